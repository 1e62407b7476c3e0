//! What somebody on the path, or a peer without the secret, can try: every try ends the connection, and
//! nothing of it reaches the application.

mod common {
    pub mod joined;
}

use common::joined::{Joined, SECRET, frames};
use std::sync::LazyLock;
use wire::auth::{AuthError, NONCE_LEN};
use wire::message::{Code, Health};
use wire::session::{Event, HANDSHAKE_TIMEOUT_MS, Limits, Session, SessionError};

/// The client's frames, then the server's.
type Frames = (Vec<Vec<u8>>, Vec<Vec<u8>>);

/// A whole handshake, recorded.
static RECORDED: LazyLock<Frames> = LazyLock::new(|| {
    let mut joined = Joined::new(SECRET, 1);
    joined.run();
    joined.client.open(&Health {}, true).expect("open");
    joined.run();
    (frames(&joined.client_sent), frames(&joined.server_sent))
});

fn is_let_in(events: &[Event]) -> bool {
    events.iter().any(|e| matches!(e, Event::Ready { .. } | Event::Opened { .. }))
}

#[test]
fn a_recorded_session_cannot_be_played_again() {
    let mut joined = Joined::new(SECRET, 2);
    for frame in &RECORDED.0 {
        joined.server.receive(frame, 0);
        joined.poll();
    }
    assert!(!is_let_in(&joined.server_events));
    let end = joined.server_events.last();
    assert_eq!(end, Some(&Event::Closed { error: SessionError::Auth(AuthError::NonceMismatch) }));
}

#[test]
fn a_recorded_server_cannot_be_played_again() {
    let mut joined = Joined::new(SECRET, 2);
    for frame in &RECORDED.1 {
        joined.client.receive(frame, 0);
        joined.poll();
    }
    assert!(!is_let_in(&joined.client_events));
    assert!(joined.client.is_closed());
}

#[test]
fn a_client_that_hears_only_itself_does_not_believe_it() {
    let mut joined = Joined::new(SECRET, 1);
    for _ in 0..10 {
        let bytes = joined.client.output().to_vec();
        joined.client.consume_output(bytes.len());
        joined.client.receive(&bytes, 0);
        joined.poll();
    }
    assert!(joined.client.is_closed() && !is_let_in(&joined.client_events));
}

/// Every bit of the handshake, either way: somebody notices, and the side that heard the wrong bit never
/// passes anything on. The first frame with a MAC proves that both ended up with the same keys.
#[test]
fn any_changed_bit_of_the_handshake_is_found() {
    let mut tried = 0;
    for to_server in [true, false] {
        let sent = if to_server { &RECORDED.0 } else { &RECORDED.1 };
        let handshake: usize = sent.iter().take(if to_server { 4 } else { 3 }).map(Vec::len).sum();
        for byte in 0..handshake {
            // Each byte, one of its bits; all bits of the bytes that decide (headers, versions).
            let bits = if byte < 64 { 0..8 } else { byte % 8..byte % 8 + 1 };
            for bit in bits {
                let mut joined = Joined::new(SECRET, 1);
                joined.flip = Some((to_server, byte, bit as u8));
                joined.run();
                let _ = joined.client.open(&Health {}, true);
                joined.run();
                // A length that grew leaves its receiver waiting: time ends that.
                joined.client.handle_timeout(HANDSHAKE_TIMEOUT_MS + 60_000);
                joined.server.handle_timeout(HANDSHAKE_TIMEOUT_MS + 60_000);
                joined.poll();
                let opened = joined.server_events.iter().any(|e| matches!(e, Event::Opened { .. }));
                assert!(!opened, "to server {to_server}, byte {byte}, bit {bit}");
                assert!(joined.client.is_closed() || joined.server.is_closed());
                tried += 1;
            }
        }
    }
    assert!(tried > 1000, "{tried}");
}

#[test]
fn frames_of_the_handshake_cannot_be_left_out_doubled_or_swapped() {
    let sent = &RECORDED.0;
    let orders: [&[usize]; 6] =
        [&[0, 1, 3], &[0, 1, 2, 2, 3], &[0, 1, 3, 2], &[0, 2, 1, 3], &[1, 2, 3], &[0, 1, 1, 2, 3]];
    for order in orders {
        // The same nonces as in the recording, so that only the order is wrong.
        let mut joined = Joined::new(SECRET, 1);
        for i in order {
            joined.server.receive(&sent[*i], 0);
            joined.poll();
        }
        assert!(!is_let_in(&joined.server_events), "{order:?}");
        assert!(joined.server.is_closed(), "{order:?}");
    }
}

