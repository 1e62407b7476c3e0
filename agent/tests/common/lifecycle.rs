//! Pausing, resuming and snapshots through the agent as a program, in real virtual machines, whichever VMM
//! runs them. Needs WRENN_TEST_DIR, a directory with `kernels/` and `images/minimal/`.

use crate::common::commands::{start_detached, text_of};
use crate::common::{Agent, Client, Place, creation, guest_directory};
use std::time::{Duration, Instant};
use wire::message::{
    CapsuleCreate, CapsuleGet, CapsuleInfo, CapsulePause, CapsulePing, CapsuleResume, CapsuleSnapshot,
    CapsuleState, Code, Done, Error, SnapshotDelete, SnapshotInfo,
};

fn pause(cp: &mut Client, id: &str) -> Result<CapsuleInfo, Error> {
    cp.ask(&CapsulePause { capsule_id: id.into() })
}

fn resume(cp: &mut Client, id: &str) -> Result<CapsuleInfo, Error> {
    cp.ask(&CapsuleResume { capsule_id: id.into(), deadline_ms: 0 })
}

fn get(cp: &mut Client, id: &str) -> CapsuleInfo {
    cp.ask(&CapsuleGet { capsule_id: id.into() }).expect("known")
}

/// The standard output of a shell command that succeeds.
fn shell(cp: &mut Client, id: &str, command: &str) -> String {
    text_of(command, &cp.exec(id, &["/bin/sh", "-c", command]).expect("ran"))
}

/// A process that counts in its memory alone, and tells when it is asked by a signal.
const COUNTER: &str = "n=41; trap 'n=$((n+1)); echo $n >/tmp/told' USR1; echo $$ >/tmp/pid; \
                       while :; do sleep 0.05; done";
const ASK_COUNTER: &str = "rm -f /tmp/told; kill -USR1 $(cat /tmp/pid); while [ ! -s /tmp/told ]; do sleep 0.05; done; cat /tmp/told";

pub fn a_paused_capsule_goes_on_where_it_was() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(0, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let info = cp.create("cl-paused").expect("created");
    start_detached(&mut cp, "cl-paused", COUNTER);
    shell(&mut cp, "cl-paused", "while [ ! -s /tmp/pid ]; do sleep 0.05; done; echo kept >$HOME/file");
    let boot_id = shell(&mut cp, "cl-paused", "cat /proc/sys/kernel/random/boot_id");
    for round in 0..3 {
        let begun = Instant::now();
        let paused = pause(&mut cp, "cl-paused").expect("paused");
        let took = begun.elapsed();
        assert_eq!((paused.state, paused.host_ip.as_str()), (CapsuleState::Paused, info.host_ip.as_str()));
        // In the first round it is resumed at once, and waits for its machine to be gone.
        if round > 0 {
            place.wait_for_remains(&["sandboxes/cl-paused"]);
        }
        let error = pause(&mut cp, "cl-paused").expect_err("paused already");
        assert_eq!(error.code(), Code::InvalidState, "{error}");
        let error = cp.exec("cl-paused", &["true"]).expect_err("paused");
        assert_eq!(error.code(), Code::InvalidState, "{error}");
        let begun = Instant::now();
        let resumed = resume(&mut cp, "cl-paused").expect("resumed");
        eprintln!("round {round}: paused in {took:?}, resumed in {:?}", begun.elapsed());
        assert_eq!((resumed.state, resumed.host_ip), (CapsuleState::Running, info.host_ip.clone()));
        assert_eq!(shell(&mut cp, "cl-paused", ASK_COUNTER), (42 + round).to_string());
        assert_eq!(shell(&mut cp, "cl-paused", "cat $HOME/file"), "kept");
        assert_eq!(shell(&mut cp, "cl-paused", "cat /proc/sys/kernel/random/boot_id"), boot_id);
        let guest_time: u64 = shell(&mut cp, "cl-paused", "date +%s").parse().expect("seconds");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("now").as_secs();
        assert!(now.abs_diff(guest_time) <= 2, "the guest's clock is {guest_time}, it is {now}");
    }
    let error = resume(&mut cp, "cl-paused").expect_err("runs");
    assert_eq!(error.code(), Code::InvalidState, "{error}");
    let Done {} = cp.destroy("cl-paused").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

pub fn a_paused_capsule_survives_its_agent() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(1, &guest);
    let mut agent = Agent::start(&place);
    let mut cp = agent.client();
    cp.create("cl-kept").expect("created");
    shell(&mut cp, "cl-kept", "echo in-memory >/dev/shm/file");
    pause(&mut cp, "cl-kept").expect("paused");
    agent.child.kill().expect("killed");
    agent.wait();
    // Once after a crash and once after an end in good order.
    for _ in 0..2 {
        let agent = Agent::start(&place);
        let mut cp = agent.client();
        assert_eq!(get(&mut cp, "cl-kept").state, CapsuleState::Paused);
        resume(&mut cp, "cl-kept").expect("resumed");
        assert_eq!(shell(&mut cp, "cl-kept", "cat /dev/shm/file"), "in-memory");
        pause(&mut cp, "cl-kept").expect("paused again");
        assert!(agent.hand_over().success());
        assert_eq!(place.remains(), ["sandboxes/cl-kept"]);
    }
    let agent = Agent::start(&place);
    agent.client().destroy("cl-kept").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
}

