//! Responses, as a client reads them.

use super::body::{BodyReader, Piece};
use super::head::{HeadBuffer, Headers, framing, keeps_alive, minor_version, parse_lines};
use super::{Framing, HttpError, Limits};

/// The most interim responses that are skipped before the final one.
const MAX_INTERIM: u32 = 16;

/// A response's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// The status, 101 or 200 to 999.
    pub status: u16,
    /// The fields.
    pub headers: Headers,
    /// How the body is delimited.
    pub framing: Framing,
    /// Whether the connection goes on.
    pub keep_alive: bool,
}

/// What a parser found.
#[derive(Debug, PartialEq, Eq)]
pub enum ResponseEvent<'a> {
    /// The response begins.
    Head(ResponseHead),
    /// Bytes of its body, at least one.
    Data(&'a [u8]),
    /// It is complete.
    End,
}

#[derive(Debug)]
enum State {
    Head,
    Body(BodyReader),
    Done,
    Failed(HttpError),
}

/// Reads one response; interim ones (1xx but 101) before it are skipped.
#[derive(Debug)]
pub struct ResponseParser {
    limits: Limits,
    is_head_request: bool,
    interim: u32,
    head: HeadBuffer,
    state: State,
}

impl ResponseParser {
    /// A parser for the response to a request; one to `HEAD` has no body.
    pub fn new(limits: Limits, is_head_request: bool) -> ResponseParser {
        ResponseParser {
            limits,
            is_head_request,
            interim: 0,
            head: HeadBuffer::default(),
            state: State::Head,
        }
    }

    /// Takes from `input` up to the next event. Returns how much was taken; without an event that is all
    /// of it, unless the response is complete.
    ///
    /// # Errors
    /// Why the response cannot be read; the same again for every later call.
    pub fn parse<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<ResponseEvent<'a>>), HttpError> {
        let result = match &mut self.state {
            State::Done => Ok((0, None)),
            State::Failed(error) => Err(*error),
            State::Body(body) => match body.read(input, &self.limits) {
                Ok((taken, Piece::Data(data))) => Ok((taken, Some(ResponseEvent::Data(data)))),
                Ok((taken, Piece::More)) => Ok((taken, None)),
                Ok((taken, Piece::End)) => {
                    self.state = State::Done;
                    Ok((taken, Some(ResponseEvent::End)))
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

    /// The connection ended. Returns whether the response is complete with that.
    ///
    /// # Errors
    /// [`HttpError::Truncated`] when it is not.
    pub fn connection_ended(&mut self) -> Result<(), HttpError> {
        let is_complete = match &self.state {
            State::Done => true,
            State::Body(body) => body.ends_with_connection(),
            State::Head | State::Failed(_) => false,
        };
        self.state = if is_complete { State::Done } else { State::Failed(HttpError::Truncated) };
        if is_complete { Ok(()) } else { Err(HttpError::Truncated) }
    }

    fn parse_head<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<ResponseEvent<'a>>), HttpError> {
        let mut at = 0;
        loop {
            let (taken, complete) = self.head.take(&input[at..], self.limits.max_head_bytes)?;
            at += taken;
            if !complete {
                return Ok((at, None));
            }
            let head = read_head(&self.head.finish(), &self.limits, self.is_head_request)?;
            if head.status < 200 && head.status != 101 {
                self.interim += 1;
                if self.interim > MAX_INTERIM {
                    return Err(HttpError::Malformed("too many interim responses"));
                }
                continue;
            }
            self.state = State::Body(BodyReader::new(head.framing));
            return Ok((at, Some(ResponseEvent::Head(head))));
        }
    }
}

fn read_head(bytes: &[u8], limits: &Limits, is_head_request: bool) -> Result<ResponseHead, HttpError> {
    let (line, headers) = parse_lines(bytes, limits)?;
    let (version, rest) =
        line.split_once(' ').ok_or(HttpError::Malformed("the status line has no status"))?;
    let minor_version = minor_version(version)?;
    let status = rest.split(' ').next().unwrap_or_default();
    if status.len() != 3 || !status.bytes().all(|b| b.is_ascii_digit()) {
        return Err(HttpError::Malformed("the status is not a number of three digits"));
    }
    let status: u16 = status.parse().map_err(|_| HttpError::Malformed("the status is not a number"))?;
    if status < 100 {
        return Err(HttpError::Malformed("the status is below 100"));
    }
    let said = framing(&headers, minor_version)?;
    let framing = match status {
        // RFC 9112 section 6.3: these never have a body, whatever the fields say.
        100..200 | 204 | 304 => Framing::None,
        _ if is_head_request => Framing::None,
        _ => said.unwrap_or(Framing::UntilClose),
    };
    let keep_alive = keeps_alive(&headers, minor_version) && framing != Framing::UntilClose;
    Ok(ResponseHead { status, headers, framing, keep_alive })
}
