//! The private writable disk of a capsule, made in milliseconds from a read-only base image.
//!
//! - [`Backend`]: how this host makes disks, chosen once by trying
//! - [`Disk`]: one capsule's disk, however it is made
//! - [`qcow2`]: the overlay's on-disk format
//! - `file`: disks that are a file in the capsule's directory, reflink or overlay

mod error;
mod file;
pub mod qcow2;

pub use error::DiskError;

use std::fmt;
use std::path::{Path, PathBuf};

/// The largest disk, in bytes: what one cluster of the overlay's first-level table can describe.
pub const MAX_DISK_BYTES: u64 = qcow2::MAX_VIRTUAL_BYTES;
/// What the size of every disk is a multiple of.
pub const SECTOR_BYTES: u64 = 512;

/// The format in which a VMM has to read a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes themselves.
    Raw,
    /// QEMU's format, with another image behind it.
    Qcow2,
}

/// What a VMM needs to know of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskImage {
    /// The file or block device.
    pub path: PathBuf,
    /// How to read it.
    pub format: Format,
    /// The raw, read-only image behind it.
    pub backing: Option<PathBuf>,
}

/// What to make.
#[derive(Debug, Clone, Copy)]
pub struct DiskSpec<'a> {
    /// The raw base image. It must not change while a disk made from it exists.
    pub base: &'a Path,
    /// The capsule's own directory, which exists and holds no disk.
    pub directory: &'a Path,
    /// The disk's size in bytes, at least the base's; the base's when there is none.
    pub size_bytes: Option<u64>,
}

/// A capsule's disk. Dropping it leaves it in place.
pub trait Disk: fmt::Debug + Send {
    /// What the VMM needs to know.
    fn image(&self) -> DiskImage;
    /// The size that the guest sees, in bytes.
    fn virtual_bytes(&self) -> u64;
    /// The space that it takes on the host, in bytes. Where blocks are shared with the base they count as
    /// if they were not: an upper bound.
    fn allocated_bytes(&self) -> Result<u64, DiskError>;
    /// Removes it for good, on the disk as well when this returns.
    fn remove(self: Box<Self>) -> Result<(), DiskError>;
}

/// How this host makes disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A copy that shares its blocks with the base until they are written (btrfs, XFS, bcachefs).
    Reflink,
    /// A qcow2 file that holds what differs from the base. Works on every filesystem.
    Overlay,
}

impl Backend {
    /// Tries whether files in `images` can be reflinked into `capsules`, two existing directories. Leaves
    /// nothing behind.
    pub fn probe(images: &Path, capsules: &Path) -> Result<Backend, DiskError> {
        file::probe(images, capsules)
    }

    /// Makes a disk, safe on the storage when this returns. On failure nothing stays.
    pub fn create(self, spec: &DiskSpec<'_>) -> Result<Box<dyn Disk>, DiskError> {
        Ok(Box::new(file::create(self, spec)?))
    }

    /// The disk that an earlier agent has made in a capsule's directory, whichever way it was made; `None`
    /// when there is none.
    pub fn open(directory: &Path) -> Result<Option<Box<dyn Disk>>, DiskError> {
        Ok(file::open(directory)?.map(|disk| Box::new(disk) as Box<dyn Disk>))
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Reflink => "reflink",
            Backend::Overlay => "qcow2 overlay",
        })
    }
}
