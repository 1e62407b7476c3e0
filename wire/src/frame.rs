//! Frames: the unit that travels. A fixed 12-byte header, a payload, and after the handshake a MAC.
//!
//! ```text
//!  0        4          8      9       10         12
//!  +--------+----------+------+-------+----------+---------+----------------+
//!  | length | stream   | type | flags | reserved | payload | MAC (16 bytes) |
//!  +--------+----------+------+-------+----------+---------+----------------+
//! ```

use crate::codec::{DecodeError, Reader};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 12;
/// The longest payload, in bytes. A sender never makes a longer one; a receiver closes on one.
pub const MAX_PAYLOAD: usize = 65_536;
/// Bytes of the truncated HMAC-SHA-256 after each payload once the handshake is done.
pub const MAC_LEN: usize = 16;
/// What each stream frame is charged beyond its payload, so that tiny frames cannot make a receiver
/// hold more memory than its window says.
pub const FRAME_CHARGE: u32 = 32;
/// What the dialling side sends before its first frame. The zero byte cannot start an HTTP request,
/// and the line end shows a transport that mangles text.
pub const PREAMBLE: [u8; 8] = *b"\0WRENN\r\n";

/// The frame's sender ends its half of the stream with this frame.
pub const FLAG_FIN: u8 = 0x01;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum FrameType {
    /// Versions, features and windows of one side. Stream 0, before anything else.
    Hello = 0x01,
    /// One SCRAM message (RFC 5802). Stream 0.
    Auth = 0x02,
    /// Starts a stream with a message.
    Open = 0x10,
    /// A further message on a stream.
    Message = 0x11,
    /// Raw bytes of one channel of a stream.
    Data = 0x12,
    /// Gives the receiver of the frame more credit, for a stream or (stream 0) the connection.
    Credit = 0x13,
    /// Ends a stream at once, both halves.
    Reset = 0x14,
    /// Asks for a `Pong` with the same 8 bytes. Stream 0.
    Ping = 0x20,
    /// Answers a `Ping`. Stream 0.
    Pong = 0x21,
    /// The sender takes no new streams. Stream 0.
    GoAway = 0x22,
}

/// Every frame type with its name in `PROTOCOL.md`.
pub const FRAME_TYPES: [(FrameType, &str); 10] = [
    (FrameType::Hello, "HELLO"),
    (FrameType::Auth, "AUTH"),
    (FrameType::Open, "OPEN"),
    (FrameType::Message, "MESSAGE"),
    (FrameType::Data, "DATA"),
    (FrameType::Credit, "CREDIT"),
    (FrameType::Reset, "RESET"),
    (FrameType::Ping, "PING"),
    (FrameType::Pong, "PONG"),
    (FrameType::GoAway, "GOAWAY"),
];

impl FrameType {
    /// The type with this number, if this version defines it.
    pub fn from_number(number: u8) -> Option<FrameType> {
        FRAME_TYPES.iter().map(|(t, _)| *t).find(|t| *t as u8 == number)
    }

    fn may_finish(self) -> bool {
        matches!(self, FrameType::Open | FrameType::Message | FrameType::Data)
    }

    fn on_connection(self) -> bool {
        !matches!(
            self,
            FrameType::Open | FrameType::Message | FrameType::Data | FrameType::Reset | FrameType::Credit
        )
    }
}

/// Why a header is refused. Each ends the connection: after it the byte stream has no meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderError {
    /// The payload length is over [`MAX_PAYLOAD`].
    TooLong(u32),
    /// The frame type is not defined in this version.
    UnknownType(u8),
    /// A flag is set that the type does not have.
    BadFlags(u8),
    /// The reserved bytes are not zero.
    BadReserved(u16),
    /// A stream frame on stream 0, or a connection frame on another stream.
    BadStream(u32),
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeaderError::TooLong(n) => write!(f, "frame payload of {n} bytes, at most {MAX_PAYLOAD} allowed"),
            HeaderError::UnknownType(t) => write!(f, "unknown frame type {t:#04x}"),
            HeaderError::BadFlags(flags) => {
                write!(f, "frame flags {flags:#04x} are not defined for the type")
            }
            HeaderError::BadReserved(v) => write!(f, "reserved header bytes are {v:#06x}, not zero"),
            HeaderError::BadStream(id) => write!(f, "frame type does not belong on stream {id}"),
        }
    }
}

