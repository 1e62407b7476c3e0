//! As much of HTTP/1.1 (RFC 9112) as the metadata service needs: small requests, one at a time.

use std::fmt::Write;

/// The longest request line and headers, together.
pub const MAX_HEAD_BYTES: usize = 4_096;
/// The longest body. None is needed; a client may send one.
pub const MAX_BODY_BYTES: usize = 1_024;
/// The longest request.
pub const MAX_REQUEST_BYTES: usize = MAX_HEAD_BYTES + MAX_BODY_BYTES;
/// Most headers of a request.
const MAX_HEADERS: usize = 32;

/// A request's method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// GET.
    Get,
    /// PUT.
    Put,
    /// Some other.
    Other,
}

/// A request whose body has been received and is of no interest.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its method.
    pub method: Method,
    /// The path, without a query, beginning with a slash.
    pub path: &'a str,
    /// Whether the client wants the connection closed after the answer.
    pub close: bool,
    headers: Vec<(&'a str, &'a str)>,
}

impl Request<'_> {
    /// The first header of this name, which is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// Whether `application/json` is among the types that the client names.
    pub fn accepts_json(&self) -> bool {
        self.header("accept").is_some_and(|accept| {
            accept.split(',').any(|kind| {
                kind.split(';').next().is_some_and(|k| k.trim().eq_ignore_ascii_case("application/json"))
            })
        })
    }
}

/// What is at the beginning of the input.
#[derive(Debug)]
pub enum Parsed<'a> {
    /// Not all of a request.
    Incomplete,
    /// A request and its length in bytes.
    Request(Request<'a>, usize),
    /// No request; this is the answer, after which there is no knowing where the next one begins.
    Invalid(Response),
}

/// Reads one request from the beginning of `input`.
pub fn parse(input: &[u8]) -> Parsed<'_> {
    let searched = &input[..input.len().min(MAX_HEAD_BYTES)];
    let Some(head_length) = searched.windows(4).position(|w| w == b"\r\n\r\n") else {
        return if input.len() >= MAX_HEAD_BYTES {
            invalid(431, "The request's headers are too long.")
        } else {
            Parsed::Incomplete
        };
    };
    let Ok(head) = std::str::from_utf8(&input[..head_length]) else {
        return invalid(400, "The request's headers are not text.");
    };
    let mut lines = head.split("\r\n");
    let Some((method, path, old)) = lines.next().and_then(parse_request_line) else {
        return invalid(400, "This is no HTTP/1.1 request line.");
    };
    let mut headers = Vec::new();
    for line in lines {
        let Some((name, value)) = line.split_once(':').filter(|(name, _)| is_token(name)) else {
            return invalid(400, "A header is malformed.");
        };
        if headers.len() >= MAX_HEADERS {
            return invalid(431, "The request has too many headers.");
        }
        headers.push((name, value.trim_matches([' ', '\t'])));
    }
    let mut request = Request { method, path, close: old, headers };
    if let Some(connection) = request.header("connection") {
        request.close |= connection.split(',').any(|o| o.trim().eq_ignore_ascii_case("close"));
    }
    let body_length = match body_length(&request) {
        Ok(length) => length,
        Err(response) => return Parsed::Invalid(response),
    };
    let length = head_length + 4 + body_length;
    if input.len() < length { Parsed::Incomplete } else { Parsed::Request(request, length) }
}

fn body_length(request: &Request<'_>) -> Result<usize, Response> {
    if request.header("transfer-encoding").is_some() {
        return Err(Response::text(501, "A body with a transfer encoding is not accepted.").closing());
    }
    let mut lengths = request.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case("content-length"));
    let Some((_, length)) = lengths.next() else { return Ok(0) };
    if lengths.next().is_some() || length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Response::text(400, "Content-Length is malformed.").closing());
    }
    match length.parse() {
        Ok(length) if length <= MAX_BODY_BYTES => Ok(length),
        _ => Err(Response::text(413, "The request's body is too long.").closing()),
    }
}

/// Method, path, and whether this is HTTP/1.0.
fn parse_request_line(line: &str) -> Option<(Method, &str, bool)> {
    let mut parts = line.split(' ');
    let (method, target, version) = (parts.next()?, parts.next()?, parts.next()?);
    let old = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        _ => return None,
    };
    if parts.next().is_some() || !is_token(method) || target.bytes().any(|b| b.is_ascii_control()) {
        return None;
    }
    // A client that takes us for a proxy sends the whole URI.
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |slash| &rest[slash..]),
        None => target,
    };
    let path = path.split('?').next()?;
    let method = match method {
        "GET" => Method::Get,
        "PUT" => Method::Put,
        _ => Method::Other,
    };
    path.starts_with('/').then_some((method, path, old))
}

/// RFC 9110, section 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Whether the connection ends after it.
    pub close: bool,
    ttl_sec: Option<u32>,
    content_type: &'static str,
    body: String,
}

impl Response {
    /// An answer in plain text.
    pub fn text(status: u16, body: &str) -> Response {
        Response { status, close: false, ttl_sec: None, content_type: "text/plain", body: body.to_owned() }
    }

    /// A 200 answer in JSON.
    pub fn json(body: String) -> Response {
        Response { status: 200, close: false, ttl_sec: None, content_type: "application/json", body }
    }

    /// A 200 answer with a token and its life in seconds.
    pub fn token(token: &str, ttl_sec: u32) -> Response {
        Response { ttl_sec: Some(ttl_sec), ..Response::text(200, token) }
    }

    /// The same, with the end of the connection.
    pub fn closing(self) -> Response {
        Response { close: true, ..self }
    }

    /// Appends its bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        // Writing to a String cannot fail.
        let _ =
            write!(head, "Content-Type: {}\r\nContent-Length: {}\r\n", self.content_type, self.body.len());
        if let Some(ttl_sec) = self.ttl_sec {
            let _ = write!(head, "X-metadata-token-ttl-seconds: {ttl_sec}\r\n");
        }
        if self.status == 405 {
            head.push_str("Allow: GET, PUT\r\n");
        }
        if self.close {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.body.as_bytes());
    }
}

fn invalid(status: u16, text: &str) -> Parsed<'static> {
    Parsed::Invalid(Response::text(status, text).closing())
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        _ => "Internal Server Error",
    }
}
