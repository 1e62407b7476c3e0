//! Processes through a real envd: starts, output, input, ends.

mod common;

use common::{Client, Daemon, PATIENCE, SECRET, command, shell};
use std::time::{Duration, Instant};
use wire::message::*;
use wire::session::{Event, Limits, SessionError};

#[test]
fn exit_codes_and_signals_are_told_exactly() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let code = |client: &mut Client, argv: &[&str]| client.run(&command(argv)).expect("runs").exit;
    assert_eq!(code(&mut client, &["true"]).exit_code, 0);
    assert_eq!(code(&mut client, &["false"]).exit_code, 1);
    assert_eq!(code(&mut client, &["sh", "-c", "exit 255"]).exit_code, 255);
    for signal in [1, 9, 15, 11] {
        let exit = code(&mut client, &["sh", "-c", &format!("kill -{signal} $$")]);
        assert_eq!((exit.exit_code, exit.signal, exit.timed_out), (0, signal, false));
    }
    daemon.wait_until_clean(files);
}

#[test]
fn health_tells_the_version() {
    let daemon = Daemon::start();
    let reply: HealthReply = daemon.client().ask(&Health {}).expect("healthy");
    assert_eq!(reply.version, env!("CARGO_PKG_VERSION"));
}

#[test]
fn failures_to_start_are_clear_and_at_once() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let mut error = |start: &ProcessStart| client.run(start).expect_err("cannot start");
    let e = error(&command(&["no-such-program"]));
    assert_eq!((e.code(), e.errno), (Code::NotFound, libc::ENOENT as u32));
    assert!(e.text.starts_with("command not found: no-such-program"), "{}", e.text);
    let e = error(&command(&["/etc/passwd"]));
    assert_eq!((e.code(), e.errno), (Code::PermissionDenied, libc::EACCES as u32));
    let e = error(&ProcessStart { cwd: "/no/such/place".into(), ..command(&["true"]) });
    assert_eq!((e.code(), e.errno), (Code::NotFound, libc::ENOENT as u32));
    assert!(e.text.contains("working directory /no/such/place"), "{}", e.text);
    let e = error(&ProcessStart { user: "nobody-at-all".into(), ..command(&["true"]) });
    assert_eq!(e.code(), Code::NotFound);
    assert!(e.text.contains("account"), "{}", e.text);
    let e = error(&command(&[]));
    assert_eq!(e.code(), Code::InvalidRequest);
    daemon.wait_until_clean(files);
}

#[test]
fn environment_directory_and_user_are_those_asked_for() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let output = |client: &mut Client, start: &ProcessStart| {
        let finished = client.run(start).expect("runs");
        assert_eq!(finished.exit.exit_code, 0, "{}", String::from_utf8_lossy(&finished.stderr));
        String::from_utf8(finished.stdout).expect("text")
    };
    let start = ProcessStart {
        environment: vec![("GREETING".into(), "hello there".into())],
        cwd: "/usr".into(),
        ..shell("echo $GREETING; pwd; echo $HOME")
    };
    assert_eq!(output(&mut client, &start), "hello there\n/usr\n/root\n");
    assert_eq!(output(&mut client, &command(&["pwd"])), "/root\n");
    let start = ProcessStart { user: "nobody".into(), cwd: "/".into(), ..shell("id -un; id -u; echo $USER") };
    assert_eq!(output(&mut client, &start), "nobody\n65534\nnobody\n");
    // No signal is ignored or blocked, no descriptor of envd's is open, it leads its own session.
    let status = output(&mut client, &command(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]));
    assert_eq!(status, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    let files = output(&mut client, &command(&["ls", "/proc/self/fd"]));
    assert_eq!(files, "0\n1\n2\n3\n");
    let session = output(
        &mut client,
        &shell(
            "read pid comm state ppid group session rest < /proc/$$/stat; [ $pid = $session ] && [ $group = $pid ] && echo own",
        ),
    );
    assert_eq!(session, "own\n");
    assert_eq!(output(&mut client, &shell("cat /proc/self/oom_score_adj")), "500\n");
}

#[test]
fn output_of_both_kinds_comes_whole_and_in_order() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let finished = client.run(&shell("echo out; echo err >&2; echo more")).expect("runs");
    assert_eq!((&finished.stdout[..], &finished.stderr[..]), (&b"out\nmore\n"[..], &b"err\n"[..]));
    let finished = client.run(&shell("seq 1 2000000")).expect("runs");
    let expected: String = (1..=2_000_000).map(|n| format!("{n}\n")).collect();
    assert!(finished.stdout == expected.as_bytes(), "{} bytes", finished.stdout.len());
}

