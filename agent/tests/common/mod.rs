//! Runs `wrenn-agent` on a data directory of its own and speaks the wire protocol to it.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod commands;

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use wire::auth::{ITERATIONS, NONCE_LEN, Verifier};
use wire::codec::Bytes;
use wire::message::{
    CHANNEL_STDERR, CHANNEL_STDOUT, CapsuleCreate, CapsuleDestroy, CapsuleInfo, Code, Done, Error, Forward,
    Message, ProcessExited, ProcessStart, ProcessStarted,
};
use wire::session::{Event, Limits, Session, SessionError, StreamId};
use wrenn_agent::ending::Ending;
use wrenn_agent::net::Slot;

/// The secret of the test's control plane.
pub const SECRET: &[u8] = b"the test's control plane";
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The directory with `kernels/` and `images/minimal/`, or `None` with a loud word why tests are skipped.
pub fn guest_directory() -> Option<PathBuf> {
    let Some(directory) = std::env::var_os("WRENN_TEST_DIR").map(PathBuf::from) else {
        eprintln!("SKIPPED: WRENN_TEST_DIR names no directory with kernels/ and images/ (`make rootfs`)");
        return None;
    };
    assert!(directory.join("kernels").is_dir(), "{} has no kernels/", directory.display());
    Some(directory)
}

/// A data directory and slots of its own; removed with everything when dropped.
pub struct Place {
    pub directory: PathBuf,
    pub first_slot: u32,
}

impl Place {
    /// `number` tells the places of one test program apart.
    pub fn new(number: u32) -> Place {
        let directory = std::env::temp_dir().join(format!("wrenn-agent-{}-{number}", std::process::id()));
        let first_slot = 40_000 + (std::process::id() % 300) * 80 + number * 4;
        Place::at(directory, first_slot)
    }

    /// In this directory, which must not be there yet.
    pub fn at(directory: PathBuf, first_slot: u32) -> Place {
        // Not two in one: one would write through the links of the other.
        fs::create_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        for part in ["kernels", "images/minimal"] {
            fs::create_dir_all(directory.join(part)).expect("made");
        }
        let place = Place { directory, first_slot };
        place.write_token();
        place
    }

    /// The same with the real kernel and image.
    pub fn with_guest(number: u32, guest: &Path) -> Place {
        let place = Place::new(number);
        place.put_guest(guest);
        place
    }

    pub fn put_guest(&self, guest: &Path) {
        for entry in fs::read_dir(guest.join("kernels")).expect("kernels").flatten() {
            place_file(&entry.path(), &self.directory.join("kernels").join(entry.file_name()));
        }
        let image = "images/minimal/rootfs.ext4";
        place_file(&guest.join(image), &self.directory.join(image));
    }

    /// Writes a file that must not be there: a link would lead to what all tests share.
    pub fn write_new(&self, name: &str, content: &[u8]) {
        let file = fs::File::options().write(true).create_new(true).open(self.directory.join(name));
        file.and_then(|mut file| file.write_all(content)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    fn write_token(&self) {
        let verifier = Verifier::new(SECRET, &[7; 16], ITERATIONS).to_text();
        let token = format!(
            r#"{{"host_id":"host-test","token":"t","refresh_token":"r","wire_verifier":"{verifier}",
            "obtained_sec":{}}}"#,
            u32::MAX
        );
        let path = self.directory.join("host-token");
        fs::write(&path, token).expect("token");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("token");
    }

    /// Its network slots.
    pub fn slots(&self) -> std::ops::Range<u32> {
        self.first_slot..self.first_slot + 4
    }

    pub fn sandboxes(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.join("sandboxes")).expect("sandboxes").flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Everything of this place that is on the host: directories, namespaces, links, processes.
    pub fn remains(&self) -> Vec<String> {
        let mut found: Vec<String> =
            self.sandboxes().into_iter().map(|name| format!("sandboxes/{name}")).collect();
        for slot in self.slots() {
            let paths = [format!("/run/netns/ns-{slot}"), format!("/sys/class/net/wrenn-{slot}")];
            found.extend(paths.into_iter().filter(|p| Path::new(p).exists()));
        }
        found.extend(self.machines().into_iter().map(|pid| format!("VMM process {pid}")));
        found
    }

