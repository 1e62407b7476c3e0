//! The floor: QEMU alone with the agent's machine but for its network, its memory in a file that it shares.
//! Saving is standing still, the devices' state written, and both files synced, as the agent's are. So nothing
//! is copied, and the disk may have begun before. Restoring is from QEMU's exec until the guest runs again.

use crate::{DEADLINE_MS, MEMORY_MB, SETTLE};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use wrenn_tests::process::wait_until;
use wrenn_tests::{Context, Failure, Result};

pub const TIMEOUT: Duration = Duration::from_millis(DEADLINE_MS as u64);
/// What the guest's init says first when the kernel command line has `wrenn.announce`.
pub const ANNOUNCEMENT: &str = "wrenn-init: started";
/// What the agent tells a kernel, but for the network.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 mitigations=off tsc=reliable no_timer_check \
                                reboot=t panic=-1 random.trust_cpu=on root=/dev/vda rw wrenn.announce";
/// How often QEMU is asked whether the guest runs.
const POLL: Duration = Duration::from_millis(1);

/// What a bare VMM takes.
pub struct Floor {
    /// From the VMM's exec until the guest's init speaks.
    pub boot: Duration,
    /// To save, for the first time after the boot.
    pub save: Duration,
    /// The same before anything is synced: what would be lost with the power.
    pub unsynced: Duration,
    /// To restore.
    pub restore: Duration,
    /// Space that its memory takes on disk, in bytes.
    pub bytes: u64,
}

/// Boots, saves and restores.
pub fn measure(directory: &Path, data: &Path) -> Result<Floor> {
    let place = Place { directory: directory.join("bare"), data: data.to_path_buf() };
    fs::create_dir_all(&place.directory).context(place.directory.display())?;
    let began = Instant::now();
    let mut machine = place.boot()?;
    let boot = began.elapsed();
    std::thread::sleep(SETTLE);
    let began = Instant::now();
    machine.command("stop", Value::Null)?;
    machine.command("xen-save-devices-state", json!({"filename": place.state(), "live": false}))?;
    let unsynced = began.elapsed();
    for file in [place.memory(), place.state()] {
        File::open(&file).and_then(|file| file.sync_all()).context(file.display())?;
    }
    let save = began.elapsed();
    drop(machine);
    // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2).
    let bytes = fs::metadata(place.memory()).context(place.memory().display())?.blocks() * 512;
    let began = Instant::now();
    let mut machine = place.restore()?;
    while machine.command("query-status", Value::Null)?["status"] == "inmigrate" {
        std::thread::sleep(POLL);
    }
    machine.command("cont", Value::Null)?;
    let restore = began.elapsed();
    drop(machine);
    fs::remove_dir_all(&place.directory).context(place.directory.display())?;
    Ok(Floor { boot, save, unsynced, restore, bytes })
}

/// A file of the guest's kernels, by how its name begins.
pub fn boot_file(data: &Path, prefix: &str) -> Result<PathBuf> {
    let kernels = data.join("kernels");
    let entries = fs::read_dir(&kernels).into_iter().flatten().flatten();
    let mut paths = entries.map(|e| e.path());
    let found = paths.find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)));
    found.ok_or_else(|| Failure(format!("{} has no {prefix}*", kernels.display())))
}

struct Place {
    directory: PathBuf,
    data: PathBuf,
}

impl Place {
    fn memory(&self) -> PathBuf {
        self.directory.join("memory")
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn console(&self) -> PathBuf {
        self.directory.join("console")
    }

    fn command(&self, share: &str) -> Command {
        let program = std::env::var("WRENN_QEMU_BIN").unwrap_or_else(|_| "qemu-system-x86_64".into());
        let mut command = Command::new(program);
        let image = self.data.join("images/minimal/rootfs.ext4");
        command
            .args(["-M", "q35,memory-backend=memory,usb=off,vmport=off,smbus=off,sata=off,i8042=off,suppress-vmdesc=on"])
            .args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Nehalem", "-bios", "qboot.rom"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-m", &format!("{MEMORY_MB}M"), "-object"])
            .arg(format!(
                "memory-backend-file,id=memory,size={MEMORY_MB}M,mem-path={},share={share}",
                self.memory().display()
            ))
            .arg("-drive")
            .arg(format!("file={},if=none,id=d0,format=raw,snapshot=on", image.display()))
            .args(["-device", "virtio-blk-pci,drive=d0,disable-legacy=on"])
            .args(["-device", "virtio-rng-pci,disable-legacy=on"])
            .arg("-serial")
            .arg(format!("file:{}", self.console().display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", self.directory.join("qmp").display()))
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    fn boot(&self) -> Result<Machine> {
        let mut command = self.command("on");
        command.arg("-kernel").arg(boot_file(&self.data, "vmlinux")?);
        command.arg("-initrd").arg(boot_file(&self.data, "initramfs")?);
        command.arg("-append").arg(format!("{COMMAND_LINE} cryptomgr.notests noreplace-smp init_on_alloc=0"));
        let machine = Machine::start(command, &self.directory.join("qmp"))?;
        wait_until("the bare guest's init", TIMEOUT, || {
            fs::read(self.console()).is_ok_and(|said| String::from_utf8_lossy(&said).contains(ANNOUNCEMENT))
        })?;
        Ok(machine)
    }

    fn restore(&self) -> Result<Machine> {
        let mut command = self.command("off");
        command.args(["-S", "-incoming", "fd:0", "-global", "migration.send-configuration=off"]);
        command.stdin(File::open(self.state()).context("the state")?);
        Machine::start(command, &self.directory.join("qmp"))
    }
}

/// QEMU and its monitor; ended when dropped.
struct Machine {
    child: Child,
    monitor: BufReader<UnixStream>,
}

impl Machine {
    fn start(mut command: Command, socket: &Path) -> Result<Machine> {
        let _ = fs::remove_file(socket);
        let mut child = command.spawn().context("start QEMU")?;
        let end = Instant::now() + TIMEOUT;
        let monitor = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < end && matches!(child.try_wait(), Ok(None)) => {
                    std::thread::sleep(POLL);
                }
                Err(e) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(Failure(format!("QEMU's monitor: {e}")));
                }
            }
        };
        let mut machine = Machine { child, monitor: BufReader::new(monitor) };
        machine.monitor.get_ref().set_read_timeout(Some(TIMEOUT)).context("QEMU's monitor")?;
        machine.command("qmp_capabilities", Value::Null)?;
        Ok(machine)
    }

    /// What a command returns. The greeting and events before that are passed over.
    fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({"execute": name});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.monitor.get_mut().write_all(format!("{request}\n").as_bytes()).context(name)?;
        let mut line = String::new();
        loop {
            line.clear();
            if self.monitor.read_line(&mut line).context(name)? == 0 {
                return Err(Failure(format!("{name}: QEMU has ended")));
            }
            let said: Value = serde_json::from_str(&line).context(name)?;
            if let Some(returned) = said.get("return") {
                return Ok(returned.clone());
            }
            if let Some(error) = said.get("error") {
                return Err(Failure(format!("{name}: {error}")));
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
