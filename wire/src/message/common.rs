//! Messages that every peer knows: errors, plain success, health.

use super::messages;
use alloc::string::String;
use core::fmt;

messages! {
    /// A request failed. The last message of the stream's half.
    Error = 0x0001 {
        /// What kind of failure, from the error code table.
        code: u16,
        /// The errno behind it (`errno(3)`, Linux x86-64 numbers); 0 where none is.
        errno: u32,
        /// For a person: what failed and what to do next.
        text: String,
    }

    /// A request succeeded and has nothing to say.
    Done = 0x0002 {
    }

    /// Asks whether the peer is well.
    Health = 0x0010 {
    }

    /// The peer is well.
    HealthReply = 0x0011 {
        /// The program's version.
        version: String,
        /// How long it has run, in milliseconds.
        uptime_ms: u64,
    }
}

/// What went wrong, as carried in [`Error`], `RESET` and `GOAWAY`. Codes that this version does not
/// know are treated as [`Code::Internal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Code {
    /// The work was cancelled by the side that asked for it.
    Cancelled = 1,
    /// The request makes no sense; sending it again will not help.
    InvalidRequest = 2,
    /// What the request names is not there.
    NotFound = 3,
    /// What the request would make is there already.
    AlreadyExists = 4,
    /// The thing is there, but not in a state that allows this.
    InvalidState = 5,
    /// Not allowed.
    PermissionDenied = 6,
    /// Not authenticated, or the secret is wrong.
    Unauthenticated = 7,
    /// A limit or the host's capacity is reached; may work later.
    ResourceExhausted = 8,
    /// The other side or something it needs is not reachable; try again.
    Unavailable = 9,
    /// It took too long and was undone.
    DeadlineExceeded = 10,
    /// The message kind is not known to this peer.
    Unimplemented = 11,
    /// A fault in the program.
    Internal = 12,
    /// The peer broke the protocol; the connection ends.
    Protocol = 13,
    /// The byte stream was cut, changed, replayed or reordered; the connection ends.
    Integrity = 14,
    /// The peer is shutting down; try again, perhaps elsewhere.
    ShuttingDown = 15,
}

/// Every code with its name, and whether the same request may be sent again as it is.
pub const CODES: [(Code, &str, bool); 15] = [
    (Code::Cancelled, "cancelled", false),
    (Code::InvalidRequest, "invalid_request", false),
    (Code::NotFound, "not_found", false),
    (Code::AlreadyExists, "already_exists", false),
    (Code::InvalidState, "invalid_state", false),
    (Code::PermissionDenied, "permission_denied", false),
    (Code::Unauthenticated, "unauthenticated", false),
    (Code::ResourceExhausted, "resource_exhausted", true),
    (Code::Unavailable, "unavailable", true),
    (Code::DeadlineExceeded, "deadline_exceeded", false),
    (Code::Unimplemented, "unimplemented", false),
    (Code::Internal, "internal", false),
    (Code::Protocol, "protocol", false),
    (Code::Integrity, "integrity", false),
    (Code::ShuttingDown, "shutting_down", true),
];

impl Code {
    /// The code with this number; unknown ones are [`Code::Internal`].
    pub fn from_number(number: u16) -> Code {
        CODES.iter().map(|c| c.0).find(|c| *c as u16 == number).unwrap_or(Code::Internal)
    }

    /// The code's name in `PROTOCOL.md`.
    pub fn name(self) -> &'static str {
        CODES.iter().find(|c| c.0 == self).map_or("internal", |c| c.1)
    }

    /// Whether the same request may be sent again unchanged.
    pub fn may_retry(self) -> bool {
        CODES.iter().any(|c| c.0 == self && c.2)
    }
}

impl Error {
    /// An error without an errno.
    pub fn new(code: Code, text: impl Into<String>) -> Error {
        Error { code: code as u16, errno: 0, text: text.into() }
    }

    /// An error that an errno is behind.
    pub fn with_errno(code: Code, errno: i32, text: impl Into<String>) -> Error {
        Error { code: code as u16, errno: errno.unsigned_abs(), text: text.into() }
    }

    /// The code as this version knows it.
    pub fn code(&self) -> Code {
        Code::from_number(self.code)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code().name(), self.text)
    }
}

impl core::error::Error for Error {}
