//! The metadata service that a guest finds at 169.254.169.254: Firecracker's MMDS, version 2. Sans-I/O:
//! bytes and the time go in, bytes come out; who owns the sockets does the rest.
//!
//! `PUT /latest/api/token` with `X-metadata-token-ttl-seconds: 1..=21600` gives a token; `GET` of any path
//! of the document with `X-metadata-token` gives that part of it, as JSON when the client accepts
//! `application/json`, else as EC2's service does: a string itself, an object's keys one a line.
//!
//! The client is a guest, so hostile: every buffer, count and wait has a bound here.
//!
//! - [`Endpoint`]: one capsule's service with its connections
//! - `http`: requests and responses; `token`: session tokens; `document`: looking things up

mod document;
mod http;
mod token;

use document::Lookup;
use http::{Method, Parsed, Request, Response};
use serde_json::Value;
use token::Tokens;

/// Connections that one capsule's guest may have open: its daemon, and a few programs that ask.
pub const MAX_CONNECTIONS: usize = 8;
/// How long a connection may take for its next request, its answer included, in milliseconds.
pub const REQUEST_TIMEOUT_MS: u64 = 10_000;
/// Answers that may wait to be written; a client that asks without reading is cut off.
pub const MAX_OUTPUT_BYTES: usize = 256 * 1024;
/// Requests on one connection, after which it has to make a new one.
pub const MAX_REQUESTS_PER_CONNECTION: u32 = 1_000;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN_HEADERS: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TTL_HEADERS: [&str; 2] = ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];

/// A connection of one [`Endpoint`]; valid from `accept` until `close`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(usize);

#[derive(Debug)]
struct Connection {
    input: Vec<u8>,
    output: Vec<u8>,
    /// When the request that is being received began, or the connection.
    since_ms: u64,
    requests: u32,
    /// No further request is read; what is in `output` is the end.
    last: bool,
}

/// One capsule's metadata service.
#[derive(Debug)]
pub struct Endpoint {
    document: Value,
    tokens: Tokens,
    connections: [Option<Connection>; MAX_CONNECTIONS],
    fetched: bool,
}

impl Endpoint {
    /// A service for this document.
    pub fn new(document: Value) -> Endpoint {
        Endpoint {
            document,
            tokens: Tokens::default(),
            connections: [const { None }; MAX_CONNECTIONS],
            fetched: false,
        }
    }

    /// Replaces the document; tokens stay valid.
    pub fn set_document(&mut self, document: Value) {
        self.document = document;
    }

    /// Whether some of the document was fetched with a valid token since the last call: a sign of life
    /// from the guest.
    pub fn take_fetched(&mut self) -> bool {
        std::mem::take(&mut self.fetched)
    }

    /// A new connection, or `None` when the guest has too many: drop the socket then.
    pub fn accept(&mut self, now_ms: u64) -> Option<ConnectionId> {
        let free = self.connections.iter().position(Option::is_none)?;
        self.connections[free] = Some(Connection {
            input: Vec::new(),
            output: Vec::new(),
            since_ms: now_ms,
            requests: 0,
            last: false,
        });
        Some(ConnectionId(free))
    }

    /// Bytes have come on a connection.
    pub fn receive(&mut self, id: ConnectionId, bytes: &[u8], now_ms: u64) {
        let Some(mut connection) = self.connections[id.0].take() else { return };
        let mut bytes = bytes;
        // Each round takes at least one byte from the input or ends.
        while !connection.last {
            let room = (http::MAX_REQUEST_BYTES - connection.input.len()).min(bytes.len());
            connection.input.extend_from_slice(&bytes[..room]);
            bytes = &bytes[room..];
            match http::parse(&connection.input) {
                Parsed::Incomplete => break,
                Parsed::Request(request, used) => {
                    let mut response = self.answer(&request, now_ms);
                    connection.requests += 1;
                    response.close |= request.close || connection.requests >= MAX_REQUESTS_PER_CONNECTION;
                    connection.write(&response);
                    connection.input.drain(..used);
                    connection.since_ms = now_ms;
                }
                Parsed::Invalid(response) => connection.write(&response),
            }
        }
        self.connections[id.0] = Some(connection);
    }

