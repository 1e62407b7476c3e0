//! Named snapshots: running capsules written down, from which others start where they were.
//!
//! ```text
//! snapshots/NAME/snapshot.json   what it is
//! snapshots/NAME/memory-0        the guest's memory
//! snapshots/NAME/state-0         the state of its devices
//! snapshots/NAME/rootfs.ext4     its disk, whole
//! snapshots/.new-N/              one that is being made; cleared away at the agent's start
//! ```
//!
//! A snapshot appears under its name, and takes another's place, in one step. Capsules that were made of
//! it hold on to its disk by a hard link of their own, and to its memory by a file in memory that they
//! share: so it can be deleted or replaced while they are there.

use crate::layout::{Layout, LayoutError};
use crate::sys::memfd;
use crate::sys::rename;
use crate::vmm::{Image, Kind, Restore, VmmError};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use wire::message::SnapshotInfo;

/// The most snapshots that a host keeps.
pub const MAX_SNAPSHOTS: usize = 1024;
/// The version of [`Manifest`]; others are not used.
const VERSION: u32 = 1;
const MANIFEST: &str = "snapshot.json";
const MAX_MANIFEST_BYTES: u64 = 65_536;
const DISK: &str = "rootfs.ext4";
/// A snapshot's disk in the directory of a capsule that was made of it.
const LINKED_DISK: &str = "base.ext4";
const NEW_PREFIX: &str = ".new-";
/// The one generation of a snapshot's files.
pub const GENERATION: u64 = 0;

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this form.
    pub version: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
    /// Size of the root disk in MiB.
    pub disk_mb: u32,
    /// When it was made, in microseconds since the epoch.
    pub created_us: u64,
    /// The VMM that wrote the devices' state, and that alone is sure to read it.
    pub vmm: String,
}

/// A snapshot that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its directory.
    pub directory: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// Why something could not be done with a snapshot.
#[derive(Debug)]
pub enum SnapshotError {
    /// A file system call failed.
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// The name cannot be one.
    Name(LayoutError),
    /// There is none of this name.
    NotThere(String),
    /// There is a snapshot or a template of this name.
    Exists(String),
    /// There are [`MAX_SNAPSHOTS`].
    TooMany,
    /// Another has taken its place while a capsule was made of it.
    Replaced(PathBuf),
    /// It was written by another VMM than this host has.
    OtherVmm {
        /// By which.
        written_by: String,
        /// Which there is.
        here: String,
    },
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SnapshotError::Io { step, path, source } => write!(f, "{step} {}: {source}", path.display()),
            SnapshotError::Name(e) => e.fmt(f),
            SnapshotError::NotThere(name) => write!(f, "this host has no snapshot {name:?}"),
            SnapshotError::Exists(name) => {
                write!(
                    f,
                    "there is a snapshot or template {name:?} already; overwrite it or take another name"
                )
            }
            SnapshotError::TooMany => {
                write!(f, "this host has {MAX_SNAPSHOTS} snapshots already; delete one")
            }
            SnapshotError::Replaced(directory) => {
                let name = directory.file_name().unwrap_or_default().to_string_lossy();
                write!(f, "the snapshot {name:?} was replaced or deleted at this moment; try again")
            }
            SnapshotError::OtherVmm { written_by, here } => {
                write!(f, "the snapshot was made with {written_by}, and this host has {here}; make it anew")
            }
        }
    }
}

impl std::error::Error for SnapshotError {}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_path_buf();
    move |source| SnapshotError::Io { step, path, source }
}

