//! What a session offers, what it tells, and why things fail.

use super::StreamId;
use crate::auth::AuthError;
use crate::codec::DecodeError;
use crate::frame::HeaderError;
use crate::message::Code;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// What a session offers its peer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes that the peer may have under way on a stream.
    pub stream_window: u32,
    /// Bytes that the peer may have under way on all streams together.
    pub connection_window: u32,
    /// Streams that the peer may have open at once.
    pub max_streams: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { stream_window: 256 * 1024, connection_window: 2 * 1024 * 1024, max_streams: 4096 }
    }
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionError {
    /// The first bytes are not this protocol's.
    NotWrenn,
    /// No version is spoken by both sides.
    NoCommonVersion,
    /// A frame header is malformed.
    Header(HeaderError),
    /// A connection-level payload is malformed.
    Payload(DecodeError),
    /// A frame's MAC is wrong: the byte stream was changed, replayed or reordered.
    Integrity,
    /// Authentication failed.
    Auth(AuthError),
    /// A frame came that the state does not allow.
    Unexpected(&'static str),
    /// The peer sent more than its credit.
    CreditExceeded,
    /// The peer has more streams open than it may.
    TooManyStreams,
    /// The peer does not read what it is sent.
    PeerDoesNotRead,
    /// The handshake took too long.
    HandshakeTimeout,
    /// The peer has been silent for too long.
    PeerSilent,
    /// The peer ended the connection, with a code and its reason.
    ByPeer(u16, String),
    /// The transport ended.
    TransportClosed,
    /// This side ended it.
    Local,
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionError::NotWrenn => f.write_str("the peer does not speak the Wrenn wire protocol"),
            SessionError::NoCommonVersion => {
                f.write_str("no protocol version is spoken by both sides: upgrade the older one")
            }
            SessionError::Header(e) => write!(f, "{e}"),
            SessionError::Payload(e) => write!(f, "a connection frame is malformed: {e}"),
            SessionError::Integrity => f.write_str("a frame was changed, replayed or reordered on its way"),
            SessionError::Auth(e) => write!(f, "{e}"),
            SessionError::Unexpected(what) => write!(f, "unexpected {what}"),
            SessionError::CreditExceeded => f.write_str("the peer sent more than its credit"),
            SessionError::TooManyStreams => f.write_str("the peer opened more streams than it may"),
            SessionError::PeerDoesNotRead => f.write_str("the peer does not read what it is sent"),
            SessionError::HandshakeTimeout => f.write_str("the handshake took too long"),
            SessionError::PeerSilent => f.write_str("the peer has been silent for too long"),
            SessionError::ByPeer(code, reason) => {
                // The reason may come from a peer that has proven nothing, and goes into logs.
                let reason = reason.replace(char::is_control, "\u{fffd}");
                write!(f, "closed by the peer: {}: {reason}", Code::from_number(*code).name())
            }
            SessionError::TransportClosed => f.write_str("the connection was closed"),
            SessionError::Local => f.write_str("closed by this side"),
        }
    }
}

impl core::error::Error for SessionError {}

impl SessionError {
    /// The code told to the peer.
    pub(super) fn code(&self) -> Code {
        match self {
            SessionError::Integrity => Code::Integrity,
            SessionError::Auth(_) => Code::Unauthenticated,
            SessionError::PeerDoesNotRead => Code::ResourceExhausted,
            SessionError::HandshakeTimeout | SessionError::PeerSilent => Code::DeadlineExceeded,
            SessionError::Local => Code::ShuttingDown,
            _ => Code::Protocol,
        }
    }
}

/// What a session has to tell its application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Server: somebody claims this identity; answer with [`provide_verifier`](super::Session::provide_verifier).
    Authenticate {
        /// The claimed identity, not yet proven.
        identity: String,
    },
    /// The handshake is done; streams may be opened.
    Ready {
        /// Who the client is, proven; on the client, its own identity.
        identity: String,
        /// The peer's program and version.
        peer_name: String,
    },
    /// The peer opened a stream with a message.
    Opened {
        /// The stream.
        stream: StreamId,
        /// The message's number.
        kind: u16,
        /// The message's body.
        body: Vec<u8>,
    },
    /// A further message.
    Message {
        /// The stream.
        stream: StreamId,
        /// The message's number.
        kind: u16,
        /// The message's body.
        body: Vec<u8>,
        /// What to [release](super::Session::release) once it is dealt with.
        cost: u32,
    },
    /// Raw bytes.
    Data {
        /// The stream.
        stream: StreamId,
        /// Which of the stream's channels.
        channel: u8,
        /// The bytes, at least one.
        bytes: Vec<u8>,
        /// What to [release](super::Session::release) once they are dealt with.
        cost: u32,
    },
    /// The peer ended its half.
    Finished {
        /// The stream.
        stream: StreamId,
    },
    /// The peer ended the stream at once.
    Reset {
        /// The stream.
        stream: StreamId,
        /// Why, see [`Code`].
        code: u16,
        /// Why, for a person.
        reason: String,
    },
    /// Data can be sent again on a stream where less than all was taken.
    Writable {
        /// The stream.
        stream: StreamId,
    },
    /// The peer takes no new streams; those open go on.
    GoingAway {
        /// Why, see [`Code`].
        code: u16,
        /// Why, for a person.
        reason: String,
    },
    /// The session is over; every stream with it.
    Closed {
        /// Why.
        error: SessionError,
    },
}

/// Why a stream cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// The handshake is not done, or the session is over.
    NotReady,
    /// The peer takes no new streams.
    GoingAway,
    /// The peer's limit of open streams is reached; try again when one has ended.
    TooManyStreams,
    /// All stream numbers are used; the connection has to be made anew.
    Exhausted,
    /// The message is longer than a frame.
    TooLong,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpenError::NotReady => "the connection is not ready",
            OpenError::GoingAway => "the peer is shutting down",
            OpenError::TooManyStreams => "too many streams are open on the connection",
            OpenError::Exhausted => "the connection has used all its stream numbers",
            OpenError::TooLong => "the message is longer than a frame can be",
        })
    }
}

impl core::error::Error for OpenError {}

/// Why a message cannot be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendError {
    /// The stream is not open, or this half of it has ended.
    NoStream,
    /// Too much waits on the stream already.
    QueueFull,
    /// The message is longer than a frame.
    TooLong,
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SendError::NoStream => "the stream has ended",
            SendError::QueueFull => "too many messages wait on the stream",
            SendError::TooLong => "the message is longer than a frame can be",
        })
    }
}

impl core::error::Error for SendError {}