    /// What is to be written to a connection.
    pub fn output(&self, id: ConnectionId) -> &[u8] {
        self.connections[id.0].as_ref().map_or(&[], |c| &c.output)
    }

    /// The first `count` bytes of the output have been written.
    pub fn consume_output(&mut self, id: ConnectionId, count: usize) {
        if let Some(connection) = &mut self.connections[id.0] {
            connection.output.drain(..count.min(connection.output.len()));
        }
    }

    /// Whether everything has been said: close the socket, and then the connection here.
    pub fn finished(&self, id: ConnectionId) -> bool {
        self.connections[id.0].as_ref().is_none_or(|c| c.last && c.output.is_empty())
    }

    /// A connection has ended; its id may be given out again.
    pub fn close(&mut self, id: ConnectionId) {
        self.connections[id.0] = None;
    }

    /// When [`Endpoint::expired`] is worth asking; `None` without connections.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.connections.iter().flatten().map(|c| c.since_ms + REQUEST_TIMEOUT_MS).min()
    }

    /// The connections that have taken too long. The caller closes their sockets and them.
    pub fn expired(&self, now_ms: u64) -> Vec<ConnectionId> {
        let late = |c: &Connection| now_ms >= c.since_ms + REQUEST_TIMEOUT_MS;
        let all = self.connections.iter().enumerate();
        all.filter(|(_, c)| c.as_ref().is_some_and(late)).map(|(index, _)| ConnectionId(index)).collect()
    }

    fn answer(&mut self, request: &Request<'_>, now_ms: u64) -> Response {
        match request.method {
            Method::Get => self.answer_get(request, now_ms),
            Method::Put => self.answer_put(request, now_ms),
            // The answer to a HEAD would have to come without its body: the connection ends with it.
            Method::Other => Response::text(405, "Only GET and PUT are allowed.").closing(),
        }
    }

    fn answer_put(&mut self, request: &Request<'_>, now_ms: u64) -> Response {
        if request.path != TOKEN_PATH {
            return Response::text(404, &format!("Resource not found: {}.", request.path));
        }
        // A request that came through a proxy was perhaps not meant for us (as EC2's service has it).
        if request.header("x-forwarded-for").is_some() {
            return Response::text(
                400,
                "A token is not given to a forwarded request: remove X-Forwarded-For.",
            );
        }
        let Some(ttl) = TTL_HEADERS.iter().find_map(|name| request.header(name)) else {
            return Response::text(
                400,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds`.",
            );
        };
        let ttl_sec = match ttl.parse::<u32>() {
            Ok(ttl_sec) if (token::MIN_TTL_SEC..=token::MAX_TTL_SEC).contains(&ttl_sec) => ttl_sec,
            _ => {
                let (min, max) = (token::MIN_TTL_SEC, token::MAX_TTL_SEC);
                return Response::text(400, &format!("X-metadata-token-ttl-seconds must be {min} to {max}."));
            }
        };
        match self.tokens.issue(ttl_sec, now_ms) {
            Ok(token) => Response::token(&token, ttl_sec),
            Err(_) => Response::text(500, "No random numbers for a token."),
        }
    }

    fn answer_get(&mut self, request: &Request<'_>, now_ms: u64) -> Response {
        let Some(token) = TOKEN_HEADERS.iter().find_map(|name| request.header(name)) else {
            return Response::text(401, "No metadata token provided. Use the `X-metadata-token` header.");
        };
        if !self.tokens.is_valid(token, now_ms) {
            return Response::text(401, "The metadata token is not valid, or no longer.");
        }
        let response = match document::look_up(&self.document, request.path, request.accepts_json()) {
            Lookup::Json(text) => Response::json(text),
            Lookup::Text(text) => Response::text(200, &text),
            Lookup::Missing => Response::text(404, &format!("Resource not found: {}.", request.path)),
            Lookup::NotText => {
                Response::text(501, "This value has no text form. Ask with `Accept: application/json`.")
            }
        };
        self.fetched |= response.status == 200;
        response
    }
}

impl Connection {
    fn write(&mut self, response: &Response) {
        response.encode(&mut self.output);
        self.last |= response.close;
        if self.output.len() > MAX_OUTPUT_BYTES {
            self.output.clear();
            self.last = true;
        }
    }
}

#[cfg(test)]
mod tests;
