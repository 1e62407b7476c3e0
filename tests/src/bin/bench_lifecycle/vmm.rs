//! What the figures are of: QEMU, or Firecracker, on this machine or in the test host.

use crate::bare::Floor;
use crate::test_host::{self, Contents};
use crate::{FIRECRACKER, bare, bare_firecracker};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use wrenn_agent::sys::dm::Control;
use wrenn_agent::sys::kvm;
use wrenn_tests::stack::project_root;
use wrenn_tests::{Context, Failure, Result};

/// How long a program in KVM may take, in milliseconds.
const KVM_TIMEOUT_MS: i32 = 5_000;
/// How long the test host may take for all figures.
const PATIENCE: Duration = Duration::from_secs(3_600);
/// What it needs for all clones, each of which counts as if it shared nothing.
const MEMORY_MIB: u32 = 9_216;
const WORK_BYTES: u64 = 8 << 30;

pub enum Vmm {
    Qemu,
    /// Where it is; its jailer is beside it.
    Firecracker(PathBuf),
}

impl Vmm {
    pub fn name(&self) -> &'static str {
        match self {
            Vmm::Qemu => "QEMU",
            Vmm::Firecracker(_) => "Firecracker",
        }
    }

    /// Has an agent use it.
    pub fn choose(&self, agent: &mut Command) {
        match self {
            Vmm::Qemu => agent.env("WRENN_VMM", "qemu"),
            Vmm::Firecracker(program) => {
                agent.env("WRENN_VMM", FIRECRACKER).env("WRENN_FIRECRACKER_BIN", program)
            }
        };
    }

    /// What it takes alone.
    pub fn floor(&self, directory: &Path, data: &Path) -> Result<Floor> {
        match self {
            Vmm::Qemu => bare::measure(directory, data),
            Vmm::Firecracker(program) => bare_firecracker::measure(program, directory, data),
        }
    }
}

/// The directory with the guest's files, and the agent.
pub fn builds() -> (PathBuf, PathBuf) {
    match std::env::var_os(test_host::INSIDE).map(PathBuf::from) {
        Some(work) => (work.join("guest"), work.join("wrenn-agent")),
        None => (project_root().join("builds/guest"), project_root().join("builds/wrenn-agent")),
    }
}

/// Firecracker and its jailer, where they are there.
pub fn firecracker() -> Option<(PathBuf, PathBuf)> {
    match std::env::var_os(test_host::INSIDE).map(PathBuf::from) {
        Some(work) => Some((work.join("firecracker"), work.join("jailer"))),
        None => test_host::firecracker(),
    }
}

pub fn can_run_firecracker() -> bool {
    matches!(kvm::try_program(KVM_TIMEOUT_MS), Ok(Ok(()))) && Control::open().is_ok()
}

/// Runs this program in the test host, for its figures in Firecracker.
pub fn in_test_host((firecracker, jailer): (PathBuf, PathBuf)) -> Result<()> {
    let (guest, agent) = builds();
    let mut files = vec![
        ("program".to_owned(), std::env::current_exe().context("find this program")?),
        ("wrenn-agent".to_owned(), agent),
        ("firecracker".to_owned(), firecracker),
        ("jailer".to_owned(), jailer),
    ];
    files.extend(test_host::guest_files(&guest));
    let host = project_root().join("builds/testhost");
    if !host.is_dir() {
        return Err(Failure(format!("{}: run tests/testhost/build.sh first", host.display())));
    }
    println!("in the test host:");
    let outcome = test_host::run(&Contents {
        host: &host,
        files,
        arguments: &[FIRECRACKER],
        memory_mib: MEMORY_MIB,
        work_bytes: WORK_BYTES,
        patience: PATIENCE,
    });
    print!("{}", outcome.results);
    match outcome.is_good("alone") {
        true => Ok(()),
        false => Err(Failure(format!("it failed; its console says:\n{}", outcome.console))),
    }
}
