//! Capsule networks on a real kernel: made as described, adopted, undone half-way, many at once, and nothing
//! stays.

#[path = "support/run.rs"]
mod run;
mod support;

use run::{in_namespace, output};
use std::fs::File;
use std::time::Instant;
use support::{Machine, with_free_slot};
use wrenn_agent::net::{CapsuleNetwork, NetError, Policy, destroy_remains, existing_slots};

const CLOSED: &Policy = &Policy::CLOSED;
/// More than there are processors, fewer than would take long.
const AT_ONCE: usize = 16;

#[test]
fn a_network_is_made_as_described_and_goes_without_a_trace() {
    let Some(machine) = Machine::take() else { return };
    let began = Instant::now();
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
    let made = began.elapsed();
    let slot = network.slot();
    assert!(existing_slots().expect("listed").contains(&slot));

    assert!(output("ip", &["netns", "list"]).contains(&slot.namespace_name()));
    let addresses = output("ip", &["-brief", "address", "show", "dev", &slot.host_link_name()]);
    assert!(addresses.contains(&format!("{}/31", slot.host_link())), "{addresses}");
    assert!(!addresses.contains("fe80"), "{addresses}");
    let inside = in_namespace(slot, &["ip", "-brief", "address"]);
    for expected in ["169.254.169.254/32", "169.254.0.22/30", &format!("{}/31", slot.guest_link())] {
        assert!(inside.contains(expected), "{expected}: {inside}");
    }
    let neighbours = in_namespace(slot, &["ip", "neighbour"]);
    let guest = format!("169.254.0.21 dev tap0 lladdr {} PERMANENT", slot.guest_mac());
    assert!(neighbours.contains(&guest), "{neighbours}");
    let routes = in_namespace(slot, &["ip", "route"]);
    assert!(routes.contains(&format!("default via {} dev eth0", slot.host_link())), "{routes}");
    let route = output("ip", &["route", "get", &slot.host_ip().to_string()]);
    assert!(route.contains(&slot.guest_link().to_string()), "{route}");
    assert!(in_namespace(slot, &["cat", "/proc/sys/net/ipv4/ip_forward"]).starts_with('1'));
    // The caller is where it was.
    assert!(!output("ip", &["-brief", "link"]).contains("tap0"));

    // A second one in the same slot is refused and harms nothing.
    match CapsuleNetwork::create(slot, CLOSED) {
        Err(NetError::NameTaken { name }) => assert_eq!(name, slot.namespace_name()),
        other => panic!("{other:?}"),
    }
    assert!(in_namespace(slot, &["ip", "-brief", "link"]).contains("tap0"));

    drop(tap);
    assert!(!in_namespace(slot, &["ip", "-brief", "link"]).contains("tap0"));
    let began = Instant::now();
    network.destroy().expect("destroyed");
    eprintln!("network: made in {made:?}, destroyed in {:?}", began.elapsed());
    assert!(!destroy_remains(slot).expect("nothing there"));
    machine.check();
}

#[test]
fn a_network_is_adopted() {
    let Some(machine) = Machine::take() else { return };
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
    let slot = network.slot();
    drop(network);
    let rules = in_namespace(slot, &["nft", "list", "ruleset"]);
    assert!(rules.contains("device \"tap0\""), "{rules}");
    let network = CapsuleNetwork::adopt(slot).expect("adopted");
    network.set_policy(CLOSED).expect("it can be changed");
    assert_eq!(in_namespace(slot, &["nft", "list", "ruleset"]), rules);
    drop(tap);
    network.destroy().expect("destroyed");
    assert!(CapsuleNetwork::adopt(slot).is_err());
    machine.check();
}

#[test]
fn a_half_made_network_is_undone_and_a_strangers_is_left_alone() {
    let Some(machine) = Machine::take() else { return };
    // A stranger has the link's name: the namespace, made before it, goes again; the link stays.
    let slot = with_free_slot(|slot| {
        let (network, _tap) = CapsuleNetwork::create(slot, CLOSED)?;
        network.destroy().map(|()| slot)
    });
    output("ip", &["link", "add", &slot.host_link_name(), "type", "veth", "peer", "name", "wr61-stranger"]);
    match CapsuleNetwork::create(slot, CLOSED) {
        Err(NetError::NameTaken { name }) => assert_eq!(name, slot.host_link_name()),
        other => panic!("{other:?}"),
    }
    assert!(!output("ip", &["netns", "list"]).contains(&slot.namespace_name()));
    output("ip", &["link", "delete", &slot.host_link_name()]);
    // A namespace of a dead maker: a file on which nothing is mounted.
    File::create(format!("/run/netns/{}", slot.namespace_name())).expect("created");
    assert!(destroy_remains(slot).expect("removed"));
    machine.check();
}

#[test]
fn many_networks_are_made_at_once_without_getting_in_each_others_way() {
    let Some(machine) = Machine::take() else { return };
    let began = Instant::now();
    let made: Vec<_> = std::thread::scope(|scope| {
        let make = || with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(make)).collect();
        threads.into_iter().map(|thread| thread.join().expect("made")).collect()
    });
    let took = began.elapsed();
    let mut slots: Vec<_> = made.iter().map(|(network, _)| network.slot()).collect();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), AT_ONCE);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for (network, tap) in made {
            drop(tap);
            scope.spawn(|| network.destroy().expect("destroyed"));
        }
    });
    eprintln!("{AT_ONCE} networks at once: made in {took:?}, destroyed in {:?}", began.elapsed());
    machine.check();
}
