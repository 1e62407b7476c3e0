//! Disks that are a file in the capsule's directory.

use super::flatten::{self, SparseWriter};
use super::qcow2::{self, Cluster, Overlay};
use super::{Backend, Disk, DiskError, DiskImage, DiskSpec, Format, MAX_DISK_BYTES, SECTOR_BYTES};
use crate::sys::reflink;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const RAW_NAME: &str = "disk.raw";
const OVERLAY_NAME: &str = "disk.qcow2";
/// A second name of the image behind an overlay: whoever replaces the image leaves the capsule its own.
const BASE_NAME: &str = "disk.base";
/// Only the agent opens a disk by its name; the VMM inherits it open.
const MODE: u32 = 0o600;

/// A disk that is a file: a reflink copy, or an overlay with an image behind it.
#[derive(Debug)]
pub(super) struct FileDisk {
    path: PathBuf,
    virtual_bytes: u64,
    backing: Option<PathBuf>,
}

impl Disk for FileDisk {
    fn image(&self) -> DiskImage {
        let format = if self.backing.is_some() { Format::Qcow2 } else { Format::Raw };
        DiskImage { path: self.path.clone(), format, backing: self.backing.clone() }
    }

    fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    fn allocated_bytes(&self) -> Result<u64, DiskError> {
        allocated_bytes(&self.path)
    }

    fn flatten(&self, to: &Path) -> Result<u64, DiskError> {
        let file = File::open(&self.path).map_err(DiskError::system("opening", &self.path))?;
        flatten::write(to, self.virtual_bytes, |writer| match &self.backing {
            None => writer.copy_data(&file, &self.path, 0, 0, self.virtual_bytes),
            Some(backing) => self.flatten_overlay(&file, backing, writer),
        })
    }

    fn remove(self: Box<Self>) -> Result<(), DiskError> {
        for path in [self.path.clone(), self.path.with_file_name(BASE_NAME)] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(DiskError::system("removing", &path)(e));
                }
                _ => {}
            }
        }
        sync_parent(&self.path)
    }
}

