//! Pausing, resuming and snapshots in the VMM that this machine offers.

mod common;
#[path = "common/lifecycle.rs"]
mod lifecycle;

use common::{Agent, Client, Place, guest_directory};
use lifecycle::{get, pause, resume, shell};
use std::time::{Duration, Instant};
use wire::message::{CapsuleState, Code};

#[test]
fn a_paused_capsule_goes_on_where_it_was() {
    lifecycle::a_paused_capsule_goes_on_where_it_was();
}

#[test]
fn a_paused_capsule_survives_its_agent() {
    lifecycle::a_paused_capsule_survives_its_agent();
}

#[test]
fn what_fails_leaves_a_capsule_as_it_was() {
    lifecycle::what_fails_leaves_a_capsule_as_it_was();
}

#[test]
fn an_idle_capsule_is_paused_unless_somebody_pings() {
    lifecycle::an_idle_capsule_is_paused_unless_somebody_pings();
}

#[test]
fn capsules_start_from_a_snapshot_where_it_was_and_are_apart() {
    lifecycle::capsules_start_from_a_snapshot_where_it_was_and_are_apart();
}

fn wait_for_state(cp: &mut Client, id: &str, state: CapsuleState) {
    let end = Instant::now() + Duration::from_secs(60);
    while get(cp, id).state != state {
        assert!(Instant::now() < end, "{id} is {:?}, not {state:?}", get(cp, id).state);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_capsule_hibernates_and_goes_on_where_it_was() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(5, &guest);
    let hibernating = |command: &mut std::process::Command| {
        command.env("WRENN_HIBERNATE_AFTER_SEC", "1");
    };
    let mut agent = Agent::start_with(&place, hibernating);
    let mut cp = agent.client();
    cp.create("cl-asleep").expect("created");
    shell(&mut cp, "cl-asleep", "echo in-memory >/dev/shm/file; head -c 9000000 /dev/urandom >/dev/shm/much");
    let sum = shell(&mut cp, "cl-asleep", "cksum /dev/shm/much");
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
        assert_eq!(shell(&mut cp, "cl-asleep", "cksum /dev/shm/much"), sum);
        pause(&mut cp, "cl-asleep").expect("paused");
        wait_for_state(&mut cp, "cl-asleep", CapsuleState::Hibernated);
    }
    cp.destroy("cl-asleep").expect("destroyed");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}
