//! The guest itself through a real envd: defaults, figures, ports.

mod common;

use common::{Client, Daemon, PATIENCE, shell};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use wire::message::*;
use wire::session::{Event, StreamId};

#[test]
fn defaults_from_the_agent_hold_for_every_process() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let init = GuestInit {
        time_us: 0,
        default_user: "nobody".into(),
        environment: vec![("FROM_AGENT".into(), "yes".into())],
        entropy: [7u8; 32][..].into(),
    };
    let _: Done = client.ask(&init).expect("done");
    let start = ProcessStart { user: String::new(), cwd: "/".into(), ..shell("id -un; echo $FROM_AGENT") };
    assert_eq!(client.run(&start).expect("runs").stdout, b"nobody\nyes\n");
    let wrong = GuestInit { default_user: "who".into(), ..init };
    assert_eq!(client.ask::<_, Done>(&wrong).expect_err("refused").code(), Code::NotFound);
}

fn wall_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_micros() as u64
}

#[test]
fn a_resumed_guest_does_no_work_before_it_is_told_what_it_missed() {
    let daemon = Daemon::start();
    let mut other = daemon.client();
    let mut client = daemon.client();
    let reads = ProcessStart { stdin: true, ..shell("read line; echo $line") };
    let stream = client.open(&reads, false);
    let _: ProcessStarted = client.message(stream);
    let _: Done = client.ask(&GuestPrepareSnapshot {}).expect("synced");
    other.wait_for(|e| matches!(e, Event::Closed { .. }));
    // The guest that was saved goes on, as does what runs in it.
    assert_eq!(client.run(&shell("echo saved")).expect("runs").stdout, b"saved\n");
    client.send_all(stream, CHANNEL_STDIN, b"on\n");
    assert_eq!(client.finish(stream).stdout, b"on\n");

    // Who comes later comes to a guest that may be another one.
    let mut newer = daemon.client();
    let _: HealthReply = newer.ask(&Health {}).expect("health");
    let refused = |client: &mut Client| {
        let error = client.run(&shell("true")).expect_err("too early");
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        let error = client.ask::<_, FileEntry>(&FileStat { path: "/".into(), ..FileStat::default() });
        assert_eq!(error.expect_err("too early").code(), Code::Unavailable);
        let error = client.ask::<_, Done>(&GuestPrepareSnapshot {}).expect_err("too early");
        assert_eq!(error.code(), Code::Unavailable);
    };
    refused(&mut newer);
    let whole = GuestInit { time_us: wall_us(), entropy: [9u8; 64][..].into(), ..GuestInit::default() };
    for (lacking, code) in [
        (GuestInit { time_us: 0, ..whole.clone() }, Code::InvalidRequest),
        (GuestInit { entropy: [9u8; 16][..].into(), ..whole.clone() }, Code::InvalidRequest),
        (GuestInit { default_user: "who".into(), ..whole.clone() }, Code::NotFound),
    ] {
        assert_eq!(newer.ask::<_, Done>(&lacking).expect_err("refused").code(), code);
        refused(&mut newer);
    }
    let _: Done = newer.ask(&whole).expect("done");
    assert_eq!(newer.run(&shell("echo new")).expect("runs").stdout, b"new\n");
    // Sessions from before the resume are of no use any more.
    client.wait_for(|e| matches!(e, Event::Closed { .. }));
}

#[test]
fn no_session_is_trusted_when_the_one_that_had_it_saved_is_gone() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let _: Done = client.ask(&GuestPrepareSnapshot {}).expect("synced");
    drop(client);
    let mut newer = daemon.client();
    let error = newer.run(&shell("true")).expect_err("too early");
    assert_eq!(error.code(), Code::Unavailable);
}

#[test]
fn figures_are_plausible() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let first: GuestMetricsReply = client.ask(&GuestMetrics {}).expect("figures");
    std::thread::sleep(Duration::from_millis(50));
    let second: GuestMetricsReply = client.ask(&GuestMetrics {}).expect("figures");
    assert!(second.at_ms > first.at_ms && second.idle_ms + second.busy_ms >= first.idle_ms + first.busy_ms);
    assert!(first.processors >= 1 && first.processes >= 1);
    assert!(first.memory_available_bytes > 0 && first.memory_available_bytes < first.memory_total_bytes);
    assert!(first.disk_available_bytes <= first.disk_total_bytes && first.disk_total_bytes > 0);
}

fn connect(client: &mut Client, port: u16) -> Result<StreamId, Error> {
    let stream = client.open(&PortConnect { port }, false);
    client.answer::<Done>(stream).map(|Done {}| stream)
}