    /// Waits until nothing but this is left, as it is soon after a pause.
    pub fn wait_for_remains(&self, wanted: &[&str]) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.remains() != wanted {
            assert!(Instant::now() < end, "{:?} in place of {wanted:?}", self.remains());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The VMM processes of this place, by the user ids that its slots lead to.
    pub fn machines(&self) -> Vec<u32> {
        let uids: Vec<u32> = self.slots().map(|s| wrenn_agent::capsule::FIRST_UID + s).collect();
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            // One that has ended and waits for its parent to look runs no more.
            if status.lines().any(|l| l.starts_with("State:") && l.contains('Z')) {
                return false;
            }
            let uid = status.lines().find_map(|l| l.strip_prefix("Uid:"));
            let uid = uid.and_then(|l| l.split_ascii_whitespace().next()?.parse().ok());
            uid.is_some_and(|uid| uids.contains(&uid))
        })
        .collect()
    }
}

impl Drop for Place {
    /// A test that failed leaves nothing either.
    fn drop(&mut self) {
        for pid in self.machines() {
            if let Ok(process) = wrenn_agent::sys::pidfd::Process::child(pid) {
                let _ = process.kill();
            }
        }
        for slot in self.slots().filter_map(Slot::new) {
            let _ = wrenn_agent::net::destroy_remains(slot);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A hard link, or a copy where that cannot be.
pub fn place_file(from: &Path, to: &Path) {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).expect("copied");
    }
}

/// The VMM of the agents that are started from now on; what their environment says when there is none.
static VMM: Mutex<Option<(&str, PathBuf)>> = Mutex::new(None);

/// Agents that are started from now on use this VMM; `program` is where Firecracker is, if that is it.
pub fn use_vmm(vmm: &'static str, program: &Path) {
    *VMM.lock().expect("nobody failed with it") = Some((vmm, program.to_owned()));
}

/// A file system of its own in memory, unmounted when dropped.
pub struct SmallStorage(PathBuf);

impl SmallStorage {
    pub fn mount(directory: &Path, mib: u32) -> SmallStorage {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=0700"), "wrenn-test"])
            .arg(directory)
            .status();
        assert!(mounted.expect("mount runs").success());
        SmallStorage(directory.to_owned())
    }

