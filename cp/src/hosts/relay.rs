//! What joins a client's connection with a stream to a host: WebSockets, downloads, uploads.
//!
//! A [`Translator`] stands between the two and does no I/O: it is told what came from either side and
//! answers with [`Action`]s. The shell carries them out and holds either side back when the other does
//! not keep up.

use super::error::HostError;
use crate::http::handler::{Flow, Response, Step, encode};
use wire::message::{Forward, Message};

/// What a translator wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The response's status and header; of downloads, before the first bytes.
    Head(Response),
    /// Bytes of the response's body.
    Body(Vec<u8>),
    /// The response's body is complete.
    EndBody,
    /// A complete response, before any head; on a WebSocket an error message and a close.
    Respond(Response),
    /// A text message to the WebSocket.
    Text(String),
    /// A binary message to the WebSocket.
    Binary(Vec<u8>),
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

pub use crate::api::capsule_access::Target;

/// Joins the client with a stream to a host until either ends.
pub struct Relay {
    /// The host's id.
    pub host_id: String,
    /// Where its agent listens, `IP:PORT`.
    pub address: String,
    /// Encoded messages that open the stream.
    pub messages: Vec<Vec<u8>>,
    /// Whether our half of the stream ends after them.
    pub half_close: bool,
    /// Whether the client's side is a WebSocket; else it is the response's body.
    pub is_websocket: bool,
    /// How long until the host's first message, in milliseconds, connecting included.
    pub timeout_ms: u64,
    /// What stands between the two.
    pub translator: Box<dyn Translator>,
}

impl Relay {
    /// A WebSocket joined with a stream into a capsule that `message` opens.
    pub fn websocket<M: Message>(
        target: &Target,
        message: &M,
        timeout_ms: u64,
        translator: impl Translator + 'static,
    ) -> Flow {
        Ok(Step::Relay(Relay::new(target, message, false, true, timeout_ms, Box::new(translator))))
    }

    /// A response's body from a stream out of a capsule that `message` opens.
    pub fn download<M: Message>(
        target: &Target,
        message: &M,
        timeout_ms: u64,
        translator: impl Translator + 'static,
    ) -> Flow {
        Ok(Step::Relay(Relay::new(target, message, true, false, timeout_ms, Box::new(translator))))
    }

    fn new<M: Message>(
        target: &Target,
        message: &M,
        half_close: bool,
        is_websocket: bool,
        timeout_ms: u64,
        translator: Box<dyn Translator>,
    ) -> Relay {
        let forward = Forward { capsule_id: target.capsule_id.clone() };
        Relay {
            host_id: target.host_id.clone(),
            address: target.address.clone(),
            messages: vec![encode(&forward), encode(message)],
            half_close,
            is_websocket,
            timeout_ms,
            translator,
        }
    }
}

/// What follows an upload: its end, or the response that refuses it.
pub type UploadContinuation = Box<dyn FnOnce(Result<(), Response>) -> Flow + Send>;

/// A streamed multipart body that goes into a file of a capsule.
pub struct Upload {
    /// Where to.
    pub target: Target,
    /// The request's `Content-Type`.
    pub content_type: String,
    /// What follows.
    pub then: UploadContinuation,
}