#[test]
fn a_stream_cut_short_has_not_ended_well() {
    let mut joined = Joined::new(SECRET, 1);
    joined.run();
    let stream = joined.client.open(&Health {}, false).expect("open");
    joined.client.send_data(stream, 1, b"the first half").expect("send");
    joined.run();
    joined.server.transport_closed();
    joined.poll();
    assert!(!joined.server_events.iter().any(|e| matches!(e, Event::Finished { .. })));
    let end = joined.server_events.last();
    assert_eq!(end, Some(&Event::Closed { error: SessionError::TransportClosed }));
}

/// A version or feature that somebody took out or put in is in what both sides sign.
#[test]
fn a_downgrade_is_found() {
    // Preamble 8, header 12: min_version at 20, max_version at 22, features at 24, windows at 32 and 36.
    for (byte, bit) in [(31, 0), (24, 7), (33, 2), (39, 4), (43, 1)] {
        let mut joined = Joined::new(SECRET, 1);
        joined.flip = Some((true, byte, bit));
        joined.run();
        assert!(!is_let_in(&joined.server_events), "byte {byte}");
        assert!(!is_let_in(&joined.client_events), "byte {byte}");
    }
    let mut joined = Joined::new(SECRET, 1);
    joined.flip = Some((true, 31, 0));
    joined.run();
    let end = joined.server_events.last();
    assert_eq!(end, Some(&Event::Closed { error: SessionError::Auth(AuthError::BindingMismatch) }));
}

#[test]
fn a_wrong_secret_and_an_unknown_identity_look_the_same() {
    let mut told = Vec::new();
    for unknown in [false, true] {
        let mut joined = Joined::new(b"guess", 1);
        joined.knows = !unknown;
        joined.run();
        assert!(!is_let_in(&joined.server_events) && !is_let_in(&joined.client_events));
        match joined.client_events.last() {
            Some(Event::Closed { error: SessionError::ByPeer(code, reason) }) => {
                assert_eq!(Code::from_number(*code), Code::Unauthenticated);
                told.push(reason.clone());
            }
            other => panic!("{other:?}"),
        }
        let lengths: Vec<usize> = frames(&joined.server_sent).iter().map(Vec::len).collect();
        told.push(format!("{lengths:?}"));
    }
    assert_eq!(told[..2], told[2..]);
}

#[test]
fn a_handshake_that_never_ends_is_ended() {
    // One byte a second, for ever: the clock of the whole handshake counts, not that of the last byte.
    let mut server = Session::server("test", [2; NONCE_LEN], Limits::default(), 0);
    let all: Vec<u8> = RECORDED.0.concat();
    for (second, byte) in all.iter().enumerate() {
        let now_ms = second as u64 * 1000;
        if server.next_timeout_ms().is_some_and(|t| t <= now_ms) {
            server.handle_timeout(now_ms);
        }
        server.receive(&[*byte], now_ms);
    }
    let events: Vec<Event> = std::iter::from_fn(|| server.poll_event()).collect();
    assert_eq!(events.last(), Some(&Event::Closed { error: SessionError::HandshakeTimeout }));
    assert!(server.buffered_bytes() < 4096);
}

#[test]
fn a_peer_that_floods_before_it_is_let_in_holds_no_memory() {
    let mut joined = Joined::new(SECRET, 1);
    joined.answers = false;
    joined.run();
    // The server waits for its application to look up the verifier.
    joined.server.receive(&vec![0x41; 1 << 20], 0);
    assert!(joined.server.is_closed());
    assert!(joined.server.buffered_bytes() < 4096);
}

#[test]
fn a_peer_that_never_reads_is_given_up_on() {
    let mut joined = Joined::new(SECRET, 1);
    joined.run();
    // PINGs by the million: each asks for an answer that is never read.
    let mut other = Joined::new(SECRET, 1);
    other.run();
    for now_ms in (15_000..).step_by(20_000).take(3_000_000) {
        other.client.handle_timeout(now_ms);
        let ping = other.client.output().to_vec();
        other.client.consume_output(ping.len());
        joined.server.receive(&ping, now_ms);
        if joined.server.is_closed() {
            break;
        }
        // What the client hears keeps it alive: the PONG of its own world.
        other.server.receive(&ping, now_ms);
        let pong = other.server.output().to_vec();
        other.server.consume_output(pong.len());
        other.client.receive(&pong, now_ms);
    }
    assert!(joined.server.is_closed());
    assert!(joined.server.output().len() < 2 * 1024 * 1024);
}
