//! Whether KVM works here. That `/dev/kvm` opens says little: there are kernels whose KVM emulates, slowly
//! and incompletely. It counts as usable when a processor's own virtualisation is behind it and a few
//! instructions that such emulators do not know run as they should.

use crate::sys::kvm::{self, Step};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How long a handful of instructions may take.
const TIMEOUT_MS: i32 = 2_000;
/// The kernel modules that drive a processor's own virtualisation, built in or loaded.
const MODULES: [&str; 2] = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];
const GROUP_MAY_USE: u32 = 0o060;
const ALL_MAY_USE: u32 = 0o006;

/// Why KVM is not usable.
#[derive(Debug)]
pub enum KvmUnusable {
    /// There is no /dev/kvm, or it cannot be examined.
    NoDevice(io::Error),
    /// /dev/kvm is for root alone, and capsules do not run as root.
    RootOnly,
    /// Neither kvm_intel nor kvm_amd is loaded.
    NoModule,
    /// The program did not run as it should.
    Failed(Step),
    /// It could not be tried.
    NotTried(io::Error),
}

impl fmt::Display for KvmUnusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmUnusable::NoDevice(error) => write!(f, "{}: {error}", kvm::DEVICE),
            KvmUnusable::RootOnly => write!(
                f,
                "{} is not readable and writable for its group: give it a group, as with `chgrp kvm` and \
                 `chmod 660`",
                kvm::DEVICE
            ),
            KvmUnusable::NoModule => f.write_str(
                "neither kvm_intel nor kvm_amd is loaded (no virtualisation in this processor, or switched \
                 off in its firmware, or not passed on by the machine around this one)",
            ),
            KvmUnusable::Failed(step) => write!(f, "a test program did not run in it ({step:?})"),
            KvmUnusable::NotTried(error) => write!(f, "trying it: {error}"),
        }
    }
}

impl std::error::Error for KvmUnusable {}

/// Access to KVM for a VMM that is not root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmAccess {
    /// The group that may use /dev/kvm; `None` when everybody may.
    pub group: Option<u32>,
}

/// Tries whether KVM works. Blocks, for two seconds at most.
pub fn kvm() -> Result<KvmAccess, KvmUnusable> {
    let metadata = fs::metadata(kvm::DEVICE).map_err(KvmUnusable::NoDevice)?;
    // Before anything runs: what an emulator does with it is anybody's guess.
    if !MODULES.iter().any(|module| Path::new(module).exists()) {
        return Err(KvmUnusable::NoModule);
    }
    let access = access(metadata.mode(), metadata.gid()).ok_or(KvmUnusable::RootOnly)?;
    kvm::try_program(TIMEOUT_MS).map_err(KvmUnusable::NotTried)?.map_err(KvmUnusable::Failed)?;
    Ok(access)
}

fn access(mode: u32, gid: u32) -> Option<KvmAccess> {
    let all = mode & ALL_MAY_USE == ALL_MAY_USE;
    let group = mode & GROUP_MAY_USE == GROUP_MAY_USE;
    (all || group).then_some(KvmAccess { group: (!all).then_some(gid) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_follows_the_devices_mode() {
        assert_eq!(access(0o20660, 104), Some(KvmAccess { group: Some(104) }));
        assert_eq!(access(0o20666, 104), Some(KvmAccess { group: None }));
        assert_eq!(access(0o20600, 0), None);
    }

    #[test]
    fn the_program_runs_or_fails_but_ends() -> io::Result<()> {
        // Where there is no KVM, or one that only pretends, a step fails; nothing hangs or crashes us.
        match kvm::try_program(TIMEOUT_MS)? {
            Ok(()) => assert!(Path::new(kvm::DEVICE).exists()),
            Err(step) => eprintln!("KVM does not work here: {step:?}"),
        }
        Ok(())
    }
}
