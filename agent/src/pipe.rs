//! Streams that pass through the agent: from a control plane's session into a capsule's, and back.
//!
//! A [`Pipe`] is one direction. Credit is given back to the sender only when the receiver's session has
//! taken the bytes, so a slow reader at one end stops the writer at the other and the agent never holds
//! more than the sender's window.

use std::collections::VecDeque;
use wire::session::{SendError, Session, StreamId};

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
    /// The receiving session takes no more and will tell when it does.
    Waiting,
    /// The receiving session has too many messages waiting and will not tell: try again after it has
    /// heard from its peer.
    Stalled,
    /// The end of the stream has gone too.
    Ended,
}

/// One direction of a forwarded stream.
#[derive(Debug, Default)]
pub struct Pipe {
    items: VecDeque<Item>,
    finished: bool,
    ended: bool,
}

impl Pipe {
    /// A message has come.
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

    /// Whether everything up to the end of the stream has gone.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Moves what can be moved.
    ///
    /// # Errors
    /// The receiver's stream is gone.
    pub fn pump(
        &mut self,
        from: (&mut Session, StreamId),
        to: (&mut Session, StreamId),
    ) -> Result<Flow, SendError> {
        let (from, from_stream) = from;
        let (to, to_stream) = to;
        while let Some(item) = self.items.front_mut() {
            let spent = match item {
                Item::Message { payload, cost } => match to.send_raw(to_stream, payload.clone(), false) {
                    Ok(()) => *cost,
                    Err(SendError::QueueFull) => return Ok(Flow::Stalled),
                    Err(e) => return Err(e),
                },
                Item::Data { channel, bytes, sent, cost } => {
                    *sent += to.send_data(to_stream, *channel, &bytes[*sent..])?;
                    if *sent < bytes.len() {
                        return Ok(Flow::Waiting);
                    }
                    *cost
                }
            };
            from.release(from_stream, spent);
            self.items.pop_front();
        }
        if self.finished && !self.ended {
            self.ended = true;
            to.finish(to_stream)?;
        }
        Ok(if self.ended { Flow::Ended } else { Flow::Idle })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::auth::{ITERATIONS, NONCE_LEN, Verifier};
    use wire::codec::Bytes;
    use wire::message::{ProcessStart, expect};
    use wire::session::{Event, Limits, MIN_WINDOW};

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

    /// Moves the events of the two agent-side sessions into the pipes.
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
            if !self.inward.has_ended() {
                self.inward.pump((a, outer), (b, inner)).expect("inward");
            }
            if !self.outward.has_ended() {
                self.outward.pump((b, inner), (a, outer)).expect("outward");
            }
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
            let fresh = std::iter::from_fn(|| relay.inner.server.poll_event());
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
        assert!(relay.inward.has_ended());
        // And an answer back, with the end.
        relay.inner.server.send_data(inner_id, 1, b"done").expect("send");
        relay.inner.server.finish(inner_id).expect("finish");
        relay.turn();
        relay.turn();
        let events: Vec<Event> = std::iter::from_fn(|| relay.outer.client.poll_event()).collect();
        assert!(
            matches!(&events[..], [Event::Data { bytes, channel: 1, .. }, Event::Finished { .. }]
            if bytes == b"done"),
            "{events:?}"
        );
        assert_eq!((relay.outer.server.stream_count(), relay.inner.client.stream_count()), (0, 0));
    }

    #[test]
    fn a_receiver_that_is_gone_is_an_error() {
        let mut relay = relay();
        let (outer_id, inner_id) = relay.ids;
        relay.inner.client.reset(inner_id, wire::message::Code::Cancelled, "gone");
        relay.inward.push_data(0, b"x".to_vec(), 34);
        let (a, b) = (&mut relay.outer.server, &mut relay.inner.client);
        assert_eq!(relay.inward.pump((a, outer_id), (b, inner_id)), Err(SendError::NoStream));
    }
}
