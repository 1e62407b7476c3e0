//! Requests, as a server reads them.

use super::body::{BodyReader, Piece};
use super::head::{HeadBuffer, Headers, framing, is_token, keeps_alive, minor_version, parse_lines};
use super::{Framing, HttpError, Limits};

/// Bytes of a first line besides its target: the method, the version, two spaces.
const REQUEST_LINE_OVERHEAD: usize = 64;

/// A request's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHead {
    /// The method, a token.
    pub method: String,
    /// The target's path and query, as they came: starts with `/`, or is `*`. The scheme and authority
    /// of an absolute target are dropped.
    pub target: String,
    /// The minor version: 0 or 1.
    pub minor_version: u8,
    /// The fields.
    pub headers: Headers,
    /// How the body is delimited; never [`Framing::UntilClose`].
    pub framing: Framing,
    /// Whether the client wants the connection to go on.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

/// What a parser found.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestEvent<'a> {
    /// A request begins.
    Head(RequestHead),
    /// Bytes of its body, at least one.
    Data(&'a [u8]),
    /// It is complete; another may follow.
    End,
}

#[derive(Debug)]
enum State {
    Head,
    Body(BodyReader),
    Failed(HttpError),
}

/// Reads requests from a connection, one after another.
#[derive(Debug)]
pub struct RequestParser {
    limits: Limits,
    head: HeadBuffer,
    state: State,
}

impl RequestParser {
    /// A parser at the start of a connection.
    pub fn new(limits: Limits) -> RequestParser {
        RequestParser { limits, head: HeadBuffer::default(), state: State::Head }
    }

    /// Whether it stands between two requests, with nothing of the next one read.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Head) && self.head.is_empty()
    }

    /// Takes from `input` up to the next event. Returns how much was taken; without an event that is all
    /// of it. Call again with the rest, or with more.
    ///
    /// # Errors
    /// Why the connection cannot go on; the same again for every later call.
    pub fn parse<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<RequestEvent<'a>>), HttpError> {
        let result = match &mut self.state {
            State::Failed(error) => Err(*error),
            State::Body(body) => match body.read(input, &self.limits) {
                Ok((taken, Piece::Data(data))) => Ok((taken, Some(RequestEvent::Data(data)))),
                Ok((taken, Piece::More)) => Ok((taken, None)),
                Ok((taken, Piece::End)) => {
                    self.state = State::Head;
                    Ok((taken, Some(RequestEvent::End)))
                }
                Err(error) => Err(error),
            },
            State::Head => self.parse_head(input),
        };
        if let Err(error) = result {
            self.state = State::Failed(error);
        }
        result
    }

    fn parse_head<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<RequestEvent<'a>>), HttpError> {
        let taken = self.head.take(input, self.limits.max_head_bytes);
        // Said first where both apply, because it tells the client more.
        if self.head.first_line_len() > self.limits.max_target_bytes + REQUEST_LINE_OVERHEAD {
            return Err(HttpError::TargetTooLong);
        }
        let (taken, complete) = taken?;
        if !complete {
            return Ok((taken, None));
        }
        let head = read_head(&self.head.finish(), &self.limits)?;
        self.state = State::Body(BodyReader::new(head.framing));
        Ok((taken, Some(RequestEvent::Head(head))))
    }
}

/// Reads a complete head (without its empty line).
fn read_head(bytes: &[u8], limits: &Limits) -> Result<RequestHead, HttpError> {
    let (line, headers) = parse_lines(bytes, limits)?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(HttpError::Malformed("the request line is not METHOD TARGET VERSION"));
    };
    if !is_token(method.as_bytes()) {
        return Err(HttpError::Malformed("the method has a character that is not allowed"));
    }
    let minor_version = minor_version(version)?;
    if target.len() > limits.max_target_bytes {
        return Err(HttpError::TargetTooLong);
    }
    let target = read_target(method, target)?;
    match (headers.get_all("host").count(), minor_version) {
        (1, _) | (0, 0) => {}
        (0, _) => return Err(HttpError::Malformed("the Host header is missing")),
        _ => return Err(HttpError::Malformed("the Host header is given more than once")),
    }
    let expects_continue = match headers.get("expect") {
        None => false,
        // HTTP/1.0 clients do not know interim responses (RFC 9110 section 10.1.1).
        Some(value) if value.eq_ignore_ascii_case("100-continue") => minor_version >= 1,
        Some(_) => return Err(HttpError::Expectation),
    };
    let framing = framing(&headers, minor_version)?.unwrap_or(Framing::None);
    let keep_alive = keeps_alive(&headers, minor_version);
    Ok(RequestHead {
        method: method.to_string(),
        target,
        minor_version,
        expects_continue: expects_continue && framing != Framing::None,
        framing,
        keep_alive,
        headers,
    })
}

/// The path and query of a target (RFC 9112 section 3.2).
fn read_target(method: &str, target: &str) -> Result<String, HttpError> {
    if target.is_empty() || !target.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
        return Err(HttpError::Malformed("the request target has a character that is not allowed"));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok(target.to_string());
    }
    if method == "CONNECT" {
        return Err(HttpError::NotImplemented("CONNECT"));
    }
    let scheme_end = target.find("://").map(|at| at + 3);
    let is_http = target.get(..7).is_some_and(|s| s.eq_ignore_ascii_case("http://"))
        || target.get(..8).is_some_and(|s| s.eq_ignore_ascii_case("https://"));
    let Some(rest) = scheme_end.filter(|_| is_http).map(|at| &target[at..]) else {
        return Err(HttpError::Malformed("the request target is not a path"));
    };
    match rest.find(['/', '?']) {
        Some(at) if rest.as_bytes()[at] == b'/' => Ok(rest[at..].to_string()),
        Some(at) => Ok(format!("/{}", &rest[at..])),
        None => Ok("/".to_string()),
    }
}
