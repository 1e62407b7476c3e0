//! A request's chain of steps: what it waits for, and the things that go on for long: relays,
//! uploads and exchanges with services.

use super::handler::{HostContinuation, MessageContinuation, PauseContinuation};
use super::multipart::Multipart;
use crate::budget::Share;
use crate::hosts::relay::{Translator, UploadContinuation};
use crate::hosts::sessions::CallId;
use crate::proxy::exchange::Exchange;
use crate::wire_clients::requests::Shape;
use std::collections::VecDeque;
use wire::session::StreamId;

/// What a task is named by. Never used twice.
pub type TaskId = u64;

/// One chain.
pub struct Task {
    /// The connection that gets the answer; `None` once it has it, has gone, or never was.
    pub client: Option<u64>,
    /// The wire client that gets the answer instead.
    pub caller: Option<Caller>,
    /// The recurring job that it is a run of, by its place in the table.
    pub job: Option<usize>,
    /// Whether it has not done anything yet.
    pub is_new: bool,
    /// What it waits for.
    pub wait: Wait,
}

/// A wire client that waits for a task.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Its connection.
    pub client: u64,
    /// Its stream; `None` for its login.
    pub stream: Option<StreamId>,
    /// How success is told.
    pub shape: Shape,
}

/// What a task waits for.
pub enum Wait {
    /// Its next step is being found.
    Nothing,
    /// A worker.
    Worker,
    /// Some time.
    Pause(PauseContinuation),
    /// A host's reply.
    Host {
        /// The call.
        call: CallId,
        /// Whether it goes on without its client.
        is_detached: bool,
        /// What follows.
        then: HostContinuation,
    },
    /// The WebSocket's next message.
    Message(MessageContinuation),
    /// The end of a relay.
    Relay(Box<Relaying>),
    /// The end of an upload.
    Upload(Box<Uploading>),
    /// The end of an exchange with a service.
    Proxy(Box<Proxying>),
    /// The end of a wire client's stream into a capsule.
    Splice(CallId),
}

/// Bytes on their way to a host.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Channel, bytes, and how many of them have gone.
    waiting: VecDeque<(u8, Vec<u8>, usize)>,
    finish: bool,
}

impl Outbox {
    /// Adds bytes.
    pub fn push(&mut self, channel: u8, bytes: Vec<u8>) {
        if !bytes.is_empty() && !self.finish {
            self.waiting.push_back((channel, bytes, 0));
        }
    }

    /// Ends our half once all has gone.
    pub fn finish(&mut self) {
        self.finish = true;
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Sends what waits by `send`, which tells how many bytes were taken (`None`: the stream is over),
    /// and then `finish`.
    pub fn send(&mut self, mut send: impl FnMut(u8, &[u8]) -> Option<usize>, finish: impl FnOnce()) {
        while let Some((channel, bytes, sent)) = self.waiting.front_mut() {
            let Some(taken) = send(*channel, &bytes[*sent..]) else {
                self.waiting.clear();
                return;
            };
            *sent += taken;
            if *sent < bytes.len() {
                return;
            }
            self.waiting.pop_front();
        }
        if std::mem::take(&mut self.finish) {
            finish();
        }
    }
}

/// A client joined with a stream.
pub struct Relaying {
    /// The stream.
    pub call: CallId,
    /// What stands between.
    pub translator: Box<dyn Translator>,
    /// Credit that goes back once the client has taken what it was for.
    pub owed: u32,
    /// What the stream has not taken yet.
    pub outbox: Outbox,
    /// Whether the stream is open.
    pub is_open: bool,
    /// Whether the host's side has ended.
    pub is_over: bool,
}

/// A client joined with a service in a capsule.
pub struct Proxying {
    /// The stream to the service.
    pub call: CallId,
    /// What stands between.
    pub exchange: Exchange,
    /// Credit that goes back once the client has taken what it was for.
    pub owed: u32,
    /// What the stream has not taken yet.
    pub outbox: Outbox,
    /// Whether the service is connected.
    pub is_connected: bool,
}

/// A streamed body on its way into a file.
pub struct Uploading {
    /// Where to.
    pub target: crate::hosts::relay::Target,
    /// Reads the body.
    pub multipart: Multipart,
    /// The `path` field.
    pub path: Option<String>,
    /// Whether the file has begun.
    pub has_file: bool,
    /// Bytes of the file that came before its path, and their share in what may be held in all.
    pub held: (usize, Share),
    /// The stream, once the file has begun and its path is known.
    pub call: Option<CallId>,
    /// Whether the stream is open.
    pub is_open: bool,
    /// What the stream has not taken yet.
    pub outbox: Outbox,
    /// Whether the file came to its end.
    pub file_ended: bool,
    /// Whether the host has said that the file is written.
    pub is_written: bool,
    /// Whether the request's body has ended.
    pub body_ended: bool,
    /// What follows.
    pub then: UploadContinuation,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outbox_sends_in_order_and_finishes_last() {
        let mut outbox = Outbox::default();
        outbox.push(4, b"abcdef".to_vec());
        outbox.push(4, b"gh".to_vec());
        outbox.finish();
        outbox.push(4, b"late".to_vec());
        let (mut sent, mut finished) = (Vec::new(), 0);
        for room in [4, 3, 9] {
            let mut room = room;
            outbox.send(
                |_, bytes| {
                    let n = bytes.len().min(room);
                    room -= n;
                    sent.extend_from_slice(&bytes[..n]);
                    Some(n)
                },
                || finished += 1,
            );
        }
        assert_eq!((sent.as_slice(), finished), (b"abcdefgh".as_slice(), 1));
        outbox.send(|_, _| Some(0), || finished += 1);
        assert_eq!(finished, 1);
    }
}