pub fn what_fails_leaves_a_capsule_as_it_was() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(2, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    cp.create("cl-whole").expect("created");
    shell(&mut cp, "cl-whole", "echo in-memory >/dev/shm/file");
    let directory = place.directory.join("sandboxes/cl-whole");
    // Something is in the way of the memory's file: the pause fails and the capsule runs on.
    std::fs::create_dir(directory.join("memory-1")).expect("made");
    let error = pause(&mut cp, "cl-whole").expect_err("in the way");
    assert!(error.text.contains("memory-1") && error.text.ends_with("it runs on"), "{error}");
    assert_eq!(shell(&mut cp, "cl-whole", "cat /dev/shm/file"), "in-memory");
    std::fs::remove_dir(directory.join("memory-1")).expect("removed");
    pause(&mut cp, "cl-whole").expect("paused");
    // The devices' state is not there: resuming fails and the capsule stays paused.
    let state = std::fs::read_dir(&directory).expect("listed").flatten();
    let state = state.map(|e| e.path()).find(|p| p.to_string_lossy().contains("state-")).expect("a state");
    let away = place.directory.join("away");
    std::fs::rename(&state, &away).expect("moved");
    std::fs::write(&state, b"nonsense").expect("written");
    for _ in 0..2 {
        let error = resume(&mut cp, "cl-whole").expect_err("no state");
        assert!(error.text.ends_with("it is still paused"), "{error}");
        assert_eq!(get(&mut cp, "cl-whole").state, CapsuleState::Paused);
        assert_eq!(place.remains(), ["sandboxes/cl-whole"]);
    }
    std::fs::rename(&away, &state).expect("moved");
    resume(&mut cp, "cl-whole").expect("resumed");
    assert_eq!(shell(&mut cp, "cl-whole", "cat /dev/shm/file"), "in-memory");
    cp.destroy("cl-whole").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
}

pub fn an_idle_capsule_is_paused_unless_somebody_pings() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(3, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let request = CapsuleCreate { timeout_sec: 2, ..creation("cl-idle") };
    let _: CapsuleInfo = cp.ask(&request).expect("created");
    let ping = CapsulePing { capsule_id: "cl-idle".into() };
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(500));
        let Done {} = cp.ask(&ping).expect("runs");
    }
    // A command that takes longer than that is use.
    assert_eq!(shell(&mut cp, "cl-idle", "sleep 3; echo awake"), "awake");
    let end = Instant::now() + Duration::from_secs(30);
    while get(&mut cp, "cl-idle").state != CapsuleState::Paused {
        assert!(Instant::now() < end, "it is not paused");
        std::thread::sleep(Duration::from_millis(100));
    }
    let error = cp.ask::<_, Done>(&ping).expect_err("paused");
    assert_eq!(error.code(), Code::InvalidState, "{error}");
    resume(&mut cp, "cl-idle").expect("resumed");
    it_may_run_only_so_long(&place, agent, &ping);
}

