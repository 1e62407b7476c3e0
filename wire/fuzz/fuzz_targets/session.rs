//! An authenticated peer that sends any frames whatever, with the right MACs: no panic, and no more memory
//! than the windows allow. The input is a list of frames: type, flags, stream (2 bytes), length (2 bytes),
//! then that many bytes, of which those that are not there are zero.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use wire::auth::{ClientExchange, NONCE_LEN, ServerExchange, SessionKeys, Verifier, hmac_sha256};
use wire::frame::{MAC_LEN, PREAMBLE};
use wire::session::{Event, Hello, Limits, Session};

const SECRET: &[u8] = b"0123456789abcdef";
/// The fewest rounds, so that a run takes little time.
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| Verifier::new(SECRET, &[3; 16], 4096));

fn frame(frame_type: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[frame_type, flags, 0, 0]);
    out.extend_from_slice(payload);
    out
}

/// The client's three frames and the keys, once: all nonces are fixed, so every run is the same.
static LOGIN: LazyLock<(Vec<Vec<u8>>, SessionKeys)> = LazyLock::new(|| {
    let mut server = Session::server("fuzz", [2; NONCE_LEN], Limits::default(), 0);
    let hello = Hello {
        min_version: 1,
        max_version: 1,
        features: 0,
        stream_window: 262_144,
        connection_window: 1 << 21,
        max_streams: 100,
        name: String::new(),
    };
    let start = [&PREAMBLE[..], &frame(1, 0, 0, &hello.encode())].concat();
    server.receive(&start, 0);
    let answer = server.output().to_vec();
    let mut all = start.clone();
    all.extend_from_slice(&answer);
    let binding = sha256(&all);
    let (mut client, first) = ClientExchange::start("agent", SECRET, [1; NONCE_LEN], binding).expect("start");
    let mut exchange = ServerExchange::start(&first, binding).expect("first");
    let challenge = exchange.challenge(VERIFIER.clone(), [2; NONCE_LEN]);
    let proof = client.answer(&challenge).expect("answer");
    let (_, keys) = exchange.finish(&proof).expect("proof");
    (vec![start, frame(2, 0, 0, first.as_bytes()), frame(2, 0, 0, proof.as_bytes())], keys)
});

fn sha256(data: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(data).into()
}

fn poll(session: &mut Session, stalls: bool) {
    while let Some(event) = session.poll_event() {
        match event {
            Event::Authenticate { .. } => session.provide_verifier(Some(VERIFIER.clone()), b"decoy"),
            Event::Message { stream, cost, .. } | Event::Data { stream, cost, .. } if !stalls => {
                session.release(stream, cost);
            }
            Event::Opened { stream, .. } => {
                let _ = session.send_data(stream, 1, &[1; 100]);
            }
            Event::Finished { stream } => {
                let _ = session.finish(stream);
            }
            _ => {}
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut session = Session::server("fuzz", [2; NONCE_LEN], Limits::default(), 0);
    for part in &LOGIN.0 {
        session.receive(part, 0);
        poll(&mut session, false);
    }
    assert!(session.is_ready());
    let mut rest = data;
    let mut sequence = 0u64;
    while let Some((head, tail)) = rest.split_first_chunk::<6>() {
        let length = usize::from(u16::from_be_bytes([head[4], head[5]]));
        let (bytes, tail) = tail.split_at(length.min(tail.len()));
        let mut payload = bytes.to_vec();
        payload.resize(length, 0);
        let stream = u32::from(u16::from_be_bytes([head[2], head[3]]));
        let mut bytes = frame(head[0], head[1], stream, &payload);
        let mac = hmac_sha256(&LOGIN.1.client_to_server, &[&sequence.to_be_bytes(), &bytes]);
        bytes.extend_from_slice(&mac[..MAC_LEN]);
        sequence += 1;
        session.receive(&bytes, 0);
        poll(&mut session, data.len() % 2 == 0);
        assert!(session.buffered_bytes() < 4 << 20);
        rest = tail;
    }
});
