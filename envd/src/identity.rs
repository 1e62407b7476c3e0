//! How envd gets to know the capsule that it is in, and who may talk to it.

use crate::connection::Gate;
use crate::log::log;
use crate::metadata::{Fetch, Metadata, Step, identity_files};
use crate::sys::epoll::Epoll;
use crate::sys::{Errno, Fd, clock, file, socket};
use crate::token::Token;
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::{Ipv4Addr, SocketAddrV4};
use wire::auth::Verifier;

/// The metadata service.
const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80);
/// Time for the answers of one try, in milliseconds.
const ANSWER_MS: u64 = 2_000;
/// Time to connect in the first try; each further one has twice as long, up to [`ANSWER_MS`]. The first
/// packets of a link that just came up may be lost, and TCP itself would try again only after a second.
const FIRST_CONNECT_MS: u64 = 20;
/// Pause before the second try; each further one is twice as long, up to [`MAX_PAUSE_MS`].
const FIRST_PAUSE_MS: u64 = 5;
/// The longest pause between tries.
const MAX_PAUSE_MS: u64 = 1_000;
/// Tries before envd gives up: some minutes, far beyond the time in which a host waits for a guest.
const MAX_TRIES: u32 = 300;
/// How long the document is taken for the present one when a session begins.
const FRESH_MS: u64 = 3_000;
/// The longest verifier file, in bytes.
const MAX_VERIFIER_FILE: usize = 4096;

/// One try that is under way.
struct Try {
    fd: Fd,
    fetch: Fetch,
    output: Vec<u8>,
    connected: bool,
    wants_write: bool,
}

/// The fetch of the metadata document, over as many tries as it takes.
pub struct Identity {
    current: Option<Try>,
    tries: u32,
    due_ms: Option<u64>,
    fetched_ms: Option<u64>,
    is_given: bool,
}

impl Identity {
    /// Starts with the first try at once.
    pub fn new(now_ms: u64) -> Identity {
        Identity { current: None, tries: 0, due_ms: Some(now_ms), fetched_ms: None, is_given: false }
    }

    /// Nothing to fetch.
    pub fn given() -> Identity {
        Identity { current: None, tries: 0, due_ms: None, fetched_ms: None, is_given: true }
    }

    /// Somebody wants to be let in: whether what is known may be used for that. When it may not, it is
    /// fetched again: the guest may have been resumed as another capsule.
    pub fn is_fresh(&mut self, now_ms: u64) -> bool {
        let fresh = self.is_given || self.fetched_ms.is_some_and(|at| now_ms.saturating_sub(at) < FRESH_MS);
        if !fresh && self.current.is_none() && self.due_ms.is_none() {
            self.tries = 0;
            self.due_ms = Some(now_ms);
        }
        fresh
    }

    /// The guest is about to be saved: who it is when it goes on is to be asked anew.
    pub fn forget_freshness(&mut self) {
        self.fetched_ms = None;
    }