/// An agent that comes later counts from when the machine began to run, and use does not change that.
fn it_may_run_only_so_long(place: &Place, agent: Agent, ping: &CapsulePing) {
    assert!(agent.hand_over().success());
    let agent = Agent::start_with(place, |command| {
        command.env("WRENN_MAX_RUN_SEC", "1");
    });
    let mut cp = agent.client();
    for _ in 0..2 {
        let end = Instant::now() + Duration::from_secs(30);
        let refusal = loop {
            assert!(Instant::now() < end, "it runs on");
            match cp.ask::<_, Done>(ping) {
                Ok(Done {}) => std::thread::sleep(Duration::from_millis(100)),
                Err(error) => break error,
            }
        };
        assert_eq!(refusal.code(), Code::InvalidState, "{refusal}");
        wait_for_state(&mut cp, "cl-idle", CapsuleState::Paused);
        let began = Instant::now();
        assert_eq!(resume(&mut cp, "cl-idle").expect("resumed").state, CapsuleState::Running);
        wait_for_state(&mut cp, "cl-idle", CapsuleState::Paused);
        assert!(began.elapsed() >= Duration::from_secs(1), "its time begins anew");
        resume(&mut cp, "cl-idle").expect("resumed");
    }
    cp.destroy("cl-idle").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
}

/// How long a guest takes for what needs about three seconds with these limits, and next to none without.
const BYTES_PER_SEC: &str = "16777216";
const OPS_PER_SEC: &str = "500";
const GROWN: &str = "for i in $(seq 300); do set -- $(df -k / | tail -n 1); [ $2 -lt 900000 ] || exit 0; sleep 0.1; done; df -k /; exit 1";
const WRITING: &str = "dd if=/dev/zero of=/tmp/file bs=1M count=64 conv=fsync 2>&1";
const READING: &str = "dd if=/tmp/file of=/dev/null bs=4k count=2000 iflag=direct 2>&1";
/// What it takes at the least: a second's worth may go at once.
const AT_LEAST: Duration = Duration::from_secs(2);

pub fn what_a_capsule_does_to_its_disk_has_limits() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(7, &guest);
    let agent = Agent::start_with(&place, |command| {
        command.env("WRENN_DISK_BYTES_PER_SEC", BYTES_PER_SEC).env("WRENN_DISK_OPS_PER_SEC", OPS_PER_SEC);
    });
    let mut cp = agent.client();
    let request = CapsuleCreate { disk_size_mb: 1_024, ..creation("cl-slow") };
    let _: CapsuleInfo = cp.ask(&request).expect("created");
    // Its file system grows beside what it is used for: on a slow host there is no room for the file before.
    shell(&mut cp, "cl-slow", GROWN);
    for round in ["as it was made", "resumed"] {
        for command in [WRITING, READING] {
            let begun = Instant::now();
            let said = shell(&mut cp, "cl-slow", command);
            assert!(begun.elapsed() >= AT_LEAST, "{round}: {said}");
        }
        if round != "resumed" {
            pause(&mut cp, "cl-slow").expect("paused");
            resume(&mut cp, "cl-slow").expect("resumed");
        }
    }
    // An agent with other settings: from the next resume on.
    assert!(agent.hand_over().success());
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    pause(&mut cp, "cl-slow").expect("paused");
    resume(&mut cp, "cl-slow").expect("resumed");
    let said = shell(&mut cp, "cl-slow", READING);
    eprintln!("without a limit: {said}");
    cp.destroy("cl-slow").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
}

