//! Clients of the wire protocol against the control plane's public port: ours in Rust, Python and C.

use crate::{Context, Outcome, Test, ensure};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use wire::client::{Client, ClientError, Identity, Incoming};
use wire::frame::PREAMBLE;
use wire::message::{
    CHANNEL_FILE, CHANNEL_STDOUT, CHANNEL_TERMINAL, CapsuleCreate, CapsuleDestroy, CapsuleGet, CapsuleInfo,
    CapsuleList, CapsuleState, Code, Done, FileEntry, FileRead, FileWrite, GuestInit, Health, HealthReply,
    HostStatus, Message, ProcessExited, ProcessList, ProcessListReply, ProcessStart, ProcessStarted,
    TerminalResize, expect,
};
use wire::session::{SessionError, StreamId};
use wrenn_tests::process::{random_hex, run, wait_until};
use wrenn_tests::stack::project_root;
use wrenn_tests::{Context as _, Failure, Result};

pub const TESTS: &[Test] = &[
    ("a_wire_client_has_a_capsule_of_its_own", a_wire_client_has_a_capsule_of_its_own),
    ("a_wire_client_reaches_its_own_team_only", a_wire_client_reaches_its_own_team_only),
    ("wire_keys_are_proven_and_can_be_revoked", wire_keys_are_proven_and_can_be_revoked),
    ("the_python_wire_client_works", the_python_wire_client_works),
    ("the_c_wire_client_works", the_c_wire_client_works),
    ("wire_clients_that_stand_still_are_ended", wire_clients_that_stand_still_are_ended),
    ("nonsense_on_the_wire_ends_its_connection_only", nonsense_on_the_wire_ends_its_connection_only),
    ("guessing_keys_on_the_wire_has_to_wait", guessing_keys_on_the_wire_has_to_wait),
];

const TIMEOUT: Duration = Duration::from_secs(60);
/// More than a stream's and a connection's window.
const FILE_BYTES: usize = 3_000_000;
/// Streams that are cancelled while they are full: more than fill a connection's window.
const CANCELLED_FLOODS: usize = 20;
/// How long each fills.
const FLOOD_TIME: Duration = Duration::from_millis(100);
/// Failures after which a client has to wait, and some more.
const GUESSES: u64 = wire::limiter::BURST + 2;

/// What a call of the client gives.
pub type Called<T> = std::result::Result<T, ClientError>;

/// An API key: id, visible prefix, secret.
pub struct Key {
    pub id: String,
    prefix: String,
    pub secret: String,
}

impl Context {
    /// A key made by this user.
    pub fn new_key(&self, bearer: &wrenn_tests::http::Client) -> Result<Key> {
        let made = bearer.post("/v1/api-keys", &json!({"name": "wire"}))?;
        ensure!(made.status == 201, "{} {}", made.status, made.json());
        let text = |name: &str| made.json()[name].as_str().unwrap_or_default().to_string();
        Ok(Key { id: text("id"), prefix: text("key_prefix"), secret: text("key") })
    }

    /// A client of the wire protocol at the control plane.
    pub fn dial(&self, identity: &str, secret: &str) -> Called<Client> {
        let identity = Identity {
            name: identity,
            secret: secret.as_bytes(),
            program: concat!("e2e/", env!("CARGO_PKG_VERSION")),
        };
        Client::connect(&self.stack.cp_address, identity, TIMEOUT)
    }
}

fn failed(step: &str) -> impl Fn(ClientError) -> Failure + '_ {
    move |e| Failure(format!("{step}: {e}"))
}

fn shell(command: &str) -> ProcessStart {
    ProcessStart {
        argv: ["/bin/sh", "-c", command].iter().map(|a| a.as_bytes().into()).collect(),
        ..ProcessStart::default()
    }
}

/// All bytes of a channel, and the last message.
fn collect(client: &mut Client, stream: StreamId, wanted: u8) -> Result<(Vec<u8>, u16, Vec<u8>)> {
    let (mut out, mut kind, mut last) = (Vec::new(), 0, Vec::new());
    loop {
        match client.next(stream).map_err(failed("a stream's next event"))? {
            Incoming::Data { channel, bytes } if channel == wanted => out.extend(bytes),
            Incoming::Data { .. } => {}
            Incoming::Message { kind: k, body } => (kind, last) = (k, body),
            Incoming::Finished => return Ok((out, kind, last)),
        }
    }
}

