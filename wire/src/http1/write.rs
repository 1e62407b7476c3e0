//! Messages, as they are written. A field that could break the message is left out, not sent.

use super::Framing;
use super::head::is_token;
use std::io::Write;

/// The reason phrase of a status; empty when it is not a common one.
pub fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        302 => "Found",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    }
}

/// Appends the interim response that lets a client send its body.
pub fn write_continue(out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
}

fn write_field(out: &mut Vec<u8>, name: &str, value: &str) {
    let is_safe = is_token(name.as_bytes()) && !value.bytes().any(|b| (b < b' ' && b != b'\t') || b == 0x7f);
    debug_assert!(is_safe, "a header field that cannot be sent: {name:?}");
    if is_safe {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
}

fn write_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::Length(n) => write_field(out, "content-length", &n.to_string()),
        Framing::Chunked => write_field(out, "transfer-encoding", "chunked"),
        Framing::None | Framing::UntilClose => {}
    }
}

/// Writes one response: head, then body.
#[derive(Debug)]
pub struct ResponseWriter {
    framing: Framing,
    /// Whether the body is left out, because the request was `HEAD`.
    is_head_request: bool,
}

impl ResponseWriter {
    /// Appends a head. `framing` must be [`Framing::None`] for 1xx, 204 and 304; for others it is
    /// written as a field. With `keep_alive` false the client is told that the connection ends.
    pub fn start<'a>(
        out: &mut Vec<u8>,
        status: u16,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
        framing: Framing,
        keep_alive: bool,
        is_head_request: bool,
    ) -> ResponseWriter {
        // Writing to a Vec does not fail.
        let _ = write!(out, "HTTP/1.1 {status} {}\r\n", reason_phrase(status));
        for (name, value) in headers {
            write_field(out, name, value);
        }
        write_framing(out, framing);
        if status != 101 {
            write_field(out, "connection", if keep_alive { "keep-alive" } else { "close" });
        }
        out.extend_from_slice(b"\r\n");
        ResponseWriter { framing, is_head_request }
    }

    /// Appends bytes of the body.
    pub fn body(&self, out: &mut Vec<u8>, bytes: &[u8]) {
        if self.is_head_request || bytes.is_empty() {
            return;
        }
        match self.framing {
            Framing::Chunked => {
                let _ = write!(out, "{:x}\r\n", bytes.len());
                out.extend_from_slice(bytes);
                out.extend_from_slice(b"\r\n");
            }
            Framing::Length(_) | Framing::UntilClose => out.extend_from_slice(bytes),
            Framing::None => debug_assert!(false, "a body where there is none"),
        }
    }

    /// Appends what ends the body.
    pub fn end(&self, out: &mut Vec<u8>) {
        if self.framing == Framing::Chunked && !self.is_head_request {
            out.extend_from_slice(b"0\r\n\r\n");
        }
    }
}

/// Appends a request with its whole body. `host` is the authority. `Connection: close` is sent, because
/// callers make one request a connection.
pub fn write_request<'a>(
    out: &mut Vec<u8>,
    method: &str,
    target: &str,
    host: &str,
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
    body: &[u8],
) {
    debug_assert!(is_token(method.as_bytes()) && target.bytes().all(|b| b.is_ascii_graphic()));
    let _ = write!(out, "{method} {target} HTTP/1.1\r\n");
    write_field(out, "host", host);
    for (name, value) in headers {
        write_field(out, name, value);
    }
    if !body.is_empty() || matches!(method, "POST" | "PUT" | "PATCH") {
        write_framing(out, Framing::Length(body.len() as u64));
    }
    write_field(out, "connection", "close");
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(body);
}
