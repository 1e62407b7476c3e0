//! What needs a kernel with device-mapper and KVM: disks, control groups, and capsules as a real host runs them. The test
//! boots a "test host" (`tests/testhost/build.sh`), a virtual machine that runs this very program with all
//! the cases, once.

mod capsules;
#[path = "../common/mod.rs"]
mod common;
mod disks;
mod groups;
mod host;
#[path = "../common/lifecycle.rs"]
mod lifecycle;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Set in the test host: a directory on a small file system of its own.
const INSIDE: &str = "WRENN_TEST_HOST_WORK";

/// A name, and what is tried in a directory of its own.
type Case = (&'static str, fn(&Path));

#[test]
fn disks_and_capsules_on_a_host_with_device_mapper_and_kvm() {
    let Some(work) = std::env::var_os(INSIDE).map(PathBuf::from) else { return host::run() };
    disks::crash_if_told();
    let mut failed = Vec::new();
    for (name, case) in groups::CASES.iter().chain(disks::CASES).chain(capsules::CASES) {
        let began = Instant::now();
        let directory = work.join(name.replace(' ', "-"));
        std::fs::create_dir(&directory).expect("a directory for the case");
        let done = catch_unwind(|| case(&directory));
        let mut left = disks::remains();
        left.extend(groups::remains());
        disks::remove_all_devices();
        let _ = std::fs::remove_dir_all(&directory);
        let ok = done.is_ok() && left.is_empty();
        let outcome = if ok { "ok" } else { "FAILED" };
        println!("case {name}: {outcome} in {} ms {left:?}", began.elapsed().as_millis());
        if !ok {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}
