//! Agents that end, are killed and start again while real virtual machines run: what runs is adopted, with
//! its guest's processes. Needs WRENN_TEST_DIR, a directory with `kernels/` and `images/minimal/`.

mod common;

use common::commands::{count, shell_when_reached as shell, start_counter};
use common::{Agent, Client, PATIENCE, Place, SmallStorage, creation, guest_directory};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};
use wire::codec::Bytes;
use wire::message::{
    CapsuleCreate, CapsuleGet, CapsuleInfo, CapsuleMetrics, CapsuleMetricsReply, CapsulePause, CapsuleResume,
    CapsuleSnapshot, CapsuleState, Code, Done, Error, Message, SnapshotInfo,
};
use wrenn_agent::ending::Ending;

/// What storage in memory is given out by.
const PAGE_BYTES: usize = 4_096;

fn state(cp: &mut Client, id: &str) -> CapsuleState {
    let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: id.into() }).expect("known");
    info.state
}

#[test]
fn capsules_run_on_while_agents_come_and_go() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(0, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let environment = vec![(Bytes(b"GREETING".to_vec()), Bytes(b"good day".to_vec()))];
    let made: CapsuleInfo = cp.ask(&CapsuleCreate { environment, ..creation("cl-one") }).expect("created");
    start_counter(&mut cp, "cl-one");
    assert_eq!(count(&mut cp, "cl-one"), 1);
    let machine = place.machines();
    let mut agent = Some(agent);
    for (round, how) in ["kill", "hand over", "kill"].into_iter().enumerate() {
        let last = agent.take().expect("one");
        match how {
            "kill" => last.kill(),
            _ => assert!(last.hand_over().success()),
        }
        assert_eq!(place.machines(), machine, "{how}: the machine runs on");
        let begun = Instant::now();
        let next = Agent::start(&place);
        let mut cp = next.client();
        let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: "cl-one".into() }).expect("known");
        assert_eq!(
            (info.state, &info.host_ip, info.disk_size_mb),
            (CapsuleState::Running, &made.host_ip, made.disk_size_mb)
        );
        assert_eq!(count(&mut cp, "cl-one"), 2 + round as u32, "{how}");
        eprintln!("after {how}: counted on {:?} after the next agent's start", begun.elapsed());
        assert_eq!(shell(&mut cp, "cl-one", "echo $GREETING"), "good day");
        assert_eq!(place.machines(), machine, "{how}: the same machine");
        agent = Some(next);
    }
    // It is a capsule like any other: paused, resumed, adopted again, and destroyed.
    let agent = agent.expect("one");
    let mut cp = agent.client();
    let id = || "cl-one".to_string();
    let _: CapsuleInfo = cp.ask(&CapsulePause { capsule_id: id() }).expect("paused");
    let _: CapsuleInfo = cp.ask(&CapsuleResume { capsule_id: id(), deadline_ms: 0 }).expect("resumed");
    agent.kill();
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(count(&mut cp, "cl-one"), 5);
    let snapshot = CapsuleSnapshot { capsule_id: id(), name: "warm".into(), overwrite: false };
    let _: SnapshotInfo = cp.ask(&snapshot).expect("made");
    let _: CapsuleInfo =
        cp.ask(&CapsuleCreate { template: "warm".into(), ..creation("cl-two") }).expect("created");
    agent.kill();
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!((count(&mut cp, "cl-one"), count(&mut cp, "cl-two")), (6, 6));
    // One whose machine has ended meanwhile is cleared away, the other goes on.
    let second: Vec<u32> = place
        .machines()
        .into_iter()
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains("cl-two")
        })
        .collect();
    agent.kill();
    for pid in &second {
        wrenn_agent::sys::pidfd::Process::child(*pid).and_then(|p| p.kill()).expect("killed");
    }
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let error = cp.ask::<_, CapsuleInfo>(&CapsuleGet { capsule_id: "cl-two".into() }).expect_err("gone");
    assert_eq!((second.len(), error.code()), (1, Code::NotFound));
    assert_eq!(count(&mut cp, "cl-one"), 7);
    let Done {} = cp.destroy("cl-one").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

/// Runs `wrenn-agent ORDER` on the place; its standard output and whether it succeeded.
fn order(place: &Place, order: &str) -> (String, bool) {
    let mut command: Command = Agent::command(place, common::free_address());
    let output = command.arg(order).output().expect("ran");
    assert!(output.status.signal().is_none());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (text + &String::from_utf8_lossy(&output.stderr), output.status.success())
}

