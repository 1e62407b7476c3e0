//! The kernel's tables under `/proc` and its inotify records: no panic, no overflow, nothing that was not
//! there. The first byte says which.
#![no_main]

use envd::sys::inotify;
use envd::{metrics, ports};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match first % 6 {
        0 => {
            let found = ports::listeners([text.as_ref()].into_iter());
            assert!(found.len() <= text.lines().count());
        }
        1 => _ = metrics::processors(&text),
        2 => _ = metrics::memory(&text, "MemAvailable"),
        3 => _ = metrics::network(&text),
        4 => _ = metrics::load(&text),
        _ => {
            let names: usize = inotify::events(rest).map(|event| event.name.len()).sum();
            assert!(names <= rest.len());
        }
    }
});
