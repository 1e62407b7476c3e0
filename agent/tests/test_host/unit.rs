//! The agent by its unit, under systemd: what the unit leaves it is enough, and its capsules run on when it
//! is upgraded or killed.

use crate::Case;
use crate::capsules::{FIRECRACKER, guest, in_firecracker, in_qemu, slow, start_from_a_snapshot};
use crate::common::{Client, PATIENCE, Place, SECRET};
use crate::disks::device_names;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use wire::message::{
    CapsuleGet, CapsuleInfo, CapsulePause, CapsuleResume, CapsuleState, HostStatus, HostStatusReply,
};

pub const CASES: &[Case] = &[
    ("the unit is enough for QEMU", |_| in_qemu(|| the_unit_is_enough("qemu", 100))),
    ("the unit is enough for Firecracker", |_| in_firecracker(|| the_unit_is_enough("firecracker", 110))),
];

const UNIT: &str = "wrenn-agent.service";
/// Where unit and README want the program and its settings.
const PROGRAM: &str = "/usr/local/bin/wrenn-agent";
const SETTINGS: &str = "/etc/wrenn/agent.env";
const DROP_INS: &str = "/etc/systemd/system/wrenn-agent.service.d";
const ADDRESS: &str = "127.0.0.1:50051";
/// What no agent needs: loading modules, I/O ports, rebooting, setting the clock (linux/capability.h).
const FORBIDDEN_CAPABILITIES: [u32; 4] = [16, 17, 22, 25];

/// What systemd says.
fn systemctl(arguments: &[&str]) -> String {
    let ran = Command::new("systemctl").args(arguments).output().expect("systemctl");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    assert!(ran.status.success(), "systemctl {arguments:?}: {} {}", said(&ran.stdout), said(&ran.stderr));
    said(&ran.stdout)
}

fn property(name: &str) -> String {
    systemctl(&["show", "--value", "-p", name, UNIT])
}