fn code_of<T>(result: Called<T>) -> Option<Code> {
    match result {
        Err(ClientError::Refused(error)) => Some(error.code()),
        _ => None,
    }
}

fn processes(client: &mut Client, capsule: &str) -> Result<Vec<u32>> {
    let stream = client.open_in(capsule, &ProcessList {}, true).map_err(failed("list processes"))?;
    let list: ProcessListReply = client.next_message(stream).map_err(failed("the list of processes"))?;
    Ok(list.processes.iter().map(|p| p.0.0).collect())
}

fn a_wire_client_has_a_capsule_of_its_own(context: &mut Context) -> Result<Outcome> {
    let key = context.new_key(&context.stack.admin()?)?;
    let mut client = context.dial(&key.id, &key.secret).map_err(failed("log in"))?;
    ensure!(client.peer_name().starts_with("wrenn-cp/"), "{}", client.peer_name());
    let health: HealthReply = client.request(&Health {}).map_err(failed("health"))?;
    ensure!(!health.version.is_empty(), "{health:?}");
    let order = CapsuleCreate { template: "minimal".into(), memory_mb: 256, ..CapsuleCreate::default() };
    let made: CapsuleInfo = client.request(&order).map_err(failed("create"))?;
    ensure!(made.state == CapsuleState::Running && made.memory_mb == 256, "{made:?}");
    let capsule = made.capsule_id;
    let result = use_capsule(&mut client, &capsule);
    let gone: Called<Done> = client.request(&CapsuleDestroy { capsule_id: capsule.clone() });
    result?;
    gone.map_err(failed("destroy"))?;
    let again: Called<CapsuleInfo> = client.request(&CapsuleGet { capsule_id: capsule });
    ensure!(
        again.as_ref().is_ok_and(|c| c.state == CapsuleState::Stopped)
            || code_of(again) == Some(Code::NotFound),
        "a destroyed capsule is told as it is"
    );
    client.close().map_err(failed("close"))?;
    Ok(Outcome::Passed)
}

fn use_capsule(client: &mut Client, capsule: &str) -> Result<()> {
    let info: CapsuleInfo =
        client.request(&CapsuleGet { capsule_id: capsule.into() }).map_err(failed("get"))?;
    ensure!(info.capsule_id == capsule, "{info:?}");
    let stream = client.open(&CapsuleList {}, true).map_err(failed("list"))?;
    let mut listed = Vec::new();
    while let Incoming::Message { kind: CapsuleInfo::KIND, body } =
        client.next(stream).map_err(failed("list"))?
    {
        listed.push(expect::<CapsuleInfo>(CapsuleInfo::KIND, &body).context("CapsuleInfo")?.capsule_id);
    }
    ensure!(listed.iter().any(|id| id == capsule), "{listed:?}");

    let echo = shell("for i in 1 2 3; do echo line $i; done; exit 7");
    let stream = client.open_in(capsule, &echo, true).map_err(failed("start"))?;
    let (out, kind, last) = collect(client, stream, CHANNEL_STDOUT)?;
    let exited: ProcessExited = expect(kind, &last).context("ProcessExited")?;
    ensure!(out == b"line 1\nline 2\nline 3\n" && exited.exit_code == 7, "{out:?} {exited:?}");

    // One that is not read stops nobody else.
    let flood = client.open_in(capsule, &shell("cat /dev/zero"), true).map_err(failed("flood"))?;
    client.next_message::<ProcessStarted>(flood).map_err(failed("flood"))?;
    files(client, capsule)?;
    terminal(client, capsule)?;

    // What is cancelled ends in the guest.
    let before = processes(client, capsule)?;
    client.cancel(flood, "enough").map_err(failed("cancel"))?;
    let sleep = client.open_in(capsule, &shell("exec sleep 1000"), true).map_err(failed("sleep"))?;
    let pid = client.next_message::<ProcessStarted>(sleep).map_err(failed("sleep"))?.pid;
    client.cancel(sleep, "enough").map_err(failed("cancel"))?;
    wait_until("cancelled processes to end", TIMEOUT, || {
        processes(client, capsule).is_ok_and(|now| !now.contains(&pid) && now.len() < before.len())
    })?;

    // Given up while they hold as much as they may, again and again: they take nothing with them.
    for _ in 0..CANCELLED_FLOODS {
        let flood = client.open_in(capsule, &shell("cat /dev/zero"), true).map_err(failed("flood"))?;
        client.next_message::<ProcessStarted>(flood).map_err(failed("flood"))?;
        client.idle(FLOOD_TIME).map_err(failed("flood"))?;
        client.cancel(flood, "enough").map_err(failed("cancel"))?;
    }
    let stream =
        client.open_in(capsule, &shell("head -c 1000000 /dev/zero"), true).map_err(failed("start"))?;
    let (out, _, _) = collect(client, stream, CHANNEL_STDOUT)?;
    ensure!(out.len() == 1_000_000, "{} bytes after the cancelled floods", out.len());

    // What only a host agent may say to a guest is not passed on.
    let forged = GuestInit::default();
    let stream = client.open_in(capsule, &forged, true).map_err(failed("forge"))?;
    let refused = client.next_message::<Done>(stream);
    ensure!(code_of(refused) == Some(Code::PermissionDenied), "GuestInit was not refused");
    let refused: Called<Done> = client.request(&HostStatus {});
    ensure!(code_of(refused) == Some(Code::Unimplemented), "HostStatus was not refused");
    Ok(())
}

