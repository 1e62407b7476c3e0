//! A process's output against a list of every byte there ever was: what the ring still has is the end of
//! that list, each byte with its number and channel. The input is the ring's size, then what happens to it.
#![no_main]

use envd::process::ring::OutputRing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((size, mut rest)) = data.split_first() else { return };
    let limit = usize::from(*size) + 1;
    let mut ring = OutputRing::new(limit);
    let mut all: Vec<(u8, u8)> = Vec::new();
    while let [what, amount, tail @ ..] = rest {
        rest = tail;
        if what & 3 == 3 {
            ring.forget_before(ring.start() + u64::from(*amount));
        } else {
            let room = ring.room_keeping(ring.start());
            let start = ring.start();
            let bytes: Vec<u8> = (0..*amount).map(|n| n ^ what).collect();
            ring.push(what & 3, &bytes);
            all.extend(bytes.iter().map(|byte| (what & 3, *byte)));
            // What it has room for pushes nothing out.
            assert!(bytes.len() > room || ring.start() == start);
        }
        assert_eq!(ring.end(), all.len() as u64);
        assert!((ring.end() - ring.start()) as usize <= limit);
    }
    let mut at = ring.start();
    while let Some((channel, piece)) = ring.piece(at) {
        assert!(!piece.is_empty());
        for byte in piece {
            assert_eq!(all[at as usize], (channel, *byte));
            at += 1;
        }
    }
    assert_eq!(at, ring.end());
});
