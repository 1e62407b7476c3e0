//! A small blocking HTTP/1.1 client for one request a connection. On purpose not built on the
//! project's own codec: the tests should not check it against itself.

use crate::{Context, Failure, Result};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// The longest answer read, in bytes.
const MAX_ANSWER: u64 = 256 * 1024 * 1024;
/// How long a request may take when the caller does not say.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(90);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header names in lower case, with their values.
    pub headers: Vec<(String, String)>,
    /// The body, chunks joined.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; `Null` when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The first header with this lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The error code of the API's error form; empty when there is none.
    pub fn error_code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_string()
    }

    /// The error message of the API's error form; empty when there is none.
    pub fn error_message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_default().to_string()
    }
}

/// A server and the headers that every request to it carries.
#[derive(Debug, Clone)]
pub struct Client {
    address: String,
    headers: Vec<(String, String)>,
    timeout: Duration,
}

impl Client {
    /// A client of `address` (`ip:port`) without credentials.
    pub fn new(address: &str) -> Client {
        Client { address: address.to_string(), headers: Vec::new(), timeout: DEFAULT_TIMEOUT }
    }

    /// The same with one more header on every request.
    pub fn with_header(&self, name: &str, value: &str) -> Client {
        let mut client = self.clone();
        client.headers.push((name.to_string(), value.to_string()));
        client
    }

    /// The same with another time limit for reads and writes.
    pub fn with_timeout(&self, timeout: Duration) -> Client {
        Client { timeout, ..self.clone() }
    }

    /// `GET`.
    pub fn get(&self, path: &str) -> Result<Answer> {
        self.request("GET", path, None)
    }

    /// `DELETE`.
    pub fn delete(&self, path: &str) -> Result<Answer> {
        self.request("DELETE", path, None)
    }

    /// `POST` of a JSON body.
    pub fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.request("POST", path, Some(("application/json", body.to_string().as_bytes())))
    }

    /// Any method with any body: content type and bytes.
    pub fn request(&self, method: &str, path: &str, body: Option<(&str, &[u8])>) -> Result<Answer> {
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        for (name, value) in &self.headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some((content_type, bytes)) = body {
            request.push_str(&format!("Content-Type: {content_type}\r\nContent-Length: {}\r\n", bytes.len()));
        }
        request.push_str("\r\n");
        let mut raw = request.into_bytes();
        raw.extend_from_slice(body.map_or(&[], |b| b.1));
        self.raw(&raw).context(format!("{method} {path}"))
    }

    /// Sends bytes as they are and reads one answer to the connection's end.
    pub fn raw(&self, request: &[u8]) -> Result<Answer> {
        let mut stream = TcpStream::connect(&self.address).context(format!("connect to {}", self.address))?;
        stream.set_read_timeout(Some(self.timeout)).context("set a timeout")?;
        stream.set_write_timeout(Some(self.timeout)).context("set a timeout")?;
        // A server may answer and close before it has read everything; the answer is what counts.
        let _ = stream.write_all(request);
        let mut raw = Vec::new();
        if let Err(e) = stream.take(MAX_ANSWER).read_to_end(&mut raw)
            && raw.is_empty()
        {
            return Err(Failure(format!("read the answer: {e}")));
        }
        parse(&raw)
    }
}

/// One connection for many requests, as a client that keeps it alive has.
#[derive(Debug)]
pub struct Connection {
    client: Client,
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Connection {
    /// Connects with a client's address, headers and timeout.
    pub fn open(client: &Client) -> Result<Connection> {
        let stream = TcpStream::connect(&client.address).context(format!("connect to {}", client.address))?;
        stream.set_read_timeout(Some(client.timeout)).context("set a timeout")?;
        stream.set_nodelay(true).context("TCP_NODELAY")?;
        Ok(Connection { client: client.clone(), stream, unread: Vec::new() })
    }

    /// `POST` of a JSON body; the answer must have a `Content-Length`.
    pub fn post(&mut self, path: &str, body: &Value) -> Result<Answer> {
        let body = body.to_string();
        let mut request = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n",
            self.client.address,
            body.len()
        );
        for (name, value) in &self.client.headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        request.push_str(&body);
        self.stream.write_all(request.as_bytes()).context(format!("POST {path}"))?;
        let mut block = [0; 65_536];
        loop {
            if let Ok(answer) = parse(&self.unread)
                && answer.header("content-length").is_some()
            {
                // One request is under way at a time, so what was read is this answer and no more.
                self.unread.clear();
                return Ok(answer);
            }
            let n = self.stream.read(&mut block).context(format!("POST {path}"))?;
            if n == 0 {
                return Err(Failure(format!("POST {path}: the server closed the connection")));
            }
            self.unread.extend_from_slice(&block[..n]);
        }
    }
}

fn parse(raw: &[u8]) -> Result<Answer> {
    let end = raw
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .ok_or_else(|| Failure(format!("no whole answer, only {:?}", String::from_utf8_lossy(raw))))?;
    let head = String::from_utf8_lossy(&raw[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|l| l.strip_prefix("HTTP/1.1 "))
        .and_then(|l| l.get(..3))
        .and_then(|s| s.parse().ok())
        .ok_or_else(|| Failure(format!("not an HTTP/1.1 answer: {head}")))?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|l| l.split_once(':'))
        .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_string()))
        .collect();
    let rest = &raw[end + 4..];
    let answer = Answer { status, headers, body: Vec::new() };
    if status == 100 {
        return parse(rest);
    }
    let body = if answer.header("transfer-encoding") == Some("chunked") {
        join_chunks(rest)?
    } else {
        match answer.header("content-length").and_then(|l| l.parse::<usize>().ok()) {
            Some(length) if rest.len() < length => {
                return Err(Failure(format!("the body ends after {} of {length} bytes", rest.len())));
            }
            Some(length) => rest[..length].to_vec(),
            None => rest.to_vec(),
        }
    };
    Ok(Answer { body, ..answer })
}

fn join_chunks(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|w| w == b"\r\n").ok_or("a chunk has no size line")?;
        let size = std::str::from_utf8(&rest[..line]).context("a chunk size is not text")?;
        let size = usize::from_str_radix(size.trim(), 16).context(format!("chunk size {size:?}"))?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Ok(body);
        }
        if rest.len() < size + 2 {
            return Err(Failure("the body ends inside a chunk".into()));
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_a_length_and_in_chunks_are_read() {
        let answer = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").expect("an answer");
        assert_eq!((answer.status, answer.body.as_slice()), (200, b"{}".as_slice()));
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n";
        assert_eq!(parse(chunked).expect("an answer").body, b"abcd");
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}").is_err(), "cut short");
    }
}