fn files(client: &mut Client, capsule: &str) -> Result<()> {
    let content: Vec<u8> = (0..FILE_BYTES).map(|i| (i * 7 % 251) as u8).collect();
    let write = FileWrite { path: b"/tmp/wire-rust".as_slice().into(), mode: 0o644, ..FileWrite::default() };
    let stream = client.open_in(capsule, &write, false).map_err(failed("write"))?;
    client.send_data(stream, CHANNEL_FILE, &content).map_err(failed("send a file"))?;
    client.finish(stream).map_err(failed("finish"))?;
    let entry: FileEntry = client.next_message(stream).map_err(failed("FileEntry"))?;
    ensure!(entry.size == content.len() as u64, "{entry:?}");
    let read = FileRead { path: b"/tmp/wire-rust".as_slice().into(), ..FileRead::default() };
    let stream = client.open_in(capsule, &read, true).map_err(failed("read"))?;
    let (back, kind, _) = collect(client, stream, CHANNEL_FILE)?;
    ensure!(back == content && kind == Done::KIND, "{} bytes came back, then {kind:#06x}", back.len());
    let missing = FileRead { path: b"/nowhere".as_slice().into(), ..FileRead::default() };
    let stream = client.open_in(capsule, &missing, true).map_err(failed("read"))?;
    let refused = client.next_message::<FileEntry>(stream);
    ensure!(code_of(refused) == Some(Code::NotFound), "a missing file");
    Ok(())
}

fn terminal(client: &mut Client, capsule: &str) -> Result<()> {
    let start = ProcessStart {
        argv: vec![b"/bin/sh".as_slice().into()],
        stdin: true,
        terminal_columns: 80,
        terminal_rows: 24,
        ..ProcessStart::default()
    };
    let stream = client.open_in(capsule, &start, false).map_err(failed("terminal"))?;
    client.next_message::<ProcessStarted>(stream).map_err(failed("terminal"))?;
    client.send(stream, &TerminalResize { columns: 100, rows: 40 }).map_err(failed("resize"))?;
    client.send_data(stream, CHANNEL_TERMINAL, b"stty size; exit\n").map_err(failed("type"))?;
    let (out, kind, _) = collect(client, stream, CHANNEL_TERMINAL)?;
    let out = String::from_utf8_lossy(&out);
    ensure!(out.contains("40 100") && kind == ProcessExited::KIND, "{out}");
    Ok(())
}

