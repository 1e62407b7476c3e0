//! What can go wrong with a virtual machine.

use super::qmp::QmpError;
use crate::sys::cgroup::CgroupError;
use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a virtual machine could not be started or spoken to.
#[derive(Debug)]
pub enum VmmError {
    /// There is no QEMU.
    NoQemu {
        /// Where it was looked for.
        searched: String,
    },
    /// This QEMU is too old, or no QEMU.
    WrongQemu {
        /// The program.
        program: PathBuf,
        /// What it says of itself.
        says: String,
    },
    /// There is no Firecracker.
    NoFirecracker {
        /// Where it was looked for.
        searched: String,
    },
    /// There is no jailer, without which Firecracker is not used.
    NoJailer {
        /// Where it was looked for.
        searched: String,
    },
    /// This Firecracker or jailer is not used.
    WrongFirecracker {
        /// The program.
        program: PathBuf,
        /// Why not.
        why: String,
    },
    /// Firecracker is wanted but cannot be used here.
    NotHere {
        /// Why not.
        why: String,
    },
    /// A file that QEMU opens itself is not readable for its own user.
    NotReadable {
        /// The file.
        path: PathBuf,
    },
    /// The machine's description has a value that no machine can have.
    Invalid {
        /// Which, and what is possible.
        reason: String,
    },
    /// A system call failed.
    System {
        /// What was to be done.
        step: &'static str,
        /// To which file or program.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The monitor's connection cannot go on.
    Monitor(QmpError),
    /// Another error, and what the VMM said.
    Said(Box<VmmError>, String),
    /// The monitor's connection is closed: the VMM has ended or is about to.
    MonitorClosed,
    /// The VMM has refused a command.
    Refused {
        /// Which.
        command: &'static str,
        /// Its reason.
        why: String,
    },
    /// The VMM has not answered a command in time.
    NoAnswer {
        /// Which.
        command: &'static str,
    },
    /// There is no control group for it.
    Group(CgroupError),
    /// A saved machine is not as it should be.
    BadImage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl fmt::Display for VmmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmmError::NoQemu { searched } => {
                write!(f, "no qemu-system-x86_64 in {searched}: install qemu-system-x86")
            }
            VmmError::WrongQemu { program, says } => {
                write!(f, "{} is not QEMU 7.0 or later: {says}", program.display())
            }
            VmmError::Group(e) => write!(f, "its limits cannot be set: {e}"),
            VmmError::NoFirecracker { searched } => write!(
                f,
                "no firecracker in {searched}: install it or set WRENN_FIRECRACKER_BIN, or set WRENN_VMM=qemu"
            ),
            VmmError::NoJailer { searched } => write!(
                f,
                "no jailer in {searched}: install Firecracker's jailer beside it or set WRENN_JAILER_BIN; \
                 WRENN_FIRECRACKER_UNJAILED=true runs Firecracker without it, which is less safe"
            ),
            VmmError::WrongFirecracker { program, why } => write!(f, "{}: {why}", program.display()),
            VmmError::NotHere { why } => write!(f, "{why}; set WRENN_VMM=qemu, or mend it"),
            VmmError::Said(error, said) => write!(f, "{error}; it said: {said}"),
            VmmError::NotReadable { path } => write!(
                f,
                "{} is not readable for all, and capsules run as users of their own: chmod a+r it",
                path.display()
            ),
            VmmError::Invalid { reason } => f.write_str(reason),
            VmmError::System { step, path, source } => write!(f, "{step} {}: {source}", path.display()),
            VmmError::Monitor(error) => error.fmt(f),
            VmmError::MonitorClosed => f.write_str("the VMM has closed its control socket"),
            VmmError::Refused { command, why } => write!(f, "the VMM refused {command}: {why}"),
            VmmError::NoAnswer { command } => write!(f, "the VMM did not answer {command} in time"),
            VmmError::BadImage { path, what } => write!(f, "{}: {what}", path.display()),
        }
    }
}

impl std::error::Error for VmmError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            VmmError::System { source, .. } => Some(source),
            VmmError::Monitor(error) => Some(error),
            VmmError::Said(error, _) => error.source(),
            _ => None,
        }
    }
}

impl From<QmpError> for VmmError {
    fn from(error: QmpError) -> VmmError {
        VmmError::Monitor(error)
    }
}