#[test]
fn loopback_services_are_reached_through_streams() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).expect("listen");
        let port = listener.local_addr().expect("address").port();
        let ports: PortListReply = client.ask(&PortList {}).expect("ports");
        assert!(ports.ports.contains(&(port, true)), "{ports:?}");
        // An echo that answers with everything doubled once its input has ended.
        let echo = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("accept");
            let mut all = Vec::new();
            socket.read_to_end(&mut all).expect("read");
            socket.write_all(&all).expect("write");
            socket.write_all(&all).expect("write");
        });
        let stream = connect(&mut client, port).expect("connected");
        let content: Vec<u8> = (0..2_000_000u32).map(|i| (i % 241) as u8).collect();
        client.send_all(stream, CHANNEL_PORT, &content);
        client.session.finish(stream).expect("half-close");
        let mut back = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while !client.has(|e| matches!(e, Event::Finished { stream: s } if *s == stream)) || back.is_empty() {
            client.turn(Duration::from_millis(10));
            back.extend(client.take_data(stream).into_iter().flat_map(|(_, b)| b));
            assert!(Instant::now() < deadline, "{} bytes came back", back.len());
        }
        back.extend(client.take_data(stream).into_iter().flat_map(|(_, b)| b));
        assert!(back == [&content[..], &content[..]].concat(), "{} bytes", back.len());
        echo.join().expect("echo");
    }
    let free = TcpListener::bind("127.0.0.1:0").expect("listen").local_addr().expect("address").port();
    let error = connect(&mut client, free).expect_err("nobody listens");
    assert_eq!((error.code(), error.errno), (Code::Unavailable, libc::ECONNREFUSED as u32));
    assert_eq!(connect(&mut client, 0).expect_err("no port").code(), Code::InvalidRequest);
    daemon.wait_until_clean(files);
}

#[test]
fn a_stream_that_is_reset_closes_its_connection() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let stream = connect(&mut client, listener.local_addr().expect("address").port()).expect("connected");
    let (mut socket, _) = listener.accept().expect("accept");
    socket.write_all(b"greeting").expect("write");
    client.wait_for(|e| matches!(e, Event::Data { .. }));
    client.session.reset(stream, Code::Cancelled, "enough");
    client.turn(Duration::from_millis(10));
    let mut rest = Vec::new();
    // An end or a reset, but no hang.
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let begin = Instant::now();
    let _ = socket.read_to_end(&mut rest);
    assert!(rest.is_empty() && begin.elapsed() < PATIENCE);
}

#[test]
fn figures_are_kept_each_second() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    std::thread::sleep(Duration::from_millis(2_500));
    let history = |client: &mut Client, after_ms| {
        let stream = client.open(&GuestMetricsHistory { after_ms }, true);
        let mut all = Vec::new();
        loop {
            match client.next_message(stream) {
                (GuestMetricsReply::KIND, body) => {
                    all.push(GuestMetricsReply::decode(&body).expect("figures").at_ms)
                }
                (kind, _) => {
                    assert_eq!(kind, Done::KIND);
                    return all;
                }
            }
        }
    };
    let all = history(&mut client, 0);
    assert!(all.len() >= 2 && all.windows(2).all(|pair| pair[1] >= pair[0] + 900), "{all:?}");
    // A reader gets what it lacks.
    let later = history(&mut client, all[0]);
    assert!(later.len() >= all.len() - 1 && later[0] == all[1], "{all:?} {later:?}");
}

#[test]
fn ports_are_told_as_they_come_and_go() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let there = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port_of = |l: &TcpListener| l.local_addr().expect("address").port();
    let stream = client.open(&PortWatch {}, false);
    let mut first = Vec::new();
    loop {
        match client.next_message(stream) {
            (PortChange::KIND, body) => first.push(PortChange::decode(&body).expect("a change")),
            (kind, _) => break assert_eq!(kind, Done::KIND),
        }
    }
    let own = first.iter().find(|c| c.port == port_of(&there)).expect("the port that was there");
    assert!(own.listening && own.loopback_only && own.pid == std::process::id(), "{own:?}");
    // Others on this machine listen too.
    let change_of = |client: &mut Client, port| loop {
        let (kind, body) = client.next_message(stream);
        assert_eq!(kind, PortChange::KIND);
        let change = PortChange::decode(&body).expect("a change");
        if change.port == port {
            return change;
        }
    };
    let new = TcpListener::bind("0.0.0.0:0").expect("listen");
    let port = port_of(&new);
    let change = change_of(&mut client, port);
    assert!(change.listening && !change.loopback_only && change.pid == std::process::id(), "{change:?}");
    drop(new);
    assert!(!change_of(&mut client, port).listening);
}

/// A guest may listen on as many ports as it likes: their owners are looked for together.
#[test]
fn hundreds_of_ports_hold_nobody_up() {
    const PORTS: usize = 800;
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let there: Vec<_> = (0..PORTS).map(|_| TcpListener::bind("127.0.0.1:0").expect("listen")).collect();
    let begin = Instant::now();
    let stream = client.open(&PortWatch {}, false);
    let mut told = std::collections::BTreeMap::new();
    while let (PortChange::KIND, body) = client.next_message(stream) {
        let change = PortChange::decode(&body).expect("a change");
        told.insert(change.port, change.pid);
    }
    let took = begin.elapsed();
    for listener in &there {
        let port = listener.local_addr().expect("address").port();
        assert_eq!(told.get(&port), Some(&std::process::id()), "port {port}");
    }
    assert!(took < Duration::from_secs(1), "it took {took:?}");
}
