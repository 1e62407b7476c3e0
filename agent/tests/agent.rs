//! The agent as a program, driven over the wire protocol. The first tests need no guest; the others boot
//! real virtual machines and need WRENN_TEST_DIR, a directory with `kernels/` and `images/minimal/`.

mod common;

use common::{Agent, Client, PATIENCE, Place, SECRET, SmallStorage, creation, free_address, guest_directory};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use wire::auth::{ITERATIONS, Verifier};
use wire::codec::Bytes;
use wire::message::{
    CapsuleCreate, CapsuleGet, CapsuleInfo, CapsuleList, CapsuleState, Code, Done, Error, Forward, Health,
    HealthReply, HostStatus, HostStatusReply, Message, ProcessStart, ProcessStarted,
};
use wire::session::Event;
use wrenn_agent::capsule::FIRST_UID;
use wrenn_agent::net::{CapsuleNetwork, Policy, Slot};

/// A kernel for tests without a guest: present, but nothing that runs.
fn with_files(place: &Place, kernel: &[u8]) {
    place.write_new("kernels/vmlinux", kernel);
    place.write_new("kernels/initramfs.img", b"nothing");
    place.write_new("images/minimal/rootfs.ext4", &vec![0; 1 << 20]);
}

/// A cpio archive (newc, see cpio(5)) that has only its trailer.
const EMPTY_CPIO: &str = "070701000000000000000000000000000000000000000100000000000000000000000000000000000000000000\
    000000000000000B00000000TRAILER!!!\0\0\0\0";

/// An ELF kernel that QEMU starts by its PVH note and that does nothing for ever: `cli; hlt; jmp`.
fn spinning_kernel() -> Vec<u8> {
    const BASE: u32 = 0x10_0000;
    const HEADERS: usize = 64 + 2 * 56;
    const NOTE: usize = HEADERS;
    const CODE: usize = 0x1000;
    let mut elf = vec![0; CODE + 16];
    elf[..16].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let put = |at: usize, bytes: &[u8], elf: &mut Vec<u8>| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes(), &mut elf); // ET_EXEC
    put(18, &62u16.to_le_bytes(), &mut elf); // EM_X86_64
    put(20, &1u32.to_le_bytes(), &mut elf);
    put(24, &u64::from(BASE).to_le_bytes(), &mut elf); // entry
    put(32, &64u64.to_le_bytes(), &mut elf); // program headers
    put(52, &64u16.to_le_bytes(), &mut elf);
    put(54, &56u16.to_le_bytes(), &mut elf);
    put(56, &2u16.to_le_bytes(), &mut elf);
    let segment = |at: usize, kind: u32, offset: u64, address: u64, size: u64, elf: &mut Vec<u8>| {
        put(at, &kind.to_le_bytes(), elf);
        put(at + 4, &7u32.to_le_bytes(), elf);
        for (field, value) in [(8, offset), (16, address), (24, address), (32, size), (40, size), (48, 4)] {
            put(at + field, &value.to_le_bytes(), elf);
        }
    };
    segment(64, 1, CODE as u64, u64::from(BASE), 16, &mut elf); // PT_LOAD
    segment(120, 4, NOTE as u64, 0, 20, &mut elf); // PT_NOTE
    // XEN_ELFNOTE_PHYS32_ENTRY (18) of xen/include/public/elfnote.h: the 32-bit entry point.
    for (at, word) in [(0, 4), (4, 4), (8, 18)] {
        put(NOTE + at, &u32::to_le_bytes(word), &mut elf);
    }
    put(NOTE + 12, b"Xen\0", &mut elf);
    put(NOTE + 16, &BASE.to_le_bytes(), &mut elf);
    put(CODE, &[0xfa, 0xf4, 0xeb, 0xfd], &mut elf);
    elf
}

fn assert_nothing_left(place: &Place) {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let remains = place.remains();
        if remains.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "left: {remains:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn code(error: &Error) -> Code {
    error.code()
}

