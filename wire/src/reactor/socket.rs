//! A TCP stream under an edge-triggered poll: readiness is remembered, because a turn may end before
//! everything is read or written.

use mio::net::TcpStream;
use std::io::{self, Read, Write};

/// Bytes read at a time.
pub const READ_CHUNK_BYTES: usize = 64 * 1024;
/// Bytes read from one connection before the others have their turn.
pub const READ_BUDGET_BYTES: usize = 256 * 1024;

/// What became of a read or a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// So many bytes, at least one.
    Done(usize),
    /// Nothing now; the poll will tell.
    Blocked,
    /// The peer has ended its direction (reads only).
    Ended,
    /// The connection is broken.
    Broken(io::ErrorKind),
}

/// A stream and its readiness.
#[derive(Debug)]
pub struct Socket {
    /// The stream, for registering it.
    pub stream: TcpStream,
    readable: bool,
    writable: bool,
}

impl Socket {
    /// A stream that may be ready for anything, or is still being connected.
    pub fn new(stream: TcpStream) -> Socket {
        // Without it, a small frame could wait for the acknowledgement of the one before (RFC 896).
        if let Err(error) = stream.set_nodelay(true) {
            log::debug!("TCP_NODELAY: {error}");
        }
        Socket { stream, readable: true, writable: true }
    }

    /// A stream whose connect is in progress: nothing is ready until the poll says so.
    pub fn connecting(stream: TcpStream) -> Socket {
        Socket { readable: false, writable: false, ..Socket::new(stream) }
    }

    /// The poll says what the stream is ready for.
    pub fn on_ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Whether there may be more to read without another word from the poll.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// Whether there may be room to write without another word from the poll.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Reads once.
    pub fn read(&mut self, buffer: &mut [u8]) -> Transfer {
        while self.readable {
            match self.stream.read(buffer) {
                Ok(0) => {
                    self.readable = false;
                    return Transfer::Ended;
                }
                Ok(n) => return Transfer::Done(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.readable = false;
                    return Transfer::Broken(error.kind());
                }
            }
        }
        Transfer::Blocked
    }

    /// Writes once. `bytes` is not empty.
    pub fn write(&mut self, bytes: &[u8]) -> Transfer {
        while self.writable {
            match self.stream.write(bytes) {
                Ok(0) => self.writable = false,
                Ok(n) => return Transfer::Done(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.writable = false;
                    return Transfer::Broken(error.kind());
                }
            }
        }
        Transfer::Blocked
    }
}