#[test]
fn a_slow_reader_stops_the_process_and_nobody_else() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let slow = client.open(&shell("yes"), true);
    client.message::<ProcessStarted>(slow);
    // What comes is not released, so the credit runs out.
    for _ in 0..50 {
        client.turn(Duration::from_millis(10));
    }
    let held = daemon.status_kb("VmRSS");
    for _ in 0..50 {
        client.turn(Duration::from_millis(10));
    }
    assert!(daemon.status_kb("VmRSS") <= held + 256, "it buffers without end");
    assert_eq!(client.run(&shell("echo quick")).expect("runs").stdout, b"quick\n");
    // It goes on when it is read, and it ends when its stream does.
    assert!(client.take_data(slow).iter().map(|(_, b)| b.len()).sum::<usize>() > 100_000);
    client.turn(Duration::from_millis(100));
    assert!(!client.take_data(slow).is_empty());
    client.session.reset(slow, Code::Cancelled, "enough");
    client.turn(Duration::from_millis(10));
    let deadline = Instant::now() + PATIENCE;
    while daemon.children() > 0 {
        assert!(Instant::now() < deadline, "the process outlives its stream");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn input_reaches_the_process_and_its_end_too() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let stream = client.open(&ProcessStart { stdin: true, ..command(&["cat"]) }, false);
    client.message::<ProcessStarted>(stream);
    client.send_all(stream, CHANNEL_STDIN, b"line\n");
    let event = client.wait_for(|e| matches!(e, Event::Data { .. }));
    assert!(matches!(event, Event::Data { channel: 1, ref bytes, .. } if bytes == b"line\n"));
    client.session.finish(stream).expect("half-close");
    assert_eq!(client.finish(stream).exit.exit_code, 0);

    // Far more than any buffer, through sha256sum, which answers only at the end.
    let stream = client.open(&ProcessStart { stdin: true, ..command(&["sha256sum"]) }, false);
    client.message::<ProcessStarted>(stream);
    client.send_all(stream, CHANNEL_STDIN, &vec![b'a'; 5_000_000]);
    client.session.finish(stream).expect("half-close");
    let finished = client.finish(stream);
    let expected = std::process::Command::new("sh")
        .args(["-c", "head -c 5000000 /dev/zero | tr '\\0' a | sha256sum"])
        .output()
        .expect("oracle");
    assert_eq!(finished.stdout, expected.stdout);

    // A process that does not read its input ends all the same.
    let stream = client.open(&ProcessStart { stdin: true, ..command(&["true"]) }, false);
    client.message::<ProcessStarted>(stream);
    let _ = client.session.send_data(stream, CHANNEL_STDIN, &[0; 100_000]);
    assert_eq!(client.finish(stream).exit.exit_code, 0);
    let _ = client.session.finish(stream);

    // Without stdin there is an empty one.
    assert_eq!(client.run(&command(&["cat"])).expect("runs").exit.exit_code, 0);
    daemon.wait_until_clean(files);
}

#[test]
fn signals_reach_the_whole_group() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let stream =
        client.open(&ProcessStart { tag: "victim".into(), ..shell("sleep 1000 & sleep 1000; true") }, true);
    let started: ProcessStarted = client.message(stream);
    let list: ProcessListReply = client.ask(&ProcessList {}).expect("list");
    assert_eq!(list.processes[0].0, (started.pid, "victim".to_string()));
    let _: Done = client.ask(&ProcessSignal { selector: "victim".into(), signal: 15 }).expect("signal");
    assert_eq!(client.finish(stream).exit.signal, 15);
    assert_eq!(
        std::process::Command::new("pgrep")
            .args(["-r", "R,S,D,T", "-g", &started.pid.to_string()])
            .output()
            .expect("pgrep")
            .stdout,
        b""
    );
    let error = client
        .ask::<_, Done>(&ProcessSignal { selector: started.pid.to_string(), signal: 9 })
        .expect_err("gone");
    assert_eq!(error.code(), Code::NotFound);
    let error =
        client.ask::<_, Done>(&ProcessSignal { selector: "victim".into(), signal: 65 }).expect_err("gone");
    assert_eq!(error.code(), Code::NotFound);
}