#[test]
fn an_agent_is_drained_and_terminated() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(1, &guest);
    let (said, ok) = order(&place, "drain");
    assert!(!ok && said.contains("no wrenn-agent serves"), "{said}");
    let mut agent = Agent::start(&place);
    let mut cp = agent.client();
    cp.create("cl-one").expect("created");
    shell(&mut cp, "cl-one", "echo in-memory >/dev/shm/file");
    // One that is being made when the order comes is undone, and whoever asked for it is told.
    let making = cp.session.open(&creation("cl-late"), true).expect("opened");
    cp.ask::<_, CapsuleInfo>(&CapsuleGet { capsule_id: "cl-late".into() }).expect("begun");
    let (said, ok) = order(&place, "drain");
    assert!(ok && said.contains("1 capsules are paused") && !said.contains("but not"), "{said}");
    assert_eq!(Error::decode(&cp.answer(making).1).map(|e| e.code()), Ok(Code::ShuttingDown));
    assert!(agent.wait().success());
    assert_eq!(place.remains(), ["sandboxes/cl-one"], "only its files are left");
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(state(&mut cp, "cl-one"), CapsuleState::Paused);
    let _: CapsuleInfo =
        cp.ask(&CapsuleResume { capsule_id: "cl-one".into(), deadline_ms: 0 }).expect("resumed");
    assert_eq!(shell(&mut cp, "cl-one", "cat /dev/shm/file"), "in-memory");
    // Without an agent that serves, terminating does what is left to do.
    agent.kill();
    let (said, ok) = order(&place, "terminate");
    assert!(ok && said.contains("destroyed 1 capsules"), "{said}");
    assert_eq!(place.remains(), Vec::<String>::new());
    let mut agent = Agent::start(&place);
    agent.client().create("cl-two").expect("created");
    let (said, ok) = order(&place, "terminate");
    assert!(ok && said.contains("are destroyed") && !said.contains("but not"), "{said}");
    assert!(agent.wait().success());
    assert_eq!(place.remains(), Vec::<String>::new());
    assert_eq!(Ending::of_signal(Ending::Drain.signal()), Ending::Drain);
}

#[test]
fn an_agent_that_starts_on_full_storage_goes_on_with_what_is_there() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(2, &guest);
    let sandboxes = place.directory.join("sandboxes");
    std::fs::create_dir(&sandboxes).expect("made");
    let storage = SmallStorage::mount(&sandboxes, 512);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    for id in ["cl-awake", "cl-asleep"] {
        let _: CapsuleInfo = cp.ask(&creation(id)).expect("created");
        start_counter(&mut cp, id);
    }
    let asleep = || "cl-asleep".to_string();
    let _: CapsuleInfo = cp.ask(&CapsulePause { capsule_id: asleep() }).expect("paused");
    // As a power cut leaves the end of a journal, once the agent has nothing more to write to it.
    let path = sandboxes.join("cl-asleep/journal");
    let begun = Instant::now();
    while !std::fs::read_to_string(&path).expect("a journal").contains(r#""remove_network","phase":"done""#) {
        assert!(begun.elapsed() < PATIENCE, "its network stays");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut journal = std::fs::File::options().append(true).open(path).expect("a journal");
    let mut torn = b"0123456789abcdef {".to_vec();
    // To the end of a page: on full storage what is in the last one's rest still fits.
    let length = journal.metadata().expect("examined").len() as usize + torn.len();
    torn.resize(torn.len() + length.next_multiple_of(PAGE_BYTES) - length, b'x');
    std::io::Write::write_all(&mut journal, &torn).expect("torn");
    // What its guest has begun to write is on its disk before there is no more room.
    shell(&mut cp, "cl-awake", "sync");
    let ballast = storage.fill();
    let error = cp.ask::<_, CapsuleInfo>(&CapsuleResume { capsule_id: asleep(), deadline_ms: 0 });
    assert!(error.expect_err("full").text.contains("it is still paused"));
    agent.kill();

    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(state(&mut cp, "cl-awake"), CapsuleState::Running);
    assert_eq!(state(&mut cp, "cl-asleep"), CapsuleState::Paused);
    assert_eq!(count(&mut cp, "cl-awake"), 1);
    // Neither does the one after that know less, nor does a second start lose what the first one noted.
    agent.kill();
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    std::fs::remove_file(&ballast).expect("removed");
    let _: CapsuleInfo = cp.ask(&CapsuleResume { capsule_id: asleep(), deadline_ms: 0 }).expect("resumed");
    let _: CapsuleInfo = cp.ask(&CapsulePause { capsule_id: asleep() }).expect("paused");
    agent.kill();
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(state(&mut cp, "cl-asleep"), CapsuleState::Paused);
    let _: CapsuleInfo = cp.ask(&CapsuleResume { capsule_id: asleep(), deadline_ms: 0 }).expect("resumed");
    assert_eq!((count(&mut cp, "cl-awake"), count(&mut cp, "cl-asleep")), (2, 1));
    assert!(agent.terminate().success());
    assert_eq!(place.remains(), Vec::<String>::new());
    drop(storage);
}

