//! What the driver does, and what it makes of what Firecracker says.

use super::double::PAGE;
use super::support::{FIRST_UID, Machine as Host, with_free_slot};
use serde_json::json;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use wrenn_agent::disk::{Backend, DiskImage, Format};
use wrenn_agent::net::{CapsuleNetwork, Policy, Tap};
use wrenn_agent::sys::pidfd::Exit;
use wrenn_agent::vmm::firecracker::{Firecracker, Programs};
use wrenn_agent::vmm::image::clean;
use wrenn_agent::vmm::probe::KvmAccess;
use wrenn_agent::vmm::{DiskLimits, Event, Image, Kind, Machine, MachineSpec, Pump, VmmError, Wanted};

pub const CASES: &[(&str, fn())] = &[
    ("the double takes nothing out of order or shape", the_double_takes_nothing_out_of_order_or_shape),
    ("a machine boots in its jail and goes without a trace", a_machine_boots_in_its_jail),
    ("without a jailer only where that is allowed", without_a_jailer_only_where_that_is_allowed),
    ("a second pause writes what has changed", a_second_pause_writes_what_has_changed),
    ("what was told once is not missed later", what_was_told_once_is_not_missed_later),
    ("a snapshot is nobody's to change", a_snapshot_is_nobodys_to_change),
    ("a machine is adopted", a_machine_is_adopted),
    ("what fails leaves nothing", what_fails_leaves_nothing),
    ("versions that are not used are refused", versions_that_are_not_used_are_refused),
];

const MEMORY_MB: u32 = 64;

/// A directory that goes with its owner.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("wrenn-firecracker-{name}-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).expect("a directory");
        Directory(path)
    }

    /// Firecracker and its jailer, as a person has installed them: this very program.
    fn programs(&self, version: Option<&str>) -> Programs {
        let firecracker = self.0.join("firecracker");
        for program in [&firecracker, &self.0.join("jailer")] {
            fs::copy(std::env::current_exe().expect("this program"), program).expect("copied");
        }
        if let Some(version) = version {
            fs::write(self.0.join("firecracker.version"), version).expect("written");
        }
        Programs { firecracker: Some(firecracker), jailer: None, without_jailer: false }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A capsule's worth of parts.
struct Capsule {
    directory: Directory,
    network: CapsuleNetwork,
    tap: Option<Tap>,
}

impl Capsule {
    fn new(name: &str) -> Capsule {
        let directory = Directory::new(name);
        let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, &Policy::CLOSED));
        for (file, mode) in [("vmlinux", 0o644), ("initramfs.img", 0o644), ("disk.raw", 0o600)] {
            let path = directory.0.join(file);
            fs::write(&path, file).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
        }
        Capsule { directory, network, tap: Some(tap) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.0.join(name)
    }

    fn uid(&self) -> u32 {
        FIRST_UID + self.network.slot().index()
    }

    fn spec(&self) -> MachineSpec {
        let disk = DiskImage { path: self.path("disk.raw"), format: Format::Raw, backing: None };
        MachineSpec {
            name: "cap-test".into(),
            vcpus: 2,
            memory_mb: MEMORY_MB,
            kernel: self.path("vmlinux"),
            initramfs: Some(self.path("initramfs.img")),
            command_line: "console=ttyS0".into(),
            disks: vec![disk],
            disk_limits: DiskLimits { bytes_per_sec: 1 << 20, ops_per_sec: 0 },
            guest_mac: self.network.slot().guest_mac(),
            metadata: json!({"instanceID": "cap-test", "accessTokenHash": "x"}),
            uid: self.uid(),
            gid: self.uid(),
            directory: self.directory.0.clone(),
            restore: None,
            group: None,
        }
    }

    /// Its network with a fresh cable, as it is made for a capsule that goes on.
    fn renew(&mut self) {
        drop(self.tap.take());
        let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, &Policy::CLOSED));
        // The files are the first slot's.
        std::mem::replace(&mut self.network, network).destroy().expect("the network goes");
        self.tap = Some(tap);
    }

    fn start(&mut self, firecracker: &Firecracker, spec: &MachineSpec) -> Result<Machine, VmmError> {
        firecracker.start(spec, self.tap.take().expect("a cable"), self.network.namespace())
    }

    /// Starts one that goes on from an image of its own; it runs when this returns.
    fn resume(&mut self, firecracker: &Firecracker, image: Image, uid: u32) -> Machine {
        self.renew();
        let restore = image.open(&self.directory.0).expect("opened");
        let spec = MachineSpec { restore: Some(restore), uid, gid: uid, ..self.spec() };
        let mut machine = self.start(firecracker, &spec).expect("started");
        machine.wait_until_restored().expect("restored");
        machine.go_on().expect("went on");
        machine
    }

    fn jail(&self) -> PathBuf {
        self.path("jail/firecracker/cap-test/root")
    }

    fn remove(self) {
        self.network.destroy().expect("the network goes");
    }
}