    /// When [`Identity::handle_timeout`] is due.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.due_ms
    }

    /// Whether all tries have failed.
    pub fn has_given_up(&self) -> bool {
        self.current.is_none() && self.due_ms.is_none() && self.tries >= MAX_TRIES
    }

    /// Begins a try, or ends one that takes too long.
    pub fn handle_timeout(&mut self, epoll: &Epoll, now_ms: u64) {
        if self.due_ms.is_none_or(|at| at > now_ms) {
            return;
        }
        if self.current.is_some() {
            self.failed("no answer in time", now_ms);
            return;
        }
        self.tries += 1;
        let connect_ms = (FIRST_CONNECT_MS << (self.tries - 1).min(10)).min(ANSWER_MS);
        self.due_ms = Some(now_ms + connect_ms);
        let (fetch, output) = Fetch::start();
        let begun = socket::connect(SERVICE).and_then(|fd| {
            epoll.add(&fd, libc::EPOLLOUT, Token::Metadata.pack())?;
            Ok(fd)
        });
        match begun {
            Ok(fd) => {
                self.current = Some(Try { fd, fetch, output, connected: false, wants_write: true });
            }
            Err(e) => self.failed(&format!("cannot connect: {e}"), now_ms),
        }
    }

    fn failed(&mut self, why: &str, now_ms: u64) {
        self.current = None;
        if self.tries >= MAX_TRIES {
            self.due_ms = None;
            log!("no metadata from 169.254.169.254: {why}; giving up, nobody is let in");
            return;
        }
        // The first failures are common while the host still sets things up.
        if self.tries == 10 {
            log!("no metadata from 169.254.169.254 yet: {why}");
        }
        let pause = FIRST_PAUSE_MS << (self.tries - 1).min(10);
        self.due_ms = Some(now_ms + pause.min(MAX_PAUSE_MS));
    }

    /// The socket is ready: the document, once it is there.
    pub fn on_ready(&mut self, epoll: &Epoll, scratch: &mut [u8], now_ms: u64) -> Option<Metadata> {
        let attempt = self.current.as_mut()?;
        let was_connected = attempt.connected;
        match attempt.go_on(epoll, scratch) {
            Ok(None) => {
                if attempt.connected && !was_connected {
                    self.due_ms = Some(now_ms + ANSWER_MS);
                }
                None
            }
            Ok(Some(metadata)) => {
                self.current = None;
                self.due_ms = None;
                self.fetched_ms = Some(now_ms);
                Some(metadata)
            }
            Err(why) => {
                self.failed(why.as_str(), now_ms);
                None
            }
        }
    }
}

impl Try {
    fn go_on(&mut self, epoll: &Epoll, scratch: &mut [u8]) -> Result<Option<Metadata>, String> {
        let text = |e: Errno| format!("{e}");
        if !self.connected {
            socket::take_error(&self.fd).map_err(text)?;
            self.connected = true;
        }
        if self.output.is_empty() {
            let n = match self.fd.read(scratch) {
                Err(Errno(libc::EAGAIN)) => return Ok(None),
                other => other.map_err(text)?,
            };
            match self.fetch.receive(&scratch[..n]).map_err(|e| String::from(e.text()))? {
                Step::Read => {}
                Step::Send(bytes) => self.output = bytes,
                Step::Done(metadata) => return Ok(Some(metadata)),
            }
        }
        if !self.output.is_empty() {
            match socket::send(&self.fd, &self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(Errno(libc::EAGAIN)) => {}
                Err(e) => return Err(text(e)),
            }
        }
        let wants_write = !self.output.is_empty();
        if wants_write != self.wants_write {
            let events = if wants_write { libc::EPOLLOUT } else { libc::EPOLLIN };
            epoll.modify(&self.fd, events, Token::Metadata.pack()).map_err(text)?;
            self.wants_write = wants_write;
        }
        Ok(None)
    }
}

/// Opens the gate for who knows the verifier's secret.
pub fn open_gate(verifier: Verifier) -> Result<Gate, Errno> {
    let mut decoy_key = [0; 32];
    clock::random(&mut decoy_key)?;
    Ok(Gate::Open { verifier, decoy_key })
}

/// Reads a verifier from a file, for machines without a metadata service.
pub fn read_verifier(path: &str) -> Result<Verifier, String> {
    let name = CString::new(path).map_err(|_| "the path has a NUL byte")?;
    let text = file::read_file(&name, MAX_VERIFIER_FILE).map_err(|e| format!("cannot read {path}: {e}"))?;
    core::str::from_utf8(&text)
        .ok()
        .and_then(|text| Verifier::parse(text.trim()))
        .ok_or_else(|| format!("{path} does not hold a SCRAM-SHA-256 verifier"))
}

/// Leaves the ids where programs in the guest look for them.
pub fn write_identity_files(metadata: &Metadata) {
    let directory = c"/run/wrenn";
    match file::make_directory(file::CURRENT, directory, 0o755) {
        Ok(()) | Err(Errno(libc::EEXIST)) => {}
        Err(e) => log!("cannot make /run/wrenn: {e}"),
    }
    for (name, content) in identity_files(metadata) {
        let path = format!("/run/wrenn/{name}\0");
        if let Ok(path) = core::ffi::CStr::from_bytes_with_nul(path.as_bytes())
            && let Err(e) = file::write_file(path, content.as_bytes(), 0o644)
        {
            log!("cannot write {}: {e}", path.to_string_lossy());
        }
    }
}
