//! Capsules as a real host runs them: guests in KVM, disks by device-mapper, through the agent as a program.

use crate::common::{Agent, Client, Place, creation, use_vmm};
use crate::disks::device_names;
use crate::{Case, lifecycle, sweep};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};
use wire::codec::Bytes;
use wire::message::{
    CapsuleCreate, CapsuleInfo, CapsulePause, CapsuleResume, CapsuleSnapshot, CapsuleState, Done, Forward,
    HostStatus, HostStatusReply, Message, ProcessStart, ProcessStarted, SnapshotDelete, SnapshotInfo,
};
use wrenn_agent::sys::dm::Control;

pub const CASES: &[Case] = &[
    ("a capsule runs on when its agent is killed", |_| {
        in_qemu(|| a_capsule_runs_on_when_its_agent_is_killed("qemu", 20))
    }),
    ("a paused capsule survives a reboot", |_| in_qemu(|| a_paused_capsule_survives_a_reboot(22))),
    ("firecracker: killed", |_| {
        in_firecracker(|| a_capsule_runs_on_when_its_agent_is_killed("firecracker", 24))
    }),
    ("firecracker: reboot", |_| in_firecracker(|| a_paused_capsule_survives_a_reboot(26))),
    ("firecracker: jail", |_| in_firecracker(firecracker_is_shut_in)),
    ("firecracker: ends", |_| in_firecracker(a_guest_that_reboots_ends)),
    ("firecracker: pauses", |_| in_firecracker(lifecycle::a_paused_capsule_goes_on_where_it_was)),
    ("firecracker: agents", |_| in_firecracker(lifecycle::a_paused_capsule_survives_its_agent)),
    ("firecracker: failures", |_| in_firecracker(lifecycle::what_fails_leaves_a_capsule_as_it_was)),
    ("firecracker: idling", |_| in_firecracker(lifecycle::an_idle_capsule_is_paused_unless_somebody_pings)),
    ("firecracker: disk", |_| in_firecracker(lifecycle::what_a_capsule_does_to_its_disk_has_limits)),
    ("firecracker: hibernates", |_| in_firecracker(lifecycle::a_capsule_hibernates_and_goes_on_where_it_was)),
    ("firecracker: snapshots", |_| {
        in_firecracker(lifecycle::capsules_start_from_a_snapshot_where_it_was_and_are_apart);
    }),
    ("firecracker: sweep, making", |_| {
        swept(sweep::a_crash_at_any_entry_of_making_and_destroying_loses_and_leaks_nothing);
    }),
    ("firecracker: sweep, pausing", |_| {
        swept(sweep::a_crash_at_any_entry_of_pausing_resuming_and_snapshots_loses_and_leaks_nothing);
    }),
];
pub const FIRECRACKER: &str = "/testhost/firecracker";

pub fn in_qemu(case: fn()) {
    use_vmm("qemu", Path::new(FIRECRACKER));
    case();
}

/// Runs a case in Firecracker, where the test host got one.
pub fn in_firecracker(case: fn()) {
    match Path::new(FIRECRACKER).exists() {
        true if guest().is_some() => {
            use_vmm("firecracker", Path::new(FIRECRACKER));
            case();
        }
        true => {}
        false => println!(
            "  SKIPPED: no Firecracker was given: none on PATH, and WRENN_FIRECRACKER_BIN names none; what is \
             left are the tests with the double"
        ),
    }
}

/// Runs a crash sweep in Firecracker.
fn swept(sweep: fn()) {
    if cfg!(feature = "crash-points") {
        in_firecracker(sweep);
    } else {
        println!("  SKIPPED: this program was built without the feature crash-points");
    }
}

