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
    use crate::auth::{ITERATIONS, NONCE_LEN, Verifier};
    use crate::codec::Bytes;
    use crate::message::{ProcessStart, expect};
    use crate::session::{Event, Limits, MIN_WINDOW};
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

    /// A client and a server session with nothing but memory between them.
    struct Pair {
        client: Session,
        server: Session,
    }

    impl Pair {
        fn new(limits: Limits) -> Pair {
            let mut pair = Pair {
                client: Session::client("cp", b"secret", "client", [1; NONCE_LEN], limits, 0),
                server: Session::server("server", [2; NONCE_LEN], limits, 0),
            };
            while !pair.client.is_ready() {
                pair.carry();
                match pair.server.poll_event() {
                    Some(Event::Authenticate { .. }) => {
                        let verifier = Verifier::new(b"secret", &[3; 16], ITERATIONS);
                        pair.server.provide_verifier(Some(verifier), &[0; 32]);
                    }
                    Some(Event::Ready { .. }) | None => {}
                    other => panic!("{other:?}"),
                }
            }
            pair.client.poll_event();
            pair
        }

        fn carry(&mut self) {
            exchange(&mut self.client, &mut self.server);
            exchange(&mut self.server, &mut self.client);
        }
    }

    fn exchange(from: &mut Session, to: &mut Session) {
        let bytes = from.output().to_vec();
        from.consume_output(bytes.len());
        to.receive(&bytes, 0);
    }

    /// The smallest windows that there are.
    const WINDOW: usize = MIN_WINDOW as usize;

    fn small() -> Limits {
        Limits { stream_window: MIN_WINDOW, connection_window: 4 * MIN_WINDOW, max_streams: 16 }
    }

    /// Moves the events of the two sessions in the middle into the pipes.
    struct Relay {
        outer: Pair,
        inner: Pair,
        ids: (StreamId, StreamId),
        inward: Pipe,
        outward: Pipe,
        held: usize,
    }

    impl Relay {
        fn turn(&mut self) {
            self.outer.carry();
            self.inner.carry();
            while let Some(event) = self.outer.server.poll_event() {
                match event {
                    Event::Message { kind, body, cost, .. } => self.inward.push_message(kind, &body, cost),
                    Event::Data { channel, bytes, cost, .. } => self.inward.push_data(channel, bytes, cost),
                    Event::Finished { .. } => self.inward.push_end(),
                    _ => {}
                }
            }
            while let Some(event) = self.inner.client.poll_event() {
                match event {
                    Event::Message { kind, body, cost, .. } => self.outward.push_message(kind, &body, cost),
                    Event::Data { channel, bytes, cost, .. } => self.outward.push_data(channel, bytes, cost),
                    Event::Finished { .. } => self.outward.push_end(),
                    _ => {}
                }
            }
            let (outer, inner) = self.ids;
            let (a, b) = (&mut self.outer.server, &mut self.inner.client);
            let (inward, spent) = self.inward.pump(&mut (&mut *b, inner));
            a.release(outer, spent);
            let (outward, spent) = self.outward.pump(&mut (&mut *a, outer));
            b.release(inner, spent);
            assert!(inward != Flow::Broken && outward != Flow::Broken);
            let waiting = |p: &Pipe| -> usize {
                p.items.iter().map(|i| if let Item::Data { bytes, .. } = i { bytes.len() } else { 0 }).sum()
            };
            self.held = self.held.max(waiting(&self.inward)).max(waiting(&self.outward));
        }
    }

    fn relay() -> Relay {
        let (mut outer, mut inner) = (Pair::new(small()), Pair::new(small()));
        let start = ProcessStart { argv: vec![Bytes(b"cat".to_vec())], stdin: true, ..Default::default() };
        let outer_id = outer.client.open(&start, false).expect("open");
        outer.carry();
        let Some(Event::Opened { stream, kind, body }) = outer.server.poll_event() else {
            panic!("not opened")
        };
        assert_eq!(stream, outer_id);
        let mut payload = kind.to_be_bytes().to_vec();
        payload.extend_from_slice(&body);
        let inner_id = inner.client.open_raw(payload, false).expect("open");
        inner.carry();
        let Some(Event::Opened { kind, body, .. }) = inner.server.poll_event() else { panic!("not opened") };
        assert_eq!(expect::<ProcessStart>(kind, &body), Ok(start));
        Relay {
            outer,
            inner,
            ids: (outer_id, inner_id),
            inward: Pipe::default(),
            outward: Pipe::default(),
            held: 0,
        }
    }

    #[test]
    fn bytes_pass_both_ways_and_a_slow_reader_stops_the_writer() {
        let mut relay = relay();
        let (outer_id, inner_id) = relay.ids;
        let sent: Vec<u8> = (0..400_000u32).map(|n| (n % 251) as u8).collect();
        let (mut offset, mut received, mut unread) = (0, Vec::new(), Vec::new());
        // The guest reads nothing: the writer comes to a stop well before the end.
        for _ in 0..50 {
            offset += relay.outer.client.send_data(outer_id, 0, &sent[offset..]).expect("send");
            relay.turn();
            while let Some(event) = relay.inner.server.poll_event() {
                unread.push(event);
            }
        }
        assert!(offset <= 2 * WINDOW, "{offset} bytes were taken with nobody reading");
        assert!(relay.held <= WINDOW, "{} bytes held", relay.held);
        // Now it reads.
        for _ in 0..500 {
            if offset < sent.len() {
                offset += relay.outer.client.send_data(outer_id, 0, &sent[offset..]).expect("send");
                if offset == sent.len() {
                    relay.outer.client.finish(outer_id).expect("finish");
                }
            }
            while relay.outer.client.poll_event().is_some() {}
            relay.turn();
            let fresh = core::iter::from_fn(|| relay.inner.server.poll_event());
            let events: Vec<Event> = unread.drain(..).chain(fresh).collect();
            for event in events {
                if let Event::Data { bytes, cost, channel, .. } = event {
                    assert_eq!(channel, 0);
                    received.extend_from_slice(&bytes);
                    relay.inner.server.release(inner_id, cost);
                }
            }
        }
        assert_eq!(received.len(), sent.len());
        assert_eq!(received, sent);
        assert!(relay.inward.ended);
        // And an answer back, with the end.
        relay.inner.server.send_data(inner_id, 1, b"done").expect("send");
        relay.inner.server.finish(inner_id).expect("finish");
        relay.turn();
        relay.turn();
        let events: Vec<Event> = core::iter::from_fn(|| relay.outer.client.poll_event()).collect();
        assert!(
            matches!(&events[..], [Event::Data { bytes, channel: 1, .. }, Event::Finished { .. }]
            if bytes == b"done"),
            "{events:?}"
        );
        assert_eq!((relay.outer.server.stream_count(), relay.inner.client.stream_count()), (0, 0));
    }
}
