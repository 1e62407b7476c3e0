//! Two sessions joined by a perfect transport; hostile ones are in `tests/`.

use super::*;
use crate::auth::{AuthError, ITERATIONS, Verifier};
use crate::frame::MAX_PAYLOAD;
use crate::message::{Code, Done, Health, HealthReply, Message};

const SECRET: &[u8] = b"0123456789abcdef";

struct Pair {
    client: Session,
    server: Session,
    client_events: Vec<Event>,
    server_events: Vec<Event>,
    verifier: Option<Verifier>,
}

impl Pair {
    fn new(secret: &[u8], limits: Limits) -> Pair {
        Pair {
            client: Session::client("agent", secret, "test/1", [1; NONCE_LEN], limits, 0),
            server: Session::server("test/2", [2; NONCE_LEN], limits, 0),
            client_events: Vec::new(),
            server_events: Vec::new(),
            verifier: Some(Verifier::new(SECRET, &[3; 16], ITERATIONS)),
        }
    }

    fn ready() -> Pair {
        let mut pair = Pair::new(SECRET, Limits::default());
        pair.run();
        pair.client_events.clear();
        pair.server_events.clear();
        pair
    }

    /// Moves bytes and events until nothing moves any more.
    fn run(&mut self) {
        for _ in 0..100_000 {
            let mut moved = false;
            let bytes = self.client.output().to_vec();
            self.client.consume_output(bytes.len());
            self.server.receive(&bytes, 0);
            moved |= !bytes.is_empty();
            let bytes = self.server.output().to_vec();
            self.server.consume_output(bytes.len());
            self.client.receive(&bytes, 0);
            moved |= !bytes.is_empty();
            while let Some(event) = self.client.poll_event() {
                self.client_events.push(event);
                moved = true;
            }
            while let Some(event) = self.server.poll_event() {
                if matches!(event, Event::Authenticate { .. }) {
                    self.server.provide_verifier(self.verifier.clone(), b"decoy");
                }
                self.server_events.push(event);
                moved = true;
            }
            if !moved {
                return;
            }
        }
        panic!("the pair never comes to rest");
    }
}

#[test]
fn a_handshake_proves_both_sides() {
    let mut pair = Pair::new(SECRET, Limits::default());
    pair.run();
    assert_eq!(pair.client_events, [Event::Ready { identity: "agent".into(), peer_name: "test/2".into() }]);
    assert_eq!(
        pair.server_events,
        [
            Event::Authenticate { identity: "agent".into() },
            Event::Ready { identity: "agent".into(), peer_name: "test/1".into() }
        ]
    );
}

#[test]
fn a_wrong_secret_ends_both_sides() {
    let mut pair = Pair::new(b"guess", Limits::default());
    pair.run();
    assert!(pair.client.is_closed() && pair.server.is_closed());
    assert_eq!(
        pair.server_events.last(),
        Some(&Event::Closed { error: SessionError::Auth(AuthError::WrongSecret) })
    );
    assert!(matches!(pair.client_events.last(), Some(Event::Closed { error: SessionError::ByPeer(7, _) })));
}

#[test]
fn a_request_is_answered_and_the_stream_forgotten() {
    let mut pair = Pair::ready();
    let stream = pair.client.open(&Health {}, true).expect("open");
    pair.run();
    assert_eq!(
        pair.server_events,
        [Event::Opened { stream, kind: Health::KIND, body: vec![0, 0] }, Event::Finished { stream }]
    );
    let reply = HealthReply { version: "1".into(), uptime_ms: 5 };
    pair.server.send_last(stream, &reply).expect("reply");
    pair.run();
    let Some(Event::Message { kind, body, .. }) = pair.client_events.first() else {
        panic!("no reply: {:?}", pair.client_events)
    };
    assert_eq!(crate::message::expect::<HealthReply>(*kind, body), Ok(reply));
    assert_eq!((pair.client.stream_count(), pair.server.stream_count()), (0, 0));
}