fn wait_for_state(cp: &mut Client, id: &str, state: CapsuleState) {
    let end = Instant::now() + Duration::from_secs(60);
    while get(cp, id).state != state {
        assert!(Instant::now() < end, "{id} is {:?}, not {state:?}", get(cp, id).state);
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn a_capsule_hibernates_and_goes_on_where_it_was() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(5, &guest);
    let hibernating = |command: &mut std::process::Command| {
        command.env("WRENN_HIBERNATE_AFTER_SEC", "1");
    };
    let mut agent = Agent::start_with(&place, hibernating);
    let mut cp = agent.client();
    cp.create("cl-asleep").expect("created");
    shell(&mut cp, "cl-asleep", "echo in-memory >/dev/shm/file; head -c 9000000 /dev/urandom >/dev/shm/much");
    let sum = shell(&mut cp, "cl-asleep", "sum /dev/shm/much");
    let directory = place.directory.join("sandboxes/cl-asleep");
    let files = || {
        let entries = std::fs::read_dir(&directory).expect("listed").flatten();
        let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        let mut of_image: Vec<_> =
            names.filter(|n| n.starts_with("memory-") || n.starts_with("packed-")).collect();
        of_image.sort();
        of_image
    };
    let paused = pause(&mut cp, "cl-asleep").expect("paused");
    assert_eq!((paused.state, files()), (CapsuleState::Paused, vec!["memory-1".into()]));
    wait_for_state(&mut cp, "cl-asleep", CapsuleState::Hibernated);
    assert_eq!(files(), ["packed-1"]);
    let packed = get(&mut cp, "cl-asleep");
    assert!(packed.disk_used_mb < paused.disk_used_mb / 2, "{paused:?} {packed:?}");
    let error = pause(&mut cp, "cl-asleep").expect_err("it is paused");
    assert!(error.code() == Code::InvalidState && error.text.contains("is hibernated"), "{error}");
    // The agent ends, at once and in good order, and the capsule sleeps on.
    agent.child.kill().expect("killed");
    agent.wait();
    // What a kill in the middle of packing or unpacking leaves.
    std::fs::write(directory.join("memory-1"), "half").expect("written");
    let agent = Agent::start_with(&place, hibernating);
    assert_eq!(files(), ["packed-1"]);
    assert!(agent.hand_over().success());
    let agent = Agent::start_with(&place, hibernating);
    let mut cp = agent.client();
    assert_eq!(get(&mut cp, "cl-asleep").state, CapsuleState::Hibernated);
    // Packed memory that cannot be read is told, and nothing is lost.
    let (whole, away) = (directory.join("packed-1"), place.directory.join("away"));
    std::fs::rename(&whole, &away).expect("moved");
    std::fs::write(&whole, "nonsense").expect("written");
    let error = resume(&mut cp, "cl-asleep").expect_err("no memory");
    assert!(error.text.contains("packed-1") && error.text.ends_with("it is still paused"), "{error}");
    assert_eq!(
        (get(&mut cp, "cl-asleep").state, files()),
        (CapsuleState::Hibernated, vec!["packed-1".into()])
    );
    std::fs::rename(&away, &whole).expect("moved back");
    for round in 0..2 {
        let begun = Instant::now();
        let resumed = resume(&mut cp, "cl-asleep").expect("resumed");
        eprintln!("round {round}: resumed from hibernation in {:?}", begun.elapsed());
        assert_eq!((resumed.state, files()), (CapsuleState::Running, vec!["memory-1".into()]));
        assert_eq!(shell(&mut cp, "cl-asleep", "cat /dev/shm/file"), "in-memory");
        assert_eq!(shell(&mut cp, "cl-asleep", "sum /dev/shm/much"), sum);
        pause(&mut cp, "cl-asleep").expect("paused");
        wait_for_state(&mut cp, "cl-asleep", CapsuleState::Hibernated);
    }
    cp.destroy("cl-asleep").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

pub fn capsules_start_from_a_snapshot_where_it_was_and_are_apart() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(4, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    cp.create("cl-origin").expect("created");
    start_detached(&mut cp, "cl-origin", COUNTER);
    shell(&mut cp, "cl-origin", "while [ ! -s /tmp/pid ]; do sleep 0.05; done; echo of-origin >$HOME/file");
    let order = |name: &str, overwrite| CapsuleSnapshot {
        capsule_id: "cl-origin".into(),
        name: name.into(),
        overwrite,
    };
    let begun = Instant::now();
    let info: SnapshotInfo = cp.ask(&order("warm", false)).expect("made");
    eprintln!("snapshot made in {:?}, {} KiB", begun.elapsed(), info.size_bytes / 1024);
    assert_eq!((info.name.as_str(), info.vcpus, info.memory_mb), ("warm", 1, 256));
    assert_eq!(shell(&mut cp, "cl-origin", ASK_COUNTER), "42", "it runs on");
    for (name, expected) in
        [("warm", Code::AlreadyExists), ("minimal", Code::AlreadyExists), ("../x", Code::InvalidRequest)]
    {
        let error = cp.ask::<_, SnapshotInfo>(&order(name, false)).expect_err("refused");
        assert_eq!(error.code(), expected, "{error}");
    }
    let mut seen = Vec::new();
    for id in ["cl-first", "cl-second"] {
        let begun = Instant::now();
        let request = CapsuleCreate { template: "warm".into(), memory_mb: 512, ..creation(id) };
        let made: CapsuleInfo = cp.ask(&request).expect("started");
        eprintln!("{id} runs after {:?}", begun.elapsed());
        assert_eq!((made.memory_mb, made.template.as_str()), (256, "warm"), "the machine is as it was");
        assert_eq!(shell(&mut cp, id, ASK_COUNTER), "42", "the process goes on from the snapshot");
        assert_eq!(shell(&mut cp, id, "cat $HOME/file"), "of-origin");
        shell(&mut cp, id, &format!("echo {id} >$HOME/file"));
        let random = shell(&mut cp, id, "head -c 16 /dev/urandom | od -An -tx1");
        seen.push((random, made.host_ip));
        let guest_time: u64 = shell(&mut cp, id, "date +%s").parse().expect("seconds");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("now").as_secs();
        assert!(now.abs_diff(guest_time) <= 2, "{id}: the guest's clock is {guest_time}, it is {now}");
    }
    assert!(seen[0].0 != seen[1].0 && seen[0].1 != seen[1].1, "{seen:?}");
    // Replaced and deleted, it is still the base of those that are there, paused ones too.
    let _: SnapshotInfo = cp.ask(&order("warm", true)).expect("replaced");
    pause(&mut cp, "cl-first").expect("paused");
    let Done {} = cp.ask(&SnapshotDelete { name: "warm".into() }).expect("deleted");
    let error = cp.ask::<_, Done>(&SnapshotDelete { name: "warm".into() }).expect_err("gone");
    assert_eq!(error.code(), Code::NotFound, "{error}");
    resume(&mut cp, "cl-first").expect("resumed");
    pause(&mut cp, "cl-first").expect("paused again");
    resume(&mut cp, "cl-first").expect("resumed again");
    for id in ["cl-first", "cl-second"] {
        assert_eq!(shell(&mut cp, id, "cat $HOME/file"), id);
    }
    assert_eq!(shell(&mut cp, "cl-origin", "cat $HOME/file"), "of-origin");
    for id in ["cl-first", "cl-second", "cl-origin"] {
        cp.destroy(id).expect("destroyed");
    }
    assert_eq!(place.remains(), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(place.directory.join("snapshots")).expect("listed").count(), 0);
}
