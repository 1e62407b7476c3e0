//! What the tests of the host-level parts share: they need root and a real kernel, and leave the machine as
//! they found it.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use wrenn_agent::net::{NetError, Slot, destroy_remains, host};
use wrenn_agent::sys::pidfd::Process;

/// Tests of one program change the same machine: one at a time.
static MACHINE: Mutex<()> = Mutex::new(());

/// Slots that these tests take; far above those of an agent that happens to run here as well.
const FIRST_TEST_SLOT: u32 = 61_000;
const TEST_SLOTS: u32 = 200;

/// Why these tests cannot run here; `None` where they can.
fn reason_to_skip() -> Option<String> {
    let root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !root {
        return Some("this needs root".into());
    }
    for program in ["nft", "ip"] {
        if Command::new(program).arg("-V").output().is_err() {
            return Some(format!("this needs `{program}` on PATH"));
        }
    }
    None
}

/// The slots that the test in progress has taken.
static TAKEN: Mutex<Vec<Slot>> = Mutex::new(Vec::new());

/// What a test's VMM runs as: this and the slot's number.
pub const FIRST_UID: u32 = 961_000;

/// What is on the machine of the kinds that the agent makes, in the test's slots.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    namespaces: BTreeSet<String>,
    links: BTreeSet<String>,
    tables: BTreeSet<String>,
    addresses: BTreeSet<String>,
    processes: BTreeSet<String>,
}

/// Holds the machine, and compares it with how it was when it is let go with [`Machine::check`].
pub struct Machine {
    before: Snapshot,
    /// Whether the host's firewall table was there.
    installed: bool,
    _guard: MutexGuard<'static, ()>,
}

impl Machine {
    /// Waits for other tests of this program and looks at the machine. `None`, loudly, where these tests
    /// cannot run.
    pub fn take() -> Option<Machine> {
        let guard = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = reason_to_skip() {
            eprintln!("SKIPPED: {reason}");
            return None;
        }
        let installed = host::is_installed().expect("nft runs");
        TAKEN.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Some(Machine { before: Snapshot::now(), installed, _guard: guard })
    }

    /// Panics when anything is there that was not, or the other way round.
    pub fn check(self) {
        if !self.installed {
            host::remove_if_unused().expect("the table is removed");
        }
        assert_eq!(self.before, Snapshot::now(), "the machine is not as it was");
    }
}

impl Drop for Machine {
    /// A test that failed leaves nothing either.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for slot in TAKEN.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            kill_processes_of(FIRST_UID + slot.index());
            let _ = destroy_remains(slot);
        }
        if !self.installed {
            let _ = host::remove_if_unused();
        }
    }
}

fn kill_processes_of(uid: u32) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let of_uid =
        processes.filter(|p| p.metadata().is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == uid));
    for pid in of_uid.filter_map(|p| p.file_name().to_str()?.parse().ok()) {
        if let Ok(process) = Process::child(pid) {
            let _ = process.kill();
        }
    }
}

impl Snapshot {
    fn now() -> Snapshot {
        let own_slot = |index: &str| {
            index.parse().is_ok_and(|i| (FIRST_TEST_SLOT..FIRST_TEST_SLOT + TEST_SLOTS).contains(&i))
        };
        let names = |directory: &str, prefix: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let names = entries.filter_map(|e| e.file_name().into_string().ok());
            names.filter(|n| n.strip_prefix(prefix).is_some_and(own_slot)).collect()
        };
        let of_test =
            |line: &&str| line.contains("wrenn-61") || line.contains("10.11.238.") || line.contains("ns-61");
        let lines = |program: &str, arguments: &[&str]| -> BTreeSet<String> {
            let output = Command::new(program).args(arguments).output().map(|o| o.stdout).unwrap_or_default();
            String::from_utf8_lossy(&output).lines().filter(of_test).map(str::to_owned).collect()
        };
        // A child belongs to the thread that started it.
        let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let children: String =
            threads.filter_map(|t| fs::read_to_string(t.path().join("children")).ok()).collect();
        Snapshot {
            namespaces: names("/run/netns", "ns-"),
            links: names("/sys/class/net", "wrenn-"),
            tables: lines("nft", &["list", "ruleset"]),
            addresses: &lines("ip", &["address"]) | &lines("ip", &["route"]),
            processes: children.split_whitespace().map(str::to_owned).collect(),
        }
    }
}

/// Tries slots until one is free, as the agent does.
pub fn with_free_slot<T>(make: impl Fn(Slot) -> Result<T, NetError>) -> T {
    for index in FIRST_TEST_SLOT..FIRST_TEST_SLOT + TEST_SLOTS {
        let Some(slot) = Slot::new(index) else { continue };
        match make(slot) {
            Err(NetError::NameTaken { .. }) => {}
            Ok(made) => {
                TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
                return made;
            }
            Err(e) => panic!("{e}"),
        }
    }
    panic!("no free slot");
}