#[test]
fn a_reader_that_stalls_stops_its_own_stream_only() {
    let mut pair = Pair::ready();
    let slow = pair.client.open(&Done {}, false).expect("open");
    let fast = pair.client.open(&Done {}, false).expect("open");
    let block = vec![7u8; 100_000];
    let mut sent = 0;
    loop {
        let n = pair.client.send_data(slow, 1, &block).expect("send");
        pair.run();
        if n == 0 {
            break;
        }
        sent += n;
    }
    let window = Limits::default().stream_window as usize;
    assert!(sent <= window && sent > window / 2, "{sent}");
    assert_eq!(pair.client.send_data(fast, 1, b"key"), Ok(3));
    pair.run();
    assert!(pair.server_events.iter().any(|e| matches!(e, Event::Data { stream, .. } if *stream == fast)));

    // Once the reader has dealt with what came, the writer is told to go on.
    pair.client_events.clear();
    for event in std::mem::take(&mut pair.server_events) {
        if let Event::Data { stream, cost, .. } = event {
            pair.server.release(stream, cost);
        }
    }
    pair.run();
    assert!(pair.client_events.contains(&Event::Writable { stream: slow }));
}

#[test]
fn all_bytes_arrive_in_order_through_many_windows() {
    let mut pair = Pair::ready();
    let stream = pair.client.open(&Done {}, false).expect("open");
    let all: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < all.len() {
        sent += pair.client.send_data(stream, 1, &all[sent..]).expect("send");
        pair.run();
        for event in std::mem::take(&mut pair.server_events) {
            if let Event::Data { stream, bytes, cost, .. } = event {
                got.extend_from_slice(&bytes);
                pair.server.release(stream, cost);
            }
        }
    }
    assert!(got == all);
}

#[test]
fn a_reset_reaches_the_other_side_and_returns_the_credit() {
    let mut pair = Pair::ready();
    for _ in 0..200 {
        let stream = pair.client.open(&Done {}, false).expect("open");
        assert_eq!(pair.client.send_data(stream, 1, &[1; 30_000]), Ok(30_000));
        pair.run();
        pair.server.reset(stream, Code::Cancelled, "enough");
        pair.run();
        assert!(pair.client_events.iter().any(|e| matches!(e, Event::Reset { code: 1, .. })));
        assert_eq!((pair.client.stream_count(), pair.server.stream_count()), (0, 0));
        // The application had these in hand when it reset the stream.
        for event in std::mem::take(&mut pair.server_events) {
            if let Event::Data { stream, cost, .. } = event {
                pair.server.release(stream, cost);
            }
        }
        pair.client_events.clear();
    }
}

#[test]
fn any_changed_bit_after_the_handshake_is_found() {
    let mut pair = Pair::ready();
    pair.client.open(&Health {}, true).expect("open");
    let good = pair.client.output().to_vec();
    for bit in 0..good.len() * 8 {
        let mut other = Pair::ready();
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        other.server.receive(&bytes, 0);
        // A longer length only makes the receiver wait for bytes whose MAC will not fit.
        other.server.receive(&vec![0; MAX_PAYLOAD + 64], 0);
        other.run();
        assert!(other.server.is_closed(), "bit {bit}");
        assert!(!other.server_events.iter().any(|e| matches!(e, Event::Opened { .. })), "bit {bit}");
    }
}

#[test]
fn replayed_reordered_and_reflected_frames_are_refused() {
    let mut pair = Pair::ready();
    pair.client.open(&Health {}, true).expect("open");
    let first = pair.client.output().to_vec();
    pair.client.consume_output(first.len());
    pair.client.open(&Health {}, true).expect("open");
    let second = pair.client.output().to_vec();
    for wrong in [[first.clone(), first.clone()].concat(), second.clone()] {
        let mut other = Pair::ready();
        other.server.receive(&wrong, 0);
        other.run();
        assert_eq!(other.server_events.last(), Some(&Event::Closed { error: SessionError::Integrity }));
    }
    pair.client.receive(&first, 0);
    assert!(pair.client.is_closed(), "a frame came back to its sender");
}

#[test]
fn time_runs_out_for_handshakes_and_silent_peers() {
    let mut server = Session::server("test", [2; NONCE_LEN], Limits::default(), 0);
    assert_eq!(server.next_timeout_ms(), Some(HANDSHAKE_TIMEOUT_MS));
    server.handle_timeout(HANDSHAKE_TIMEOUT_MS);
    assert!(server.is_closed());

    let mut pair = Pair::ready();
    pair.client.handle_timeout(PING_AFTER_MS);
    assert!(!pair.client.output().is_empty(), "a ping is sent");
    pair.client.handle_timeout(DEAD_AFTER_MS);
    assert!(pair.client.is_closed());
}

