//! A real machine in QEMU: booted on a capsule's network and disk, watched, adopted and ended, with nothing
//! left. Needs WRENN_TEST_DIR, a data directory with a kernel and the minimal image.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::{FIRST_UID, with_free_slot};
use wrenn_agent::disk::{Backend, Disk, DiskSpec};
use wrenn_agent::net::metadata::Endpoint;
use wrenn_agent::net::{CapsuleNetwork, ENVD_PORT, Policy, Tap};
use wrenn_agent::sys::pidfd::Exit;
use wrenn_agent::vmm::qemu::Qemu;
use wrenn_agent::vmm::{DiskLimits, Event, Machine, MachineSpec};

const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 mitigations=off tsc=reliable no_timer_check reboot=t panic=-1 \
                            random.trust_cpu=on root=/dev/vda rw \
                            ip=169.254.0.21::169.254.0.22:255.255.255.252:test:eth0:off";

/// The newest kernel, its initramfs, and the image.
struct Files {
    kernel: PathBuf,
    initramfs: PathBuf,
    image: PathBuf,
}

fn files() -> Option<Files> {
    let Some(directory) = std::env::var_os("WRENN_TEST_DIR").map(PathBuf::from) else {
        eprintln!("SKIPPED: WRENN_TEST_DIR does not name a directory with kernels/ and images/minimal/");
        return None;
    };
    let newest = |prefix: &str| -> Option<PathBuf> {
        let entries = fs::read_dir(directory.join("kernels")).ok()?.flatten().map(|e| e.path());
        entries.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))).max()
    };
    let image = directory.join("images/minimal/rootfs.ext4");
    match (newest("vmlinux"), newest("initramfs")) {
        (Some(kernel), Some(initramfs)) if image.exists() => Some(Files { kernel, initramfs, image }),
        _ => panic!("{} has no kernel, initramfs or minimal image", directory.display()),
    }
}

/// A directory that goes with its owner.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A capsule's worth of parts, as the agent puts them together.
struct Capsule {
    directory: Directory,
    network: CapsuleNetwork,
    disk: Box<dyn Disk>,
}

impl Capsule {
    fn new(name: &str, image: &Path) -> (Capsule, Tap) {
        let directory = std::env::temp_dir().join(format!("wrenn-machine-{name}-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&directory).expect("a directory");
        let directory = Directory(directory);
        let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, &Policy::CLOSED));
        let spec = DiskSpec { base: image, directory: &directory.0, size_bytes: Some(1 << 30) };
        let disk = Backend::Overlay.create(&spec).expect("a disk");
        (Capsule { directory, network, disk }, tap)
    }

    fn spec(&self, files: &Files, command_line: &str) -> MachineSpec {
        MachineSpec {
            name: "cap-test".into(),
            vcpus: 1,
            memory_mb: 256,
            kernel: files.kernel.clone(),
            initramfs: Some(files.initramfs.clone()),
            command_line: command_line.into(),
            disks: vec![self.disk.image()],
            disk_limits: DiskLimits::default(),
            guest_mac: self.network.slot().guest_mac(),
            metadata: serde_json::Value::Null,
            uid: FIRST_UID + self.network.slot().index(),
            gid: FIRST_UID + self.network.slot().index(),
            directory: self.directory.0.clone(),
            restore: None,
            group: None,
        }
    }

    fn remove(self) {
        self.network.destroy().expect("the network goes");
        self.disk.remove().expect("the disk goes");
    }
}

