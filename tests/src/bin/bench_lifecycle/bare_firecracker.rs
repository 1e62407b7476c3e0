//! The floor for Firecracker: it alone, without its jailer, with the machine that the agent makes but for its
//! network. Saving is standing still, a full snapshot, and both files synced; restoring is from Firecracker's
//! exec until the guest runs again.

use crate::bare::{ANNOUNCEMENT, COMMAND_LINE, Floor, TIMEOUT, boot_file};
use crate::{MEMORY_MB, SETTLE};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use wrenn_tests::process::wait_until;
use wrenn_tests::{Context, Failure, Result};

/// How often a socket is tried that is not there yet.
const POLL: Duration = Duration::from_millis(1);
/// What an answer of Firecracker's may be long.
const MAX_ANSWER: u64 = 65_536;

/// Boots, saves and restores.
pub fn measure(program: &Path, directory: &Path, data: &Path) -> Result<Floor> {
    let directory = directory.join("bare");
    fs::create_dir_all(&directory).context(directory.display())?;
    let disk = directory.join("disk");
    fs::copy(data.join("images/minimal/rootfs.ext4"), &disk).context(disk.display())?;
    let (memory, state, console) =
        (directory.join("memory"), directory.join("state"), directory.join("console"));
    let began = Instant::now();
    let machine = Machine::start(program, &directory, &console)?;
    machine.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MB}))?;
    let source = json!({"kernel_image_path": boot_file(data, "vmlinux")?,
        "initrd_path": boot_file(data, "initramfs")?, "boot_args": COMMAND_LINE});
    machine.put("/boot-source", &source)?;
    let drive = json!({"drive_id": "disk0", "path_on_host": disk, "is_root_device": false,
        "is_read_only": false, "cache_type": "Writeback"});
    machine.put("/drives/disk0", &drive)?;
    machine.put("/entropy", &json!({}))?;
    machine.put("/actions", &json!({"action_type": "InstanceStart"}))?;
    wait_until("the bare guest's init", TIMEOUT, || {
        fs::read(&console).is_ok_and(|said| String::from_utf8_lossy(&said).contains(ANNOUNCEMENT))
    })?;
    let boot = began.elapsed();
    std::thread::sleep(SETTLE);
    let began = Instant::now();
    machine.ask("PATCH", "/vm", &json!({"state": "Paused"}))?;
    let files = json!({"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory});
    machine.put("/snapshot/create", &files)?;
    let unsynced = began.elapsed();
    for file in [&memory, &state] {
        File::open(file).and_then(|file| file.sync_all()).context(file.display())?;
    }
    let save = began.elapsed();
    drop(machine);
    // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2).
    let bytes = fs::metadata(&memory).context(memory.display())?.blocks() * 512;
    let began = Instant::now();
    let machine = Machine::start(program, &directory, &console)?;
    let load = json!({"snapshot_path": state, "resume_vm": true,
        "mem_backend": {"backend_type": "File", "backend_path": memory}});
    machine.put("/snapshot/load", &load)?;
    let restore = began.elapsed();
    drop(machine);
    fs::remove_dir_all(&directory).context(directory.display())?;
    Ok(Floor { boot, save, unsynced, restore, bytes })
}

/// Firecracker and its socket; ended when dropped.
struct Machine {
    child: Child,
    socket: PathBuf,
}

impl Machine {
    fn start(program: &Path, directory: &Path, console: &Path) -> Result<Machine> {
        let socket = directory.join("api.sock");
        let _ = fs::remove_file(&socket);
        let output = File::create(console).context(console.display())?;
        let mut command = Command::new(program);
        command.args(["--enable-pci", "--api-sock"]).arg(&socket).stdin(Stdio::null()).stdout(output);
        let child = command.stderr(Stdio::null()).spawn().context("start Firecracker")?;
        let mut machine = Machine { child, socket };
        let end = Instant::now() + TIMEOUT;
        while UnixStream::connect(&machine.socket).is_err() {
            let ended = machine.child.try_wait().context("Firecracker")?;
            if ended.is_some() || Instant::now() > end {
                return Err(Failure(format!("Firecracker has no socket: {ended:?}")));
            }
            std::thread::sleep(POLL);
        }
        Ok(machine)
    }

    fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.ask("PUT", path, body)
    }

    /// A request of a connection of its own; the answer has to be one of success.
    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<()> {
        let mut stream = UnixStream::connect(&self.socket).context(path)?;
        stream.set_read_timeout(Some(TIMEOUT)).context(path)?;
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).context(path)?;
        let mut answer = BufReader::new(stream.take(MAX_ANSWER));
        let mut status = String::new();
        answer.read_line(&mut status).context(path)?;
        if status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
            return Ok(());
        }
        let mut length = 0;
        let mut line = String::new();
        while answer.read_line(&mut line).context(path)? > 2 {
            if let Some(("content-length", value)) = line.to_ascii_lowercase().split_once(':') {
                length = value.trim().parse().context(path)?;
            }
            line.clear();
        }
        let mut why = String::new();
        answer.take(length).read_to_string(&mut why).context(path)?;
        Err(Failure(format!("{method} {path}: {} {why}", status.trim_end())))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
