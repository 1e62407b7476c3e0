//! A header that decodes encodes to the same bytes; a reason that decodes comes through again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::frame::{HEADER_LEN, Header, decode_reset, encode_reset};

fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk::<HEADER_LEN>()
        && let Ok(header) = Header::decode(bytes)
    {
        assert_eq!(header.encode(), *bytes);
    }
    if let Ok((code, reason)) = decode_reset(data) {
        assert_eq!(encode_reset(code, &reason), data);
    }
});
