//! What passes between a guest, its metadata service, the host, other capsules and the internet, on a real
//! kernel. The guest is played by hand, frame by frame, so that it can lie.

#[path = "support/guest.rs"]
mod guest;
#[path = "support/run.rs"]
mod run;
mod support;

use guest::{
    GUEST, METADATA, RST, SYN_ACK, acknowledgement, datagram, is_tcp_with, packet, read_frame,
    set_tcp_checksum, write_frame,
};
use run::{in_namespace, output};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;
use support::{Machine, with_free_slot};
use wrenn_agent::net::{CapsuleNetwork, Policy, Slot, existing_slots, firewall, host};

const CLOSED: &Policy = &Policy::CLOSED;
const OPEN: &Policy = &Policy::OPEN;
/// Another source port than the one of [`packet`].
const OTHER_PORT: u16 = 40_001;

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

#[test]
fn a_guest_reaches_the_metadata_service_and_nothing_else() {
    let Some(machine) = Machine::take() else { return };
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, CLOSED));
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
        // Only from there: the metadata service still repeats its own answer.
        let wanted =
            |f: &[u8]| is_tcp_with(0)(f) && f[26..30] == address.octets() && f[34..36] == port.to_be_bytes();
        let answer = read_frame(&tap, wanted);
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
    machine.check();
}

#[test]
fn with_internet_a_guest_gets_out_of_the_host_masqueraded() {
    let Some(machine) = Machine::take() else { return };
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read");
    host::install(true).expect("installed");
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, OPEN));
    let slot = network.slot();
    let outside = Outside::new();
    const SERVER: &str = "import socket;s=socket.create_server(('8.8.4.4',80));print('listening',flush=True);\
                          c,a=s.accept();print(a[0],flush=True)";
    let mut server = Command::new("ip")
        .args(["netns", "exec", Outside::NAMESPACE, "python3", "-c", SERVER])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("started");
    let mut said = BufReader::new(server.stdout.take().expect("its output")).lines();
    assert_eq!(said.next().expect("a line").expect("read"), "listening");
    write_frame(&tap, &packet(slot, slot.guest_mac().0, GUEST, Ipv4Addr::new(8, 8, 4, 4), 80));
    let answer = read_frame(&tap, is_tcp_with(SYN_ACK)).expect("an answer from outside");
    assert_eq!(answer[26..30], [8, 8, 4, 4]);
    // The handshake's last segment, acknowledging theirs, so that the server's accept returns.
    let theirs = u32::from_be_bytes(answer[38..42].try_into().expect("four bytes"));
    write_frame(&tap, &acknowledgement(slot, Ipv4Addr::new(8, 8, 4, 4), theirs.wrapping_add(1)));
    let seen = said.next().expect("a line").expect("read");
    assert_eq!(seen, "8.8.4.1", "the address that the outside saw");
    server.wait().expect("ended");

    drop((tap, outside));
    network.destroy().expect("destroyed");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", forwarding).expect("restored");
    machine.check();
}

/// The internet: a namespace behind the host, with one public address.
struct Outside;

impl Outside {
    const NAMESPACE: &str = "ns-61999";
    const UPLINK: &str = "wr61-uplink";

    fn new() -> Outside {
        let (outside, uplink) = (Outside::NAMESPACE, Outside::UPLINK);
        output("ip", &["netns", "add", outside]);
        output("ip", &["link", "add", uplink, "type", "veth", "peer", "name", "public", "netns", outside]);
        output("ip", &["address", "add", "8.8.4.1/24", "dev", uplink]);
        output("ip", &["link", "set", uplink, "up"]);
        for command in ["address add 8.8.4.4/24 dev public", "link set public up", "link set lo up"] {
            let arguments: Vec<&str> =
                ["netns", "exec", outside, "ip"].into_iter().chain(command.split(' ')).collect();
            output("ip", &arguments);
        }
        Outside
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for arguments in [["link", "delete", Outside::UPLINK], ["netns", "delete", Outside::NAMESPACE]] {
            let _ = Command::new("ip").args(arguments).status();
        }
    }
}

#[test]
fn a_guest_cannot_fill_the_kernels_table_of_connections() {
    let Some(machine) = Machine::take() else { return };
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read");
    host::install(true).expect("installed");
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, OPEN));
    let (slot, outside) = (network.slot(), Outside::new());
    const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
    let number = |text: String| text.trim().parse::<u32>().expect("a number");
    let inside = || number(in_namespace(slot, &["cat", COUNT]));
    let on_host = || number(std::fs::read_to_string(COUNT).expect("read"));
    // Others on this machine open and end connections as well.
    const OTHERS: u32 = 500;
    let before = on_host();
    // Datagrams to ever other ports: each is a connection to the kernel.
    let flood = |address: Ipv4Addr| {
        let frame = datagram(slot, address);
        for port in 1..=firewall::MAX_CONNECTIONS as u16 + 1_000 {
            let mut frame = frame.clone();
            frame[36..38].copy_from_slice(&port.to_be_bytes());
            write_frame(&tap, &frame);
        }
    };
    flood(Ipv4Addr::new(8, 8, 4, 4));
    let (own, others) = (inside(), on_host() - before);
    eprintln!("connections: {own} in the namespace, {others} more on the host");
    assert!((1_000..=firewall::MAX_CONNECTIONS + 10).contains(&own), "{own}");
    assert!(others <= firewall::MAX_CONNECTIONS + OTHERS, "{others}");
    // A change of the policy begins the namespace's count anew, the host's goes on.
    network.set_policy(OPEN).expect("set");
    flood(Ipv4Addr::new(8, 8, 4, 5));
    let others = on_host().saturating_sub(before);
    assert!(others <= firewall::MAX_CONNECTIONS + OTHERS, "{others}");
    drop((tap, outside));
    network.destroy().expect("destroyed");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", forwarding).expect("restored");
    machine.check();
}

