//! The metadata service's answers, in any pieces, the kernel's command line and envd's own arguments: no
//! panic, and what comes of them keeps its bounds. The first byte says which, and how long the pieces are.
#![no_main]

use envd::metadata::{Fetch, Step};
use envd::{cmdline, json, metadata, options};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    match first & 3 {
        0 => {
            let members = json::string_members(rest);
            if let Ok(document) = metadata::parse_document(rest) {
                assert!(members.is_ok() && !document.instance_id.is_empty() && !document.env_id.is_empty());
            }
        }
        1 => {
            let (mut fetch, request) = Fetch::start();
            assert!(!request.is_empty());
            for piece in rest.chunks(usize::from(first >> 2) + 1) {
                match fetch.receive(piece) {
                    Ok(Step::Read) => {}
                    Ok(Step::Send(bytes)) => assert!(!bytes.is_empty()),
                    Ok(Step::Done(_)) | Err(_) => return,
                }
            }
        }
        2 => {
            if let Some(network) = cmdline::parse(&String::from_utf8_lossy(rest)).network {
                assert!(network.host_name.len() <= cmdline::MAX_HOST_NAME && !network.device.contains('/'));
            }
        }
        _ => _ = options::parse(String::from_utf8_lossy(rest).split(' ')),
    }
});