#[test]
fn what_is_not_the_protocol_is_refused_at_once() {
    let mut server = Session::server("test", [2; NONCE_LEN], Limits::default(), 0);
    server.receive(b"GET / HTTP/1.1\r\n", 0);
    assert_eq!(server.poll_event(), Some(Event::Closed { error: SessionError::NotWrenn }));
    assert!(server.output().is_empty());
}

#[test]
fn a_draining_side_takes_no_streams_and_finishes_those_it_has() {
    let mut pair = Pair::ready();
    let old = pair.client.open(&Health {}, true).expect("open");
    pair.run();
    pair.server.drain("restart");
    pair.run();
    assert_eq!(pair.client.open(&Health {}, true), Err(OpenError::GoingAway));
    pair.server.send_last(old, &Done {}).expect("reply");
    pair.run();
    assert!(pair.client_events.iter().any(|e| matches!(e, Event::Message { .. })));
}

/// Half of all streams of the connection stall with as much in hand as they get; a new one still works.
#[test]
fn readers_that_stall_on_many_streams_leave_room_for_the_next() {
    let limits = Limits { max_streams: 400, ..Limits::default() };
    let mut pair = Pair::new(SECRET, limits);
    pair.run();
    let block = vec![7u8; 400_000];
    for _ in 0..300 {
        let stalled = pair.client.open(&Done {}, false).expect("open");
        pair.client.send_data(stalled, 1, &block).expect("send");
        pair.run();
    }
    pair.server_events.clear();
    let live = pair.client.open(&Done {}, false).expect("open");
    let (mut sent, mut got) = (0, 0);
    for _ in 0..10_000 {
        if got == block.len() {
            break;
        }
        sent += pair.client.send_data(live, 1, &block[sent..]).expect("send");
        pair.run();
        for event in std::mem::take(&mut pair.server_events) {
            if let Event::Data { stream, bytes, cost, .. } = event
                && stream == live
            {
                got += bytes.len();
                pair.server.release(stream, cost);
            }
        }
        pair.run();
    }
    assert_eq!(got, block.len());
    assert!(pair.server.buffered_bytes() < 2 * 1024 * 1024);
}

#[test]
fn streams_take_turns_when_messages_wait() {
    let mut pair = Pair::ready();
    let streams: Vec<StreamId> = (0..4).map(|_| pair.client.open(&Done {}, false).expect("open")).collect();
    pair.run();
    let mut message = vec![0x12, 0x34];
    message.resize(50_000, 0);
    // More than the output takes at once, so some wait.
    for _ in 0..4 {
        for stream in &streams {
            pair.client.send_raw(*stream, message.clone(), false).expect("queued");
        }
    }
    pair.run();
    let order: Vec<StreamId> = pair
        .server_events
        .iter()
        .filter_map(|e| match e {
            Event::Message { stream, .. } => Some(*stream),
            _ => None,
        })
        .collect();
    assert_eq!(order.len(), 16);
    assert!(order.chunks(4).all(|turn| streams.iter().all(|s| turn.contains(s))), "{order:?}");
}

#[test]
fn what_a_stream_was_owed_before_does_not_hold_back_its_last_message() {
    let mut pair = Pair::ready();
    let streams: Vec<StreamId> =
        (0..60).map(|_| pair.client.open(&Health {}, false).expect("open")).collect();
    pair.run();
    let first = streams[0];
    assert_eq!(pair.server.send_data(first, 1, &[7; 9_000]), Ok(9_000));
    pair.run();
    for event in core::mem::take(&mut pair.client_events) {
        if let Event::Data { stream, cost, .. } = event {
            // Little enough, and with room enough, not to be given back at once.
            pair.client.release(stream, cost);
        }
    }
    // The others take what there is, and nobody reads them.
    for stream in &streams[1..] {
        let mut left = 300_000;
        while left > 0 {
            let taken = pair.server.send_data(*stream, 1, &vec![0; left.min(8_000)]).expect("open");
            left -= taken;
            pair.run();
            if taken == 0 {
                break;
            }
        }
    }
    pair.client_events.clear();
    pair.server.send_last(first, &Done {}).expect("queued");
    pair.run();
    assert!(
        matches!(&pair.client_events[..], [Event::Message { stream, .. }, Event::Finished { .. }] if *stream == first),
        "{:?}",
        pair.client_events
    );
}
