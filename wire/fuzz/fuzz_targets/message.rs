//! A body of any kind is refused, or encodes to bytes that decode to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::message::recode;

fuzz_target!(|data: &[u8]| {
    let Some((kind, body)) = data.split_first_chunk::<2>() else { return };
    let kind = u16::from_be_bytes(*kind);
    if let Some(Ok((text, bytes))) = recode(kind, body) {
        assert!(bytes.len() <= body.len(), "an encoding is never longer than what it was decoded from");
        assert_eq!(recode(kind, &bytes), Some(Ok((text, bytes))));
    }
});