#[test]
fn rules_that_somebody_has_flushed_are_put_in_place_again() {
    let Some(machine) = Machine::take() else { return };
    let make = |policy| with_free_slot(|slot| CapsuleNetwork::create(slot, policy));
    let ((open, open_tap), (closed, closed_tap)) = (make(OPEN), make(CLOSED));
    let names = [open.slot().host_link_name(), closed.slot().host_link_name()];
    let handles = [open.policy_handle(), closed.policy_handle()];
    let links = || {
        let set = output("nft", &["list", "set", "inet", "wrenn", "internet"]);
        [0, 1].map(|which| set.contains(&format!("\"{}\"", names[which])))
    };
    assert!(!host::mend(&handles).expect("looked at"), "nothing was gone");
    // As it is after another capsule's creation was first to put the table in place again.
    let element = format!("{{ \"{}\" }}", names[0]);
    output("nft", &["delete", "element", "inet", "wrenn", "internet", &element]);
    assert!(!host::mend(&handles).expect("looked at"));
    assert_eq!(links(), [true, false]);
    // Where no other agent needs it.
    if existing_slots().expect("listed") == [open.slot(), closed.slot()] {
        output("nft", &["delete", "table", "inet", "wrenn"]);
        assert!(host::mend(&handles).expect("mended"), "it was gone");
        assert_eq!(links(), [true, false]);
        let chain = output("nft", &["list", "chain", "inet", "wrenn", "input"]);
        assert!(chain.contains("iifname \"wrenn-*\" drop"), "{chain}");
    }
    drop((open_tap, closed_tap));
    open.destroy().expect("destroyed");
    closed.destroy().expect("destroyed");
    // One that is being taken away is let out no more.
    assert!(!host::mend(&handles).expect("looked at") && !host::mend(&[]).expect("nothing to do"));
    assert_eq!(links(), [false, false]);
    machine.check();
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

#[test]
fn what_the_kernel_remembers_of_a_capsules_connections_goes_with_it() {
    let Some(machine) = Machine::take() else { return };
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("read");
    host::install(true).expect("installed");
    let make = || with_free_slot(|slot| CapsuleNetwork::create(slot, OPEN));
    let ((one, one_tap), (two, two_tap)) = (make(), make());
    let outside = Outside::new();
    // Of the host's namespace. The capsules' own have the same addresses, and go as a whole.
    let of = |slot: Slot| {
        let ends = [format!(" src={} ", slot.guest_link()), format!(" dst={} ", slot.host_ip())];
        let table = std::fs::read_to_string("/proc/net/nf_conntrack").expect("read");
        ends.map(|end| table.lines().filter(|line| line.contains(&end)).count())
    };
    let connections: u16 = 2_000;
    for (network, tap) in [(&one, &one_tap), (&two, &two_tap)] {
        let slot = network.slot();
        let mut frame = datagram(slot, Ipv4Addr::new(8, 8, 4, 4));
        for port in 1..=connections {
            frame[36..38].copy_from_slice(&port.to_be_bytes());
            write_frame(tap, &frame);
        }
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bound");
        socket.send_to(b"x", (slot.host_ip(), 9)).expect("sent");
    }
    let (from, other) = (one.slot(), two.slot());
    let before = of(other);
    assert!(of(from)[0] > usize::from(connections) / 2 && of(from)[1] > 0, "{:?}", of(from));
    drop(one_tap);
    let begun = std::time::Instant::now();
    one.destroy().expect("destroyed");
    eprintln!("{connections} connections forgotten with the rest after {:?}", begun.elapsed());
    assert_eq!(of(from), [0, 0]);
    assert_eq!(of(other), before, "another capsule's stay");
    drop((two_tap, outside));
    two.destroy().expect("destroyed");
    assert_eq!(of(other), [0, 0]);
    std::fs::write("/proc/sys/net/ipv4/ip_forward", forwarding).expect("restored");
    machine.check();
}

#[test]
fn capsules_do_not_reach_each_other_even_with_internet() {
    let Some(machine) = Machine::take() else { return };
    let make = || with_free_slot(|slot| CapsuleNetwork::create(slot, OPEN));
    let ((one, one_tap), (two, two_tap)) = (make(), make());
    let (from, to) = (one.slot(), two.slot());
    for address in [to.host_ip(), to.guest_link(), to.host_link()] {
        write_frame(&one_tap, &packet(from, from.guest_mac().0, GUEST, address, 49_983));
        assert!(read_frame(&one_tap, is_tcp_with(RST)).is_some(), "{address} is not refused");
    }
    // Were the first capsule's own rules gone, the host's would still hold.
    output("ip", &["netns", "exec", &from.namespace_name(), "nft", "flush", "ruleset"]);
    write_frame(&one_tap, &packet(from, from.guest_mac().0, GUEST, to.host_ip(), 49_983));
    assert_eq!(read_frame(&two_tap, is_tcp_with(0)), None, "the second guest has heard of it");
    drop((one_tap, two_tap));
    assert!(!host::remove_if_unused().expect("looked at"), "a table in use stays");
    one.destroy().expect("destroyed");
    two.destroy().expect("destroyed");
    machine.check();
}