/// What a guest that has taken its VMM over would find.
fn firecracker_is_shut_in() {
    let Some(guest) = guest() else { return };
    let place = Place::with_guest(28, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let _: CapsuleInfo = cp.ask(&slow("cl-jail")).expect("created");
    let machines = place.machines();
    let [pid] = machines[..] else { panic!("one VMM, not {machines:?}") };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    for line in ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Groups:\t"] {
        assert!(status.lines().any(|l| l.trim_end() == line.trim_end()), "{line} in {status}");
    }
    let mut found: Vec<String> = fs::read_dir(format!("/proc/{pid}/root/"))
        .expect("its root")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    println!("  its root: {found:?}");
    assert!(!found.iter().any(|name| ["proc", "etc", "testhost", "kernel"].contains(&name.as_str())));
    assert!(found.contains(&"disk0".to_owned()));
    let inside = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace");
    for kind in ["net", "mnt"] {
        assert_ne!(inside(kind), fs::read_link(format!("/proc/self/ns/{kind}")).expect("a namespace"));
    }
    // The metadata service is Firecracker's, and wants a token.
    let ask = "curl -s -o /dev/null -w %{http_code} http://169.254.169.254/";
    assert_eq!(cp.exec("cl-jail", &["/bin/sh", "-c", ask]).expect("ran").stdout, b"401");
    cp.destroy("cl-jail").expect("destroyed");
    assert_eq!((place.remains(), device_names()), (Vec::new(), Vec::new()));
    assert!(agent.terminate().success());
}

