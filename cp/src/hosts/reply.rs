//! What a host answered: the messages of the stream and the bytes of its channels, within a bound.

use super::error::HostError;
use crate::budget::Share;
use crate::http::handler::{Flow, Response, Step};
use std::collections::BTreeMap;
use wire::message::{Error, Message};

/// The most messages that a reply may have.
pub const MAX_REPLY_MESSAGES: usize = 65_536;
/// The most bytes that a reply's messages may have together.
pub const MAX_REPLY_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// From how many bytes on a reply is put into JSON by a worker: a listing of so many takes the event loop
/// 4 ms, and one of the most that may come 2 s.
pub const LARGE_REPLY_BYTES: usize = 32 * 1024;

/// A complete answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// The messages in order: number and body. None of them is an `Error`.
    pub messages: Vec<(u16, Vec<u8>)>,
    /// The bytes of each channel that had any.
    pub channels: BTreeMap<u8, Vec<u8>>,
    /// Bytes of DATA that were dropped because the bound was reached.
    pub dropped_bytes: u64,
}

impl Reply {
    /// The first message of this kind.
    ///
    /// # Errors
    /// [`HostError::BadReply`] when there is none or it is malformed.
    pub fn message<M: Message>(&self) -> Result<M, HostError> {
        let Some((_, body)) = self.messages.iter().find(|m| m.0 == M::KIND) else {
            let kinds: Vec<u16> = self.messages.iter().map(|m| m.0).take(8).collect();
            return Err(HostError::BadReply(format!("no {} among the kinds {kinds:#06x?}", M::NAME)));
        };
        M::decode(body).map_err(|error| HostError::BadReply(format!("{}: {error}", M::NAME)))
    }

    /// All messages of this kind, in order.
    ///
    /// # Errors
    /// [`HostError::BadReply`] when one is malformed.
    pub fn all<M: Message>(&self) -> Result<Vec<M>, HostError> {
        self.messages
            .iter()
            .filter(|m| m.0 == M::KIND)
            .map(|m| M::decode(&m.1).map_err(|e| HostError::BadReply(format!("{}: {e}", M::NAME))))
            .collect()
    }

    /// The bytes of a channel; empty when there were none.
    pub fn channel(&self, channel: u8) -> &[u8] {
        self.channels.get(&channel).map_or(&[], Vec::as_slice)
    }

    /// Whether it has [`LARGE_REPLY_BYTES`] or more.
    pub fn is_large(&self) -> bool {
        let messages: usize = self.messages.iter().map(|(_, body)| body.len()).sum();
        let channels: usize = self.channels.values().map(Vec::len).sum();
        messages + channels >= LARGE_REPLY_BYTES
    }

    /// Makes the API's answer of it: at once where it is small, else on a worker.
    ///
    /// # Errors
    /// What `answer` says.
    pub fn answer(self, answer: impl FnOnce(&Reply) -> Result<Response, HostError> + Send + 'static) -> Flow {
        if self.is_large() {
            Step::compute(move || Step::respond(answer(&self)?))
        } else {
            Step::respond(answer(&self)?)
        }
    }
}

/// Puts a reply together from a stream's events.
#[derive(Debug)]
pub(super) struct Collector {
    reply: Reply,
    last_kinds: Vec<u16>,
    message_bytes: usize,
    data_left: usize,
    share: Share,
}

/// Whether a reply is complete.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// More has to come.
    More,
    /// It is: take it.
    Complete,
}

impl Collector {
    /// A collector of at most `max_data_bytes` of DATA, as far as `share` goes.
    pub fn new(last_kinds: Vec<u16>, max_data_bytes: usize, share: Share) -> Collector {
        Collector { reply: Reply::default(), last_kinds, message_bytes: 0, data_left: max_data_bytes, share }
    }

    /// Takes a message.
    pub fn message(&mut self, kind: u16, body: Vec<u8>) -> Result<Progress, HostError> {
        if kind == Error::KIND {
            return Err(match Error::decode(&body) {
                Ok(error) => HostError::Remote(error),
                Err(error) => HostError::BadReply(format!("Error: {error}")),
            });
        }
        self.message_bytes += body.len();
        if self.reply.messages.len() >= MAX_REPLY_MESSAGES || self.message_bytes > MAX_REPLY_MESSAGE_BYTES {
            return Err(HostError::BadReply("it is too long".to_string()));
        }
        if !self.share.grow(body.len()) {
            return Err(HostError::Busy);
        }
        self.reply.messages.push((kind, body));
        Ok(if self.last_kinds.contains(&kind) { Progress::Complete } else { Progress::More })
    }

