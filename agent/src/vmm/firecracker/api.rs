//! Firecracker's API: HTTP/1.1 over a Unix socket, one request a connection.
//!
//! The peer is a VMM that a guest may have taken over: answers have a bound, waits have an end, and it must
//! be the process that was started.

use super::requests::Request;
use crate::sys::{node, poll};
use crate::vmm::VmmError;
use crate::vmm::machine::system;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use wire::http1::{HttpError, Limits, ResponseEvent, ResponseParser, write_request};

/// The socket, in the machine's root.
pub const SOCKET: &str = "api.sock";
/// The longest answer that is read, in bytes. Good ones are empty, and bad ones say why in a sentence.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// How much of an answer that makes no sense goes into a message, in characters.
const SHOWN_CHARS: usize = 300;

/// An answer as it comes: bytes in, a verdict out.
#[derive(Debug)]
pub struct Answer {
    parser: ResponseParser,
    status: u16,
    body: Vec<u8>,
    is_complete: bool,
}

impl Answer {
    /// Of which nothing has come.
    pub fn new() -> Answer {
        let parser = ResponseParser::new(Limits::default(), false);
        Answer { parser, status: 0, body: Vec::new(), is_complete: false }
    }

    /// Takes what has come; true when the answer is complete.
    pub fn take(&mut self, mut bytes: &[u8]) -> Result<bool, String> {
        // Each round takes at least one byte or ends.
        while !self.is_complete {
            let (taken, event) = self.parser.parse(bytes).map_err(|e: HttpError| e.to_string())?;
            bytes = &bytes[taken..];
            match event {
                Some(ResponseEvent::Head(head)) => self.status = head.status,
                Some(ResponseEvent::Data(data)) => self.body.extend_from_slice(data),
                Some(ResponseEvent::End) => self.is_complete = true,
                None => break,
            }
            if self.body.len() > MAX_ANSWER_BYTES {
                return Err(format!("an answer of more than {MAX_ANSWER_BYTES} bytes"));
            }
        }
        Ok(self.is_complete)
    }

    /// Why a complete answer is a refusal; `None` when it is none.
    pub fn refusal(&self) -> Option<String> {
        if (200..300).contains(&self.status) {
            return None;
        }
        let fault = serde_json::from_slice::<Value>(&self.body).ok();
        let fault = fault.as_ref().and_then(|f| f["fault_message"].as_str());
        let text = fault.map_or_else(|| String::from_utf8_lossy(&self.body).into_owned(), str::to_owned);
        let text: String =
            text.chars().take(SHOWN_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
        Some(if text.is_empty() { format!("HTTP status {}", self.status) } else { text })
    }
}

/// The bytes of a request.
pub fn request_bytes(request: &Request) -> Vec<u8> {
    let mut out = Vec::new();
    let headers = [("accept", "application/json"), ("content-type", "application/json")];
    let body = request.body.to_string();
    write_request(&mut out, request.method, &request.path, "localhost", headers, body.as_bytes());
    out
}

/// One Firecracker's API.
#[derive(Debug)]
pub struct Api {
    /// The machine's root. By way of it, because a socket's own path may have no more than 107 bytes, unix(7).
    root: File,
    pid: u32,
}

impl Api {
    /// The API of the process `pid`, whose root this is.
    pub fn new(root: File, pid: u32) -> Api {
        Api { root, pid }
    }

    /// Whether somebody listens.
    pub fn is_up(&self) -> bool {
        self.connect().is_ok()
    }

    /// Makes a request and waits at most `timeout_ms` for its answer. Blocks.
    pub fn call(&self, request: &Request, timeout_ms: u64) -> Result<(), VmmError> {
        let end = Instant::now() + Duration::from_millis(timeout_ms);
        let command = request.step;
        let mut stream = self.connect().map_err(system("connecting to", Path::new(SOCKET)))?;
        let bytes = request_bytes(request);
        let mut written = 0;
        while written < bytes.len() {
            match stream.write(&bytes[written..]) {
                Ok(count) => written += count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(&stream, libc::POLLOUT, end, command)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(VmmError::MonitorClosed),
            }
        }
        let mut answer = Answer::new();
        let mut chunk = [0; 4_096];
        loop {
            match stream.read(&mut chunk) {
                Ok(0) => return Err(VmmError::MonitorClosed),
                Ok(count) => {
                    let complete =
                        answer.take(&chunk[..count]).map_err(|why| VmmError::Refused { command, why })?;
                    if complete {
                        return answer
                            .refusal()
                            .map_or(Ok(()), |why| Err(VmmError::Refused { command, why }));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(&stream, libc::POLLIN, end, command)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(VmmError::MonitorClosed),
            }
        }
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let path = format!("/proc/self/fd/{}/{SOCKET}", self.root.as_raw_fd());
        let stream = node::connect(Path::new(&path))?;
        // The root is the VMM's own: it could put another's socket there.
        if node::peer_pid(stream.as_fd())? != self.pid {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "another process listens there"));
        }
        Ok(stream)
    }
}

fn wait(
    stream: &UnixStream,
    events: libc::c_short,
    end: Instant,
    command: &'static str,
) -> Result<(), VmmError> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(VmmError::NoAnswer { command });
    }
    poll::wait(stream.as_fd(), events, left).map_err(system("waiting for", Path::new(SOCKET)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::firecracker::requests::set_running;

    #[test]
    fn a_request_is_written_byte_by_byte_as_it_should_be() {
        let expected = "PATCH /vm HTTP/1.1\r\nhost: localhost\r\naccept: application/json\r\n\
                        content-type: application/json\r\ncontent-length: 18\r\nconnection: close\r\n\r\n\
                        {\"state\":\"Paused\"}";
        assert_eq!(String::from_utf8_lossy(&request_bytes(&set_running(false))), expected);
    }

    #[test]
    fn answers_are_read_in_any_pieces() {
        let good = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        let fault = b"HTTP/1.1 400 \r\nContent-Length: 30\r\n\r\n{\"fault_message\":\"no\\u001bkernel\"}";
        for size in [1, 7, 1_000] {
            let mut answer = Answer::new();
            let complete = good.chunks(size).map(|piece| answer.take(piece).expect("read")).last();
            assert_eq!((complete, answer.refusal()), (Some(true), None));
        }
        let length = fault.len() - b"HTTP/1.1 400 \r\nContent-Length: 30\r\n\r\n".len();
        let fault = String::from_utf8_lossy(fault).replace("30", &length.to_string());
        let mut answer = Answer::new();
        assert!(answer.take(fault.as_bytes()).expect("read"));
        assert_eq!(answer.refusal().as_deref(), Some("no kernel"));
    }

    #[test]
    fn answers_that_are_none_or_too_long_are_refused() {
        assert!(Answer::new().take(b"QMP!\r\n\r\n").is_err());
        let mut answer = Answer::new();
        assert!(!answer.take(b"HTTP/1.1 400 \r\nContent-Length: 10000000\r\n\r\n").expect("a head"));
        let refused = (0..100).find_map(|_| answer.take(&[b'x'; 4_096]).err());
        assert!(refused.is_some_and(|why| why.contains("65536")));
    }
}