#[test]
fn a_host_says_what_it_is_and_refuses_what_it_cannot_do() {
    let place = Place::new(0);
    with_files(&place, b"no kernel");
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let health: HealthReply = cp.ask(&Health {}).expect("health");
    assert_eq!(health.version, env!("CARGO_PKG_VERSION"));
    let status: HostStatusReply = cp.ask(&HostStatus {}).expect("status");
    assert_eq!((status.arch.as_str(), status.vcpus_reserved), ("x86_64", 0));
    assert!(status.memory_reserved_mb >= 512 && status.memory_reserved_mb < status.memory_mb, "{status:?}");
    assert!(status.memory_mb > 0 && status.cpu_cores > 0 && status.disk_mb > 0, "{status:?}");
    assert_eq!(status.templates, ["minimal"]);
    assert!(status.vmm.starts_with("qemu "), "{}", status.vmm);

    let good = creation("cl-refused");
    for (request, expected) in [
        (CapsuleCreate { capsule_id: "../x".into(), ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { capsule_id: String::new(), ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { template: "../minimal".into(), ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { template: "unknown".into(), ..good.clone() }, Code::NotFound),
        (CapsuleCreate { memory_mb: 1, ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { memory_mb: status.memory_mb, ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { vcpus: 0, ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { vcpus: 65, ..good.clone() }, Code::InvalidRequest),
        (CapsuleCreate { deadline_ms: 700_000, ..good.clone() }, Code::InvalidRequest),
    ] {
        let error = cp.ask::<_, CapsuleInfo>(&request).expect_err("refused");
        assert_eq!(code(&error), expected, "{error} for {request:?}");
        assert!(error.text.len() > 20, "{error}");
    }
    let error = cp.destroy("cl-unknown").expect_err("unknown");
    assert_eq!(code(&error), Code::NotFound);
    let error = cp.exec("cl-unknown", &["true"]).expect_err("unknown");
    assert_eq!(code(&error), Code::NotFound);
    let (kind, _) = cp.request(&CapsuleList {});
    assert_eq!(kind, Done::KIND);
    let stream = cp.session.open_raw(vec![0x7f, 0xff, 0, 0], true).expect("opened");
    let (_, body) = cp.answer(stream);
    assert_eq!(Error::decode(&body).map(|e| e.code()), Ok(Code::Unimplemented));
    let stream = cp.session.open_raw(vec![0x01, 0x00, 9], true).expect("opened");
    let (_, body) = cp.answer(stream);
    assert_eq!(Error::decode(&body).map(|e| e.code()), Ok(Code::InvalidRequest));
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

#[test]
fn only_the_control_plane_gets_in() {
    let place = Place::new(1);
    with_files(&place, b"no kernel");
    let agent = Agent::start(&place);
    for (identity, secret) in [("cp", &b"guess"[..]), ("agent", SECRET), ("root", b"")] {
        let mut stranger = Client::connecting(agent.address, identity, secret);
        let error = stranger.end();
        assert!(error.to_string().contains("secret is wrong"), "{identity}: {error}");
    }
    // Nor do strangers who say nothing keep it out.
    let strangers: Vec<_> = (0..80).map(|_| TcpStream::connect(agent.address).expect("connected")).collect();
    let mut cp = agent.client();
    assert_eq!(strangers.len(), 80);
    cp.ask::<_, HealthReply>(&Health {}).expect("health");
    assert!(agent.terminate().success());
}

#[test]
fn a_directory_has_one_agent_and_an_unregistered_host_none() {
    let place = Place::new(2);
    with_files(&place, b"no kernel");
    let agent = Agent::start(&place);
    let output = Agent::command(&place, free_address()).output().expect("run");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("another wrenn-agent uses"), "{text}");
    assert!(agent.terminate().success());

    fs::remove_file(place.directory.join("host-token")).expect("removed");
    let output = Agent::command(&place, free_address()).output().expect("run");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--register - --address IP:PORT"), "{text}");
}

/// A control plane of which only the HTTP side is there: gives the requests that it is sent, and answers
/// each with what `answer` makes of its first line.
fn control_plane(answer: fn(&str) -> String) -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = listener.local_addr().expect("address");
    let (sender, requests) = channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
            while !request.ends_with(b"}") {
                let n = stream.read(&mut chunk).expect("read");
                assert!(n > 0, "the request was cut off");
                request.extend_from_slice(&chunk[..n]);
            }
            let request = String::from_utf8(request).expect("text");
            let body = answer(request.lines().next().unwrap_or_default());
            stream.write_all(body.as_bytes()).expect("written");
            if sender.send(request).is_err() {
                return;
            }
        }
    });
    (address, requests)
}

fn good_answers(line: &str) -> String {
    if !line.contains("/register") {
        return "HTTP/1.1 204 No Content\r\n\r\n".into();
    }
    let verifier = Verifier::new(SECRET, &[7; 16], ITERATIONS).to_text();
    format!(
        "HTTP/1.1 201 Created\r\n\r\n{{\"host\":{{\"id\":\"host-42\"}},\"token\":\"jwt-42\",\
         \"refresh_token\":\"r\",\"wire_verifier\":\"{verifier}\"}}"
    )
}

fn no_answers(_: &str) -> String {
    let body = r#"{"error":{"code":"unauthorized","message":"the token has expired"}}"#;
    format!("HTTP/1.1 401 Unauthorized\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn a_host_registers_once_and_then_sends_heartbeats() {
    let place = Place::new(11);
    with_files(&place, b"no kernel");
    let token_file = place.directory.join("host-token");
    fs::remove_file(&token_file).expect("removed");
    let register = |url: SocketAddr| {
        let mut command = Agent::command(&place, free_address());
        command.args(["--register", "-", "--address", "10.0.0.9:50051", "--register-only"]);
        command.env("WRENN_CP_URL", format!("http://{url}")).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let stdin = child.stdin.take();
        stdin.expect("stdin").write_all(b"one-time-token\n").expect("token");
        child.wait_with_output().expect("run")
    };
    let (address, _) = control_plane(no_answers);
    let output = register(address);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("the token has expired"), "{text}");
    assert!(!token_file.exists());

    let (address, requests) = control_plane(good_answers);
    assert!(register(address).status.success());
    let request = requests.recv_timeout(PATIENCE).expect("a request");
    assert!(
        request.contains("\"token\":\"one-time-token\"") && request.contains("10.0.0.9:50051"),
        "{request}"
    );
    assert_eq!(fs::metadata(&token_file).expect("saved").permissions().mode() & 0o777, 0o600);

    let agent = Agent::start_with(&place, |command| {
        command.env("WRENN_CP_URL", format!("http://{address}"));
    });
    let request = requests.recv_timeout(PATIENCE).expect("a heartbeat");
    assert!(request.starts_with("POST /v1/hosts/host-42/heartbeat "), "{request}");
    assert!(request.contains("x-host-token: jwt-42"), "{request}");
    agent.client();
    assert!(agent.terminate().success());
}

#[test]
fn a_bad_configuration_is_named() {
    let place = Place::new(3);
    for (name, value) in [("WRENN_HOST_LISTEN_ADDR", "50051"), ("WRENN_HSOT", "x"), ("LOG_LEVEL", "loud")] {
        let output = Agent::command(&place, free_address()).env(name, value).output().expect("run");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(name), "{text}");
    }
    let output = Agent::command(&place, free_address()).arg("--help").output().expect("run");
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("WRENN_CP_URL"));
    let output = Agent::command(&place, free_address()).arg("--version").output().expect("run");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        concat!("wrenn-agent ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn a_guest_that_never_comes_up_fails_by_its_deadline_with_nothing_left() {
    let place = Place::new(4);
    with_files(&place, &spinning_kernel());
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let begun = Instant::now();
    let request = CapsuleCreate { deadline_ms: 1_500, ..creation("cl-spin") };
    let error = cp.ask::<_, CapsuleInfo>(&request).expect_err("never up");
    let took = begun.elapsed();
    assert_eq!(code(&error), Code::DeadlineExceeded, "{error}");
    assert!(error.text.contains("guest daemon"), "{error}");
    assert!(took >= Duration::from_millis(1_450) && took < Duration::from_secs(10), "{took:?}");
    assert_eq!(place.remains(), Vec::<String>::new(), "undone before the answer");
    // The same id and slot can be used again at once, and a caller that goes away cancels.
    let stream = cp.session.open(&creation("cl-spin"), true).expect("opened");
    let end = Instant::now() + PATIENCE;
    while place.machines().is_empty() {
        cp.ask::<_, HealthReply>(&Health {}).expect("health");
        assert!(Instant::now() < end, "no machine");
    }
    let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: "cl-spin".into() }).expect("known");
    assert_eq!(info.state, CapsuleState::Starting);
    let error = cp.ask::<_, CapsuleInfo>(&creation("cl-spin")).expect_err("twice");
    assert_eq!(code(&error), Code::AlreadyExists);
    let error = cp.exec("cl-spin", &["true"]).expect_err("not running");
    assert_eq!(code(&error), Code::InvalidState);
    cp.session.reset(stream, Code::Cancelled, "changed my mind");
    cp.ask::<_, HealthReply>(&Health {}).expect("health");
    assert_nothing_left(&place);
    // So does one whose connection breaks.
    let mut other = agent.client();
    other.session.open(&creation("cl-spin"), true).expect("opened");
    while place.sandboxes().is_empty() {
        other.ask::<_, HealthReply>(&Health {}).expect("health");
        assert!(Instant::now() < end, "no capsule");
    }
    drop(other);
    assert_nothing_left(&place);
    assert!(agent.terminate().success());
}