impl Snapshot {
    /// The snapshot of a name. Blocks for a small file.
    pub fn find(layout: &Layout, name: &str) -> Result<Snapshot, SnapshotError> {
        let directory = layout.snapshot(name).map_err(SnapshotError::Name)?;
        let path = directory.join(MANIFEST);
        let length = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(SnapshotError::NotThere(name.to_string()));
            }
            Err(e) => return Err(io_error("looking at", &path)(e)),
        };
        let bad = |what: &str| io_error("reading", &path)(io::Error::new(io::ErrorKind::InvalidData, what));
        if length > MAX_MANIFEST_BYTES {
            return Err(bad("it is too long"));
        }
        let bytes = fs::read(&path).map_err(io_error("reading", &path))?;
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| bad(&e.to_string()))?;
        if manifest.version != VERSION {
            return Err(bad("it is of another version"));
        }
        Ok(Snapshot { directory, manifest })
    }

    /// Whether the VMM that is here reads it.
    pub fn check_vmm(&self, here: &str) -> Result<(), SnapshotError> {
        if self.manifest.vmm == here {
            return Ok(());
        }
        Err(SnapshotError::OtherVmm { written_by: self.manifest.vmm.clone(), here: here.to_string() })
    }

    /// Its disk, the base of those of capsules.
    pub fn disk(&self) -> PathBuf {
        self.directory.join(DISK)
    }

    fn image(&self) -> Image {
        Image {
            memory: GENERATION,
            delta: None,
            state: GENERATION,
            packed: false,
            vmm: Kind::of(&self.manifest.vmm),
        }
    }

    /// Its files as they lie there, for a VMM that only reads them. Blocks.
    pub fn open(&self) -> Result<Restore, VmmError> {
        Ok(Restore { is_own: false, ..self.image().open(&self.directory)? })
    }

    /// Whether it is still the one that was found, and that a capsule has linked the disk of into its directory:
    /// memory, devices and disk of two would make a guest that destroys its file system. Asked when all of it has been
    /// taken. Blocks for a small file.
    pub fn check_whole(&self, capsule: &Path) -> Result<(), SnapshotError> {
        let replaced = || SnapshotError::Replaced(self.directory.clone());
        let text = fs::read(self.directory.join(MANIFEST)).map_err(|_| replaced())?;
        let is_same =
            serde_json::from_slice::<Manifest>(&text).is_ok_and(|manifest| manifest == self.manifest);
        let linked = capsule.join(LINKED_DISK);
        let metadata = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino()));
        let linked = metadata(&linked).map_err(io_error("looking at", &linked))?;
        match is_same && metadata(&self.disk()).is_ok_and(|disk| disk == linked) {
            true => Ok(()),
            false => Err(replaced()),
        }
    }

    /// What is told of it. Blocks for a `stat` a file.
    pub fn info(&self, name: &str) -> SnapshotInfo {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2).
        let size_bytes = entries.filter_map(|e| e.metadata().ok()).map(|m| m.blocks() * 512).sum();
        SnapshotInfo {
            name: name.to_string(),
            vcpus: self.manifest.vcpus,
            memory_mb: self.manifest.memory_mb,
            disk_size_mb: self.manifest.disk_mb,
            size_bytes,
            created_us: self.manifest.created_us,
        }
    }
}

/// A hard link to a snapshot's disk in a capsule's directory, to stay when the snapshot goes. Blocks.
pub fn link_disk(disk: &Path, directory: &Path) -> io::Result<PathBuf> {
    let link = directory.join(LINKED_DISK);
    match fs::hard_link(disk, &link) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(link),
    }
}

/// All snapshots with their names, in order. Blocks for a directory listing.
pub fn list(layout: &Layout) -> Vec<(String, Snapshot)> {
    let Ok(entries) = fs::read_dir(layout.snapshots()) else { return Vec::new() };
    let names = entries.take(MAX_SNAPSHOTS * 2).flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut found: Vec<_> = names
        .filter(|name| !name.starts_with('.'))
        .filter_map(|name| Some((name.clone(), Snapshot::find(layout, &name).ok()?)))
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Deletes a snapshot. Blocks.
pub fn delete(layout: &Layout, name: &str) -> Result<(), SnapshotError> {
    let snapshot = Snapshot::find(layout, name)?;
    // Out of sight first: what is half removed is no snapshot.
    let doomed = Draft::place(layout);
    fs::rename(&snapshot.directory, &doomed).map_err(io_error("moving", &snapshot.directory))?;
    sync(&layout.snapshots())?;
    fs::remove_dir_all(&doomed).map_err(io_error("removing", &doomed))
}

/// Removes what an agent that died was making. Blocks. What cannot be removed takes space and nothing else.
pub fn clear_drafts(layout: &Layout) {
    let Ok(entries) = fs::read_dir(layout.snapshots()) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(NEW_PREFIX)) {
        match fs::remove_dir_all(entry.path()) {
            Ok(()) => log::info!("{}: never finished, removed", entry.path().display()),
            Err(e) => log::warn!("removing {}: {e}", entry.path().display()),
        }
    }
}