/// Pumps the machine until `done` says so; panics with what the machine has to say when it takes too long.
fn pump_until(machine: &mut Machine, mut done: impl FnMut(&mut Machine, Option<Event>) -> bool) {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    while Instant::now() < deadline {
        let _ = machine.pump_monitor();
        assert!(machine.pump_console().1.is_none(), "the log is written");
        let event = machine.poll_event();
        if done(machine, event) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("not in time: {}\n{}", machine.console_tail(), machine.diagnostics());
}

fn status_of(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap_or_default();
    line.trim_start_matches(':').trim().to_owned()
}

#[test]
fn a_machine_boots_confined_asks_for_its_metadata_and_goes_without_a_trace() {
    let Some(files) = files() else { return };
    let Some(check) = support::Machine::take() else { return };
    let qemu = Qemu::find(None).expect("QEMU");
    eprintln!("{}; KVM: {:?}", qemu.describe(), qemu.why_not_kvm().map(ToString::to_string));
    let began = Instant::now();
    let (capsule, tap) = Capsule::new("boots", &files.image);
    let prepared = began.elapsed();
    let listener = capsule.network.metadata_listener().expect("listening");
    let began = Instant::now();
    let mut machine =
        qemu.start(&capsule.spec(&files, COMMAND_LINE), tap, capsule.network.namespace()).expect("started");
    let started = began.elapsed();

    pump_until(&mut machine, |_, event| event == Some(Event::Ready));
    let ready = began.elapsed();
    let pid = machine.pid();
    let id = (FIRST_UID + capsule.network.slot().index()).to_string();
    assert_eq!(status_of(pid, "Uid"), [id.as_str(); 4].join("\t"));
    assert_eq!(status_of(pid, "Gid"), [id.as_str(); 4].join("\t"));
    assert_eq!(status_of(pid, "CapEff"), "0000000000000000");
    assert_eq!(status_of(pid, "Seccomp"), "2");
    assert_eq!(status_of(pid, "NoNewPrivs"), "1");
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace");
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("readable by root");
    assert!(environment.is_empty());
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).expect("listed").flatten() {
        let target = fs::read_link(fd.path()).unwrap_or_default().to_string_lossy().into_owned();
        let ours = [
            capsule.directory.0.to_str(),
            files.image.to_str(),
            files.kernel.to_str(),
            files.initramfs.to_str(),
        ];
        let known = ours.iter().flatten().any(|p| target.starts_with(p))
            || ["socket:", "anon_inode:", "pipe:", "/memfd:", "/dev/null", "/dev/net/tun", "/dev/kvm"]
                .iter()
                .any(|p| target.starts_with(p));
        assert!(known, "QEMU holds {target}");
    }

    // As after a restart of the agent: the connections are gone, the machine is not.
    let (pid, start_ticks) = (machine.pid(), machine.start_ticks());
    drop(machine);
    let mut machine = Machine::adopt(&capsule.directory.0, pid, start_ticks).expect("adopted");
    pump_until(&mut machine, |_, event| event == Some(Event::Ready));
    machine.stand_still().expect("stood still");
    pump_until(&mut machine, |_, event| event == Some(Event::Paused));
    machine.go_on().expect("went on");
    pump_until(&mut machine, |_, event| event == Some(Event::Resumed));

    // The guest's daemon fetches its metadata when it is up, and can then be reached.
    let mut endpoint = Endpoint::new(serde_json::json!({"instanceID": "cap-test", "envID": "minimal"}));
    let mut connections = Vec::new();
    pump_until(&mut machine, |_, _| {
        serve(&listener, &mut endpoint, &mut connections);
        endpoint.take_fetched()
    });
    let up = began.elapsed();
    pump_until(&mut machine, |_, _| {
        let stream = capsule.network.connect_guest(ENVD_PORT).expect("begun");
        std::thread::sleep(Duration::from_millis(20));
        stream.peer_addr().is_ok()
    });
    eprintln!("prepared {prepared:?}, started {started:?}, monitor {ready:?}, up {up:?}");
    eprintln!("console: {}", machine.console_tail());

    machine.quit().expect("sent");
    assert!(machine.wait(10_000).expect("waited").is_some(), "QEMU quits when it is told to");
    assert!(Machine::adopt(&capsule.directory.0, pid, start_ticks).is_err());
    // QEMU was started by this process, so it is this process that has to collect it.
    drop((machine, listener, connections));
    capsule.remove();
    check.check();
}

fn serve(
    listener: &mio::net::TcpListener,
    endpoint: &mut Endpoint,
    connections: &mut Vec<(mio::net::TcpStream, wrenn_agent::net::metadata::ConnectionId)>,
) {
    while let Ok((stream, _)) = listener.accept() {
        if let Some(id) = endpoint.accept(0) {
            connections.push((stream, id));
        }
    }
    connections.retain_mut(|(stream, id)| {
        let mut buffer = [0; 4_096];
        match stream.read(&mut buffer) {
            Ok(0) => {
                endpoint.close(*id);
                return false;
            }
            Ok(count) => endpoint.receive(*id, &buffer[..count], 0),
            Err(_) => {}
        }
        let written = stream.write(endpoint.output(*id)).unwrap_or(0);
        endpoint.consume_output(*id, written);
        !endpoint.finished(*id)
    });
}

#[test]
fn a_guest_finds_its_processors_and_a_killed_machine_is_noticed() {
    let Some(files) = files() else { return };
    let Some(check) = support::Machine::take() else { return };
    let qemu = Qemu::find(None).expect("QEMU");
    let (capsule, tap) = Capsule::new("killed", &files.image);
    // A kernel that talks, and says how many processors it has found.
    let talkative = COMMAND_LINE.replace("quiet loglevel=1", "earlyprintk=ttyS0 loglevel=8");
    let spec = MachineSpec { vcpus: 2, ..capsule.spec(&files, &talkative) };
    let mut machine = qemu.start(&spec, tap, capsule.network.namespace()).expect("started");
    let log = capsule.directory.0.join("serial.log");
    let log = || fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    pump_until(&mut machine, |_, _| log().contains("smp: Brought up"));
    assert!(log().contains("2 CPUs"), "{}", log());
    machine.kill().expect("killed");
    assert_eq!(machine.wait(10_000).expect("waited"), Some(Exit::Signal(9)));
    let logs = ["serial.log", "serial.log.1"]
        .map(|n| fs::metadata(capsule.directory.0.join(n)).map_or(0, |m| m.len()));
    assert!(logs[0] > 0 && logs.iter().all(|bytes| *bytes <= 64 * 1024), "{logs:?}");
    drop(machine);
    capsule.remove();
    check.check();
}

#[test]
fn a_machine_that_cannot_start_says_why() {
    let Some(mut files) = files() else { return };
    let Some(check) = support::Machine::take() else { return };
    let qemu = Qemu::find(None).expect("QEMU");
    let (capsule, tap) = Capsule::new("fails", &files.image);
    files.kernel = files.image.clone();
    let mut machine =
        qemu.start(&capsule.spec(&files, COMMAND_LINE), tap, capsule.network.namespace()).expect("started");
    assert_eq!(machine.wait(10_000).expect("waited"), Some(Exit::Status(1)));
    let why = machine.diagnostics();
    assert!(why.contains("kernel"), "{why}");
    drop(machine);
    capsule.remove();
    check.check();
}
