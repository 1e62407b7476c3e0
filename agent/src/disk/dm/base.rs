//! One read-only loop device a base image, shared by all disks that are made from it, also after a restart
//! of the agent. Who uses it is counted by the kernel: it goes with the last disk.

use crate::sys::loopdev::{Backing, LoopDevice, attached};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Above this many images, those whose device is gone are forgotten.
const MANY_IMAGES: usize = 64;

/// A file's device and inode, as stat(2) has them.
type FileId = (u64, u64);

/// Where each image was last attached, and as what that device showed it: a hint, checked at each use. The
/// lock keeps two disks made at once from attaching one image twice.
static KNOWN: Mutex<Option<HashMap<FileId, (u32, Backing)>>> = Mutex::new(None);

/// The loop device of an image. It stays as long as this or a device-mapper table uses it.
pub(super) fn attach(base: &File, path: &Path) -> io::Result<LoopDevice> {
    let metadata = base.metadata()?;
    let id = (metadata.dev(), metadata.ino());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_default();
    if let Some((number, shown)) = known.get(&id)
        && let Some(device) = open_as(*number, *shown)
    {
        return Ok(device);
    }
    // An earlier agent may have attached it. A file that is attached stays, so its numbers are its own.
    let shown = Backing { device: id.0, inode: id.1, own_kind: true, read_only: true };
    let device = match attached()?.into_iter().find_map(|number| open_as(number, shown)) {
        Some(device) => device,
        None => LoopDevice::attach(base, true, &path.to_string_lossy())?,
    };
    if known.len() >= MANY_IMAGES {
        known.retain(|_, (number, shown)| open_as(*number, *shown).is_some());
    }
    known.insert(id, (device.number(), device.backing()?));
    Ok(device)
}

fn open_as(number: u32, wanted: Backing) -> Option<LoopDevice> {
    LoopDevice::open(number).ok().filter(|(_, shown)| *shown == wanted).map(|(device, _)| device)
}
