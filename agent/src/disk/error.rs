//! What can go wrong with a disk.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a disk could not be made, read or removed.
#[derive(Debug)]
pub enum DiskError {
    /// The wanted size is less than the base image's: the guest's filesystem would be cut off.
    TooSmall {
        /// The base image.
        base: PathBuf,
        /// Its size in bytes.
        base_bytes: u64,
        /// The wanted size in bytes.
        wanted_bytes: u64,
    },
    /// The wanted size is more than a disk can have.
    TooLarge {
        /// The wanted size in bytes.
        wanted_bytes: u64,
    },
    /// The base image's path does not fit the overlay's header.
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The file is not a disk of ours.
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The base image is no longer the one that the disk was made from.
    BaseChanged {
        /// The base image.
        base: PathBuf,
    },
    /// The device's name is another agent's.
    NameTaken {
        /// The device.
        name: String,
    },
    /// The device is still open.
    Busy {
        /// The device.
        name: String,
    },
    /// What was written to the disk is lost.
    Lost {
        /// The device.
        name: String,
        /// As the kernel calls it.
        state: String,
    },
    /// The room that is left is kept for the disks that are there.
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What is left, in bytes.
        free_bytes: u64,
        /// What has to stay free, in bytes.
        reserve_bytes: u64,
    },
    /// A system call failed.
    System {
        /// What was to be done.
        step: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl DiskError {
    /// Whether there is no room, so that another host may be asked.
    pub fn is_storage_full(&self) -> bool {
        match self {
            DiskError::NoSpace { .. } => true,
            DiskError::System { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    /// For `map_err`: a system call that failed in this step on this file.
    pub(super) fn system(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
        let path = path.to_owned();
        move |source| DiskError::System { step, path, source }
    }
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::TooSmall { base, base_bytes, wanted_bytes } => write!(
                f,
                "a disk of {} MiB is smaller than its image {} of {} MiB: ask for at least that",
                wanted_bytes >> 20,
                base.display(),
                base_bytes.div_ceil(1 << 20)
            ),
            DiskError::TooLarge { wanted_bytes } => write!(
                f,
                "a disk of {} MiB is larger than the {} MiB that a disk can have",
                wanted_bytes >> 20,
                super::MAX_DISK_BYTES >> 20
            ),
            DiskError::PathTooLong { path } => write!(
                f,
                "the path {} is longer than the {} bytes that an overlay can name: use a shorter WRENN_DIR",
                path.display(),
                super::qcow2::MAX_BACKING_PATH_BYTES
            ),
            DiskError::Malformed { path, reason } => write!(f, "{}: {reason}", path.display()),
            DiskError::BaseChanged { base } => write!(
                f,
                "{} was changed since this disk was made from it: put the old image back, or destroy the \
                 capsule",
                base.display()
            ),
            DiskError::NameTaken { name } => {
                write!(f, "the device {name} belongs to an agent with another WRENN_DIR")
            }
            DiskError::Busy { name } => {
                write!(f, "the device {name} is still open: see /sys/block/dm-*/holders")
            }
            DiskError::Lost { name, state } => {
                write!(f, "the content of the device {name} is lost ({state})")
            }
            DiskError::NoSpace { path, free_bytes, reserve_bytes } => write!(
                f,
                "{} has {} MiB left, which are kept for the capsules that run (at least {} MiB): make room there",
                path.display(),
                free_bytes >> 20,
                reserve_bytes >> 20
            ),
            DiskError::System { step, path, source } => {
                write!(f, "{step} {}: {source}", path.display())?;
                match source.kind() {
                    io::ErrorKind::StorageFull => f.write_str(" (make room in WRENN_DIR)"),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for DiskError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DiskError::System { source, .. } => Some(source),
            _ => None,
        }
    }
}
