//! Joining a stream of one session with a stream of another: pure.
//!
//! A [`Pipe`] is one direction. Credit goes back to the sender only when the receiving end has taken the
//! bytes, so a slow reader at one end stops the writer at the other, and whoever joins the two never holds
//! more than the sender's window.

use crate::session::{SendError, Session, StreamId};
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Where a pipe leads.
pub trait Sink {
    /// Sends an encoded message (`u16` number, then body).
    ///
    /// # Errors
    /// [`SendError::QueueFull`] when it is to be tried again later; else the stream is gone.
    fn send_message(&mut self, payload: &[u8]) -> Result<(), SendError>;

    /// Sends bytes, as many as there is room for, which is the number returned.
    ///
    /// # Errors
    /// The stream is gone.
    fn send_data(&mut self, channel: u8, bytes: &[u8]) -> Result<usize, SendError>;

    /// Ends this half.
    ///
    /// # Errors
    /// The stream is gone.
    fn finish(&mut self) -> Result<(), SendError>;
}

/// A stream of a session.
impl Sink for (&mut Session, StreamId) {
    fn send_message(&mut self, payload: &[u8]) -> Result<(), SendError> {
        self.0.send_raw(self.1, payload.to_vec(), false)
    }

    fn send_data(&mut self, channel: u8, bytes: &[u8]) -> Result<usize, SendError> {
        self.0.send_data(self.1, channel, bytes)
    }

    fn finish(&mut self) -> Result<(), SendError> {
        self.0.finish(self.1)
    }
}

#[derive(Debug)]
enum Item {
    Message { payload: Vec<u8>, cost: u32 },
    Data { channel: u8, bytes: Vec<u8>, sent: usize, cost: u32 },
}

/// What became of a turn of a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// All that came has gone.
    Idle,
    /// The receiving end takes no more and will tell when it does.
    Waiting,
    /// The receiving end has too many messages waiting and will not tell: try again after it has heard
    /// from its peer.
    Stalled,
    /// The end of the stream has gone too.
    Ended,
    /// The receiving end is gone.
    Broken,
}

/// One direction of two joined streams.
#[derive(Debug, Default)]
pub struct Pipe {
    items: VecDeque<Item>,
    finished: bool,
    ended: bool,
}

impl Pipe {
    /// A message has come. `cost` is the credit to give back for it.
    pub fn push_message(&mut self, kind: u16, body: &[u8], cost: u32) {
        let mut payload = Vec::with_capacity(2 + body.len());
        payload.extend_from_slice(&kind.to_be_bytes());
        payload.extend_from_slice(body);
        self.items.push_back(Item::Message { payload, cost });
    }

    /// Bytes have come.
    pub fn push_data(&mut self, channel: u8, bytes: Vec<u8>, cost: u32) {
        self.items.push_back(Item::Data { channel, bytes, sent: 0, cost });
    }

    /// The sender has ended its half.
    pub fn push_end(&mut self) {
        self.finished = true;
    }

    /// The credit of what has come and not gone: to be given back when the pipe is given up.
    pub fn owed(&self) -> u32 {
        self.items.iter().fold(0, |sum, item| match item {
            Item::Message { cost, .. } | Item::Data { cost, .. } => sum.saturating_add(*cost),
        })
    }

    /// Moves what can be moved. With what came of it goes the credit to give back to the sender.
    pub fn pump(&mut self, to: &mut impl Sink) -> (Flow, u32) {
        let mut spent = 0u32;
        if self.ended {
            return (Flow::Ended, 0);
        }
        while let Some(item) = self.items.front_mut() {
            let cost = match item {
                Item::Message { payload, cost } => match to.send_message(payload) {
                    Ok(()) => *cost,
                    Err(SendError::QueueFull) => return (Flow::Stalled, spent),
                    Err(_) => return (Flow::Broken, spent),
                },
                Item::Data { channel, bytes, sent, cost } => {
                    match to.send_data(*channel, &bytes[*sent..]) {
                        Ok(taken) => *sent += taken,
                        Err(_) => return (Flow::Broken, spent),
                    }
                    if *sent < bytes.len() {
                        return (Flow::Waiting, spent);
                    }
                    *cost
                }
            };
            spent = spent.saturating_add(cost);
            self.items.pop_front();
        }
        if !self.finished {
            return (Flow::Idle, spent);
        }
        self.ended = true;
        (if to.finish().is_ok() { Flow::Ended } else { Flow::Broken }, spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// Takes what it is told to, and remembers it.
    #[derive(Default)]
    struct Script {
        room: usize,
        queue_full: bool,
        is_gone: bool,
        taken: Vec<u8>,
        messages: Vec<Vec<u8>>,
        finished: u32,
    }

    impl Sink for Script {
        fn send_message(&mut self, payload: &[u8]) -> Result<(), SendError> {
            if self.is_gone {
                return Err(SendError::NoStream);
            }
            if self.queue_full {
                return Err(SendError::QueueFull);
            }
            self.messages.push(payload.to_vec());
            Ok(())
        }

        fn send_data(&mut self, channel: u8, bytes: &[u8]) -> Result<usize, SendError> {
            if self.is_gone {
                return Err(SendError::NoStream);
            }
            let n = bytes.len().min(self.room);
            self.room -= n;
            self.taken.push(channel);
            self.taken.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn finish(&mut self) -> Result<(), SendError> {
            self.finished += 1;
            Ok(())
        }
    }

    #[test]
    fn credit_goes_back_for_what_was_taken_whole() {
        let mut pipe = Pipe::default();
        pipe.push_message(0x0203, b"x", 10);
        pipe.push_data(1, b"abcdef".to_vec(), 22);
        pipe.push_end();
        let mut sink = Script { room: 4, ..Script::default() };
        assert_eq!(pipe.pump(&mut sink), (Flow::Waiting, 10));
        assert_eq!((pipe.owed(), sink.finished), (22, 0));
        sink.room = 100;
        assert_eq!(pipe.pump(&mut sink), (Flow::Ended, 22));
        assert_eq!(pipe.pump(&mut sink), (Flow::Ended, 0));
        assert_eq!(sink.messages, [vec![2, 3, b'x']]);
        assert_eq!((sink.taken.as_slice(), sink.finished), (b"\x01abcd\x01ef".as_slice(), 1));
    }

    #[test]
    fn a_full_queue_is_tried_again_and_a_lost_stream_is_told() {
        let mut pipe = Pipe::default();
        pipe.push_message(1, b"", 7);
        pipe.push_message(2, b"", 8);
        let mut sink = Script { queue_full: true, ..Script::default() };
        assert_eq!(pipe.pump(&mut sink), (Flow::Stalled, 0));
        sink.queue_full = false;
        assert_eq!(pipe.pump(&mut sink), (Flow::Idle, 15));
        pipe.push_data(0, vec![1], 9);
        sink.is_gone = true;
        assert_eq!(pipe.pump(&mut sink), (Flow::Broken, 0));
        assert_eq!(pipe.owed(), 9, "it still has to be given back");
    }
}
