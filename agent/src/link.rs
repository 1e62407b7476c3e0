//! A wire session on a TCP connection: the thin shell between a [`Session`] and the event loop.

use mio::net::TcpStream;
use std::io::{self, Read, Write};
use wire::session::Session;

/// Bytes read from one connection before the others have their turn.
pub const READ_BUDGET: usize = 256 * 1024;
/// Bytes read at a time.
const READ_CHUNK: usize = 64 * 1024;

/// A session and its transport. Readiness is remembered, because the event loop is edge-triggered and a
/// turn may end before everything is read or written.
pub struct Link {
    /// The transport.
    pub stream: TcpStream,
    /// The protocol.
    pub session: Session,
    readable: bool,
    writable: bool,
}

impl Link {
    /// A connected (or just accepted) transport with its session.
    pub fn new(stream: TcpStream, session: Session) -> Link {
        // Without it, a small frame could wait for the acknowledgement of the one before (RFC 896).
        if let Err(e) = stream.set_nodelay(true) {
            log::debug!("TCP_NODELAY: {e}");
        }
        Link { stream, session, readable: true, writable: true }
    }

    /// The event loop says what the transport is ready for.
    pub fn on_ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Whether there may be more to read without another word from the event loop.
    pub fn is_readable(&self) -> bool {
        self.readable && !self.session.is_closed()
    }

    /// Reads what is there, up to [`READ_BUDGET`], into the session.
    pub fn read(&mut self, now_ms: u64) {
        let mut buffer = [0; READ_CHUNK];
        let mut budget = READ_BUDGET;
        while self.is_readable() && budget > 0 {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.readable = false;
                    self.session.transport_closed();
                }
                Ok(n) => {
                    self.session.receive(&buffer[..n], now_ms);
                    budget = budget.saturating_sub(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::debug!("read: {e}");
                    self.readable = false;
                    self.session.transport_closed();
                }
            }
        }
    }

    /// Writes the session's output as far as it goes. Returns whether any went.
    pub fn flush(&mut self) -> bool {
        let mut wrote = false;
        while self.writable && !self.session.output().is_empty() {
            match self.stream.write(self.session.output()) {
                Ok(0) => self.writable = false,
                Ok(n) => {
                    self.session.consume_output(n);
                    wrote = true;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::debug!("write: {e}");
                    self.writable = false;
                    self.session.transport_closed();
                }
            }
        }
        wrote
    }
}