#[test]
fn time_limits_end_a_process_even_one_that_resists() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let begin = Instant::now();
    let finished =
        client.run(&ProcessStart { timeout_ms: 200, ..command(&["sleep", "1000"]) }).expect("runs");
    assert_eq!((finished.exit.signal, finished.exit.timed_out), (15, true));
    assert!((150..2000).contains(&finished.exit.duration_ms), "{}", finished.exit.duration_ms);
    let stubborn = ProcessStart { timeout_ms: 200, ..shell("trap '' TERM; while :; do sleep 0.1; done") };
    let finished = client.run(&stubborn).expect("runs");
    assert_eq!((finished.exit.signal, finished.exit.timed_out), (9, true));
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_a_command_leaves_running_does_not_hold_it_up() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let begin = Instant::now();
    // The child left behind writes later; SIGPIPE must not end it.
    let mark = std::env::temp_dir().join(format!("envd-left-{}", std::process::id()));
    let script = format!("(sleep 1; echo late; echo done > {}) & echo now", mark.display());
    let finished = client.run(&shell(&script)).expect("runs");
    assert_eq!(finished.stdout, b"now\n");
    assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
    let deadline = Instant::now() + PATIENCE;
    while !mark.exists() {
        assert!(Instant::now() < deadline, "the child left behind was ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::remove_file(&mark).expect("clean up");
}

#[test]
fn a_detached_process_is_watched_again_from_any_byte() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let script = "echo first; read line; echo got $line; seq 1 100000; exit 7";
    let start = ProcessStart { detached: true, stdin: true, tag: "job".into(), ..shell(script) };
    let started: ProcessStarted = client.ask(&start).expect("starts");
    let error = client.ask::<_, ProcessStarted>(&start).expect_err("the tag is taken");
    assert_eq!(error.code(), Code::AlreadyExists);

    // The process outlives the connection that started it.
    drop(client);
    let mut client = daemon.client();
    let watch = client.open(&ProcessAttach { selector: "job".into(), from_byte: 0 }, false);
    let attached: ProcessAttached = client.message(watch);
    assert_eq!((attached.pid, attached.from_byte), (started.pid, 0));
    // The second comes once there are six bytes to leave out.
    client.wait_for(|e| matches!(e, Event::Data { .. }));
    let mut other = daemon.client();
    let second = other.open(&ProcessAttach { selector: started.pid.to_string(), from_byte: 6 }, true);
    assert_eq!(other.message::<ProcessAttached>(second).from_byte, 6);
    let second = std::thread::spawn(move || other.finish(second));
    client.send_all(watch, CHANNEL_STDIN, b"input\n");
    let finished = client.finish(watch);
    let numbers: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    let expected = format!("first\ngot input\n{numbers}");
    assert_eq!(finished.exit.exit_code, 7);
    assert!(finished.stdout == expected.as_bytes()[6..]);
    assert!(second.join().expect("the second watcher").stdout == expected.as_bytes()[6..]);

    // Its result is kept, and the tail of its output; what is lost is told.
    let third = client.open(&ProcessAttach { selector: "job".into(), from_byte: 0 }, true);
    let from = client.message::<ProcessAttached>(third).from_byte as usize;
    assert_eq!(from, expected.len() - 256 * 1024);
    let finished = client.finish(third);
    assert!(finished.stdout == expected.as_bytes()[from..]);
    assert_eq!(finished.exit.exit_code, 7);
    let list: ProcessListReply = client.ask(&ProcessList {}).expect("list");
    assert!(list.processes.is_empty());
    drop(client);
    daemon.wait_until_clean(files - 1);
}

#[test]
fn a_thousand_streams_at_once_lose_nothing() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let streams: Vec<_> = (0..1000)
        .map(|i| client.open(&shell(&format!("echo {i}; read x; seq 1 200; echo {i}")), true))
        .collect();
    for stream in &streams {
        client.message::<ProcessStarted>(*stream);
    }
    let numbers: String = (1..=200).map(|n| format!("{n}\n")).collect();
    for (i, stream) in streams.into_iter().enumerate() {
        let finished = client.finish(stream);
        assert_eq!(finished.stdout, format!("{i}\n{numbers}{i}\n").as_bytes());
    }
    daemon.wait_until_clean(files);
}

#[test]
fn a_killed_process_is_gone_at_once() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let start = ProcessStart { detached: true, tag: "again".into(), ..command(&["sleep", "1000"]) };
    for _ in 0..50 {
        // The tag of the one before is free, reaped or not.
        client.ask::<_, ProcessStarted>(&start).expect("starts");
        client.ask::<_, Done>(&ProcessSignal { selector: "again".into(), signal: 9 }).expect("killed");
        let list: ProcessListReply = client.ask(&ProcessList {}).expect("list");
        assert!(list.processes.is_empty(), "{list:?}");
    }
}