    /// Takes bytes of a channel; those over the bound are counted and dropped.
    pub fn data(&mut self, channel: u8, bytes: &[u8]) {
        let kept = self.share.grow_up_to(bytes.len().min(self.data_left));
        if kept > 0 {
            self.reply.channels.entry(channel).or_default().extend_from_slice(&bytes[..kept]);
        }
        self.data_left -= kept;
        self.reply.dropped_bytes += (bytes.len() - kept) as u64;
    }

    /// The reply as it is.
    pub fn into_reply(self) -> Reply {
        self.reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use wire::message::{Code, Done, HealthReply, ProcessExited};

    fn body<M: Message>(message: &M) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    #[test]
    fn a_reply_is_complete_with_a_last_kind_and_keeps_within_its_bound() {
        let mut collector = Collector::new(vec![ProcessExited::KIND], 4, Budget::new(1000).share());
        assert_eq!(collector.message(Done::KIND, body(&Done {})), Ok(Progress::More));
        collector.data(1, b"abc");
        collector.data(2, b"de");
        let exited = ProcessExited { exit_code: 3, ..Default::default() };
        assert_eq!(collector.message(ProcessExited::KIND, body(&exited)), Ok(Progress::Complete));
        let reply = collector.into_reply();
        assert_eq!(reply.channel(1), b"abc");
        assert_eq!(reply.channel(2), b"d");
        assert_eq!(reply.channel(9), b"");
        assert_eq!(reply.dropped_bytes, 1);
        assert_eq!(reply.message::<ProcessExited>().map(|m| m.exit_code), Ok(3));
        assert!(matches!(reply.message::<HealthReply>(), Err(HostError::BadReply(_))));
    }

    #[test]
    fn an_error_message_is_the_calls_error() {
        let mut collector = Collector::new(Vec::new(), 0, Budget::new(0).share());
        let error = Error::new(Code::NotFound, "no such capsule");
        assert_eq!(collector.message(Error::KIND, body(&error)), Err(HostError::Remote(error)));
    }

    #[test]
    fn all_replies_together_keep_within_their_budget() {
        let budget = Budget::new(10);
        let mut first = Collector::new(Vec::new(), 8, budget.share());
        let mut second = Collector::new(Vec::new(), 8, budget.share());
        first.data(1, &[0; 8]);
        second.data(1, &[0; 8]);
        assert_eq!(second.message(Done::KIND, vec![0]), Err(HostError::Busy));
        let second = second.into_reply();
        assert_eq!((second.channel(1).len(), second.dropped_bytes), (2, 6), "the rest is told to be dropped");
        assert_eq!(first.into_reply().dropped_bytes, 0);
        assert_eq!(budget.share().grow_up_to(99), 10, "it has all come back");
    }

    #[test]
    fn large_replies_are_for_a_worker() {
        let reply = |bytes| Reply { channels: BTreeMap::from([(1, vec![b'x'; bytes])]), ..Reply::default() };
        let flow = |bytes| reply(bytes).answer(|reply| Ok(Response::json(200, &reply.channel(1).len())));
        assert!(matches!(flow(LARGE_REPLY_BYTES - 1), Ok(Step::Respond(_))));
        let Ok(Step::Compute(work)) = flow(LARGE_REPLY_BYTES) else { panic!("it is made at once") };
        let Ok(Step::Respond(answer)) = work() else { panic!("no answer") };
        assert_eq!(answer.body, LARGE_REPLY_BYTES.to_string().into_bytes());
        let many = Reply { messages: vec![(1, vec![0; 1024]); 32], ..Reply::default() };
        let failing = many.answer(|_| Err(HostError::BadReply("on purpose".into())));
        let Ok(Step::Compute(work)) = failing else { panic!("it is made at once") };
        assert_eq!(work().err().map(|answer| answer.status), Some(502));
    }
}