fn a_wire_client_reaches_its_own_team_only(context: &mut Context) -> Result<Outcome> {
    let capsule = context.capsule()?;
    let (email, password) = ("wire-stranger@example.com", random_hex(12)?);
    let create = ["user", "create", "--email", email, "--password-stdin"];
    run(&mut context.stack.command("wrenn-cp", &create), Some(&format!("{password}\n")))?;
    let login =
        context.stack.anonymous().post("/v1/auth/login", &json!({"email": email, "password": password}))?;
    let token = login.json()["token"].as_str().unwrap_or_default().to_string();
    let stranger = context.stack.anonymous().with_header("Authorization", &format!("Bearer {token}"));
    let key = context.new_key(&stranger)?;
    let mut client = context.dial(&key.id, &key.secret).map_err(failed("log in"))?;
    let get: Called<CapsuleInfo> = client.request(&CapsuleGet { capsule_id: capsule.clone() });
    ensure!(code_of(get) == Some(Code::NotFound), "a stranger sees the capsule");
    let destroy: Called<Done> = client.request(&CapsuleDestroy { capsule_id: capsule.clone() });
    ensure!(code_of(destroy) == Some(Code::NotFound), "a stranger destroys the capsule");
    let stream = client.open_in(&capsule, &shell("id"), true).map_err(failed("forward"))?;
    let started = client.next_message::<ProcessStarted>(stream);
    ensure!(code_of(started) == Some(Code::NotFound), "a stranger runs a command");
    let list: Called<Done> = client.request(&CapsuleList {});
    ensure!(list.is_ok(), "a stranger's list is not empty: {list:?}");
    ensure!(context.shell(&capsule, "echo there")? == "there", "and it runs on");
    Ok(Outcome::Passed)
}

fn is_refused_login(result: Called<Client>) -> bool {
    let code = Code::Unauthenticated as u16;
    matches!(result, Err(ClientError::Session(SessionError::ByPeer(told, _))) if told == code)
}

fn wire_keys_are_proven_and_can_be_revoked(context: &mut Context) -> Result<Outcome> {
    let admin = context.stack.admin()?;
    let key = context.new_key(&admin)?;
    let other = context.new_key(&admin)?;
    ensure!(is_refused_login(context.dial(&key.id, &other.secret)), "another key's secret lets in");
    ensure!(is_refused_login(context.dial("key-nobody", &key.secret)), "an unknown identity lets in");
    context.dial(&key.prefix, &key.secret).map_err(failed("log in by the key's prefix"))?;
    let mut client = context.dial(&key.id, &key.secret).map_err(failed("log in"))?;
    let stream = client.open(&CapsuleList {}, true).map_err(failed("list"))?;
    collect(&mut client, stream, 0)?;
    let revoked = admin.delete(&format!("/v1/api-keys/{}", key.id))?;
    ensure!(revoked.status == 204, "{}", revoked.status);
    let list: Called<Done> = client.request(&CapsuleList {});
    ensure!(code_of(list) == Some(Code::Unauthenticated), "a revoked key still lists");
    ensure!(is_refused_login(context.dial(&key.id, &key.secret)), "a revoked key logs in");
    Ok(Outcome::Passed)
}

fn scenario(context: &mut Context, mut command: Command, says: &str) -> Result<Outcome> {
    let key = context.new_key(&context.stack.admin()?)?;
    let (host, port) = context.stack.cp_address.rsplit_once(':').ok_or("the address has a port")?;
    command.args([host, port, &key.id]).env("WRENN_API_KEY", &key.secret);
    let output = run(&mut command, None)?;
    for step in
        ["a wrong key is refused", "streamed a command", "both ways", "terminal", "cancelled", "destroyed"]
    {
        ensure!(output.contains(step), "{says} did not say {step:?}:\n{output}");
    }
    Ok(Outcome::Passed)
}

fn the_python_wire_client_works(context: &mut Context) -> Result<Outcome> {
    let mut command = Command::new("python3");
    // No bytecode beside the sources.
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.arg(project_root().join("wire/clients/python/scenario.py"));
    scenario(context, command, "the Python client")
}

