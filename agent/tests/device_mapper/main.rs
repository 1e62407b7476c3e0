//! Disks by device-mapper, on a kernel that has it. Where this machine's has not, the test boots a "test
//! host" (`tests/testhost/build.sh`) that runs this very program, once, with all the cases.

mod cases;
mod host;

use std::path::PathBuf;
use std::time::Instant;

/// Set in the test host: a directory on a small file system of its own.
const INSIDE: &str = "WRENN_IN_TEST_HOST";

#[test]
fn disks_on_a_host_with_device_mapper() {
    let Some(work) = std::env::var_os(INSIDE).map(PathBuf::from) else { return host::run() };
    cases::crash_if_told();
    let mut failed = 0;
    for (name, case) in cases::CASES {
        let began = Instant::now();
        let directory = work.join(name.replace(' ', "-"));
        std::fs::create_dir(&directory).expect("a directory for the case");
        let done = std::panic::catch_unwind(|| case(&directory));
        let left = cases::remains(&directory);
        cases::remove_all_devices();
        let _ = std::fs::remove_dir_all(&directory);
        let ok = done.is_ok() && left.is_empty();
        println!(
            "case {name}: {} in {} ms {left:?}",
            if ok { "ok" } else { "FAILED" },
            began.elapsed().as_millis()
        );
        failed += u32::from(!ok);
    }
    assert_eq!(failed, 0, "cases that failed");
}
