//! The private writable disk of a capsule, made in milliseconds from a read-only base image.
//!
//! - [`Backend`]: how this host makes disks, chosen once by trying
//! - [`Disk`]: one capsule's disk, however it is made
//! - [`qcow2`]: the overlay's on-disk format
//! - `file`: disks that are a file in the capsule's directory, reflink or overlay
//! - [`dm`]: disks by device-mapper
//! - `room`: what is kept free for the disks that are there
//! - `flatten`: a new image of what a disk holds

pub mod dm;
mod error;
mod file;
mod flatten;
pub mod qcow2;
mod room;

pub use dm::Store;
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
    /// The same in a block device.
    Device,
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
    /// How its copy-on-write store is. A disk that is a file has none that could be lost.
    fn store(&self) -> Result<Store, DiskError> {
        self.allocated_bytes().map(|used_bytes| Store::Good { used_bytes })
    }
    /// Makes a new raw image `to` that holds what this disk holds, safe on the storage when this returns;
    /// gives back how many bytes of it are not zero. The guest must stand still, its writes done. On
    /// failure there is no file.
    fn flatten(&self, to: &Path) -> Result<u64, DiskError>;
    /// Removes it for good, on the disk as well when this returns.
    fn remove(self: Box<Self>) -> Result<(), DiskError>;
}

/// How this host makes disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A block device that reads the base until a block is written (device-mapper's snapshots).
    DeviceMapper,
    /// A copy that shares its blocks with the base until they are written (btrfs, XFS, bcachefs).
    Reflink,
    /// A qcow2 file that holds what differs from the base. Works on every filesystem.
    Overlay,
}

impl Backend {
    /// Tries what works for base images in `images` and capsules in `capsules`, two existing directories:
    /// device-mapper, then reflinks, then overlays. Leaves nothing behind.
    pub fn probe(images: &Path, capsules: &Path) -> Result<Backend, DiskError> {
        match dm::probe(capsules) {
            Ok(()) => Ok(Backend::DeviceMapper),
            // What worked before works again when there is room; capsules of another kind would be made until then.
            Err(e) if e.is_storage_full() && dm::is_there() => {
                log::warn!("device-mapper could not be tried, and is taken to work: {e}");
                Ok(Backend::DeviceMapper)
            }
            Err(e) => {
                log::info!("disks are not made by device-mapper: {e}");
                file::probe(images, capsules)
            }
        }
    }

    /// Makes a disk, safe on the storage when this returns. On failure nothing stays. Where the storage is
    /// nearly full, none is made: what is left is for those that are there.
    pub fn create(self, spec: &DiskSpec<'_>) -> Result<Box<dyn Disk>, DiskError> {
        room::refuse_if_short(spec.directory)?;
        Ok(match self {
            Backend::DeviceMapper => Box::new(dm::create(spec)?),
            Backend::Reflink => Box::new(file::create_reflink(spec)?),
            Backend::Overlay => Box::new(file::create_overlay(spec)?),
        })
    }

    /// The disk that an earlier agent has made in a capsule's directory, whichever way it was made, ready
    /// for use; `None` when there is none.
    pub fn open(directory: &Path) -> Result<Option<Box<dyn Disk>>, DiskError> {
        if let Some(disk) = dm::open(directory)? {
            return Ok(Some(Box::new(disk)));
        }
        Ok(file::open(directory)?.map(|disk| Box::new(disk) as Box<dyn Disk>))
    }
}

/// The machine of a capsule's directory is killed: lets what waits because the storage is full fail, for a
/// process that waits for its disk cannot end. Does nothing to a disk that does not wait.
pub fn release(directory: &Path) -> Result<(), DiskError> {
    dm::release(directory)
}

/// Whether the storage that a directory is on has more room than what is kept for the disks that are there.
pub fn has_room(directory: &Path) -> Result<bool, DiskError> {
    match room::refuse_if_short(directory) {
        Ok(()) => Ok(true),
        Err(DiskError::NoSpace { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Removes what the disk of a capsule's directory has outside of it, so that the directory can go. One that
/// is gone is no error.
pub fn clear(directory: &Path) -> Result<(), DiskError> {
    dm::clear(directory)
}

/// Removes what disks of capsules without a directory in `capsules` have left outside; gives back the names.
pub fn clear_orphans(capsules: &Path) -> Result<Vec<String>, DiskError> {
    dm::clear_orphans(capsules)
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::DeviceMapper => "device-mapper",
            Backend::Reflink => "reflink",
            Backend::Overlay => "qcow2 overlay",
        })
    }
}