impl FileDisk {
    /// The image behind first, then each cluster that the overlay has of its own.
    fn flatten_overlay(
        &self,
        overlay: &File,
        backing: &Path,
        writer: &mut SparseWriter<'_>,
    ) -> Result<(), DiskError> {
        let base = File::open(backing).map_err(DiskError::system("opening", backing))?;
        let base_bytes = base.metadata().map_err(DiskError::system("examining", backing))?.len();
        writer.copy_data(&base, backing, 0, 0, base_bytes.min(self.virtual_bytes))?;
        let malformed = |reason| DiskError::Malformed { path: self.path.clone(), reason };
        let read = |offset: u64, length: usize| {
            let mut bytes = vec![0; length];
            overlay.read_exact_at(&mut bytes, offset).map_err(DiskError::system("reading", &self.path))?;
            Ok::<Vec<u8>, DiskError>(bytes)
        };
        let (offset, length) = qcow2::first_level(&read(0, qcow2::HEAD_BYTES)?).map_err(malformed)?;
        let first_level = read(offset, length)?;
        for (second, entry) in first_level.chunks_exact(qcow2::ENTRY_BYTES).enumerate() {
            let Some(table) = qcow2::second_level(entry).map_err(malformed)? else { continue };
            let table = read(table, qcow2::CLUSTER_BYTES as usize)?;
            for (index, entry) in table.chunks_exact(qcow2::ENTRY_BYTES).enumerate() {
                let at = qcow2::cluster_offset(second, index);
                if at >= self.virtual_bytes {
                    break;
                }
                let length = qcow2::CLUSTER_BYTES.min(self.virtual_bytes - at);
                match qcow2::cluster(entry).map_err(malformed)? {
                    Cluster::Behind => {}
                    Cluster::Zero => writer.zero(at, length)?,
                    Cluster::Own { offset } => {
                        // What the overlay has as zeros is not zero behind.
                        writer.zero(at, length)?;
                        writer.copy(overlay, &self.path, offset, at, length)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The space that a file takes, in bytes.
pub(super) fn allocated_bytes(path: &Path) -> Result<u64, DiskError> {
    let metadata = fs::metadata(path).map_err(DiskError::system("examining", path))?;
    // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2).
    Ok(metadata.blocks() * 512)
}

pub(super) fn probe(images: &Path, capsules: &Path) -> Result<Backend, DiskError> {
    let to = match nameless(capsules) {
        Ok(file) => file,
        // A filesystem without nameless files (overlayfs before 6.1, NFS) has no reflinks for us either.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Backend::Overlay),
        Err(e) => return Err(DiskError::system("making a temporary file in", capsules)(e)),
    };
    // Images may be on a read-only or another filesystem, which an overlay does not mind.
    let cloned = nameless(images).and_then(|from| {
        match from.write_all_at(&[0; SECTOR_BYTES as usize], 0) {
            // A file system that is full has no other ways than before: nothing can be copied from an empty file too.
            Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {}
            written => written?,
        }
        reflink::clone(&from, &to)
    });
    Ok(if cloned.is_ok() { Backend::Reflink } else { Backend::Overlay })
}

pub(super) fn create_reflink(spec: &DiskSpec<'_>) -> Result<FileDisk, DiskError> {
    let (base, virtual_bytes) = open_base(spec)?;
    let path = spec.directory.join(RAW_NAME);
    make(&path, |file| {
        reflink::clone(&base, file)?;
        file.set_len(virtual_bytes)
    })?;
    Ok(FileDisk { path, virtual_bytes, backing: None })
}

pub(super) fn create_overlay(spec: &DiskSpec<'_>) -> Result<FileDisk, DiskError> {
    let (_, virtual_bytes) = open_base(spec)?;
    let path = spec.directory.join(OVERLAY_NAME);
    if path.exists() {
        return Err(DiskError::system("creating", &path)(io::ErrorKind::AlreadyExists.into()));
    }
    let backing = keep_base(spec)?;
    let made = write_overlay(&path, virtual_bytes, &backing);
    if made.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(spec.directory.join(BASE_NAME));
    }
    made.map(|()| FileDisk { path, virtual_bytes, backing: Some(backing) })
}

fn write_overlay(path: &Path, virtual_bytes: u64, backing: &Path) -> Result<(), DiskError> {
    let overlay = Overlay { virtual_bytes, backing: backing.as_os_str().as_bytes().to_vec() };
    let Some(parts) = overlay.encode() else { return Err(DiskError::PathTooLong { path: backing.into() }) };
    make(path, |file| {
        parts.iter().try_for_each(|(offset, bytes)| file.write_all_at(bytes, *offset))?;
        file.set_len(qcow2::FILE_BYTES)
    })
}

/// The path by which an overlay finds its base for ever: a name of the capsule's own. A template is replaced by
/// another file of its name, and an overlay over that one would be neither of the two.
fn keep_base(spec: &DiskSpec<'_>) -> Result<PathBuf, DiskError> {
    let path = |base: &Path| base.canonicalize().map_err(DiskError::system("finding the path of", base));
    let base = path(spec.base)?;
    let directory = path(spec.directory)?;
    if base.parent() == Some(&directory) {
        // A snapshot's, which has been linked here.
        return Ok(base);
    }
    let link = directory.join(BASE_NAME);
    match fs::hard_link(&base, &link) {
        Ok(()) => Ok(link),
        // On another file system, or where it may not be changed at all, the image keeps its one name.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EXDEV | libc::EPERM | libc::EROFS)) => Ok(base),
        Err(e) => Err(DiskError::system("linking", &base)(e)),
    }
}

/// The base image, and the size of the disk to make from it.
fn open_base(spec: &DiskSpec<'_>) -> Result<(File, u64), DiskError> {
    let base = File::open(spec.base).map_err(DiskError::system("opening", spec.base))?;
    let base_bytes = base.metadata().map_err(DiskError::system("examining", spec.base))?.len();
    let virtual_bytes = virtual_bytes(spec, base_bytes)?;
    Ok((base, virtual_bytes))
}

pub(super) fn open(directory: &Path) -> Result<Option<FileDisk>, DiskError> {
    let path = directory.join(RAW_NAME);
    match fs::metadata(&path) {
        Ok(metadata) => return Ok(Some(FileDisk { path, virtual_bytes: metadata.len(), backing: None })),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(DiskError::system("examining", &path)(e)),
    }
    let path = directory.join(OVERLAY_NAME);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(DiskError::system("opening", &path)(e)),
    };
    let mut head = Vec::new();
    file.take(qcow2::HEAD_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(DiskError::system("reading", &path))?;
    match Overlay::decode(&head) {
        Ok(overlay) => {
            let backing = Some(PathBuf::from(OsStr::from_bytes(&overlay.backing)));
            Ok(Some(FileDisk { path, virtual_bytes: overlay.virtual_bytes, backing }))
        }
        Err(reason) => Err(DiskError::Malformed { path, reason }),
    }
}

/// The size of the disk to make: what is asked for, in bounds, in whole sectors.
pub(super) fn virtual_bytes(spec: &DiskSpec<'_>, base_bytes: u64) -> Result<u64, DiskError> {
    let wanted_bytes = spec.size_bytes.unwrap_or(base_bytes);
    if wanted_bytes < base_bytes {
        return Err(DiskError::TooSmall { base: spec.base.to_owned(), base_bytes, wanted_bytes });
    }
    if wanted_bytes > MAX_DISK_BYTES {
        return Err(DiskError::TooLarge { wanted_bytes });
    }
    Ok(wanted_bytes.next_multiple_of(SECTOR_BYTES))
}

/// Makes the file `path` with `fill` and puts it and its name on the storage; removes it again on failure.
pub(super) fn make(path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), DiskError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)
        .map_err(DiskError::system("creating", path))?;
    let made = fill(&file)
        .map_err(DiskError::system("writing", path))
        .and_then(|()| file.sync_all().map_err(DiskError::system("syncing", path)))
        .and_then(|()| sync_parent(path));
    if made.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(path);
    }
    made
}

pub(super) fn sync_parent(path: &Path) -> Result<(), DiskError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(DiskError::system("syncing", parent))
}

/// A file in `directory` that has no name and goes when it is closed.
fn nameless(directory: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(MODE).open(directory)
}
