//! HTTP/1.1 (RFC 9110, RFC 9112), sans-I/O: both parsers and both writers.
//!
//! The parsers are strict, because what two programs read differently can be smuggled past one of them:
//! lines end with CR LF and nothing else, a message has one framing or is refused, field names have no
//! space behind them, values no folding. Memory is bounded by [`Limits`]; bodies are not held at all,
//! they are handed on as slices of the input.
//!
//! | type | what it is |
//! | --- | --- |
//! | [`RequestParser`] | server side, many requests on one connection |
//! | [`ResponseParser`] | client side, one response |
//! | [`ResponseWriter`] | heads, bodies, chunks |
//! | [`write_request`] | client side, a request with its body |

mod body;
mod head;
mod request;
mod response;
#[cfg(test)]
mod tests;
mod write;

pub use head::{Headers, parse_query, percent_decode};
pub use request::{RequestEvent, RequestHead, RequestParser};
pub use response::{ResponseEvent, ResponseHead, ResponseParser};
pub use write::{ResponseWriter, reason_phrase, write_continue, write_request};

use std::fmt;

/// What a parser takes at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a whole head: first line, fields and the empty line. 431 above.
    pub max_head_bytes: usize,
    /// Bytes of a request's target. 414 above.
    pub max_target_bytes: usize,
    /// Fields of a head. 431 above.
    pub max_headers: usize,
    /// Bytes of all trailer fields and of one chunk's size line.
    pub max_trailer_bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_head_bytes: 32 * 1024,
            max_target_bytes: 8 * 1024,
            max_headers: 100,
            max_trailer_bytes: 4 * 1024,
        }
    }
}

/// How a message's body is delimited (RFC 9112 section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// All until the connection ends; responses only.
    UntilClose,
}

/// Why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpError {
    /// It breaks the grammar or its framing is ambiguous.
    Malformed(&'static str),
    /// The request's target is over its limit.
    TargetTooLong,
    /// The head, or the trailer, is over its limit.
    HeadTooLong,
    /// It has too many fields.
    TooManyHeaders,
    /// It asks for something that is not implemented.
    NotImplemented(&'static str),
    /// Its version is not 1.0 or 1.1.
    Version,
    /// Its `Expect` field is not `100-continue`.
    Expectation,
    /// The connection ended within it.
    Truncated,
}

impl HttpError {
    /// The status that tells a client so.
    pub fn status(self) -> u16 {
        match self {
            HttpError::Malformed(_) | HttpError::Truncated => 400,
            HttpError::TargetTooLong => 414,
            HttpError::HeadTooLong | HttpError::TooManyHeaders => 431,
            HttpError::NotImplemented(_) => 501,
            HttpError::Version => 505,
            HttpError::Expectation => 417,
        }
    }
}

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HttpError::Malformed(what) => write!(f, "the HTTP message is malformed: {what}"),
            HttpError::TargetTooLong => f.write_str("the request's target is too long"),
            HttpError::HeadTooLong => f.write_str("the header is too long"),
            HttpError::TooManyHeaders => f.write_str("the header has too many fields"),
            HttpError::NotImplemented(what) => write!(f, "not implemented: {what}"),
            HttpError::Version => f.write_str("only HTTP/1.0 and HTTP/1.1 are spoken"),
            HttpError::Expectation => f.write_str("only the expectation 100-continue is known"),
            HttpError::Truncated => f.write_str("the connection ended within a message"),
        }
    }
}

impl std::error::Error for HttpError {}
