//! Bytes of a peer that has proven nothing: no panic, no memory, nobody let in.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::auth::{NONCE_LEN, Verifier};
use wire::session::{Event, Limits, Session};

fuzz_target!(|data: &[u8]| {
    let Some((first, mut rest)) = data.split_first() else { return };
    let mut session = match first & 1 {
        0 => Session::server("fuzz", [2; NONCE_LEN], Limits::default(), 0),
        _ => Session::client("agent", b"0123456789abcdef", "fuzz", [1; NONCE_LEN], Limits::default(), 0),
    };
    let piece = usize::from(first >> 1) + 1;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at(piece.min(rest.len()));
        session.receive(head, 0);
        rest = tail;
        while let Some(event) = session.poll_event() {
            match event {
                Event::Authenticate { .. } => session.provide_verifier(None::<Verifier>, b"decoy"),
                Event::Ready { .. } => panic!("let in without the secret"),
                _ => {}
            }
        }
        assert!(session.buffered_bytes() < 8192);
    }
});