#[test]
fn a_slot_that_is_somebody_elses_is_left_alone() {
    let place = Place::new(13);
    with_files(&place, &spinning_kernel());
    let agent = Agent::start(&place);
    // Made after the agent has looked: two slots that it believes to be free.
    let others: Vec<CapsuleNetwork> = (0..2)
        .map(|n| {
            let slot = Slot::new(place.first_slot + n).expect("a slot");
            CapsuleNetwork::create(slot, &Policy::CLOSED).expect("made").0
        })
        .collect();
    let mut cp = agent.client();
    let stream = cp.session.open(&creation("cl-third"), true).expect("opened");
    let end = Instant::now() + PATIENCE;
    while place.machines().is_empty() {
        cp.ask::<_, HealthReply>(&Health {}).expect("health");
        assert!(Instant::now() < end, "no machine");
    }
    let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: "cl-third".into() }).expect("known");
    let third = Slot::new(place.first_slot + 2).expect("a slot");
    assert_eq!(info.host_ip, third.host_ip().to_string());
    let status = fs::read_to_string(format!("/proc/{}/status", place.machines()[0])).expect("status");
    assert!(status.contains(&format!("Uid:\t{}", FIRST_UID + third.index())), "{status}");
    cp.session.reset(stream, Code::Cancelled, "enough");
    assert!(agent.terminate().success());
    assert_eq!(place.remains().len(), 4, "the others' namespaces and links: {:?}", place.remains());
    others.into_iter().for_each(|other| other.destroy().expect("destroyed"));
    assert_eq!(place.remains(), Vec::<String>::new());
}

