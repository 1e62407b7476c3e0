//! The crash sweep in QEMU, on this machine, and a crash while a network slot is given back.
//!
//! Needs WRENN_TEST_DIR, a directory with `kernels/` and `images/minimal/`, and the feature `crash-points`.
#![cfg(feature = "crash-points")]

mod common;
#[path = "common/sweep.rs"]
mod sweep;

use common::{Agent, Place, creation};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use sweep::FLEETING;
use wrenn_agent::net::{CapsuleNetwork, Policy, Slot, existing_slots};

#[test]
fn a_crash_at_any_entry_of_making_and_destroying_loses_and_leaks_nothing() {
    sweep::a_crash_at_any_entry_of_making_and_destroying_loses_and_leaks_nothing();
}

#[test]
fn a_crash_at_any_entry_of_pausing_resuming_and_snapshots_loses_and_leaks_nothing() {
    sweep::a_crash_at_any_entry_of_pausing_resuming_and_snapshots_loses_and_leaks_nothing();
}

#[test]
fn a_slot_that_was_given_back_is_nobodys_to_clear() {
    if fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) != 0) {
        eprintln!("SKIPPED: this needs root");
        return;
    }
    let place = Place::new(9);
    // A kernel that QEMU refuses: the capsule is made, and taken away again.
    for (name, content) in [
        ("kernels/vmlinux", &b"none"[..]),
        ("kernels/initramfs.img", b"none"),
        ("images/minimal/rootfs.ext4", &[0; 1 << 20]),
    ] {
        place.write_new(name, content);
    }
    let mut agent = Agent::start_with(&place, |command| {
        command.env("CRASH_AT", "remove_network.done");
    });
    let mut cp = agent.client();
    let stream = cp.session.open(&creation(FLEETING), true).expect("opened");
    cp.flush();
    assert_eq!(agent.wait().signal(), Some(libc::SIGKILL), "{stream:?}");
    assert_eq!(place.sandboxes(), [FLEETING], "its directory is there still");
    // From here on the slot is whoever's takes it.
    let slot = Slot::new(place.first_slot).expect("a slot");
    let take = || CapsuleNetwork::create(slot, &Policy::CLOSED).expect("made");
    let is_there = || existing_slots().expect("listed").contains(&slot);
    let (network, tap) = take();
    let agent = Agent::start(&place);
    assert_eq!(place.sandboxes(), Vec::<String>::new());
    assert!(is_there(), "the other's network is gone");
    drop(tap);
    network.destroy().expect("destroyed");
    agent.kill();
    // Neither does a capsule that only wanted it take it away.
    let mut agent = Agent::start_with(&place, |command| {
        command.env("CRASH_AT", "network.begin");
    });
    let (network, tap) = take();
    let mut cp = agent.client();
    cp.session.open(&creation(FLEETING), true).expect("opened");
    cp.flush();
    assert_eq!(agent.wait().signal(), Some(libc::SIGKILL));
    let agent = Agent::start(&place);
    assert_eq!(place.sandboxes(), Vec::<String>::new());
    assert!(is_there(), "the other's network is gone");
    drop(tap);
    network.destroy().expect("destroyed");
    assert!(agent.terminate().success());
}
