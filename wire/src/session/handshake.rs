//! The handshake's messages and steps, apart from the session that carries them.

use crate::auth::{ClientExchange, ServerExchange};
use crate::codec::{DecodeError, Field, Reader};
use crate::message::skip_extensions;
use alloc::string::String;
use alloc::vec::Vec;
use sha2::{Digest, Sha256};

/// The only version there is.
pub const VERSION: u16 = 1;
/// The longest program name in a `HELLO`, in bytes.
pub const MAX_NAME: usize = 128;
/// The longest payload of a frame before the handshake is done.
pub const MAX_HANDSHAKE_PAYLOAD: usize = 1200;
/// The smallest window that a peer may offer: two of the largest frames, so that a sender is never
/// stuck behind credit that its receiver holds back to send in one piece.
pub const MIN_WINDOW: u32 = 2 * (crate::frame::MAX_PAYLOAD as u32 + crate::frame::FRAME_CHARGE);
/// The largest window that a peer may offer, in bytes.
pub const MAX_WINDOW: u32 = 1 << 30;

/// The payload of a `HELLO` frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The lowest version that the sender speaks; from the server, the chosen one.
    pub min_version: u16,
    /// The highest version that the sender speaks; from the server, the chosen one.
    pub max_version: u16,
    /// Optional features, a bit each; none is defined in version 1. A server answers with those of the
    /// client's that it speaks.
    pub features: u64,
    /// Credit for each stream that the receiver of this frame starts with, in bytes.
    pub stream_window: u32,
    /// Credit for the connection that the receiver of this frame starts with, in bytes.
    pub connection_window: u32,
    /// Streams that the receiver of this frame may have open at once.
    pub max_streams: u32,
    /// Program and version, for logs.
    pub name: String,
}

impl Hello {
    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.min_version.encode(&mut out);
        self.max_version.encode(&mut out);
        self.features.encode(&mut out);
        self.stream_window.encode(&mut out);
        self.connection_window.encode(&mut out);
        self.max_streams.encode(&mut out);
        self.name.encode(&mut out);
        0u16.encode(&mut out);
        out
    }

    /// Reads a payload and checks its ranges.
    pub fn decode(payload: &[u8]) -> Result<Hello, DecodeError> {
        let mut r = Reader::new(payload);
        let hello = Hello {
            min_version: u16::decode(&mut r)?,
            max_version: u16::decode(&mut r)?,
            features: u64::decode(&mut r)?,
            stream_window: u32::decode(&mut r)?,
            connection_window: u32::decode(&mut r)?,
            max_streams: u32::decode(&mut r)?,
            name: String::decode(&mut r)?,
        };
        skip_extensions(&mut r)?;
        if hello.min_version > hello.max_version {
            return Err(DecodeError::BadValue("the version range"));
        }
        for window in [hello.stream_window, hello.connection_window] {
            if !(MIN_WINDOW..=MAX_WINDOW).contains(&window) {
                return Err(DecodeError::BadValue("a window"));
            }
        }
        if hello.name.len() > MAX_NAME {
            return Err(DecodeError::TooLong("the program name"));
        }
        // It goes into logs before its sender has proven anything.
        if hello.name.chars().any(char::is_control) {
            return Err(DecodeError::BadValue("the program name"));
        }
        Ok(hello)
    }
}

/// Where the handshake is.
pub(super) enum Phase {
    /// Server: the client's preamble has not come yet.
    AwaitPreamble,
    /// The peer's `HELLO` has not come yet. The hash covers what was sent before it.
    AwaitHello(Sha256),
    /// Server: the client-first-message has not come yet.
    AwaitClientFirst([u8; 32]),
    /// Server: the application has to provide the identity's verifier.
    AwaitVerifier(ServerExchange),
    /// Server: the client's proof has not come yet.
    AwaitProof(ServerExchange),
    /// Client: the server-first-message has not come yet.
    AwaitChallenge(ClientExchange),
    /// Client: the server-final-message has not come yet.
    AwaitServerFinal(ClientExchange),
    /// Authenticated; streams flow.
    Open,
    /// Nothing is read or opened any more.
    Closed,
}

/// The channel binding data: a hash over everything before the exchange.
pub(super) fn binding(hash: Sha256, hello_frame: &[&[u8]]) -> [u8; 32] {
    let mut hash = hash;
    for part in hello_frame {
        hash.update(part);
    }
    hash.finalize().into()
}