fn the_c_wire_client_works(context: &mut Context) -> Result<Outcome> {
    let sources = project_root().join("wire/clients/c");
    let program: PathBuf = context.stack.directory.join("wire-scenario");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    run(
        Command::new(compiler)
            .args(["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .args([sources.join("scenario.c"), sources.join("wrenn_wire.c")]),
        None,
    )
    .context("compile the C client")?;
    scenario(context, Command::new(program), "the C client")
}

fn nonsense_on_the_wire_ends_its_connection_only(context: &mut Context) -> Result<Outcome> {
    for bytes in [&[0xff; 64][..], &[0; 64], b"GET / HTTP/1.1\r\n"] {
        let mut stream = TcpStream::connect(&context.stack.cp_address).context("connect")?;
        stream.set_read_timeout(Some(TIMEOUT)).context("a time limit")?;
        stream.write_all(&PREAMBLE).context("send")?;
        stream.write_all(bytes).context("send")?;
        let mut answer = Vec::new();
        // Reset or closed: either way it is over.
        let _ = stream.read_to_end(&mut answer);
        ensure!(answer.len() < 1024, "{} bytes came back", answer.len());
    }
    // Those that say nothing further hold nobody up.
    let silent: Vec<TcpStream> = (0..32)
        .map(|_| {
            let mut stream = TcpStream::connect(&context.stack.cp_address).context("connect")?;
            stream.write_all(&PREAMBLE).context("send")?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    let key = context.new_key(&context.stack.admin()?)?;
    let mut client = context.dial(&key.id, &key.secret).map_err(failed("log in"))?;
    client.request::<_, HealthReply>(&Health {}).map_err(failed("health"))?;
    drop(silent);
    Ok(Outcome::Passed)
}

/// Starts a process that does not end by itself; its number.
fn lasting(client: &mut Client, capsule: &str, command: &str) -> Result<u32> {
    let stream = client.open_in(capsule, &shell(command), true).map_err(failed("start"))?;
    Ok(client.next_message::<ProcessStarted>(stream).map_err(failed("start"))?.pid)
}

fn wire_clients_that_stand_still_are_ended(context: &mut Context) -> Result<Outcome> {
    let capsule = context.capsule()?;
    let admin = context.stack.admin()?;
    let mut half_open = Vec::new();
    for first in [&[][..], &PREAMBLE[..1], &PREAMBLE] {
        let mut stream = TcpStream::connect(&context.stack.cp_address).context("connect")?;
        stream.set_read_timeout(Some(TIMEOUT)).context("a time limit")?;
        stream.write_all(first).context("send")?;
        half_open.push(stream);
    }
    // One that reads nothing from here on, with a process that floods it.
    let key = context.new_key(&admin)?;
    let mut stalled = context.dial(&key.id, &key.secret).map_err(failed("log in"))?;
    let flood = lasting(&mut stalled, &capsule, "exec cat /dev/zero")?;
    // One whose key is revoked while a process of its runs.
    let key = context.new_key(&admin)?;
    let mut revoked = context.dial(&key.id, &key.secret).map_err(failed("log in"))?;
    let sleep = lasting(&mut revoked, &capsule, "exec sleep 1000")?;
    ensure!(admin.delete(&format!("/v1/api-keys/{}", key.id))?.status == 204, "revoke the key");
    let ended = revoked.idle(TIMEOUT);
    let code = Code::Unauthenticated as u16;
    ensure!(
        matches!(ended, Err(ClientError::Session(SessionError::ByPeer(told, _))) if told == code),
        "a revoked key's connection: {ended:?}"
    );
    for mut stream in half_open {
        let mut said = Vec::new();
        let is_over = stream.read_to_end(&mut said).is_ok();
        ensure!(is_over && said.len() < 1024, "a half-open connection: {} bytes", said.len());
    }
    wait_until("their processes to end", TIMEOUT, || {
        let look = format!("kill -0 {sleep} 2>&- || kill -0 {flood} 2>&- && echo runs || echo gone");
        context.shell(&capsule, &look).is_ok_and(|said| said == "gone")
    })?;
    drop(stalled);
    Ok(Outcome::Passed)
}

fn guessing_keys_on_the_wire_has_to_wait(context: &mut Context) -> Result<Outcome> {
    let key = context.new_key(&context.stack.admin()?)?;
    let mut told = String::new();
    for _ in 0..GUESSES {
        if let Err(error) = context.dial(&key.id, "wrn_00000000000000000000000000000000") {
            told = error.to_string();
        }
    }
    ensure!(told.contains("too many failed logins") && told.contains("try again in"), "{told}");
    // Whoever has the key gets in after the wait, and the failures are forgotten.
    wait_until("the wait to end", TIMEOUT, || context.dial(&key.id, &key.secret).is_ok())?;
    Ok(Outcome::Passed)
}