/// A guest's reboot, or a panic of its kernel, is the end of its capsule.
fn a_guest_that_reboots_ends() {
    let Some(guest) = guest() else { return };
    let place = Place::with_guest(30, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let _: CapsuleInfo = cp.ask(&slow("cl-ends")).expect("created");
    let stream = cp.session.open(&Forward { capsule_id: "cl-ends".into() }, false).expect("opened");
    let argv = ["/bin/sh", "-c", "sleep 1; echo b >/proc/sysrq-trigger"];
    let argv = argv.map(|argument| Bytes(argument.as_bytes().to_vec())).to_vec();
    let start = ProcessStart { argv, user: "root".into(), detached: true, ..Default::default() };
    cp.session.send_last(stream, &start).expect("sent");
    assert_eq!(cp.answer(stream).0, ProcessStarted::KIND);
    let began = Instant::now();
    while !place.remains().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", place.remains());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("  gone {:?} after it began to reboot", began.elapsed().saturating_sub(Duration::from_secs(1)));
    assert_eq!(device_names(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

/// Where the test host has what was put there for it; `None` when it got no guest.
pub fn guest() -> Option<PathBuf> {
    static PLACED: Once = Once::new();
    let guest = PathBuf::from("/testhost/guest");
    if !guest.is_dir() {
        println!("  SKIPPED: no guest was given");
        return None;
    }
    // Where the tests look for it.
    PLACED.call_once(|| {
        let agent = Path::new(env!("CARGO_BIN_EXE_wrenn-agent"));
        fs::create_dir_all(agent.parent().expect("a directory")).expect("made");
        // The other half may have done so.
        if !agent.is_symlink() {
            std::os::unix::fs::symlink("/testhost/wrenn-agent", agent).expect("linked");
        }
    });
    Some(guest)
}

/// Guests in KVM in a translated processor are slow.
pub fn slow(id: &str) -> CapsuleCreate {
    CapsuleCreate { deadline_ms: 60_000, disk_size_mb: 2_048, ..creation(id) }
}

fn a_capsule_runs_on_when_its_agent_is_killed(vmm: &str, number: u32) {
    let Some(guest) = guest() else { return };
    let place = Place::with_guest(number, &guest);
    let mut agent = Agent::start(&place);
    let mut cp = agent.client();
    let status: HostStatusReply = cp.ask(&HostStatus {}).expect("status");
    assert!(status.vmm.starts_with(vmm) && status.vmm.ends_with("kvm"), "{}", status.vmm);
    let began = Instant::now();
    let info: CapsuleInfo = cp.ask(&slow("cl-one")).expect("created");
    let created = began.elapsed();
    assert_eq!(cp.exec("cl-one", &["echo", "hello"]).expect("ran").stdout, b"hello\n");
    println!("  {}: created in {created:?}, first exec after {:?}", status.vmm, began.elapsed());
    assert_eq!(device_names(), ["wrenn-cl-one"]);
    assert_eq!(info.disk_size_mb, 2_048);
    let ran = cp.exec("cl-one", &["cat", "/sys/block/vda/size"]).expect("ran");
    assert_eq!(ran.stdout, b"4194304\n", "in sectors");
    let group = Path::new("/sys/fs/cgroup/wrenn/cl-one");
    let of_group = |file: &str| fs::read_to_string(group.join(file)).expect("a group").trim().to_string();
    // KVM has a thread of its own for each machine, which is in it too.
    let machine = place.machines().first().expect("a machine").to_string();
    assert!(of_group("cgroup.procs").lines().any(|pid| pid == machine), "{}", of_group("cgroup.procs"));
    let memory = ["memory.current", "memory.peak", "memory.max"].map(of_group);
    println!("  memory now, at most and allowed: {memory:?}");
    let script =
        "set -e; head -c 8000000 /dev/zero >/tmp/data; sync; head -c 8000000 /dev/zero | cmp - /tmp/data";
    let ran = cp.exec("cl-one", &["/bin/sh", "-c", script]).expect("ran");
    assert_eq!(ran.exit_code, 0, "{}", String::from_utf8_lossy(&ran.stderr));
    agent.child.kill().expect("killed");
    agent.wait();
    assert_eq!(device_names(), ["wrenn-cl-one"]);
    assert!(group.exists());
    // The next agent goes on with it: the same machine, and what its guest had not written out.
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(place.machines().first().map(u32::to_string).as_ref(), Some(&machine));
    let ran = cp.exec_when_reached("cl-one", &["cmp", "-n", "8000000", "/tmp/data", "/dev/zero"]);
    assert_eq!(ran.exit_code, 0, "{}", String::from_utf8_lossy(&ran.stderr));
    cp.destroy("cl-one").expect("destroyed");
    assert_eq!((place.remains(), device_names()), (Vec::new(), Vec::new()));
    assert!(!group.exists());
    assert!(agent.terminate().success());
}

/// A capsule that goes on where `cl-kept` is, on a disk whose base is the other's, flattened.
pub fn start_from_a_snapshot(cp: &mut Client) {
    let order = CapsuleSnapshot { capsule_id: "cl-kept".into(), name: "warm".into(), overwrite: false };
    let began = Instant::now();
    let info: SnapshotInfo = cp.ask(&order).expect("made");
    println!("  snapshot of {} MiB made in {:?}", info.size_bytes >> 20, began.elapsed());
    let began = Instant::now();
    let request = CapsuleCreate { template: "warm".into(), ..slow("cl-copy") };
    let _: CapsuleInfo = cp.ask(&request).expect("started");
    let ran = cp.exec("cl-copy", &["cat", "/dev/shm/file", "/tmp/file"]).expect("ran");
    println!("  first exec in its copy after {:?}", began.elapsed());
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "in memory\non disk\n");
    assert_eq!(cp.exec("cl-copy", &["rm", "/tmp/file"]).expect("ran").exit_code, 0);
    let Done {} = cp.ask(&SnapshotDelete { name: "warm".into() }).expect("deleted");
    cp.destroy("cl-copy").expect("destroyed");
}

fn a_paused_capsule_survives_a_reboot(number: u32) {
    let Some(guest) = guest() else { return };
    let place = Place::with_guest(number, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let _: CapsuleInfo = cp.ask(&slow("cl-kept")).expect("created");
    let script = "echo in memory >/dev/shm/file; echo on disk >/tmp/file";
    assert_eq!(cp.exec("cl-kept", &["/bin/sh", "-c", script]).expect("ran").exit_code, 0);
    start_from_a_snapshot(&mut cp);
    let began = Instant::now();
    let paused: CapsuleInfo = cp.ask(&CapsulePause { capsule_id: "cl-kept".into() }).expect("paused");
    println!("  paused in {:?}", began.elapsed());
    assert_eq!(paused.state, CapsuleState::Paused);
    assert!(agent.hand_over().success());
    assert_eq!(device_names(), ["wrenn-cl-kept"]);
    // What a reboot takes away.
    Control::open().and_then(|control| control.remove("wrenn-cl-kept")).expect("removed");
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let began = Instant::now();
    let resume = CapsuleResume { capsule_id: "cl-kept".into(), deadline_ms: 60_000 };
    let resumed: CapsuleInfo = cp.ask(&resume).expect("resumed");
    println!("  resumed in {:?}", began.elapsed());
    assert_eq!(resumed.state, CapsuleState::Running);
    let ran = cp.exec("cl-kept", &["cat", "/dev/shm/file", "/tmp/file"]).expect("ran");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "in memory\non disk\n");
    cp.destroy("cl-kept").expect("destroyed");
    assert_eq!((place.remains(), device_names()), (Vec::new(), Vec::new()));
    assert!(agent.terminate().success());
}