/// A frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Payload bytes, 0 to [`MAX_PAYLOAD`].
    pub length: u32,
    /// The stream; 0 is the connection itself.
    pub stream: u32,
    /// What the frame is.
    pub frame_type: FrameType,
    /// Whether [`FLAG_FIN`] is set.
    pub fin: bool,
}

impl Header {
    /// The 12 bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..4].copy_from_slice(&self.length.to_be_bytes());
        out[4..8].copy_from_slice(&self.stream.to_be_bytes());
        out[8] = self.frame_type as u8;
        out[9] = if self.fin { FLAG_FIN } else { 0 };
        out
    }

    /// Checks the 12 bytes as far as they can be without the session's state.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, HeaderError> {
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (length, stream) = (word(0), word(4));
        if length as usize > MAX_PAYLOAD {
            return Err(HeaderError::TooLong(length));
        }
        let frame_type = FrameType::from_number(bytes[8]).ok_or(HeaderError::UnknownType(bytes[8]))?;
        let flags = bytes[9];
        let allowed = if frame_type.may_finish() { FLAG_FIN } else { 0 };
        if flags & !allowed != 0 {
            return Err(HeaderError::BadFlags(flags));
        }
        let reserved = u16::from_be_bytes([bytes[10], bytes[11]]);
        if reserved != 0 {
            return Err(HeaderError::BadReserved(reserved));
        }
        let stream_is_wrong = match frame_type {
            FrameType::Credit => false,
            t if t.on_connection() => stream != 0,
            _ => stream == 0,
        };
        if stream_is_wrong {
            return Err(HeaderError::BadStream(stream));
        }
        Ok(Header { length, stream, frame_type, fin: flags & FLAG_FIN != 0 })
    }
}

/// Reads a `RESET` or `GOAWAY` text: at most this many bytes are sent, and longer ones are refused.
pub const MAX_REASON: usize = 1024;

/// Decodes `{u16 code, text reason}`, the payload of `RESET`.
pub fn decode_reset(payload: &[u8]) -> Result<(u16, String), DecodeError> {
    use crate::codec::Field;
    let mut r = Reader::new(payload);
    let code = u16::decode(&mut r)?;
    let reason = String::decode(&mut r)?;
    if reason.len() > MAX_REASON {
        return Err(DecodeError::TooLong("reason"));
    }
    r.finish()?;
    Ok((code, reason))
}

/// Encodes `{u16 code, text reason}`; a reason over [`MAX_REASON`] bytes is cut at a character.
pub fn encode_reset(code: u16, reason: &str) -> Vec<u8> {
    use crate::codec::Field;
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = Vec::with_capacity(6 + end);
    code.encode(&mut out);
    reason[..end].to_string().encode(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_documented_bytes() {
        let header = Header { length: 5, stream: 3, frame_type: FrameType::Data, fin: true };
        let bytes = [0, 0, 0, 5, 0, 0, 0, 3, 0x12, 0x01, 0, 0];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::decode(&bytes), Ok(header));
    }

    #[test]
    fn headers_that_are_not_ours_are_refused() {
        let good = [0, 0, 0, 5, 0, 0, 0, 3, 0x12, 0, 0, 0];
        let with = |at: usize, v: u8| {
            let mut b = good;
            b[at] = v;
            Header::decode(&b)
        };
        assert_eq!(with(1, 2), Err(HeaderError::TooLong(0x0002_0005)));
        assert_eq!(with(8, 0x99), Err(HeaderError::UnknownType(0x99)));
        assert_eq!(with(9, 0x02), Err(HeaderError::BadFlags(0x02)));
        assert_eq!(with(11, 1), Err(HeaderError::BadReserved(1)));
        assert_eq!(with(7, 0), Err(HeaderError::BadStream(0)));
        assert_eq!(with(8, 0x20), Err(HeaderError::BadStream(3)));
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let reason = "é".repeat(MAX_REASON);
        let (code, back) = decode_reset(&encode_reset(7, &reason)).expect("own encoding");
        assert_eq!((code, back.len()), (7, MAX_REASON));
    }
}
