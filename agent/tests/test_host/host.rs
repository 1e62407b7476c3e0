//! The test host: a machine in QEMU, started once.

use crate::Half;
use crate::common::{guest_directory, place_file};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The file system on which the cases work: this, and what is put there for them.
const WORK_BYTES: u64 = 2 << 30;
/// How long all of it may take: five times what it takes on an idle machine.
const PATIENCE: Duration = Duration::from_secs(1_000);

/// An AMD processor, whose virtualization QEMU can translate, and no more than it can.
const CPU: &str = "EPYC,+svm,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,\
                   -xsavec";

/// A directory that goes when this is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn run() {
    let Some(host) = std::env::var_os("WRENN_TEST_HOST").map(PathBuf::from) else {
        eprintln!("SKIPPED: WRENN_TEST_HOST names no test host (`tests/testhost/build.sh`)");
        return;
    };
    let scratch = Scratch(std::env::temp_dir().join(format!("wrenn-test-host-{}", std::process::id())));
    fs::create_dir(&scratch.0).expect("a directory");
    let (tree, work, results, console) = (
        scratch.0.join("tree"),
        scratch.0.join("work"),
        scratch.0.join("results"),
        scratch.0.join("console"),
    );
    let mut bytes = WORK_BYTES;
    let mut put = |from: &Path, to: &str| {
        let to = tree.join(to);
        fs::create_dir_all(to.parent().expect("in the tree")).expect("a directory");
        place_file(from, &to);
        bytes += to.metadata().expect("placed").len();
    };
    put(&std::env::current_exe().expect("this program"), "program");
    put(Path::new(env!("CARGO_BIN_EXE_wrenn-agent")), "wrenn-agent");
    put(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/wrenn-agent.service")), "wrenn-agent.service");
    if let Some((firecracker, jailer)) = firecracker() {
        put(&firecracker, "firecracker");
        put(&jailer, "jailer");
    }
    if let Some(guest) = guest_directory() {
        put(&guest.join("images/minimal/rootfs.ext4"), "guest/images/minimal/rootfs.ext4");
        for entry in fs::read_dir(guest.join("kernels")).expect("kernels").flatten() {
            put(&entry.path(), &format!("guest/kernels/{}", entry.file_name().display()));
        }
    }
    File::create(&work).and_then(|file| file.set_len(bytes)).expect("a disk");
    let made = Command::new("mkfs.ext4").args(["-q", "-m", "0", "-d"]).args([&tree, &work]).status();
    assert!(made.as_ref().is_ok_and(|status| status.success()), "mkfs.ext4: {made:?}");
    let began = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-M", "q35", "-accel", "tcg", "-cpu", CPU, "-smp", "2", "-m", "2560M"])
        .arg("-kernel")
        .arg(host.join("vmlinuz"))
        .arg("-initrd")
        .arg(host.join("initramfs.img"))
        .arg("-append")
        .arg(
            "console=ttyS0 quiet loglevel=5 mitigations=off tsc=reliable no_timer_check reboot=t panic=-1 \
             random.trust_cpu=on",
        )
        .args(["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"])
        .args(drive("root", &host.join("root.ext4"), "on"))
        .args(drive("work", &work, "off"))
        .args(["-device", "virtio-serial-pci", "-chardev"])
        .arg(format!("file,id=results,path={}", results.display()))
        .args(["-device", "virtserialport,chardev=results", "-serial"])
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64");
    let ended = loop {
        if let Some(status) = qemu.try_wait().expect("waited") {
            break Some(status);
        }
        if began.elapsed() > PATIENCE {
            qemu.kill().and_then(|()| qemu.wait()).expect("killed");
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let results = text(&results);
    println!("{results}the test host ended after {} ms: {ended:?}", began.elapsed().as_millis());
    for half in Half::ALL {
        let wanted = format!("test host, {}: exit status 0", half.name());
        assert!(
            results.lines().any(|line| line == wanted),
            "the cases failed, see above; the console says:\n{}",
            text(&console)
        );
    }
}

/// Firecracker and its jailer; without them the cases that need them say so.
fn firecracker() -> Option<(PathBuf, PathBuf)> {
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
    };
    let firecracker = std::env::var_os("WRENN_FIRECRACKER_BIN").map(PathBuf::from);
    let firecracker = firecracker.or_else(|| on_path("firecracker"))?;
    let beside = firecracker.with_file_name("jailer");
    let jailer = if beside.is_file() { Some(beside) } else { on_path("jailer") };
    let jailer = jailer.unwrap_or_else(|| panic!("no jailer beside {}", firecracker.display()));
    Some((firecracker, jailer))
}

/// With `snapshot`, what is written goes with the machine.
fn drive(name: &str, path: &Path, snapshot: &str) -> [String; 4] {
    let path = path.display();
    [
        "-drive".into(),
        format!("if=none,id={name},file={path},format=raw,snapshot={snapshot},cache=unsafe"),
        "-device".into(),
        format!("virtio-blk-pci,drive={name}"),
    ]
}
