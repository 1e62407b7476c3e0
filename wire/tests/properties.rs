//! Properties of codec and session for any input.

use proptest::prelude::*;
use wire::frame::{HEADER_LEN, Header, decode_reset, encode_reset};
use wire::message::{descriptions, recode};
use wire::session::{Event, Limits, Session};

mod common {
    pub mod joined;
    pub mod schema;
}

use common::joined::{Joined, SECRET, frames};
use common::schema;
use wire::message::{Done, Health};

fn kinds() -> impl Strategy<Value = u16> {
    let all: Vec<u16> = descriptions().iter().map(|d| d.kind).collect();
    prop::sample::select(all)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever decodes encodes to bytes that decode to the same.
    #[test]
    fn decoding_any_body_is_an_error_or_a_round_trip(kind in kinds(), body in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Some(Ok((text, bytes))) = recode(kind, &body) {
            prop_assert_eq!(recode(kind, &bytes).expect("known").expect("own encoding"), (text, bytes));
        }
    }

    /// Any values that the document's types allow come through unchanged.
    #[test]
    fn any_value_comes_through(kind in kinds(), seed in 0u64..1000) {
        let message = descriptions().into_iter().find(|d| d.kind == kind).expect("known");
        let mut body = Vec::new();
        for (i, (_, name, _)) in message.fields.iter().enumerate() {
            let kind = schema::parse(name);
            schema::encode(&kind, &schema::sample(&kind, seed + i as u64), &mut body);
        }
        body.extend_from_slice(&[0, 0]);
        let (_, again) = recode(kind, &body).expect("known").expect("of its types");
        prop_assert_eq!(again, body);
    }

    #[test]
    fn a_body_with_a_byte_changed_never_panics(kind in kinds(), seed in 0u64..50, at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let message = descriptions().into_iter().find(|d| d.kind == kind).expect("known");
        let mut body = Vec::new();
        for (i, (_, name, _)) in message.fields.iter().enumerate() {
            let kind = schema::parse(name);
            schema::encode(&kind, &schema::sample(&kind, seed + i as u64), &mut body);
        }
        body.extend_from_slice(&[0, 0]);
        let at = at.index(body.len());
        body[at] = value;
        let _ = recode(kind, &body);
    }

    #[test]
    fn a_header_that_decodes_is_the_only_one_with_its_bytes(bytes in any::<[u8; HEADER_LEN]>()) {
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn any_reason_comes_through(code in any::<u16>(), reason in ".{0,300}") {
        let (back, text) = decode_reset(&encode_reset(code, &reason)).expect("own encoding");
        prop_assert_eq!(back, code);
        prop_assert!(reason.starts_with(&text));
    }

    #[test]
    fn any_bytes_at_all_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), is_client in any::<bool>()) {
        let mut session = match is_client {
            true => Session::client("agent", SECRET, "test/1", [1; 18], Limits::default(), 0),
            false => Session::server("test/2", [1; 18], Limits::default(), 0),
        };
        session.receive(&bytes, 0);
        while session.poll_event().is_some() {}
        prop_assert!(session.buffered_bytes() < 4096);
    }
}

/// Everything that the server hears in a session, cut in some way. The frames of the handshake come one
/// after the other, as a client must send them.
fn heard(bytes: &[u8], cuts: &[usize]) -> Vec<Event> {
    let mut joined = Joined::new(SECRET, 1);
    let handshake: Vec<Vec<u8>> = frames(bytes).into_iter().take(4).collect();
    let rest = bytes[handshake.concat().len()..].to_vec();
    let mut cuts = cuts.iter().copied();
    for part in handshake.iter().chain([&rest]) {
        let mut part = &part[..];
        while !part.is_empty() {
            let (head, tail) = part.split_at(cuts.next().unwrap_or(usize::MAX).min(part.len()));
            joined.server.receive(head, 0);
            joined.poll();
            part = tail;
        }
    }
    joined.server_events
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the transport splits the bytes, the events are the same.
    #[test]
    fn any_split_gives_the_same_events(cuts in prop::collection::vec(1usize..200, 0..120)) {
        let mut joined = Joined::new(SECRET, 1);
        joined.run();
        let first = joined.client.open(&Health {}, false).expect("open");
        let second = joined.client.open(&Done {}, true).expect("open");
        joined.client.send_data(first, 1, &[7; 1500]).expect("send");
        joined.client.send(first, &Done {}).expect("send");
        joined.client.finish(first).expect("finish");
        joined.client.reset(second, wire::message::Code::Cancelled, "enough");
        joined.run();
        let whole = heard(&joined.client_sent, &[]);
        prop_assert!(whole.len() >= 8, "{:?}", whole);
        prop_assert_eq!(heard(&joined.client_sent, &cuts), whole);
    }
}
