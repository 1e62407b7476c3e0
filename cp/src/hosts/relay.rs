//! What joins a client's connection with a stream to a host: WebSockets, downloads, uploads.
//!
//! A [`Translator`] stands between the two and does no I/O: it is told what came from either side and
//! answers with [`Action`]s. The shell carries them out and holds either side back when the other does
//! not keep up.

use super::error::HostError;
use crate::http::handler::{Flow, Response};

/// What a translator wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The response's status and header; of downloads, before the first bytes.
    Head(Response),
    /// Bytes of the response's body.
    Body(Vec<u8>),
    /// The response's body is complete.
    EndBody,
    /// A text message to the WebSocket.
    Text(String),
    /// Ends the WebSocket with a code (RFC 6455 section 7.4) and a reason.
    Close(u16, String),
    /// An encoded message to the host.
    Send(Vec<u8>),
    /// Bytes on a channel to the host.
    Data(u8, Vec<u8>),
    /// Ends our half of the stream.
    Finish,
}

/// The state machine between a client and a stream.
pub trait Translator: Send {
    /// A message came from the host. `Error` messages come to [`Translator::failed`] instead.
    fn message(&mut self, kind: u16, body: &[u8], actions: &mut Vec<Action>);
    /// Bytes came from the host.
    fn data(&mut self, channel: u8, bytes: &[u8], actions: &mut Vec<Action>);
    /// The host ended its half.
    fn finished(&mut self, actions: &mut Vec<Action>);
    /// The stream failed; nothing more comes from it.
    fn failed(&mut self, error: HostError, actions: &mut Vec<Action>);
    /// A text message came from the client.
    fn client_text(&mut self, text: &str, actions: &mut Vec<Action>);
    /// A binary message came from the client.
    fn client_binary(&mut self, bytes: &[u8], actions: &mut Vec<Action>);
}

/// Joins the client with a stream to a host until either ends.
pub struct Relay {
    /// The host's id.
    pub host_id: String,
    /// Where its agent listens, `IP:PORT`.
    pub address: String,
    /// Encoded messages that open the stream.
    pub messages: Vec<Vec<u8>>,
    /// How long until the host's first message, in milliseconds, connecting included.
    pub timeout_ms: u64,
    /// What stands between the two.
    pub translator: Box<dyn Translator>,
}

/// What follows an upload.
pub type UploadContinuation = Box<dyn FnOnce(Result<(), HostError>) -> Flow + Send>;

/// A streamed multipart body that goes into a file of a capsule.
pub struct Upload {
    /// The host's id.
    pub host_id: String,
    /// Where its agent listens, `IP:PORT`.
    pub address: String,
    /// The capsule.
    pub capsule_id: String,
    /// What follows.
    pub then: UploadContinuation,
}
