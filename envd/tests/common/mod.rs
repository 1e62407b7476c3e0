//! A real envd on loopback, and a blocking client of it.

#![allow(dead_code)]

pub mod inject;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use wire::auth::{ITERATIONS, NONCE_LEN, Verifier};
use wire::message::{Error, Message, ProcessExited, ProcessStart, ProcessStarted};
use wire::session::{Event, Limits, Session, StreamId};

pub const SECRET: &[u8] = b"the capsule's secret";
/// The longest that any wait in a test takes.
pub const PATIENCE: Duration = Duration::from_secs(20);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The daemon; killed when dropped.
pub struct Daemon {
    pub child: Child,
    pub address: String,
    verifier: PathBuf,
}

impl Daemon {
    pub fn start() -> Daemon {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let verifier = std::env::temp_dir().join(format!("envd-test-{}-{number}", std::process::id()));
        std::fs::write(&verifier, Verifier::new(SECRET, &[7; 16], ITERATIONS).to_text())
            .expect("verifier file");
        // The release binary can be tested as well as the one that was built with the tests.
        let program = std::env::var("ENVD_BIN")
            .unwrap_or_else(|_| option_env!("CARGO_BIN_EXE_envd").unwrap_or("envd").to_string());
        let mut child = Command::new(program)
            .args(["--listen", "127.0.0.1:0", "--verifier-file"])
            .arg(&verifier)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start envd");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        lines.read_line(&mut line).expect("a line");
        let address = line.trim().rsplit(' ').next().expect("address").to_string();
        assert!(line.contains("listening on"), "{line}");
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                eprintln!("{line}");
            }
        });
        Daemon { child, address, verifier }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.address, "agent", SECRET, Limits::default())
    }

    /// How many descriptors it has open.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("proc").count()
    }

    /// Its children, zombies among them.
    pub fn children(&self) -> usize {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        std::fs::read_to_string(path).expect("proc").split_whitespace().count()
    }

    /// A number of kB from its status.
    pub fn status_kb(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("proc");
        let line = status.lines().find(|l| l.starts_with(name)).expect("field");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("number")
    }

    /// Waits until it is back to so many descriptors and no children.
    pub fn wait_until_clean(&self, files: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.open_files() != files || self.children() != 0 {
            assert!(Instant::now() < deadline, "{} files, {} children", self.open_files(), self.children());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.verifier);
    }
}

/// A session over a blocking socket.
pub struct Client {
    socket: TcpStream,
    pub session: Session,
    started: Instant,
    events: Vec<Event>,
}

/// What a process gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Finished {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub terminal: Vec<u8>,
    pub exit: ProcessExited,
}

impl Client {
    pub fn connect(address: &str, identity: &str, secret: &[u8], limits: Limits) -> Client {
        let mut client = Client::dial(address, identity, secret, limits);
        let ready = client.wait_for(|e| matches!(e, Event::Ready { .. } | Event::Closed { .. }));
        assert!(matches!(ready, Event::Ready { .. }), "{ready:?}");
        client
    }