fn image_of(memory: u64, delta: Option<u64>, state: u64) -> Image {
    Image { memory, delta, state, packed: false, vmm: Kind::Firecracker }
}

fn end(mut machine: Machine) {
    machine.kill().expect("killed");
    assert_eq!(machine.wait(10_000).expect("waited"), Some(Exit::Signal(9)));
}

/// The first bytes of the first pages.
fn pages(path: &Path, count: u64) -> Vec<u8> {
    let file = File::open(path).expect("opened");
    let byte = |page| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, page * PAGE).expect("read");
        byte[0]
    };
    (0..count).map(byte).collect()
}

fn status_of(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap_or_default();
    line.trim_start_matches(':').trim().to_owned()
}

fn find(directory: &Directory) -> Firecracker {
    Firecracker::find(&directory.programs(None)).expect("found")
}

/// A request by hand; the fault, if there is one.
fn ask(root: &Path, method: &str, path: &str, body: &str) -> Result<(), String> {
    // By way of the directory: a socket's path is short.
    let directory = File::open(root).expect("the root");
    let socket = format!("/proc/self/fd/{}/api.sock", std::os::fd::AsRawFd::as_raw_fd(&directory));
    let mut stream = UnixStream::connect(socket).expect("connected");
    write!(stream, "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).expect("sent");
    let mut answer = [0; 4_096];
    let count = stream.read(&mut answer).expect("answered");
    let answer = String::from_utf8_lossy(&answer[..count]).into_owned();
    if answer.starts_with("HTTP/1.1 204") { Ok(()) } else { Err(answer) }
}

fn the_double_takes_nothing_out_of_order_or_shape() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("strict");
    let programs = Directory::new("strict-programs");
    let spec = capsule.spec();
    let mut machine = capsule.start(&find(&programs), &spec).expect("started");
    let jail = capsule.jail();
    for (path, body, why) in [
        ("/drives/disk1", r#"{"drive_id":"disk1","is_root_device":false}"#, "after starting"),
        ("/actions", r#"{"action_type":"InstanceStart"}"#, "after starting"),
        ("/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#, "not paused"),
        ("/snapshot/load", r#"{"snapshot_path":"s","mem_file_path":"m"}"#, "unknown field"),
        ("/machine-config", r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`"),
        ("/machine-config", r#"{"vcpu_count":64,"mem_size_mib":128}"#, "`vcpu_count` cannot be 64"),
        ("/entropy", r#"{"speed":1}"#, "unknown field"),
        ("/drive/disk1", "{}", "Invalid request method"),
        (
            "/drives/disk1",
            r#"{"drive_id":"disk1","is_root_device":false,"rate_limiter":{"size":1}}"#,
            "unknown field",
        ),
        ("/balloon", "[]", "no object"),
        ("/balloon", "{", "no JSON"),
    ] {
        let refused = ask(&jail, "PUT", path, body).expect_err("refused");
        assert!(refused.contains(why), "{path}: {refused}");
    }
    machine.stand_still().expect("stood still");
    for (id, why) in [("disk0", "is not the id in the body"), ("disk1", "Invalid block device")] {
        let body = r#"{"drive_id":"disk1","rate_limiter":{}}"#;
        let refused = ask(&jail, "PATCH", &format!("/drives/{id}"), body).expect_err("refused");
        assert!(refused.contains(why), "{id}: {refused}");
    }
    let diff = r#"{"snapshot_path":"s","mem_file_path":"m","snapshot_type":"Diff"}"#;
    let refused = ask(&jail, "PUT", "/snapshot/create", diff).expect_err("refused");
    assert!(refused.contains("dirty page tracking"), "{refused}");
    assert!(machine.diagnostics().contains("after starting"), "the log is read");
    end(machine);
    capsule.remove();
    check.check();
}

/// A second's worth of bytes, and no limit of requests.
const LIMITS: &str = r#"{"bandwidth":{"refill_time":1000,"size":1048576},"ops":{"refill_time":0,"size":0}}"#;

fn limits(capsule: &Capsule) -> String {
    fs::read_to_string(capsule.jail().join("limits")).expect("told")
}

fn a_machine_boots_in_its_jail() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("boots");
    let programs = Directory::new("boots-programs");
    let firecracker = find(&programs);
    assert_eq!(firecracker.describe(), "firecracker 1.16.1, kvm");
    let spec = capsule.spec();
    let mut machine = capsule.start(&firecracker, &spec).expect("started");
    let (pid, id) = (machine.pid(), capsule.uid().to_string());
    assert_eq!(status_of(pid, "Uid"), [id.as_str(); 4].join("\t"));
    assert_eq!(status_of(pid, "Gid"), [id.as_str(); 4].join("\t"));
    assert_eq!(status_of(pid, "Groups"), "");
    assert_eq!(status_of(pid, "CapEff"), "0000000000000000");
    assert_eq!(status_of(pid, "NoNewPrivs"), "1");
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).expect("there"), capsule.jail());
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace");
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    assert!(fs::read(format!("/proc/{pid}/environ")).expect("readable by root").is_empty());
    assert_eq!(fs::read(capsule.jail().join("told")).expect("told"), spec.metadata.to_string().as_bytes());
    assert_eq!(limits(&capsule), LIMITS);
    // The disk is its own, and the kernel is not there any more.
    assert_eq!(fs::metadata(capsule.path("disk.raw")).expect("there").uid(), capsule.uid());
    assert!(!capsule.jail().join("kernel").exists() && capsule.path("vmlinux").exists());
    assert_eq!(machine.pump_monitor().expect("read"), Pump::Drained);
    let fault = Event::Fault { what: "block_disk0.execute_fails".into(), count: 2 };
    assert_eq!((machine.poll_event(), machine.poll_event()), (Some(fault), None));
    assert!(machine.pump_console().1.is_none(), "the log is written");
    assert!(machine.console_tail().contains("turn 1"), "{}", machine.console_tail());
    end(machine);
    assert!(!capsule.path("jail").exists(), "the root goes with the machine");
    capsule.remove();
    check.check();
}

fn without_a_jailer_only_where_that_is_allowed() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("unjailed");
    let directory = Directory::new("unjailed-programs");
    let programs = directory.programs(None);
    fs::remove_file(directory.0.join("jailer")).expect("removed");
    if !Path::new("/usr/bin/jailer").exists() && !Path::new("/usr/local/bin/jailer").exists() {
        let refused = Firecracker::find(&programs).expect_err("refused");
        assert!(matches!(refused, VmmError::NoJailer { .. }), "{refused}");
        assert!(refused.to_string().contains("WRENN_FIRECRACKER_UNJAILED"), "{refused}");
    }
    let programs = Programs { without_jailer: true, ..programs };
    let firecracker = Firecracker::find(&programs).expect("found").with_kvm(KvmAccess { group: Some(7) });
    assert!(!firecracker.is_jailed());
    // It opens the host's own devices, as all users may, and a program in a directory that all may enter.
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o755)).expect("set");
    let all_may = fs::metadata("/dev/net/tun").is_ok_and(|m| m.mode() & 0o006 == 0o006);
    let spec = capsule.spec();
    match capsule.start(&firecracker, &spec) {
        Ok(machine) => {
            let id = capsule.uid().to_string();
            assert_eq!(status_of(machine.pid(), "Uid"), [id.as_str(); 4].join("\t"));
            assert_eq!(status_of(machine.pid(), "Groups"), "7");
            end(machine);
        }
        Err(e) => assert!(!all_may && e.to_string().contains("Open tap device failed"), "{e}"),
    }
    capsule.remove();
    check.check();
}

fn a_second_pause_writes_what_has_changed() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("pauses");
    let programs = Directory::new("pauses-programs");
    let firecracker = find(&programs);
    let (uid, directory) = (capsule.uid(), capsule.directory.0.clone());
    let spec = capsule.spec();
    let mut machine = capsule.start(&firecracker, &spec).expect("started");
    let (first, written) = machine.save(&directory, 1, None, uid).expect("saved");
    assert_eq!(first, image_of(1, None, 1));
    assert!(!written.is_delta && written.memory_bytes == u64::from(MEMORY_MB) << 20);
    end(machine);
    assert_eq!(pages(&capsule.path("memory-1"), 3), [1, 0, 0]);
    assert_eq!(fs::metadata(capsule.path("memory-1")).expect("there").mode() & 0o777, 0o600);

    let mut machine = capsule.resume(&firecracker, first, uid);
    assert!(!capsule.jail().join("memory").exists(), "no second name holds its space");
    let (second, written) = machine.save(&directory, 2, Some(1), uid).expect("saved");
    assert_eq!(second, image_of(1, Some(2), 2));
    assert!(written.is_delta && (PAGE..=16 * PAGE).contains(&written.memory_bytes), "{written:?}");
    end(machine);
    let merged = second.merge(&directory).expect("merged");
    clean(&directory, Some(&merged), None);
    assert_eq!(pages(&capsule.path("memory-1"), 3), [1, 2, 0]);

    let mut machine = capsule.resume(&firecracker, merged, uid);
    // Not paused after all: the guest goes on, and what was told then must be told again.
    machine.save(&directory, 3, Some(1), uid).expect("saved");
    machine.go_on().expect("went on");
    let (fourth, written) = machine.save(&directory, 4, Some(1), uid).expect("saved");
    assert_eq!((fourth, written.is_delta), (image_of(4, None, 4), false));
    assert_eq!(pages(&capsule.path("memory-4"), 5), [1, 2, 3, 4, 0]);
    end(machine);
    capsule.remove();
    check.check();
}

fn what_was_told_once_is_not_missed_later() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("between");
    let programs = Directory::new("between-programs");
    let firecracker = find(&programs);
    let (uid, directory) = (capsule.uid(), capsule.directory.0.clone());
    let spec = capsule.spec();
    let mut machine = capsule.start(&firecracker, &spec).expect("started");
    let (image, _) = machine.save(&directory, 1, None, uid).expect("saved");
    end(machine);
    let mut machine = capsule.resume(&firecracker, image, uid);
    // A snapshot between two pauses takes Firecracker's notes of what has changed.
    let named = Directory::new("between-named");
    machine.save(&named.0, 0, None, 0).expect("saved");
    machine.go_on().expect("went on");
    let (image, written) = machine.save(&directory, 2, Some(1), uid).expect("saved");
    assert_eq!((image, written.is_delta), (image_of(2, None, 2), false));
    assert_eq!(pages(&capsule.path("memory-2"), 4), [1, 2, 3, 0]);
    end(machine);
    capsule.remove();
    check.check();
}

fn a_snapshot_is_nobodys_to_change() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("snapshot");
    let programs = Directory::new("snapshot-programs");
    let firecracker = find(&programs);
    let spec = capsule.spec();
    let mut machine = capsule.start(&firecracker, &spec).expect("started");
    let named = Directory::new("snapshot-named");
    let (image, _) = machine.save(&named.0, 0, None, 0).expect("saved");
    machine.go_on().expect("went on");
    for file in ["memory-0", "state-0"] {
        let metadata = fs::metadata(named.0.join(file)).expect("there");
        assert_eq!((metadata.uid(), metadata.mode() & 0o777), (0, 0o444), "{file}");
    }
    // Two that go on from it, beside the one that it was made of.
    for name in ["copy-1", "copy-2"] {
        let mut copy = Capsule::new(name);
        let restore = image.open(&named.0).expect("opened");
        let restore = wrenn_agent::vmm::Restore { is_own: false, ..restore };
        let spec = MachineSpec { restore: Some(restore), ..copy.spec() };
        let mut started = copy.start(&firecracker, &spec).expect("started");
        started.go_on().expect("went on");
        let saved = started.save(&copy.directory.0, 1, None, copy.uid()).expect("saved");
        assert!(!saved.1.is_delta);
        assert_eq!(pages(&copy.path("memory-1"), 3), [1, 2, 0]);
        end(started);
        copy.remove();
    }
    assert_eq!(pages(&named.0.join("memory-0"), 2), [1, 0]);
    end(machine);
    capsule.remove();
    check.check();
}

fn a_machine_is_adopted() {
    let Some(check) = Host::take() else { return };
    let mut capsule = Capsule::new("adopted");
    let programs = Directory::new("adopted-programs");
    let firecracker = find(&programs);
    let (uid, directory) = (capsule.uid(), capsule.directory.0.clone());
    let spec = capsule.spec();
    let mut machine = capsule.start(&firecracker, &spec).expect("started");
    let (image, _) = machine.save(&directory, 1, None, uid).expect("saved");
    end(machine);
    let machine = capsule.resume(&firecracker, image, uid);
    let (pid, start_ticks) = (machine.pid(), machine.start_ticks());
    drop(machine);
    let mut machine = Machine::adopt(&directory, pid, start_ticks).expect("adopted");
    machine.stand_still().expect("stood still");
    machine.go_on().expect("went on");
    // What has changed since nobody knows for sure any more.
    let (image, written) = machine.save(&directory, 2, Some(1), uid).expect("saved");
    assert_eq!((image.memory, written.is_delta), (2, false));
    assert!(machine.pump_console().1.is_none(), "the log is written");
    assert!(machine.console_tail().contains("turn 3"), "{}", machine.console_tail());
    machine.quit().expect("killed");
    assert!(machine.wait(10_000).expect("waited").is_some());
    assert!(Machine::adopt(&directory, pid, start_ticks).is_err());
    capsule.remove();
    check.check();
}

fn what_fails_leaves_nothing() {
    let Some(check) = Host::take() else { return };
    let programs = Directory::new("fails-programs");
    let firecracker = find(&programs);
    let fails = |change: &dyn Fn(&Capsule, MachineSpec) -> MachineSpec, why: &str| {
        let mut capsule = Capsule::new("fails");
        let spec = change(&capsule, capsule.spec());
        let error = capsule.start(&firecracker, &spec).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
        capsule.remove();
    };
    fails(&|_, spec| MachineSpec { vcpus: 33, ..spec }, "at most 32");
    fails(&|_, spec| MachineSpec { name: "a/b".into(), ..spec }, "cannot be a machine's name");
    fails(&|_, spec| MachineSpec { disks: Vec::new(), ..spec }, "a guest of ours has a disk");
    let secret = |capsule: &Capsule, spec| {
        fs::set_permissions(capsule.path("vmlinux"), fs::Permissions::from_mode(0o600)).expect("set");
        spec
    };
    fails(&secret, "chmod a+r");
    let overlay = |capsule: &Capsule, spec| {
        let disk = DiskImage { path: capsule.path("disk.raw"), format: Format::Qcow2, backing: None };
        MachineSpec { disks: vec![disk], ..spec }
    };
    fails(&overlay, "no qcow2 disks");
    // What the jailer does not take.
    fails(&|_, spec| MachineSpec { name: "a.b".into(), ..spec }, "invalid instance id: a.b");
    let broken = |capsule: &Capsule, spec: MachineSpec| {
        fs::write(capsule.path("memory-1"), vec![0; 1 << 20]).expect("written");
        fs::write(capsule.path("state-1"), "nonsense").expect("written");
        let restore = image_of(1, None, 1).open(&capsule.directory.0).expect("opened");
        for file in ["memory-1", "state-1"] {
            std::os::unix::fs::chown(capsule.path(file), Some(spec.uid), Some(spec.gid)).expect("given");
        }
        MachineSpec { restore: Some(restore), ..spec }
    };
    fails(&broken, "the VMM refused taking the saved machine: Failed to deserialize");
    check.check();
}

fn versions_that_are_not_used_are_refused() {
    for (version, why) in [
        ("1.13.0", "not safe"),
        ("1.14.3", "not safe"),
        ("1.15.0", "not safe"),
        ("1.12.1", "too old"),
        ("nonsense", "does not say"),
    ] {
        let directory = Directory::new("versions");
        let programs = directory.programs(Some(version));
        let refused = Firecracker::find(&programs).expect_err(version).to_string();
        assert!(refused.contains(why) && refused.contains("firecracker"), "{refused}");
        // Wanted, it is an error; otherwise QEMU takes its place, where there is one.
        let wanted = wrenn_agent::vmm::Vmm::find(Wanted::Firecracker, None, &programs, Backend::DeviceMapper);
        assert!(wanted.is_err_and(|e| matches!(e, VmmError::WrongFirecracker { .. })));
        let no_qemu = directory.0.join("no-qemu");
        let fallen_back =
            wrenn_agent::vmm::Vmm::find(Wanted::Auto, Some(&no_qemu), &programs, Backend::DeviceMapper);
        assert!(fallen_back.is_err_and(|e| matches!(e, VmmError::NoQemu { .. })));
    }
    let directory = Directory::new("versions");
    let programs = directory.programs(Some("1.14.4"));
    Firecracker::find(&programs).expect("used");
    let overlay = wrenn_agent::vmm::Vmm::find(Wanted::Firecracker, None, &programs, Backend::Overlay);
    assert!(overlay.is_err_and(|e| matches!(e, VmmError::NotHere { .. })));
    let missing = Programs { firecracker: Some("/nonexistent/firecracker".into()), ..Programs::default() };
    assert!(Firecracker::find(&missing).is_err_and(|e| matches!(e, VmmError::NoFirecracker { .. })));
}