#[test]
fn a_machine_that_ends_while_it_boots_is_a_clear_error() {
    let place = Place::new(5);
    with_files(&place, b"this is no kernel");
    let agent = Agent::start(&place);
    let error = agent.client().create("cl-broken").expect_err("no kernel");
    assert_eq!(code(&error), Code::Unavailable, "{error}");
    assert!(error.text.contains("virtual machine ended"), "{error}");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

#[test]
fn an_agent_that_is_killed_leaves_nothing_after_its_next_start() {
    let place = Place::new(6);
    with_files(&place, &spinning_kernel());
    // At several moments of a create, the machine's start among them.
    for wait_ms in [0, 5, 10, 20, 40, 80, 300] {
        let mut agent = Agent::start(&place);
        let mut cp = agent.client();
        cp.session.open(&creation("cl-orphan"), true).expect("opened");
        cp.ask::<_, HealthReply>(&Health {}).expect("health");
        std::thread::sleep(Duration::from_millis(wait_ms));
        agent.child.kill().expect("killed");
        agent.wait();
        let before = place.remains();
        assert!(!before.is_empty() || wait_ms < 300, "killed before anything was made");
        let agent = Agent::start(&place);
        assert_eq!(place.remains(), Vec::<String>::new(), "{wait_ms} ms, before: {before:?}");
        assert!(agent.terminate().success());
    }
}

#[test]
fn a_host_that_has_no_room_says_what_is_short_and_has_room_again() {
    let place = Place::new(14);
    with_files(&place, &spinning_kernel());
    let agent = Agent::start_with(&place, |command| {
        command.env("WRENN_VCPU_OVERCOMMIT", "1").env("WRENN_DISK_OVERCOMMIT", "1");
    });
    let mut cp = agent.client();
    let before: HostStatusReply = cp.ask(&HostStatus {}).expect("status");
    let cores = before.cpu_cores;
    // More than it could ever have is the request's fault.
    let request = CapsuleCreate { vcpus: cores + 1, ..creation("cl-never") };
    let error = cp.ask::<_, CapsuleInfo>(&request).expect_err("too large");
    let expected =
        format!("{} virtual CPUs are needed, but this host has only {cores} for capsules", cores + 1);
    assert!(error.code() == Code::InvalidRequest && error.text.starts_with(&expected), "{error}");
    let disk_size_mb = u32::try_from(before.disk_free_mb + 2_000).expect("a small disk");
    let request = CapsuleCreate { disk_size_mb, ..creation("cl-wide") };
    let error = cp.ask::<_, CapsuleInfo>(&request).expect_err("no such space");
    // For now, or for ever where nothing else is on that file system.
    assert!(matches!(error.code(), Code::ResourceExhausted | Code::InvalidRequest), "{error}");
    assert!(error.text.contains("MiB of disk space are needed"), "{error}");
    assert!(error.text.contains("ask for less disk_size_mb"), "{error}");
    // All of its processors; it stays in its start.
    let request = CapsuleCreate { vcpus: cores, disk_size_mb: 100, ..creation("cl-first") };
    let stream = cp.session.open(&request, true).expect("opened");
    let during: HostStatusReply = cp.ask(&HostStatus {}).expect("status");
    assert_eq!(during.vcpus_reserved, cores);
    assert!(during.memory_reserved_mb >= before.memory_reserved_mb + 256, "{before:?} {during:?}");
    assert!(during.disk_free_mb + 300 <= before.disk_free_mb, "{before:?} {during:?}");
    let error = cp.ask::<_, CapsuleInfo>(&creation("cl-second")).expect_err("full");
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    let expected = "1 virtual CPUs are needed, but this host has only 0 left; destroy or pause a capsule";
    assert!(error.text.starts_with(expected), "{error}");
    cp.session.reset(stream, Code::Cancelled, "changed my mind");
    cp.ask::<_, HealthReply>(&Health {}).expect("health");
    assert_nothing_left(&place);
    let after: HostStatusReply = cp.ask(&HostStatus {}).expect("status");
    assert_eq!(after.vcpus_reserved, 0);
    assert!(agent.terminate().success());
}

#[test]
fn a_termination_signal_ends_capsules_in_any_state() {
    let place = Place::new(7);
    with_files(&place, &spinning_kernel());
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let streams: Vec<_> =
        (0..3).map(|n| cp.session.open(&creation(&format!("cl-{n}")), true).expect("opened")).collect();
    cp.ask::<_, HealthReply>(&Health {}).expect("health");
    std::thread::sleep(Duration::from_millis(200));
    let pid = libc::pid_t::try_from(agent.child.id()).expect("pid");
    // SAFETY: kill takes its arguments by value; the child is not waited for, so the pid is its.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    // They may end in any order.
    let mut waiting = streams;
    while !waiting.is_empty() {
        match cp.next() {
            Event::Message { stream, body, .. } => {
                assert_eq!(Error::decode(&body).map(|e| e.code()), Ok(Code::ShuttingDown));
                waiting.retain(|s| *s != stream);
            }
            Event::Closed { error } => panic!("{error}"),
            _ => {}
        }
    }
    let mut agent = agent;
    assert!(agent.wait().success());
    assert_eq!(place.remains(), Vec::<String>::new());
}

#[test]
fn a_command_runs_in_a_capsule() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(8, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let begun = Instant::now();
    let environment = vec![(Bytes(b"GREETING".to_vec()), Bytes(b"good day".to_vec()))];
    let request = CapsuleCreate { environment, ..creation("cl-one") };
    let info: CapsuleInfo = cp.ask(&request).expect("created");
    let created = begun.elapsed();
    let ran = cp.exec("cl-one", &["echo", "hello"]).expect("ran");
    eprintln!("created after {created:?}, first exec after {:?}", begun.elapsed());
    assert_eq!((ran.stdout.as_slice(), ran.exit_code, ran.signal), (&b"hello\n"[..], 0, 0));
    assert_eq!((info.state, info.memory_mb), (CapsuleState::Running, 256));
    assert!(info.metadata.iter().any(|(n, v)| n == "envd_version" && !v.is_empty()), "{info:?}");
    let ran = cp.exec("cl-one", &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]).expect("ran");
    assert_eq!((ran.stdout.as_slice(), ran.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(ran.exit_code, 7);
    let ran = cp.exec("cl-one", &["/bin/sh", "-c", "echo $GREETING"]).expect("ran");
    assert_eq!(ran.stdout, b"good day\n");
    let ran = cp.exec("cl-one", &["hostname"]).expect("ran");
    assert_eq!(ran.stdout, b"cl-one\n");
    let error = cp.exec("cl-one", &["no-such-command"]).expect_err("not there");
    assert_eq!(code(&error), Code::NotFound, "{error}");
    // A megabyte through all windows.
    let ran = cp.exec("cl-one", &["head", "-c", "1048576", "/dev/zero"]).expect("ran");
    assert_eq!(ran.stdout.len(), 1 << 20);

    // What is under way when the capsule is destroyed ends with a clear word.
    let stream = cp.start("cl-one", &["sleep", "60"]).expect("started");
    let mut other = agent.client();
    other.destroy("cl-one").expect("destroyed");
    let reason = loop {
        match cp.next() {
            Event::Reset { stream: s, reason, .. } if s == stream => break reason,
            Event::Closed { error } => panic!("{error}"),
            _ => {}
        }
    };
    assert!(reason.contains("destroyed"), "{reason}");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert_eq!(code(&cp.destroy("cl-one").expect_err("gone")), Code::NotFound);
    assert!(agent.terminate().success());
}

#[test]
fn a_machine_that_dies_is_an_error_and_can_be_destroyed() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(9, &guest);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    cp.create("cl-die").expect("created");
    let stream = cp.start("cl-die", &["sleep", "60"]).expect("started");
    let machines = place.machines();
    assert_eq!(machines.len(), 1);
    let pid = libc::pid_t::try_from(machines[0]).expect("pid");
    // SAFETY: kill takes its arguments by value; the process is the capsule's VMM.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    loop {
        match cp.next() {
            Event::Reset { stream: s, .. } if s == stream => break,
            Event::Closed { error } => panic!("{error}"),
            _ => {}
        }
    }
    assert_nothing_left(&place);
    let end = Instant::now() + PATIENCE;
    loop {
        let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: "cl-die".into() }).expect("known");
        if info.state == CapsuleState::Error {
            break;
        }
        assert!(info.state == CapsuleState::Stopping && Instant::now() < end, "{info:?}");
    }
    cp.destroy("cl-die").expect("destroyed");
    assert!(agent.terminate().success());
}