/// A file that can only be read, until this is dropped.
struct ReadOnly(std::path::PathBuf);

impl ReadOnly {
    fn mount(path: std::path::PathBuf) -> ReadOnly {
        for arguments in [vec!["--bind"], vec!["-o", "remount,bind,ro"]] {
            let paths: &[_] = if arguments.len() == 1 { &[&path, &path] } else { &[&path] };
            let mounted = Command::new("mount").args(arguments).args(paths).status();
            assert!(mounted.expect("mount runs").success());
        }
        ReadOnly(path)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_capsule_whose_journal_cannot_be_written_runs_on_when_it_is_paused() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(3, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let _: CapsuleInfo = cp.ask(&creation("cl-one")).expect("created");
    start_counter(&mut cp, "cl-one");
    let journal = ReadOnly::mount(place.directory.join("sandboxes/cl-one/journal"));
    let pause = || CapsulePause { capsule_id: "cl-one".into() };
    let error = cp.ask::<_, CapsuleInfo>(&pause()).expect_err("read-only");
    assert!(error.text.contains("writing its record") && error.text.ends_with("it runs on"), "{error}");
    assert_eq!(state(&mut cp, "cl-one"), CapsuleState::Running);
    assert_eq!(count(&mut cp, "cl-one"), 1);
    drop(journal);
    let _: CapsuleInfo = cp.ask(&pause()).expect("paused");
    agent.kill();
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let resume = CapsuleResume { capsule_id: "cl-one".into(), deadline_ms: 0 };
    let _: CapsuleInfo = cp.ask(&resume).expect("resumed");
    assert_eq!(count(&mut cp, "cl-one"), 2);
    assert!(agent.terminate().success());
    assert_eq!(place.remains(), Vec::<String>::new());
}

/// When samples of it were taken, in seconds, once there are more than `count` of them.
fn samples(cp: &mut Client, id: &str, count: usize) -> Vec<u64> {
    let begun = Instant::now();
    loop {
        let request = CapsuleMetrics { capsule_id: id.into(), range_sec: 600 };
        let reply: CapsuleMetricsReply = cp.ask(&request).expect("figures");
        if reply.times.len() > count {
            return reply.times;
        }
        assert!(begun.elapsed() < PATIENCE, "{} samples", reply.times.len());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_next_agent_knows_what_a_capsule_used() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(4, &guest);
    let file = place.directory.join("sandboxes/cl-one/usage");
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let _: CapsuleInfo = cp.ask(&creation("cl-one")).expect("created");
    let before = samples(&mut cp, "cl-one", 3);
    assert!(!file.exists(), "it had no turn yet");
    assert!(agent.hand_over().success());

    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let after = samples(&mut cp, "cl-one", before.len());
    assert_eq!(after[..before.len()], before, "of the agent before");
    // One that is paused is kept at once, and survives an agent that is killed.
    let handed_over = std::fs::metadata(&file).and_then(|m| m.modified()).expect("kept");
    let _: CapsuleInfo = cp.ask(&CapsulePause { capsule_id: "cl-one".into() }).expect("paused");
    let begun = Instant::now();
    while std::fs::metadata(&file).and_then(|m| m.modified()).expect("kept") == handed_over {
        assert!(begun.elapsed() < PATIENCE, "not kept when it was paused");
        std::thread::sleep(Duration::from_millis(10));
    }
    let before = samples(&mut cp, "cl-one", 0);
    agent.kill();
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(samples(&mut cp, "cl-one", 0), before, "of one that is paused");
    let resume = CapsuleResume { capsule_id: "cl-one".into(), deadline_ms: 0 };
    let _: CapsuleInfo = cp.ask(&resume).expect("resumed");
    let after = samples(&mut cp, "cl-one", before.len());
    assert_eq!(after[..before.len()], before, "of one that was resumed");

    // Damage costs the figures and nothing else.
    agent.kill();
    let mut bytes = std::fs::read(&file).expect("kept");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).expect("damaged");
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    assert_eq!(state(&mut cp, "cl-one"), CapsuleState::Running);
    assert!(samples(&mut cp, "cl-one", 0).len() < before.len(), "begun anew");
    let snapshot = CapsuleSnapshot { capsule_id: "cl-one".into(), name: "warm".into(), overwrite: false };
    let _: SnapshotInfo = cp.ask(&snapshot).expect("made");
    assert!(!place.directory.join("snapshots/warm/usage").exists());
    let Done {} = cp.destroy("cl-one").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}