fn agent_pid() -> u32 {
    property("MainPID").parse().expect("a number")
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(
            Instant::now() < end,
            "{what}: the unit is {} ({})",
            property("ActiveState"),
            property("Result")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn client() -> Client {
    let address: SocketAddr = ADDRESS.parse().expect("an address");
    wait_for("the agent listens", || TcpStream::connect(address).is_ok());
    Client::connect(address, "cp", SECRET)
}

/// The field of a process's status.
fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.expect("a field").trim().to_string()
}

/// Puts the program there as an upgrade does: another file under the same name.
fn install() {
    let new = Path::new(PROGRAM).with_extension("new");
    fs::copy("/testhost/wrenn-agent", &new).and_then(|_| fs::rename(&new, PROGRAM)).expect("installed");
}

/// The unit and its data directory; gone when dropped.
struct Installed {
    place: Place,
    log: PathBuf,
}

impl Installed {
    fn new(vmm: &str, first_slot: u32, guest: &Path) -> Installed {
        let place = Place::at(PathBuf::from(format!("/testhost/unit-{vmm}")), first_slot);
        place.put_guest(guest);
        let settings = format!(
            "WRENN_DIR={}\nWRENN_HOST_LISTEN_ADDR={ADDRESS}\nWRENN_VMM={vmm}\n\
             WRENN_FIRECRACKER_BIN={FIRECRACKER}\nWRENN_SLOTS={first_slot}-{}\nWRENN_HIBERNATE_AFTER_SEC=1\n",
            place.directory.display(),
            place.slots().end - 1
        );
        fs::write(SETTINGS, settings).expect("settings");
        let log = place.directory.with_extension("log");
        fs::create_dir_all(DROP_INS).expect("made");
        // There is no systemd-journald here.
        let output =
            format!("[Service]\nStandardOutput=append:{0}\nStandardError=append:{0}\n", log.display());
        fs::write(Path::new(DROP_INS).join("output.conf"), output).expect("a drop-in");
        fs::copy("/testhost/wrenn-agent.service", Path::new("/etc/systemd/system").join(UNIT))
            .expect("the unit");
        install();
        systemctl(&["daemon-reload"]);
        Installed { place, log }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new("systemctl").args(["--no-pager", "--full", "status", UNIT]).status();
            println!("{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
        // One that a failure left; systemd complains when there is none.
        for end in [&["kill", "--signal=SIGKILL", UNIT][..], &["stop", UNIT]] {
            let _ = Command::new("systemctl").args(end).stderr(Stdio::null()).status();
        }
    }
}

fn order(place: &Place, order: &str) -> String {
    let mut command = Command::new(PROGRAM);
    command.arg(order).env("WRENN_DIR", &place.directory);
    let ran = command.output().expect("ran");
    assert!(ran.status.success(), "{order}: {} {}", ran.status, String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

fn the_unit_is_enough(vmm: &str, first_slot: u32) {
    let Some(guest) = guest() else { return };
    let installed = Installed::new(vmm, first_slot, &guest);
    let place = &installed.place;
    systemctl(&["start", UNIT]);
    let mut cp = client();
    let host: HostStatusReply = cp.ask(&HostStatus {}).expect("status");
    assert!(host.vmm.starts_with(vmm) && host.vmm.ends_with("kvm"), "{}", host.vmm);
    let agent = agent_pid();
    assert_eq!((status(agent, "NoNewPrivs").as_str(), status(agent, "Seccomp").as_str()), ("1", "2"));
    let bounds = u64::from_str_radix(&status(agent, "CapBnd"), 16).expect("a set");
    assert!(FORBIDDEN_CAPABILITIES.iter().all(|bit| bounds & (1 << bit) == 0), "{bounds:x}");

    let _: CapsuleInfo = cp.ask(&slow("cl-kept")).expect("created");
    assert_eq!(device_names(), ["wrenn-cl-kept"]);
    let script = "echo in memory >/dev/shm/file; echo on disk >/tmp/file";
    assert_eq!(cp.exec("cl-kept", &["/bin/sh", "-c", script]).expect("ran").exit_code, 0);
    let files = ["cat", "/dev/shm/file", "/tmp/file"];
    start_from_a_snapshot(&mut cp);
    let machines = place.machines();
    assert_eq!((machines.len(), status(machines[0], "Seccomp").as_str()), (1, "2"));
    let group = fs::read_to_string(format!("/proc/{}/cgroup", machines[0])).expect("a group");
    assert!(group.trim_end().ends_with("/wrenn/cl-kept"), "{group}");

    // An upgrade.
    install();
    systemctl(&["restart", UNIT]);
    let mut cp = client();
    let upgraded = agent_pid();
    assert_ne!(upgraded, agent);
    assert_eq!(place.machines(), machines);
    assert_eq!(cp.exec_when_reached("cl-kept", &files).stdout, b"in memory\non disk\n");

    // A crash: systemd starts the next one.
    systemctl(&["kill", "--signal=SIGKILL", UNIT]);
    wait_for("another agent", || ![0, upgraded].contains(&agent_pid()));
    let mut cp = client();
    assert_eq!(place.machines(), machines);
    assert_eq!(cp.exec_when_reached("cl-kept", &files).stdout, b"in memory\non disk\n");

    // The end that an operator wants does not look like a crash to systemd.
    assert!(order(place, "drain").contains("1 capsules are paused"));
    wait_for("the unit rests", || property("ActiveState") == "inactive");
    assert_eq!(place.machines(), Vec::<u32>::new());
    systemctl(&["start", UNIT]);
    let mut cp = client();
    wait_for("it hibernates", || {
        let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: "cl-kept".into() }).expect("known");
        info.state == CapsuleState::Hibernated
    });
    let resume = CapsuleResume { capsule_id: "cl-kept".into(), deadline_ms: 60_000 };
    let _: CapsuleInfo = cp.ask(&resume).expect("resumed");
    assert_eq!(cp.exec("cl-kept", &files).expect("ran").stdout, b"in memory\non disk\n");
    // What it has changed since, by the kernel's or Firecracker's notes.
    let paused: CapsuleInfo = cp.ask(&CapsulePause { capsule_id: "cl-kept".into() }).expect("paused");
    assert_eq!(paused.state, CapsuleState::Paused);
    order(place, "terminate");
    wait_for("the unit rests", || property("ActiveState") == "inactive");
    assert_eq!((place.remains(), device_names()), (Vec::new(), Vec::new()));
}
