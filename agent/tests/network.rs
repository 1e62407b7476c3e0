//! Capsule networks on a real kernel: namespaces, links, addresses, firewall, and that nothing stays.
//!
//! The guest is a second namespace at the other end of the TAP, played through its descriptor, or a packet
//! written to it by hand.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Machine, with_free_slot};
use wrenn_agent::net::{CapsuleNetwork, NetError, Policy, Slot, Tap, destroy_remains, existing_slots, host};

const CLOSED: Policy = Policy { allow_internet: false };
const OPEN: Policy = Policy { allow_internet: true };

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("the program runs");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn in_namespace(slot: Slot, command: &[&str]) -> String {
    let name = slot.namespace_name();
    output("ip", &[&["netns", "exec", &name], command].concat())
}

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
fn a_network_is_adopted_and_its_tap_made_again() {
    let Some(machine) = Machine::take() else { return };
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
    let slot = network.slot();
    drop((network, tap));
    let mut network = CapsuleNetwork::adopt(slot).expect("adopted");
    let tap = network.open_tap(CLOSED).expect("made again");
    assert!(network.open_tap(CLOSED).is_err_and(|e| matches!(e, NetError::NameTaken { .. })));
    let rules = in_namespace(slot, &["nft", "list", "ruleset"]);
    assert!(rules.contains("device \"tap0\""), "{rules}");
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
fn sockets_of_the_namespace_work_from_outside_it() {
    let Some(machine) = Machine::take() else { return };
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
    let listener = network.metadata_listener().expect("listening");
    assert_eq!(listener.local_addr().expect("bound").to_string(), "169.254.169.254:80");
    // A connection from inside reaches it.
    let slot = network.slot();
    let client = std::thread::spawn(move || {
        in_namespace(slot, &["timeout", "3", "bash", "-c", "exec 3<>/dev/tcp/169.254.169.254/80 && echo yes"])
    });
    let mut accepted = Err(std::io::ErrorKind::WouldBlock.into());
    for _ in 0..300 {
        accepted = listener.accept();
        if accepted.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    accepted.expect("a connection");
    assert_eq!(client.join().expect("ran").trim(), "yes");

    // A connection to the guest puts a SYN on the TAP at once, without asking by ARP first.
    let connecting = network.connect_guest(49_983).expect("begun");
    let frame = read_frame(&tap, |frame| frame[12..14] == [8, 0] && frame[23] == 6).expect("a TCP segment");
    assert_eq!(frame[..6], slot.guest_mac().0);
    assert_eq!(frame[30..34], [169, 254, 0, 21]);
    assert_eq!(frame[36..38], 49_983u16.to_be_bytes());
    drop((connecting, listener, tap));
    network.destroy().expect("destroyed");
    machine.check();
}

const VNET_HEADER_BYTES: usize = 10;

/// The next frame on the TAP that `wanted` accepts, without its virtio-net header; waits up to a second.
fn read_frame(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let mut file = File::from(tap.as_fd().try_clone_to_owned().expect("cloned"));
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        let mut buffer = [0; 2_048];
        match file.read(&mut buffer) {
            Ok(count) if count >= VNET_HEADER_BYTES + 38 && wanted(&buffer[VNET_HEADER_BYTES..count]) => {
                return Some(buffer[VNET_HEADER_BYTES..count].to_vec());
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    None
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A guest's TCP SYN as an Ethernet frame.
fn packet(slot: Slot, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let head = [0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    let mut ip = [&head[..], &from.octets(), &to.octets()].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports = [40_000u16.to_be_bytes(), port.to_be_bytes()].concat();
    let rest = [0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
    let mut frame = [&slot.tap_mac().0[..], &mac, &[8, 0], &ip, &ports, &rest].concat();
    set_tcp_checksum(&mut frame);
    frame
}

fn set_tcp_checksum(frame: &mut [u8]) {
    frame[50..52].copy_from_slice(&[0, 0]);
    let pseudo = [&frame[26..34], &[0, 6, 0, 20], &frame[34..54]].concat();
    let sum = checksum(&pseudo);
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
}

fn write_frame(tap: &Tap, frame: &[u8]) {
    let mut file = File::from(tap.as_fd().try_clone_to_owned().expect("cloned"));
    file.write_all(&[&[0; VNET_HEADER_BYTES], frame].concat()).expect("written");
}

const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

fn is_tcp_with(flags: u8) -> impl Fn(&[u8]) -> bool {
    move |frame| frame[12..14] == [8, 0] && frame[23] == 6 && frame.len() >= 48 && frame[47] & flags == flags
}
const OTHER_PORT: u16 = 40_001;
const RST: u8 = 4;
const SYN_ACK: u8 = 0x12;

#[test]
fn a_guest_reaches_the_metadata_service_and_nothing_else() {
    let Some(machine) = Machine::take() else { return };
    let installed = host::is_installed().expect("nft runs");
    host::install(false).expect("installed");
    let (mut network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
    let slot = network.slot();
    let _listener = network.metadata_listener().expect("listening");
    let host_listener = std::net::TcpListener::bind((slot.host_link(), 0)).expect("listening on the host");
    let host_port = host_listener.local_addr().expect("bound").port();
    let mac = slot.guest_mac().0;
    let send = |mac, from, to, port| write_frame(&tap, &packet(slot, mac, from, to, port));

    send(mac, GUEST, METADATA, 80);
    assert!(read_frame(&tap, is_tcp_with(SYN_ACK)).is_some(), "the metadata service answers");
    // Another of its ports, the namespace itself, the host, other capsules, private networks, the internet:
    // refused at once, by a reset.
    let elsewhere = [
        (METADATA, 22),
        (Ipv4Addr::new(169, 254, 0, 22), 80),
        (slot.guest_link(), 80),
        (slot.host_link(), host_port),
        (Ipv4Addr::new(10, 11, 0, 1), 49_983),
        (Ipv4Addr::new(10, 0, 0, 1), 80),
        (Ipv4Addr::new(192, 168, 1, 1), 80),
        (Ipv4Addr::new(127, 0, 0, 1), 80),
        (Ipv4Addr::new(1, 1, 1, 1), 443),
    ];
    for (address, port) in elsewhere {
        send(mac, GUEST, address, port);
        let answer = read_frame(&tap, |f| is_tcp_with(RST)(f) || is_tcp_with(SYN_ACK)(f));
        // Packets to loopback addresses are dropped as martians before any rule sees them.
        match answer {
            None => assert!(address.is_loopback(), "{address}:{port}: silence"),
            Some(frame) => assert!(is_tcp_with(RST)(&frame), "{address}:{port} answers: {frame:02x?}"),
        }
    }
    // Somebody else's addresses: silence. The first connection's answer is still being repeated, so these
    // come from another port.
    let from_other_port = |mac, from| {
        let mut frame = packet(slot, mac, from, METADATA, 80);
        frame[34..36].copy_from_slice(&OTHER_PORT.to_be_bytes());
        set_tcp_checksum(&mut frame);
        write_frame(&tap, &frame);
        read_frame(&tap, |f| is_tcp_with(0)(f) && f[36..38] == OTHER_PORT.to_be_bytes())
    };
    assert_eq!(from_other_port([2, 0, 0, 0, 0, 9], GUEST), None);
    assert_eq!(from_other_port(mac, Ipv4Addr::new(169, 254, 0, 20)), None);
    assert_eq!(from_other_port(mac, slot.guest_link()), None);
    assert!(from_other_port(mac, GUEST).is_some(), "the same packet with its own addresses is answered");
    assert_eq!(
        host_listener
            .set_nonblocking(true)
            .and_then(|()| host_listener.accept().map(drop))
            .map_err(|e| e.kind()),
        Err(std::io::ErrorKind::WouldBlock)
    );

    // The policy widens while it runs, and narrows again: private networks and the host stay closed.
    network.set_policy(OPEN).expect("opened");
    let set = output("nft", &["list", "set", "inet", "wrenn", "internet"]);
    assert!(set.contains(&slot.host_link_name()), "{set}");
    for (address, port) in [(slot.host_link(), host_port), (Ipv4Addr::new(192, 168, 1, 1), 80)] {
        send(mac, GUEST, address, port);
        assert!(read_frame(&tap, is_tcp_with(RST)).is_some(), "{address} is not refused");
    }
    network.set_policy(CLOSED).expect("closed");
    send(mac, GUEST, Ipv4Addr::new(1, 1, 1, 1), 443);
    assert!(read_frame(&tap, is_tcp_with(RST)).is_some());

    network.set_policy(OPEN).expect("opened");
    drop((tap, host_listener, _listener));
    network.destroy().expect("destroyed");
    let set = output("nft", &["list", "set", "inet", "wrenn", "internet"]);
    assert!(!set.contains(&slot.host_link_name()), "{set}");
    if !installed {
        host::remove_if_unused().expect("removed");
    }
    machine.check();
}

#[test]
fn with_internet_a_guest_gets_out_of_the_host_masqueraded() {
    let Some(machine) = Machine::take() else { return };
    let installed = host::is_installed().expect("nft runs");
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read");
    host::install(true).expect("installed");
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, OPEN));
    let slot = network.slot();
    // The internet: a namespace behind the host, with one public address.
    let (outside, uplink) = ("ns-61999", "wr61-uplink");
    output("ip", &["netns", "add", outside]);
    output("ip", &["link", "add", uplink, "type", "veth", "peer", "name", "public", "netns", outside]);
    output("ip", &["address", "add", "8.8.4.1/24", "dev", uplink]);
    output("ip", &["link", "set", uplink, "up"]);
    for command in ["address add 8.8.4.4/24 dev public", "link set public up", "link set lo up"] {
        let arguments: Vec<&str> =
            ["netns", "exec", outside, "ip"].into_iter().chain(command.split(' ')).collect();
        output("ip", &arguments);
    }
    let server = Command::new("ip")
        .args(["netns", "exec", outside, "python3", "-c"])
        .arg("import socket;s=socket.create_server(('8.8.4.4',80));c,a=s.accept();print(a[0],flush=True)")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("started");
    std::thread::sleep(Duration::from_millis(500));
    write_frame(&tap, &packet(slot, slot.guest_mac().0, GUEST, Ipv4Addr::new(8, 8, 4, 4), 80));
    let answer = read_frame(&tap, is_tcp_with(SYN_ACK)).expect("an answer from outside");
    assert_eq!(answer[26..30], [8, 8, 4, 4]);
    // The handshake's last segment, acknowledging theirs, so that the server's accept returns.
    let theirs = u32::from_be_bytes(answer[38..42].try_into().expect("four bytes"));
    write_frame(&tap, &acknowledgement(slot, Ipv4Addr::new(8, 8, 4, 4), theirs.wrapping_add(1)));
    let seen = server.wait_with_output().expect("ended");
    assert_eq!(String::from_utf8_lossy(&seen.stdout).trim(), "8.8.4.1", "the address that the outside saw");

    output("ip", &["link", "delete", uplink]);
    output("ip", &["netns", "delete", outside]);
    drop(tap);
    network.destroy().expect("destroyed");
    if !installed {
        host::remove_if_unused().expect("removed");
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", forwarding).expect("restored");
    machine.check();
}

/// The ACK that follows [`packet`]'s SYN.
fn acknowledgement(slot: Slot, to: Ipv4Addr, number: u32) -> Vec<u8> {
    let mut frame = packet(slot, slot.guest_mac().0, GUEST, to, 80);
    frame[38..42].copy_from_slice(&1u32.to_be_bytes());
    frame[42..46].copy_from_slice(&number.to_be_bytes());
    frame[47] = 0x10;
    set_tcp_checksum(&mut frame);
    frame
}

#[test]
fn the_host_reaches_the_guest_by_its_own_address() {
    let Some(machine) = Machine::take() else { return };
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
    let slot = network.slot();
    let address = SocketAddr::from((slot.host_ip(), 8080));
    let client = std::thread::spawn(move || TcpStream::connect_timeout(&address, Duration::from_secs(1)));
    let frame = read_frame(&tap, is_tcp_with(2)).expect("a SYN for the guest");
    assert_eq!(frame[26..34], [slot.host_link().octets(), GUEST.octets()].concat());
    assert_eq!(frame[36..38], 8080u16.to_be_bytes());
    assert!(client.join().expect("ran").is_err(), "nobody has answered");
    drop(tap);
    network.destroy().expect("destroyed");
    machine.check();
}