    pub fn dial(address: &str, identity: &str, secret: &[u8], limits: Limits) -> Client {
        let socket = TcpStream::connect(address).expect("connect");
        socket.set_nodelay(true).expect("nodelay");
        let session = Session::client(identity, secret, "test/1", [5; NONCE_LEN], limits, 0);
        Client { socket, session, started: Instant::now(), events: Vec::new() }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn flush(&mut self) {
        while !self.session.output().is_empty() {
            let n = match self.socket.write(self.session.output()) {
                Ok(n) => n,
                Err(_) => self.session.output().len(),
            };
            self.session.consume_output(n);
            while let Some(event) = self.session.poll_event() {
                self.events.push(event);
            }
        }
    }

    /// Sends what there is and takes in what comes within `wait`.
    pub fn turn(&mut self, wait: Duration) {
        self.flush();
        self.socket.set_read_timeout(Some(wait.max(Duration::from_millis(1)))).expect("timeout");
        let mut buffer = [0; 65536];
        match self.socket.read(&mut buffer) {
            Ok(0) => self.session.transport_closed(),
            Ok(n) => {
                let now = self.now_ms();
                self.session.receive(&buffer[..n], now);
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => self.session.transport_closed(),
        }
        while let Some(event) = self.session.poll_event() {
            self.events.push(event);
        }
        self.flush();
    }

    /// The first event that fits, now or later; those that do not stay.
    pub fn wait_for(&mut self, fits: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(index) = self.events.iter().position(&fits) {
                return self.events.remove(index);
            }
            assert!(Instant::now() < deadline, "waited in vain; there is {:?}", self.events);
            self.turn(Duration::from_millis(50));
        }
    }

    pub fn has(&self, fits: impl Fn(&Event) -> bool) -> bool {
        self.events.iter().any(fits)
    }

    pub fn open<M: Message>(&mut self, message: &M, fin: bool) -> StreamId {
        let stream = self.session.open(message, fin).expect("open");
        self.flush();
        stream
    }

    /// The next message of a stream, whichever: its number and body.
    pub fn next_message(&mut self, stream: StreamId) -> (u16, Vec<u8>) {
        let event = self.wait_for(|e| matches!(e, Event::Message { stream: s, .. } if *s == stream));
        let Event::Message { kind, body, cost, .. } = event else { panic!("{event:?}") };
        self.session.release(stream, cost);
        (kind, body)
    }

    /// The next message of a stream, which must be an `M`.
    pub fn message<M: Message>(&mut self, stream: StreamId) -> M {
        match self.answer(stream) {
            Ok(message) => message,
            Err(error) => panic!("{error}"),
        }
    }

    /// The next message of a stream: an `M` or an error.
    pub fn answer<M: Message>(&mut self, stream: StreamId) -> Result<M, Error> {
        let event = self.wait_for(|e| {
            matches!(e, Event::Message { stream: s, .. } | Event::Reset { stream: s, .. } if *s == stream)
        });
        let Event::Message { kind, body, cost, .. } = event else { panic!("{event:?}") };
        self.session.release(stream, cost);
        if kind == Error::KIND {
            return Err(Error::decode(&body).expect("an error"));
        }
        Ok(wire::message::expect(kind, &body).expect("the expected message"))
    }

    /// Asks for something and gives the answer.
    pub fn ask<Q: Message, A: Message>(&mut self, question: &Q) -> Result<A, Error> {
        let stream = self.open(question, true);
        self.answer(stream)
    }

    pub fn send_all(&mut self, stream: StreamId, channel: u8, bytes: &[u8]) {
        let mut sent = 0;
        let deadline = Instant::now() + PATIENCE;
        while sent < bytes.len() {
            sent += self.session.send_data(stream, channel, &bytes[sent..]).expect("send");
            self.turn(Duration::from_millis(1));
            assert!(Instant::now() < deadline, "the input is not taken");
        }
    }

    /// The bytes of a stream's channels that have come.
    pub fn take_data(&mut self, stream: StreamId) -> Vec<(u8, Vec<u8>)> {
        let mut taken = Vec::new();
        let mut kept = Vec::new();
        for event in std::mem::take(&mut self.events) {
            match event {
                Event::Data { stream: s, channel, bytes, cost } if s == stream => {
                    taken.push((channel, bytes));
                    self.session.release(s, cost);
                }
                other => kept.push(other),
            }
        }
        self.events = kept;
        self.flush();
        taken
    }

    /// Everything until the process has ended.
    pub fn finish(&mut self, stream: StreamId) -> Finished {
        let mut finished = Finished::default();
        let deadline = Instant::now() + PATIENCE;
        loop {
            for (channel, bytes) in self.take_data(stream) {
                match channel {
                    1 => finished.stdout.extend(bytes),
                    2 => finished.stderr.extend(bytes),
                    3 => finished.terminal.extend(bytes),
                    other => panic!("data on channel {other}"),
                }
            }
            let ended = |e: &Event| matches!(e, Event::Message { stream: s, .. } | Event::Reset { stream: s, .. } if *s == stream);
            if self.has(ended) {
                finished.exit = self.message(stream);
                return finished;
            }
            assert!(Instant::now() < deadline, "the process does not end: {finished:?}");
            self.turn(Duration::from_millis(50));
        }
    }

    /// Runs a command to its end.
    pub fn run(&mut self, start: &ProcessStart) -> Result<Finished, Error> {
        let stream = self.open(start, true);
        self.answer::<ProcessStarted>(stream)?;
        Ok(self.finish(stream))
    }
}

/// A start message.
pub fn command(argv: &[&str]) -> ProcessStart {
    ProcessStart {
        argv: argv.iter().map(|a| (*a).into()).collect(),
        user: "root".into(),
        ..Default::default()
    }
}

/// A shell command.
pub fn shell(script: &str) -> ProcessStart {
    command(&["/bin/sh", "-c", script])
}
