//! Bodies, as their framing delimits them.

use super::head::parse_field;
use super::{Framing, HttpError, Limits};

/// The most hex digits of a chunk's size: 64 bits.
const MAX_SIZE_DIGITS: usize = 16;

/// Where a body's reader is.
#[derive(Debug)]
enum State {
    /// So many bytes are left.
    Length(u64),
    /// In a chunk's size line, gathered so far.
    Size,
    /// So many bytes of the chunk are left.
    Chunk(u64),
    /// Before the CR LF that ends a chunk's data; how many of the two have come.
    ChunkEnd(u8),
    /// In the trailer.
    Trailer,
    /// All until the connection ends.
    UntilClose,
    /// The body is complete.
    Done,
}

/// Reads one body.
#[derive(Debug)]
pub(super) struct BodyReader {
    state: State,
    line: Vec<u8>,
    trailer_bytes: usize,
}

/// What a call of [`BodyReader::read`] found.
pub(super) enum Piece<'a> {
    /// Bytes of the body.
    Data(&'a [u8]),
    /// The body is complete.
    End,
    /// All input was taken and more is needed.
    More,
}

impl BodyReader {
    pub fn new(framing: Framing) -> BodyReader {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(n) => State::Length(n),
            Framing::Chunked => State::Size,
            Framing::UntilClose => State::UntilClose,
        };
        BodyReader { state, line: Vec::new(), trailer_bytes: 0 }
    }

    /// Whether the end of the connection is the end of the body.
    pub fn ends_with_connection(&self) -> bool {
        matches!(self.state, State::UntilClose)
    }

    /// Takes from `input` up to the next piece. Returns how much was taken with it.
    pub fn read<'a>(&mut self, input: &'a [u8], limits: &Limits) -> Result<(usize, Piece<'a>), HttpError> {
        let mut at = 0;
        loop {
            let rest = &input[at..];
            match &mut self.state {
                State::Done => return Ok((at, Piece::End)),
                _ if rest.is_empty() => return Ok((at, Piece::More)),
                State::UntilClose => return Ok((input.len(), Piece::Data(rest))),
                State::Length(left) => {
                    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    *left -= n as u64;
                    if *left == 0 {
                        self.state = State::Done;
                    }
                    return Ok((at + n, Piece::Data(&rest[..n])));
                }
                State::Chunk(left) => {
                    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    *left -= n as u64;
                    if *left == 0 {
                        self.state = State::ChunkEnd(0);
                    }
                    return Ok((at + n, Piece::Data(&rest[..n])));
                }
                State::ChunkEnd(seen) => {
                    if rest[0] != b"\r\n"[usize::from(*seen)] {
                        return Err(HttpError::Malformed("a chunk is longer than its size"));
                    }
                    at += 1;
                    *seen += 1;
                    if *seen == 2 {
                        self.state = State::Size;
                    }
                }
                State::Size => {
                    let (taken, complete) = self.take_line(rest, limits)?;
                    at += taken;
                    if complete {
                        let line = std::mem::take(&mut self.line);
                        self.state = match parse_size(&line)? {
                            0 => State::Trailer,
                            size => State::Chunk(size),
                        };
                        self.trailer_bytes = 0;
                    }
                }
                State::Trailer => {
                    let (taken, complete) = self.take_line(rest, limits)?;
                    at += taken;
                    if complete {
                        let line = std::mem::take(&mut self.line);
                        if line.is_empty() {
                            self.state = State::Done;
                        } else {
                            // Checked and dropped: nothing here has a use for a trailer.
                            parse_field(&line)?;
                        }
                    }
                }
            }
        }
    }

    /// Gathers one line, without its CR LF.
    fn take_line(&mut self, input: &[u8], limits: &Limits) -> Result<(usize, bool), HttpError> {
        for (i, byte) in input.iter().enumerate() {
            self.trailer_bytes += 1;
            if self.trailer_bytes > limits.max_trailer_bytes {
                return Err(HttpError::HeadTooLong);
            }
            let after_cr = self.line.last() == Some(&b'\r');
            match byte {
                b'\n' if after_cr => {
                    self.line.pop();
                    return Ok((i + 1, true));
                }
                b'\n' => return Err(HttpError::Malformed("a line ends with a bare LF")),
                _ if after_cr => return Err(HttpError::Malformed("a CR without an LF")),
                byte => self.line.push(*byte),
            }
        }
        Ok((input.len(), false))
    }
}

/// Reads a chunk's size; extensions (RFC 9112 section 7.1.1) are checked for control characters and
/// dropped.
fn parse_size(line: &[u8]) -> Result<u64, HttpError> {
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    if digits == 0 || digits > MAX_SIZE_DIGITS {
        return Err(HttpError::Malformed("a chunk's size is not a hexadecimal number in range"));
    }
    let (number, extension) = line.split_at(digits);
    let extension = extension.trim_ascii_start();
    if !(extension.is_empty() || extension[0] == b';') || extension.iter().any(|b| *b < b' ' && *b != b'\t') {
        return Err(HttpError::Malformed("a chunk's size has something behind it"));
    }
    Ok(number.iter().fold(0u64, |n, b| n << 4 | u64::from(char::from(*b).to_digit(16).unwrap_or(0))))
}
