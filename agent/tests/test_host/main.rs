//! What needs a kernel with device-mapper and KVM: disks, control groups, and capsules as a real host runs
//! them; and the agent's unit, which needs systemd. The test boots a "test host" (`tests/testhost/build.sh`),
//! a virtual machine that runs this very program twice, alone and under systemd.

mod capsules;
#[path = "../common/mod.rs"]
mod common;
mod disks;
mod groups;
mod host;
#[path = "../common/lifecycle.rs"]
mod lifecycle;
#[path = "../common/sweep.rs"]
mod sweep;
#[path = "../../../tests/testhost/boot.rs"]
mod test_host;
mod unit;

use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A file on the test host's disk with a text: only cases that have it in their names are run.
const ONLY: &str = "only";

/// Set in the test host: which half of the cases is to run.
const HALF: &str = "WRENN_TEST_HOST_HALF";

/// What the test host runs, one after the other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    /// With nothing else on the machine.
    Alone,
    /// With systemd as the first process.
    Systemd,
}

impl Half {
    const ALL: [Half; 2] = [Half::Alone, Half::Systemd];

    fn name(self) -> &'static str {
        match self {
            Half::Alone => "alone",
            Half::Systemd => "systemd",
        }
    }

    fn cases(self) -> Vec<&'static Case> {
        match self {
            Half::Alone => groups::CASES.iter().chain(disks::CASES).chain(capsules::CASES).collect(),
            Half::Systemd => unit::CASES.iter().collect(),
        }
    }
}

/// A name, and what is tried in a directory of its own.
type Case = (&'static str, fn(&Path));

#[test]
fn disks_and_capsules_on_a_host_with_device_mapper_and_kvm() {
    let Some(work) = std::env::var_os(test_host::INSIDE).map(PathBuf::from) else { return host::run() };
    disks::crash_if_told();
    let half = std::env::var(HALF).expect("which half");
    let half = Half::ALL.into_iter().find(|known| known.name() == half).expect("a known half");
    let only = std::fs::read_to_string(work.join(ONLY)).unwrap_or_default();
    let mut failed = Vec::new();
    for (name, case) in half.cases().into_iter().filter(|(name, _)| name.contains(&only)) {
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