/// More than may wait on a stream, and more than its window.
#[test]
fn a_long_list_of_processes_comes_whole() {
    const RUNNING: usize = 700;
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let long = "x".repeat(1000);
    let start = command(&["sh", "-c", "exec sleep 1000", &long]);
    let streams: Vec<_> = (0..RUNNING).map(|_| client.open(&start, true)).collect();
    for stream in &streams {
        client.message::<ProcessStarted>(*stream);
    }
    let list = client.open(&ProcessList {}, true);
    let mut pids = std::collections::BTreeSet::new();
    while pids.len() < RUNNING {
        for ((pid, _), argv) in client.message::<ProcessListReply>(list).processes {
            assert!(pids.insert(pid) && argv.len() == 4, "{pid} {argv:?}");
        }
    }
    client.wait_for(|e| matches!(e, Event::Finished { stream } if *stream == list));
    drop(client);
    daemon.wait_until_clean(files - 1);
}

#[test]
fn terminals_have_job_control_and_a_size() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let start = ProcessStart { terminal_columns: 100, terminal_rows: 30, ..command(&["/bin/sh"]) };
    let stream = client.open(&start, false);
    client.message::<ProcessStarted>(stream);
    let mut seen = String::new();
    let mut expect = |client: &mut Client, input: &str, wanted: &str| {
        client.send_all(stream, CHANNEL_TERMINAL, input.as_bytes());
        let deadline = Instant::now() + PATIENCE;
        while !seen.contains(wanted) {
            client.turn(Duration::from_millis(20));
            for (channel, bytes) in client.take_data(stream) {
                assert_eq!(channel, CHANNEL_TERMINAL);
                seen.push_str(&String::from_utf8_lossy(&bytes));
            }
            assert!(Instant::now() < deadline, "{wanted:?} is not in {seen:?}");
        }
        seen.clear();
    };
    expect(&mut client, "stty size; echo $TERM; tty\n", "30 100\r\nxterm-256color\r\n/dev/pts/");
    // What the line discipline rubs out is a character, however many bytes it has.
    expect(&mut client, "printf '%s\\n' gr\u{fc}n\u{20ac}\x7f | tr a-z A-Z\n", "GR\u{fc}N\r\n");
    client.session.send(stream, &TerminalResize { columns: 77, rows: 11 }).expect("resize");
    expect(&mut client, "stty size\n", "11 77");
    expect(&mut client, "sleep 1000; echo code=$?\n", "sleep 1000");
    std::thread::sleep(Duration::from_millis(200));
    expect(&mut client, "\x03", "^C");
    expect(&mut client, "echo code=$?\n", "code=130");
    expect(&mut client, "sleep 1000\n", "sleep 1000");
    std::thread::sleep(Duration::from_millis(200));
    expect(&mut client, "\x1a", "topped");
    client.send_all(stream, CHANNEL_TERMINAL, b"kill -KILL %1; wait\nexit 3\nexit 3\n");
    assert_eq!(client.finish(stream).exit.exit_code, 3);
    daemon.wait_until_clean(files);
}

#[test]
fn a_terminal_ends_with_its_stream() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let start = ProcessStart { terminal_columns: 80, terminal_rows: 24, ..command(&["/bin/bash", "-i"]) };
    let stream = client.open(&start, false);
    client.message::<ProcessStarted>(stream);
    client.wait_for(|e| matches!(e, Event::Data { .. }));
    let begin = Instant::now();
    client.session.reset(stream, Code::Cancelled, "enough");
    client.turn(Duration::from_millis(1));
    daemon.wait_until_clean(files);
    assert!(begin.elapsed() < Duration::from_millis(1500), "it had to be killed: {:?}", begin.elapsed());
}

#[test]
fn who_has_not_the_secret_is_refused() {
    let daemon = Daemon::start();
    for (identity, secret) in [("agent", &b"guess"[..]), ("cp", SECRET)] {
        let mut client = Client::dial(&daemon.address, identity, secret, Limits::default());
        let event = client.wait_for(|e| matches!(e, Event::Ready { .. } | Event::Closed { .. }));
        assert!(matches!(event, Event::Closed { error: SessionError::ByPeer(7, _) }), "{event:?}");
    }
    // Strangers that say nothing cannot keep the agent out.
    let idle: Vec<_> =
        (0..30).map(|_| std::net::TcpStream::connect(&daemon.address).expect("connect")).collect();
    let reply: HealthReply = daemon.client().ask(&Health {}).expect("healthy");
    assert!(!reply.version.is_empty());
    drop(idle);
}

#[test]
fn unknown_and_malformed_messages_are_answered() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let stream = client.session.open_raw(vec![0x7f, 0xff, 0, 0], true).expect("open");
    assert_eq!(client.answer::<Done>(stream).expect_err("unknown").code(), Code::Unimplemented);
    let stream = client.session.open_raw(vec![0x02, 0x00, 0xff, 0xff, 0xff, 0xff], true).expect("open");
    assert_eq!(client.answer::<Done>(stream).expect_err("malformed").code(), Code::InvalidRequest);
    assert!(client.ask::<_, HealthReply>(&Health {}).is_ok());
}
