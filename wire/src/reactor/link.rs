//! A wire session on a TCP connection.

use super::socket::{READ_BUDGET_BYTES, READ_CHUNK_BYTES, Socket, Transfer};
use crate::session::Session;
use mio::net::TcpStream;

/// A session and its transport.
pub struct Link {
    /// The transport.
    pub socket: Socket,
    /// The protocol.
    pub session: Session,
}

impl Link {
    /// A transport (connected, accepted, or still being connected) with its session.
    pub fn new(socket: Socket, session: Session) -> Link {
        Link { socket, session }
    }

    /// The stream, for registering it.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.socket.stream
    }

    /// Whether there may be more to read without another word from the poll.
    pub fn is_readable(&self) -> bool {
        self.socket.is_readable() && !self.session.is_closed()
    }

    /// Reads what is there, up to [`READ_BUDGET_BYTES`], into the session.
    pub fn read(&mut self, now_ms: u64) {
        let mut buffer = [0; READ_CHUNK_BYTES];
        let mut budget = READ_BUDGET_BYTES;
        while self.is_readable() && budget > 0 {
            match self.socket.read(&mut buffer) {
                Transfer::Done(n) => {
                    self.session.receive(&buffer[..n], now_ms);
                    budget = budget.saturating_sub(n);
                }
                Transfer::Blocked => return,
                Transfer::Ended | Transfer::Broken(_) => {
                    self.session.transport_closed();
                    return;
                }
            }
        }
    }

    /// Writes the session's output as far as it goes. Returns whether any went: then there may be new
    /// events.
    pub fn flush(&mut self) -> bool {
        let mut wrote = false;
        while self.socket.is_writable() && !self.session.output().is_empty() {
            match self.socket.write(self.session.output()) {
                Transfer::Done(n) => {
                    self.session.consume_output(n);
                    wrote = true;
                }
                Transfer::Blocked => break,
                Transfer::Ended | Transfer::Broken(_) => {
                    self.session.transport_closed();
                    break;
                }
            }
        }
        wrote
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{NONCE_LEN, Verifier};
    use crate::message::{Health, Message};
    use crate::session::{Event, Limits, Session};
    use std::time::{Duration, Instant};

    /// Two links over a real loopback connection shake hands and pass a message.
    #[test]
    fn two_links_talk_over_loopback() -> std::io::Result<()> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let dialled = std::net::TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        let mut sides = Vec::new();
        for (stream, session) in [
            (dialled, Session::client("cp", b"secret", "test", [1; NONCE_LEN], Limits::default(), 0)),
            (accepted, Session::server("test", [2; NONCE_LEN], Limits::default(), 0)),
        ] {
            stream.set_nonblocking(true)?;
            sides.push(Link::new(Socket::new(TcpStream::from_std(stream)), session));
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            for side in &mut sides {
                side.socket.on_ready(true, true);
                side.read(0);
                while let Some(event) = side.session.poll_event() {
                    match event {
                        Event::Authenticate { .. } => {
                            let verifier = Verifier::new(b"secret", b"0123456789abcdef", 4096);
                            side.session.provide_verifier(Some(verifier), b"decoy");
                        }
                        Event::Ready { ref identity, .. } if identity == "cp" => {
                            let _ = side.session.open(&Health {}, true);
                        }
                        Event::Opened { kind, .. } => {
                            assert_eq!(kind, Health::KIND);
                            return Ok(());
                        }
                        _ => {}
                    }
                }
                side.flush();
            }
        }
        panic!("no message came through");
    }
}