    /// Fills it to the last byte; what is filled with goes when this is removed.
    pub fn fill(&self) -> PathBuf {
        let ballast = self.0.join("ballast");
        let mut file = fs::File::create(&ballast).expect("made");
        for size in [1 << 20, 4_096, 1] {
            let piece = vec![1; size];
            while file.write_all(&piece).is_ok() {}
        }
        ballast
    }
}

impl Drop for SmallStorage {
    fn drop(&mut self) {
        // Lazily: a test that failed may have left a machine, which goes with its place.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A running agent; killed when dropped.
pub struct Agent {
    pub child: Child,
    pub address: SocketAddr,
}

impl Agent {
    pub fn command(place: &Place, address: SocketAddr) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-agent"));
        command.env("WRENN_DIR", &place.directory);
        command.env("WRENN_HOST_LISTEN_ADDR", address.to_string());
        let slots = place.slots();
        command.env("WRENN_SLOTS", format!("{}-{}", slots.start, slots.end - 1));
        command.env_remove("WRENN_CP_URL").stdin(Stdio::null());
        if let Some((vmm, firecracker)) = &*VMM.lock().expect("nobody failed with it") {
            command.env("WRENN_VMM", vmm).env("WRENN_FIRECRACKER_BIN", firecracker);
        }
        if std::env::var_os("LOG_LEVEL").is_none() {
            command.env("LOG_LEVEL", "warn");
        }
        command
    }

    pub fn start(place: &Place) -> Agent {
        Agent::start_with(place, |_| {})
    }

    pub fn start_with(place: &Place, change: impl FnOnce(&mut Command)) -> Agent {
        let address = free_address();
        let mut command = Agent::command(place, address);
        change(&mut command);
        let mut child = command.spawn().expect("started");
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            if let Some(status) = child.try_wait().expect("waited") {
                panic!("the agent ended with {status}");
            }
            assert!(Instant::now() < end, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Agent { child, address }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address, "cp", SECRET)
    }

    /// Has all capsules destroyed and waits for the end.
    pub fn terminate(self) -> ExitStatus {
        self.end(Ending::Terminate)
    }

    /// Has all capsules left as they are and waits for the end.
    pub fn hand_over(self) -> ExitStatus {
        self.end(Ending::HandOver)
    }

    pub fn end(mut self, ending: Ending) -> ExitStatus {
        let pid = libc::pid_t::try_from(self.child.id()).expect("pid");
        // SAFETY: kill takes its arguments by value; the child is not waited for, so the pid is its.
        assert_eq!(unsafe { libc::kill(pid, ending.signal()) }, 0);
        self.wait()
    }

    pub fn kill(mut self) {
        self.child.kill().expect("killed");
        self.wait();
    }

    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                return status;
            }
            assert!(Instant::now() < end, "the agent does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address of loopback that is nobody else's: the number of this process is in it, and no test gets a port
/// that another had. (A port that the kernel has just called free may be the next one's as well.)
pub fn free_address() -> SocketAddr {
    static NEXT_PORT: AtomicU16 = AtomicU16::new(1_024);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let own = std::net::Ipv4Addr::new(127, 64 | high & 63, middle, low);
    (own, NEXT_PORT.fetch_add(1, Ordering::Relaxed)).into()
}

/// A blocking wire client.
pub struct Client {
    stream: TcpStream,
    pub session: Session,
    begun: Instant,
}

/// What a process did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ran {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: u32,
    pub signal: u32,
}

impl Client {
    pub fn connect(address: SocketAddr, identity: &str, secret: &[u8]) -> Client {
        let mut client = Client::connecting(address, identity, secret);
        match client.next() {
            Event::Ready { .. } => client,
            other => panic!("{other:?}"),
        }
    }