/// Whether a snapshot of this name may be made.
pub fn check_name(layout: &Layout, name: &str, overwrite: bool) -> Result<(), SnapshotError> {
    layout.snapshot(name).map_err(SnapshotError::Name)?;
    let is_template = layout.template(name).is_ok();
    if is_template || (!overwrite && Snapshot::find(layout, name).is_ok()) {
        return Err(SnapshotError::Exists(name.to_string()));
    }
    if list(layout).len() >= MAX_SNAPSHOTS {
        return Err(SnapshotError::TooMany);
    }
    Ok(())
}

/// A snapshot that is being made. Removed when it is dropped before it is published.
#[derive(Debug)]
pub struct Draft {
    directory: PathBuf,
}

static NEXT_DRAFT: AtomicU64 = AtomicU64::new(0);

impl Draft {
    fn place(layout: &Layout) -> PathBuf {
        let number = NEXT_DRAFT.fetch_add(1, Ordering::Relaxed);
        layout.snapshots().join(format!("{NEW_PREFIX}{}-{number}", std::process::id()))
    }

    /// An empty directory for its files. Blocks.
    pub fn new(layout: &Layout) -> Result<Draft, SnapshotError> {
        let directory = Draft::place(layout);
        let made = DirBuilder::new().mode(0o700).create(&directory);
        made.map_err(io_error("making", &directory))?;
        Ok(Draft { directory })
    }

    /// Where its files go.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its disk goes.
    pub fn disk(&self) -> PathBuf {
        self.directory.join(DISK)
    }

    /// Gives it its name, on disk when this returns. Blocks.
    pub fn publish(
        self,
        layout: &Layout,
        name: &str,
        manifest: &Manifest,
        overwrite: bool,
    ) -> Result<Snapshot, SnapshotError> {
        let path = self.directory.join(MANIFEST);
        let text = serde_json::to_vec(manifest).map_err(|e| io_error("writing", &path)(e.into()))?;
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .map_err(io_error("writing", &path))?;
        sync(&self.directory)?;
        let directory = layout.snapshot(name).map_err(SnapshotError::Name)?;
        if overwrite && directory.exists() {
            // What was there goes when `self` is dropped.
            rename::exchange(&self.directory, &directory).map_err(io_error("replacing", &directory))?;
        } else {
            rename::to_new_name(&self.directory, &directory).map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => SnapshotError::Exists(name.to_string()),
                _ => io_error("naming", &directory)(e),
            })?;
        }
        sync(&layout.snapshots())?;
        Ok(Snapshot { directory, manifest: manifest.clone() })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.directory) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                log::warn!("removing {}: {e}", self.directory.display());
            }
            _ => {}
        }
    }
}

fn sync(directory: &Path) -> Result<(), SnapshotError> {
    let synced = File::open(directory).and_then(|handle| handle.sync_all());
    synced.map_err(io_error("writing out", directory))
}

/// What a new snapshot's manifest says.
pub fn manifest(vcpus: u32, memory_mb: u32, disk_mb: u32, vmm: String) -> Manifest {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let created_us = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
    Manifest { version: VERSION, vcpus, memory_mb, disk_mb, created_us, vmm }
}

/// The memory of snapshots of which capsules run: each once, whoever maps it, and sealed, so that no VMM can
/// change what another reads.
#[derive(Debug, Default)]
pub struct SharedMemory {
    loaded: Mutex<HashMap<FileId, Weak<File>>>,
}

/// Which file a memory was read from: device, inode, the time of its last change, and when its
/// snapshot was made. Memory outlives its snapshot as long as a capsule maps it, and the file system gives the
/// inode's number to the next file: by that alone one tenant's capsule would go on with another's memory.
type FileId = (u64, u64, i64, i64, u64);

