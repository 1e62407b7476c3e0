//! The test host, started once for all cases.

use crate::common::guest_directory;
use crate::test_host::{Contents, firecracker, guest_files, run as boot};
use crate::{Half, ONLY};
use std::path::PathBuf;
use std::time::Duration;

/// How long all of it may take, and that with a Firecracker, which has a crash sweep of its own: about five
/// times what it takes on an idle machine.
const PATIENCE: Duration = Duration::from_secs(1_000);
const PATIENCE_WITH_FIRECRACKER: Duration = Duration::from_secs(3_600);

/// What the cases need.
const MEMORY_MIB: u32 = 2_560;
const WORK_BYTES: u64 = 2 << 30;

pub fn run() {
    let Some(host) = std::env::var_os("WRENN_TEST_HOST").map(PathBuf::from) else {
        eprintln!("SKIPPED: WRENN_TEST_HOST names no test host (`tests/testhost/build.sh`)");
        return;
    };
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/wrenn-agent.service");
    let mut files = vec![
        ("program".to_owned(), std::env::current_exe().expect("this program")),
        ("wrenn-agent".to_owned(), env!("CARGO_BIN_EXE_wrenn-agent").into()),
        ("wrenn-agent.service".to_owned(), unit.into()),
    ];
    let mut patience = PATIENCE;
    if let Some((firecracker, jailer)) = firecracker() {
        files.extend([("firecracker".to_owned(), firecracker), ("jailer".to_owned(), jailer)]);
        patience = PATIENCE_WITH_FIRECRACKER;
    }
    if let Some(guest) = guest_directory() {
        files.extend(guest_files(&guest));
    }
    // A file, to look at some cases again and again, by hand.
    if let Some(only) = std::env::var_os("WRENN_TEST_HOST_ONLY") {
        files.push((ONLY.to_owned(), only.into()));
    }
    let (memory_mib, work_bytes) = (MEMORY_MIB, WORK_BYTES);
    let outcome = boot(&Contents { host: &host, files, arguments: &[], memory_mib, work_bytes, patience });
    print!("{}", outcome.results);
    for half in Half::ALL {
        assert!(
            outcome.is_good(half.name()),
            "the cases failed, see above; the console says:\n{}",
            outcome.console
        );
    }
}