#[test]
fn a_guest_whose_kernel_panics_is_a_clear_error_at_once() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(12, &guest);
    for entry in fs::read_dir(place.directory.join("kernels")).expect("kernels").flatten() {
        if entry.file_name().to_string_lossy().starts_with("initramfs") {
            // In place of the link to the real one: an archive with nothing in it.
            fs::remove_file(entry.path()).expect("removed");
            fs::write(entry.path(), EMPTY_CPIO).expect("written");
        }
    }
    fs::write(place.directory.join("images/minimal/rootfs.ext4.new"), vec![0; 1 << 20]).expect("written");
    let image = place.directory.join("images/minimal/rootfs.ext4");
    fs::rename(place.directory.join("images/minimal/rootfs.ext4.new"), image).expect("replaced");
    let agent = Agent::start(&place);
    let begun = Instant::now();
    let error = agent.client().create("cl-panic").expect_err("no init");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(code(&error), Code::Unavailable, "{error}");
    assert!(error.text.contains("panic"), "{error}");
    assert_eq!(place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
}

#[test]
fn a_guest_on_full_storage_stands_still_and_goes_on_when_there_is_room() {
    let Some(guest) = guest_directory() else { return };
    let place = Place::with_guest(15, &guest);
    let sandboxes = place.directory.join("sandboxes");
    fs::create_dir(&sandboxes).expect("made");
    let storage = SmallStorage::mount(&sandboxes, 192);
    let agent = Agent::start(&place);
    let mut cp = agent.client();
    let _: CapsuleInfo =
        cp.ask(&CapsuleCreate { disk_size_mb: 1024, ..creation("cl-full") }).expect("created");
    let ballast = sandboxes.join("ballast");
    fs::write(&ballast, vec![1; 140 << 20]).expect("written");
    let write = "dd if=/dev/urandom of=$HOME/big bs=1M count=80 conv=fsync 2>/dev/null && md5sum <$HOME/big >$HOME/sum; echo $? >$HOME/status";
    let argv = ["/bin/sh", "-c", write].map(|argument| Bytes(argument.as_bytes().to_vec())).to_vec();
    let stream = cp.session.open(&Forward { capsule_id: "cl-full".into() }, false).expect("opened");
    let start = ProcessStart { argv, detached: true, ..Default::default() };
    cp.session.send_last(stream, &start).expect("sent");
    assert_eq!(cp.answer(stream).0, ProcessStarted::KIND);
    let end = Instant::now() + PATIENCE;
    let error = loop {
        // What is asked before it stands still is answered when it goes on: each time another client asks.
        let mut other = agent.client();
        let forward = other.session.open(&Forward { capsule_id: "cl-full".into() }, false).expect("opened");
        let start = ProcessStart { argv: vec![Bytes(b"/bin/true".to_vec())], ..Default::default() };
        other.session.send_last(forward, &start).expect("sent");
        if let Some((Error::KIND, body)) = other.answer_within(forward, Duration::from_millis(500)) {
            break Error::decode(&body).expect("an error");
        }
        assert!(Instant::now() < end, "it does not stand still");
        // What asks without a pause takes the guest's one processor from what writes.
        std::thread::sleep(Duration::from_millis(300));
    };
    assert_eq!(code(&error), Code::Unavailable);
    assert!(error.text.contains("storage is full"), "{error}");
    let mut cp = agent.client();
    let info: CapsuleInfo = cp.ask(&CapsuleGet { capsule_id: "cl-full".into() }).expect("known");
    assert_eq!(info.state, CapsuleState::Running);
    fs::remove_file(&ballast).expect("removed");
    let end = Instant::now() + PATIENCE;
    while cp.exec("cl-full", &["/bin/true"]).is_err() {
        assert!(Instant::now() < end, "it does not go on");
        std::thread::sleep(Duration::from_millis(300));
    }
    let wait = "while [ ! -s $HOME/status ]; do sleep 0.1; done; cat $HOME/status";
    let ran = cp.exec("cl-full", &["/bin/sh", "-c", wait]).expect("ran");
    assert_eq!(ran.stdout, b"0\n", "nothing that it wrote was lost");
    let check = "[ \"$(md5sum <$HOME/big)\" = \"$(cat $HOME/sum)\" ] && wc -c <$HOME/big";
    let ran = cp.exec("cl-full", &["/bin/sh", "-c", check]).expect("ran");
    assert_eq!(ran.stdout, format!("{}\n", 80 << 20).as_bytes());
    cp.destroy("cl-full").expect("destroyed");
    assert!(agent.terminate().success());
    drop(storage);
}