fn file_id(snapshot: &Snapshot, memory: &fs::Metadata) -> FileId {
    let made = snapshot.manifest.created_us;
    (memory.dev(), memory.ino(), memory.ctime(), memory.ctime_nsec(), made)
}

impl SharedMemory {
    /// How much of the host's memory [`SharedMemory::open`] will take for a snapshot, in bytes: none where it has been
    /// read. Blocks for a `stat`. While another is being read that is not known, and this counts as if it had not.
    pub fn bytes_to_read(&self, snapshot: &Snapshot) -> u64 {
        let Ok(metadata) = fs::metadata(snapshot.image().memory_path(&snapshot.directory)) else { return 0 };
        let is_read = self.loaded.try_lock().is_ok_and(|loaded| {
            loaded.get(&file_id(snapshot, &metadata)).is_some_and(|memory| memory.strong_count() > 0)
        });
        // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2). Holes are holes in memory too.
        if is_read { 0 } else { metadata.blocks() * 512 }
    }

    /// What a machine needs to go on from a snapshot. Blocks for as long as reading its memory takes, where
    /// nobody has it.
    pub fn open(&self, snapshot: &Snapshot) -> Result<Restore, VmmError> {
        let files = snapshot.image().open(&snapshot.directory)?;
        let system = |source| VmmError::System {
            step: "taking the memory of",
            path: snapshot.directory.clone(),
            source,
        };
        let metadata = files.memory.metadata().map_err(system)?;
        // Held while one reads, so that another who wants the same waits for it.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|_, memory| memory.strong_count() > 0);
        let key = file_id(snapshot, &metadata);
        if let Some(memory) = loaded.get(&key).and_then(Weak::upgrade) {
            return Ok(Restore { memory, is_own: false, ..files });
        }
        let memory = Arc::new(memfd::sealed_copy(c"snapshot memory", &files.memory).map_err(system)?);
        loaded.insert(key, Arc::downgrade(&memory));
        Ok(Restore { memory, is_own: false, ..files })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(name: &str) -> Layout {
        let root = std::env::temp_dir().join(format!("wrenn-snapshots-{name}-{}", std::process::id()));
        let layout = Layout::new(root);
        layout.prepare().expect("prepared");
        layout
    }

    fn draft(layout: &Layout, memory: &[u8]) -> Draft {
        let draft = Draft::new(layout).expect("made");
        fs::write(draft.directory().join("memory-0"), memory).expect("written");
        fs::write(draft.directory().join("state-0"), b"state").expect("written");
        fs::write(draft.disk(), b"disk").expect("written");
        draft
    }

    #[test]
    fn memory_is_not_taken_for_that_of_a_later_file_with_the_same_number() {
        let layout = layout("inode");
        let manifest = manifest(2, 256, 300, "qemu 7.2.22, tcg".into());
        let one = draft(&layout, b"first").publish(&layout, "one", &manifest, false).expect("published");
        let shared = SharedMemory::default();
        let held = shared.open(&one).expect("opened");
        let inode = |snapshot: &Snapshot| {
            fs::metadata(snapshot.directory.join("memory-0")).map(|m| m.ino()).expect("there")
        };
        let number = inode(&one);
        // As a file system does that gives out the number of a deleted file: the same inode, another file.
        let later = Manifest { created_us: manifest.created_us + 1, ..manifest.clone() };
        fs::write(one.directory.join("memory-0"), b"later").expect("written");
        fs::remove_file(one.directory.join(MANIFEST)).expect("removed");
        let draft = Draft { directory: one.directory.clone() };
        std::mem::forget(draft.publish(&layout, "two", &later, false).expect("published"));
        let two = Snapshot::find(&layout, "two").expect("there");
        assert_eq!(inode(&two), number);
        let other = shared.open(&two).expect("opened");
        let mut memory = [0; 5];
        std::os::unix::fs::FileExt::read_exact_at(&*other.memory, &mut memory, 0).expect("read");
        assert_eq!(&memory, b"later");
        assert!(!Arc::ptr_eq(&held.memory, &other.memory), "another tenant's");
        let again = shared.open(&two).expect("opened");
        assert!(Arc::ptr_eq(&other.memory, &again.memory), "read once");
        assert_eq!(shared.bytes_to_read(&two), 0);
        drop((other, again));
        assert!(shared.bytes_to_read(&two) > 0, "nobody has it any more");
        fs::remove_dir_all(layout.root()).expect("removed");
    }

    #[test]
    fn a_capsule_is_made_of_one_snapshot() {
        let layout = layout("whole");
        let capsule = layout.root().join("sandboxes/cl-1");
        fs::create_dir(&capsule).expect("made");
        let old = manifest(2, 256, 300, "qemu 7.2.22, tcg".into());
        let new = Manifest { created_us: old.created_us + 1, ..old.clone() };
        let found = draft(&layout, b"first").publish(&layout, "one", &old, false).expect("published");
        link_disk(&found.disk(), &capsule).expect("linked");
        found.check_whole(&capsule).expect("as it was");
        // Another takes its place between the disk and the rest.
        let replaced = draft(&layout, b"second").publish(&layout, "one", &new, true).expect("replaced");
        let error = found.check_whole(&capsule).expect_err("of two").to_string();
        assert!(error.contains("\"one\" was replaced") && error.contains("try again"), "{error}");
        // Even where its manifest were the same.
        assert!(replaced.check_whole(&capsule).is_err());
        // Or before the disk was linked.
        fs::remove_file(capsule.join(LINKED_DISK)).expect("removed");
        link_disk(&replaced.disk(), &capsule).expect("linked");
        replaced.check_whole(&capsule).expect("as it was");
        assert!(found.check_whole(&capsule).is_err());
        delete(&layout, "one").expect("deleted");
        assert!(matches!(replaced.check_whole(&capsule), Err(SnapshotError::Replaced(_))));
        fs::remove_dir_all(layout.root()).expect("removed");
    }

    #[test]
    fn a_snapshot_appears_is_replaced_and_goes() {
        let layout = layout("life");
        let manifest = manifest(2, 256, 300, "qemu 7.2.22, tcg".into());
        assert!(matches!(Snapshot::find(&layout, "one"), Err(SnapshotError::NotThere(_))));
        assert!(matches!(check_name(&layout, "../one", false), Err(SnapshotError::Name(_))));
        check_name(&layout, "one", false).expect("free");
        let one = draft(&layout, b"first").publish(&layout, "one", &manifest, false).expect("published");
        assert!(matches!(check_name(&layout, "one", false), Err(SnapshotError::Exists(_))));
        let refused = draft(&layout, b"second").publish(&layout, "one", &manifest, false);
        assert!(matches!(refused, Err(SnapshotError::Exists(_))));
        let shared = SharedMemory::default();
        let first = shared.open(&one).expect("opened");
        let again = shared.open(&one).expect("opened");
        assert!(Arc::ptr_eq(&first.memory, &again.memory), "read once");
        assert!(std::os::unix::fs::FileExt::write_all_at(&*first.memory, b"x", 0).is_err(), "sealed");
        draft(&layout, b"third").publish(&layout, "one", &manifest, true).expect("replaced");
        assert_eq!(fs::read(one.directory.join("memory-0")).expect("read"), b"third");
        let other = shared.open(&one).expect("opened");
        assert!(!Arc::ptr_eq(&first.memory, &other.memory), "the new one's");
        let names: Vec<String> = list(&layout).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["one"]);
        assert!(one.info("one").size_bytes > 0 && one.check_vmm("qemu 7.2.22, tcg").is_ok());
        assert!(matches!(one.check_vmm("qemu 9"), Err(SnapshotError::OtherVmm { .. })));
        delete(&layout, "one").expect("deleted");
        assert!(matches!(delete(&layout, "one"), Err(SnapshotError::NotThere(_))));
        std::mem::forget(draft(&layout, b"unfinished"));
        clear_drafts(&layout);
        assert_eq!(fs::read_dir(layout.snapshots()).expect("listed").count(), 0);
        fs::remove_dir_all(layout.root()).expect("removed");
    }
}