    pub fn connecting(address: SocketAddr, identity: &str, secret: &[u8]) -> Client {
        let stream = TcpStream::connect(address).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_nodelay(true).expect("nodelay");
        let mut nonce = [0; NONCE_LEN];
        fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut nonce)).expect("random");
        let session = Session::client(identity, secret, "test/1", nonce, Limits::default(), 0);
        Client { stream, session, begun: Instant::now() }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).expect("a short test")
    }

    /// Writes what is to be written.
    pub fn flush(&mut self) {
        while !self.session.output().is_empty() {
            match self.stream.write(self.session.output()) {
                Ok(n) => self.session.consume_output(n),
                Err(e) => panic!("write: {e}"),
            }
        }
    }

    /// Writes what is to be written and gives the next event.
    pub fn next(&mut self) -> Event {
        let mut buffer = [0; 65_536];
        loop {
            self.flush();
            if let Some(event) = self.session.poll_event() {
                return event;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => self.session.transport_closed(),
                Ok(n) => self.session.receive(&buffer[..n], self.now_ms()),
                Err(e) => panic!("read: {e}"),
            }
        }
    }

    /// Sends a request and gives its one answer.
    pub fn request<M: Message>(&mut self, message: &M) -> (u16, Vec<u8>) {
        let stream = self.session.open(message, true).expect("opened");
        self.answer(stream)
    }

    /// The next message of a stream.
    pub fn answer(&mut self, stream: StreamId) -> (u16, Vec<u8>) {
        loop {
            match self.next() {
                Event::Message { stream: id, kind, body, cost } if id == stream => {
                    self.session.release(stream, cost);
                    return (kind, body);
                }
                Event::Reset { stream: id, code, reason } if id == stream => {
                    return encoded(&Error { code, errno: 0, text: reason });
                }
                Event::Closed { error } => panic!("closed: {error}"),
                _ => {}
            }
        }
    }

    /// The next message of a stream, if it comes within this time.
    pub fn answer_within(&mut self, wanted: StreamId, limit: Duration) -> Option<(u16, Vec<u8>)> {
        self.flush();
        let end = Instant::now() + limit;
        let mut buffer = [0; 65_536];
        loop {
            while let Some(event) = self.session.poll_event() {
                match event {
                    Event::Message { stream, kind, body, .. } if stream == wanted => {
                        return Some((kind, body));
                    }
                    Event::Reset { stream, code, reason } if stream == wanted => {
                        return Some(encoded(&Error { code, errno: 0, text: reason }));
                    }
                    _ => {}
                }
            }
            let left = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            self.stream.set_read_timeout(Some(left)).expect("timeout");
            match self.stream.read(&mut buffer) {
                Ok(0) => self.session.transport_closed(),
                Ok(n) => self.session.receive(&buffer[..n], self.now_ms()),
                Err(_) => return None,
            }
        }
    }

    pub fn ask<M: Message, A: Message>(&mut self, message: &M) -> Result<A, Error> {
        let (kind, body) = self.request(message);
        if kind == Error::KIND {
            return Err(Error::decode(&body).expect("an error"));
        }
        assert_eq!(kind, A::KIND, "an answer of another kind");
        Ok(A::decode(&body).expect("the answer"))
    }

    pub fn create(&mut self, id: &str) -> Result<CapsuleInfo, Error> {
        self.ask(&creation(id))
    }

    pub fn destroy(&mut self, id: &str) -> Result<Done, Error> {
        self.ask(&CapsuleDestroy { capsule_id: id.into() })
    }

    /// Starts a process in a capsule; its stream, once it runs.
    pub fn start(&mut self, id: &str, argv: &[&str]) -> Result<StreamId, Error> {
        let stream = self.session.open(&Forward { capsule_id: id.into() }, false).expect("opened");
        let start = ProcessStart {
            argv: argv.iter().map(|a| Bytes(a.as_bytes().to_vec())).collect(),
            ..Default::default()
        };
        self.session.send_last(stream, &start).expect("sent");
        let (kind, body) = self.answer(stream);
        match kind {
            Error::KIND => Err(Error::decode(&body).expect("an error")),
            ProcessStarted::KIND => Ok(stream),
            other => panic!("message kind {other:#06x}"),
        }
    }

    /// Runs a process in a capsule to its end.
    pub fn exec(&mut self, id: &str, argv: &[&str]) -> Result<Ran, Error> {
        let stream = self.start(id, argv)?;
        let mut ran = Ran::default();
        loop {
            match self.next() {
                Event::Data { stream: s, channel, bytes, cost } if s == stream => {
                    match channel {
                        CHANNEL_STDOUT => ran.stdout.extend_from_slice(&bytes),
                        CHANNEL_STDERR => ran.stderr.extend_from_slice(&bytes),
                        other => panic!("channel {other}"),
                    }
                    self.session.release(stream, cost);
                }
                Event::Message { stream: s, kind, body, cost } if s == stream => {
                    self.session.release(stream, cost);
                    assert_eq!(kind, ProcessExited::KIND);
                    let exited = ProcessExited::decode(&body).expect("decoded");
                    (ran.exit_code, ran.signal) = (exited.exit_code, exited.signal);
                    return Ok(ran);
                }
                Event::Reset { stream: s, code, reason } if s == stream => {
                    return Err(Error { code, errno: 0, text: reason });
                }
                Event::Closed { error } => panic!("closed: {error}"),
                _ => {}
            }
        }
    }

    /// The same, once the guest daemon is reached: an agent that has just started may have to reach it yet.
    pub fn exec_when_reached(&mut self, id: &str, argv: &[&str]) -> Ran {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.exec(id, argv) {
                Err(e) if e.code() == Code::Unavailable && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other.expect("ran"),
            }
        }
    }

    /// How the session ends.
    pub fn end(&mut self) -> SessionError {
        loop {
            if let Event::Closed { error } = self.next() {
                return error;
            }
        }
    }
}

pub fn creation(id: &str) -> CapsuleCreate {
    CapsuleCreate {
        capsule_id: id.into(),
        template: "minimal".into(),
        vcpus: 1,
        memory_mb: 256,
        ..Default::default()
    }
}

fn encoded<M: Message>(message: &M) -> (u16, Vec<u8>) {
    let mut body = Vec::new();
    message.encode(&mut body);
    (M::KIND, body)
}
