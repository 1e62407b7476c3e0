//! The agent's calls to the control plane's HTTP API: one request a connection, blocking, on a worker.

use crate::registration::{Credentials, now_sec};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};
use wire::config::HttpUrl;
use wire::http1::{HttpError, Limits, ResponseEvent, ResponseParser, write_request};

/// The time for a whole call, the resolution of the name excepted.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes.
pub const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// How much of an answer that cannot be understood goes into a message, in characters.
const SHOWN: usize = 200;

/// What the control plane is told of the host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// CPU architecture.
    pub arch: String,
    /// CPU cores.
    pub cpu_cores: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Size of the data directory's file system in GiB.
    pub disk_gb: u64,
}

/// Why a call failed.
#[derive(Debug)]
pub enum CallError {
    /// The control plane was not reached or did not answer in time.
    Unreachable {
        /// What was tried.
        step: &'static str,
        /// The failure.
        source: io::Error,
    },
    /// It answered with an error.
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its message.
        message: String,
    },
    /// Its answer is not what the API has.
    BadAnswer(String),
    /// The answer could not be kept on this host.
    Local(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Unreachable { step, source } => write!(f, "{step}: {source}"),
            CallError::Refused { status, message } => write!(f, "{message} (HTTP status {status})"),
            CallError::BadAnswer(what) => write!(f, "its answer makes no sense: {what}"),
            CallError::Local(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for CallError {}

#[derive(Deserialize)]
struct HostAnswer {
    host: HostRecord,
    token: String,
    refresh_token: String,
    wire_verifier: Option<String>,
}

#[derive(Deserialize)]
struct HostRecord {
    id: String,
}

#[derive(Deserialize)]
struct ErrorAnswer {
    error: ErrorDetail,
}

#[derive(Deserialize)]
struct ErrorDetail {
    message: String,
}

/// `POST /v1/hosts/register`.
pub fn register(
    url: &HttpUrl,
    token: &str,
    address: &str,
    facts: &HostFacts,
) -> Result<Credentials, CallError> {
    let body = json!({
        "token": token,
        "address": address,
        "arch": facts.arch,
        "cpu_cores": facts.cpu_cores,
        "memory_mb": facts.memory_mb,
        "disk_gb": facts.disk_gb,
    });
    let answer: HostAnswer = decode(&post(url, "/v1/hosts/register", None, &body)?)?;
    let wire_verifier =
        answer.wire_verifier.ok_or_else(|| CallError::BadAnswer("it has no wire_verifier".into()))?;
    Ok(Credentials {
        host_id: answer.host.id,
        token: answer.token,
        refresh_token: answer.refresh_token,
        wire_verifier,
        obtained_sec: now_sec(),
    })
}

/// `POST /v1/hosts/{id}/heartbeat`.
pub fn heartbeat(url: &HttpUrl, credentials: &Credentials) -> Result<(), CallError> {
    let path = format!("/v1/hosts/{}/heartbeat", credentials.host_id);
    post(url, &path, Some(&credentials.token), &json!({})).map(drop)
}

/// `POST /v1/hosts/auth/refresh`.
pub fn refresh(url: &HttpUrl, credentials: &Credentials) -> Result<Credentials, CallError> {
    let body = json!({ "refresh_token": credentials.refresh_token });
    let answer: HostAnswer = decode(&post(url, "/v1/hosts/auth/refresh", None, &body)?)?;
    Ok(Credentials {
        host_id: credentials.host_id.clone(),
        token: answer.token,
        refresh_token: answer.refresh_token,
        wire_verifier: answer.wire_verifier.unwrap_or_else(|| credentials.wire_verifier.clone()),
        obtained_sec: now_sec(),
    })
}

fn decode<T: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<T, CallError> {
    serde_json::from_slice(body).map_err(|e| CallError::BadAnswer(e.to_string()))
}

/// Makes a call and gives the body of a good answer.
fn post(url: &HttpUrl, path: &str, token: Option<&str>, body: &Value) -> Result<Vec<u8>, CallError> {
    let request = request_bytes(url, path, token, &body.to_string())?;
    let end = Instant::now() + CALL_TIMEOUT;
    let mut stream = connect(url, end)?;
    let unreachable = |step| move |source| CallError::Unreachable { step, source };
    stream.set_write_timeout(Some(left(end)?)).map_err(unreachable("sending"))?;
    stream.write_all(&request).map_err(unreachable("sending"))?;
    let mut answer = Answer::new();
    let mut chunk = [0; 8192];
    while !answer.complete {
        stream.set_read_timeout(Some(left(end)?)).map_err(unreachable("waiting for the answer"))?;
        match stream.read(&mut chunk) {
            Ok(0) => answer.end()?,
            Ok(n) => answer.take(&chunk[..n])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unreachable("waiting for the answer")(e)),
        }
    }
    if (200..300).contains(&answer.status) {
        return Ok(answer.body);
    }
    let message = serde_json::from_slice::<ErrorAnswer>(&answer.body).map_or_else(
        |_| String::from_utf8_lossy(&answer.body).chars().take(SHOWN).collect(),
        |answer| answer.error.message,
    );
    Err(CallError::Refused { status: answer.status, message })
}

fn request_bytes(url: &HttpUrl, path: &str, token: Option<&str>, body: &str) -> Result<Vec<u8>, CallError> {
    let printable = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
    if !printable(path) || !token.is_none_or(printable) {
        return Err(CallError::Local("the saved credentials hold characters that no token has".into()));
    }
    let headers = [
        ("user-agent", concat!("wrenn-agent/", env!("CARGO_PKG_VERSION"))),
        ("accept", "application/json"),
        ("content-type", "application/json"),
    ];
    let headers = headers.into_iter().chain(token.map(|t| ("x-host-token", t)));
    let mut out = Vec::new();
    write_request(&mut out, "POST", path, &url.authority(), headers, body.as_bytes());
    Ok(out)
}

/// An answer as it comes.
struct Answer {
    parser: ResponseParser,
    status: u16,
    body: Vec<u8>,
    complete: bool,
}

impl Answer {
    fn new() -> Answer {
        Answer {
            parser: ResponseParser::new(Limits::default(), false),
            status: 0,
            body: Vec::new(),
            complete: false,
        }
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<(), CallError> {
        // Each round takes at least one byte or ends.
        while !self.complete {
            let (taken, event) = self.parser.parse(bytes).map_err(bad_answer)?;
            bytes = &bytes[taken..];
            match event {
                Some(ResponseEvent::Head(head)) => self.status = head.status,
                Some(ResponseEvent::Data(data)) => self.body.extend_from_slice(data),
                Some(ResponseEvent::End) => self.complete = true,
                None => return Ok(()),
            }
            if self.body.len() > MAX_ANSWER_BYTES {
                return Err(CallError::BadAnswer(format!("it is longer than {MAX_ANSWER_BYTES} bytes")));
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), CallError> {
        self.parser.connection_ended().map_err(bad_answer)?;
        self.complete = true;
        Ok(())
    }
}

fn bad_answer(error: HttpError) -> CallError {
    CallError::BadAnswer(error.to_string())
}

fn connect(url: &HttpUrl, end: Instant) -> Result<TcpStream, CallError> {
    let addresses = (url.host.as_str(), url.port)
        .to_socket_addrs()
        .map_err(|source| CallError::Unreachable { step: "resolving its name", source })?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, left(end)?) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(CallError::Unreachable { step: "connecting", source: last })
}

fn left(end: Instant) -> Result<Duration, CallError> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        let source = io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        return Err(CallError::Unreachable { step: "calling", source });
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    /// A server that answers one request and gives what it was sent.
    fn server(answer: &'static str) -> (HttpUrl, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("address").port();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accepted");
            let mut request = Vec::new();
            let mut chunk = [0; 4096];
            while !String::from_utf8_lossy(&request).ends_with('}') {
                let n = stream.read(&mut chunk).expect("read");
                request.extend_from_slice(&chunk[..n]);
            }
            stream.write_all(answer.as_bytes()).expect("written");
            String::from_utf8(request).expect("text")
        });
        (HttpUrl { host: "127.0.0.1".into(), port }, thread)
    }

    fn facts() -> HostFacts {
        HostFacts { arch: "x86_64".into(), cpu_cores: 2, memory_mb: 4096, disk_gb: 10 }
    }

    #[test]
    fn a_host_is_registered() {
        let (url, thread) = server(
            "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n\r\n\
             {\"host\":{\"id\":\"host-1\",\"status\":\"online\"},\"token\":\"t\",\"refresh_token\":\"r\",\
             \"wire_verifier\":\"v\"}",
        );
        let credentials = register(&url, "one-time", "10.0.0.1:50051", &facts()).expect("registered");
        assert_eq!((credentials.host_id.as_str(), credentials.wire_verifier.as_str()), ("host-1", "v"));
        let request = thread.join().expect("server");
        assert!(request.starts_with("POST /v1/hosts/register HTTP/1.1\r\n"), "{request}");
        let body: Value =
            serde_json::from_str(request.split("\r\n\r\n").nth(1).expect("body")).expect("JSON");
        assert_eq!(body["address"], "10.0.0.1:50051");
        assert_eq!(body["memory_mb"], 4096);
        assert_eq!(body["token"], "one-time");
    }

    #[test]
    fn a_refusal_carries_the_control_planes_words() {
        let (url, thread) = server(
            "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\n\r\n\
             {\"error\":{\"code\":\"unauthorized\",\"message\":\"token expired\"}}",
        );
        let credentials = Credentials {
            host_id: "host-1".into(),
            token: "jwt".into(),
            refresh_token: String::new(),
            wire_verifier: String::new(),
            obtained_sec: 0,
        };
        let error = heartbeat(&url, &credentials).expect_err("refused");
        assert!(
            matches!(&error, CallError::Refused { status: 401, message } if message == "token expired"),
            "{error}"
        );
        assert!(thread.join().expect("server").to_lowercase().contains("\r\nx-host-token: jwt\r\n"));
        let injected = Credentials { token: "a\r\nX: y".into(), ..credentials };
        assert!(matches!(heartbeat(&url, &injected), Err(CallError::Local(_))));
    }

    #[test]
    fn answers() {
        let read = |text: &str| -> Result<(u16, Vec<u8>), CallError> {
            let mut answer = Answer::new();
            // Byte by byte, as it may come.
            text.as_bytes().chunks(1).try_for_each(|b| answer.take(b))?;
            if !answer.complete {
                answer.end()?;
            }
            Ok((answer.status, answer.body))
        };
        let ok = |text: &str| read(text).ok();
        assert_eq!(ok("HTTP/1.1 204 No Content\r\n\r\n"), Some((204, vec![])));
        assert_eq!(ok("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nabc"), Some((200, b"a".to_vec())));
        assert_eq!(ok("HTTP/1.1 200 OK\r\n\r\nabc"), Some((200, b"abc".to_vec())));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        assert_eq!(ok(chunked), Some((200, b"abc".to_vec())));
        for bad in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
        ] {
            assert!(matches!(read(bad), Err(CallError::BadAnswer(_))), "{bad:?}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(MAX_ANSWER_BYTES + 1));
        assert!(matches!(read(&endless), Err(CallError::BadAnswer(_))));
    }

    #[test]
    fn a_control_plane_that_is_not_there_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("address").port();
        drop(listener);
        let url = HttpUrl { host: "127.0.0.1".into(), port };
        let error = register(&url, "x", "10.0.0.1:1", &facts()).expect_err("nobody there");
        assert!(matches!(error, CallError::Unreachable { step: "connecting", .. }), "{error}");
    }
}
