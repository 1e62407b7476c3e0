//! Disks by device-mapper: a `snapshot` of the shared base image on a sparse copy-on-write file of the
//! capsule's own, at full speed in the kernel, for VMMs that read block devices.
//!
//! - this file: making, finding, flattening and removing one
//! - `layout`: what lies where in the file; the table
//! - `base`: the shared loop devices of base images
//! - [`guard`]: holds all disks before the file system that they are on is full
//!
//! A device is called `wrenn-{capsule}`; its identifier names the data directory as well, so agents with
//! different directories leave each other's alone. Loop devices detach themselves when no table uses them.
//! What a disk is made of is in `disk.json`, written before the device is made.

mod base;
pub mod guard;
mod layout;

pub use layout::Store;

use super::flatten::SparseWriter;
use super::{Disk, DiskError, DiskImage, DiskSpec, Format, SECTOR_BYTES, file, flatten};
use crate::sys::dm::{Control, Device};
use crate::sys::loopdev::LoopDevice;
use crate::whole_file;
use layout::Layout;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const COW_NAME: &str = "disk.cow";
const DESCRIPTION_NAME: &str = "disk.json";
/// A second name of the base image: whoever replaces the image leaves the capsule its own.
const BASE_NAME: &str = "disk.base";
/// No capsule is called so.
const PROBE_PREFIX: &str = ".probe-";
const VERSION: u32 = 1;
const MODE: u32 = 0o600;
const NAME_PREFIX: &str = "wrenn-";
const UUID_PREFIX: &str = "WRENN-";

/// The VMM that had it open may be dying, or udev looking at it: how often a busy device is tried again.
const REMOVE_ATTEMPTS: u32 = 100;
const REMOVE_RETRY: Duration = Duration::from_millis(20);

/// What a disk is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    version: u32,
    /// The base image's path.
    base: PathBuf,
    base_bytes: u64,
    /// Its inode number and the time of its last change: a copy of what differs fits no other image.
    base_inode: u64,
    base_modified_ns: i128,
    virtual_bytes: u64,
}

/// A disk that is a device-mapper device.
#[derive(Debug)]
pub(super) struct MappedDisk {
    directory: PathBuf,
    name: String,
    device: PathBuf,
    layout: Layout,
}

/// Tries with a small disk in a directory of its own in `capsules` whether all this works here. What an
/// agent left that died in the middle of it is cleared away first.
pub(super) fn probe(capsules: &Path) -> Result<(), DiskError> {
    let entries = fs::read_dir(capsules).map_err(DiskError::system("listing", capsules))?;
    for left in entries.flatten().filter(|e| e.file_name().as_bytes().starts_with(PROBE_PREFIX.as_bytes())) {
        clear(&left.path())?;
        fs::remove_dir_all(left.path()).map_err(DiskError::system("removing", &left.path()))?;
    }
    // Agents with other directories may try at the same time.
    let directory = capsules.join(format!("{PROBE_PREFIX}{}", std::process::id()));
    fs::create_dir(&directory).map_err(DiskError::system("making", &directory))?;
    let tried = probe_in(&directory);
    let cleared = fs::remove_dir_all(&directory).map_err(DiskError::system("removing", &directory));
    tried.and(cleared)
}

/// Whether this kernel has a device-mapper, whatever it can do.
pub(super) fn is_there() -> bool {
    control_if_there().is_ok_and(|control| control.is_some())
}

fn probe_in(directory: &Path) -> Result<(), DiskError> {
    const PROBE_BYTES: u64 = 64 * 1024;
    let base = directory.join("base");
    let file = File::create(&base).map_err(DiskError::system("creating", &base))?;
    file.set_len(PROBE_BYTES).map_err(DiskError::system("writing", &base))?;
    let size_bytes = Some(2 * PROBE_BYTES);
    let disk = create(&DiskSpec { base: &base, directory, size_bytes })?;
    let opened = File::options().read(true).write(true).open(&disk.device);
    let opened = opened.map(drop).map_err(DiskError::system("opening", &disk.device));
    Box::new(disk).remove().and(opened)
}

pub(super) fn create(spec: &DiskSpec<'_>) -> Result<MappedDisk, DiskError> {
    let base = File::open(spec.base).map_err(DiskError::system("opening", spec.base))?;
    let metadata = base.metadata().map_err(DiskError::system("examining", spec.base))?;
    if metadata.len() == 0 || metadata.len() % SECTOR_BYTES != 0 {
        let reason = "an image's size must be a multiple of 512 bytes";
        return Err(DiskError::Malformed { path: spec.base.to_owned(), reason });
    }
    let virtual_bytes = file::virtual_bytes(spec, metadata.len())?;
    let layout = Layout { base_bytes: metadata.len(), virtual_bytes };
    let made = build(spec, &base, &metadata, layout);
    if made.is_err() {
        // The first error is the one to tell.
        let _ = remove_files(spec.directory);
    }
    made
}

fn build(
    spec: &DiskSpec<'_>,
    base: &File,
    metadata: &fs::Metadata,
    layout: Layout,
) -> Result<MappedDisk, DiskError> {
    let directory = spec.directory;
    let link = directory.join(BASE_NAME);
    let base_path = match fs::hard_link(spec.base, &link) {
        Ok(()) => link,
        // On another file system the image keeps its one name.
        Err(_) => spec.base.canonicalize().map_err(DiskError::system("finding the path of", spec.base))?,
    };
    let cow = directory.join(COW_NAME);
    file::make(&cow, |file| file.set_len(layout.file_bytes()))?;
    let description = Description {
        version: VERSION,
        base: base_path,
        base_bytes: layout.base_bytes,
        base_inode: metadata.ino(),
        base_modified_ns: modified_ns(metadata),
        virtual_bytes: layout.virtual_bytes,
    };
    description.write(directory)?;
    let control = control()?;
    let name = device_name(directory);
    let device = activate(&control, &name, directory, base, &description)?;
    Ok(MappedDisk { directory: directory.to_owned(), name, device: device_path(&device), layout })
}

/// The disk in a capsule's directory, made active where it is not: after a reboot, or when an agent died
/// in the middle.
pub(super) fn open(directory: &Path) -> Result<Option<MappedDisk>, DiskError> {
    let Some(description) = Description::read(directory)? else { return Ok(None) };
    let layout = description.layout();
    let control = control()?;
    let name = device_name(directory);
    let found = control.device(&name).map_err(DiskError::system("looking at", Path::new(&name)))?;
    let device = match found {
        Some(device) if device.uuid != uuid(directory)? => return Err(DiskError::NameTaken { name }),
        // A released one has lost nothing but what waited, and is made anew.
        Some(device) if device.active && is_snapshot(&control, &name)? => device,
        rest => {
            if rest.is_some() {
                remove_device(&control, &name)?;
            }
            let base =
                File::open(&description.base).map_err(DiskError::system("opening", &description.base))?;
            activate(&control, &name, directory, &base, &description)?
        }
    };
    Ok(Some(MappedDisk { directory: directory.to_owned(), name, device: device_path(&device), layout }))
}

/// Removes the device of a capsule's directory, when there is one and it is ours. Its files stay.
pub(super) fn clear(directory: &Path) -> Result<(), DiskError> {
    let Some(control) = control_if_there()? else { return Ok(()) };
    let name = device_name(directory);
    match control.device(&name).map_err(DiskError::system("looking at", Path::new(&name)))? {
        Some(device) if device.uuid == uuid(directory)? => remove_device(&control, &name),
        _ => Ok(()),
    }
}

/// Lets what waits for the device of a capsule's directory fail, when it is suspended and ours.
pub(super) fn release(directory: &Path) -> Result<(), DiskError> {
    let Some(control) = control_if_there()? else { return Ok(()) };
    let name = device_name(directory);
    let error = |step| DiskError::system(step, Path::new(&name));
    match control.device(&name).map_err(error("looking at"))? {
        Some(device) if device.suspended && device.uuid == uuid(directory)? => {}
        _ => return Ok(()),
    }
    let table = control.table(&name).map_err(error("looking at"))?;
    let sectors = table.iter().map(|target| target.sectors).sum();
    control.load(&name, &layout::failing_table(sectors)).map_err(error("loading the table of"))?;
    control.resume(&name).map_err(error("starting"))
}

/// Removes every device of this data directory whose capsule has no directory; gives back their names.
pub(super) fn clear_orphans(capsules: &Path) -> Result<Vec<String>, DiskError> {
    let Some(control) = control_if_there()? else { return Ok(Vec::new()) };
    let mut removed = Vec::new();
    for (name, id, _) in own_devices(&control, capsules)? {
        if !capsules.join(&id).exists() {
            remove_device(&control, &name)?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Name, capsule and state of every device of this data directory.
fn own_devices(control: &Control, capsules: &Path) -> Result<Vec<(String, String, Device)>, DiskError> {
    let prefix = uuid_prefix(capsules)?;
    let names = control.names().map_err(DiskError::system("listing", capsules))?;
    let mut found = Vec::new();
    for name in names.into_iter().filter(|name| name.starts_with(NAME_PREFIX)) {
        let device = control.device(&name).map_err(DiskError::system("looking at", Path::new(&name)))?;
        if let Some(device) = device
            && let Some(id) = device.uuid.strip_prefix(&prefix)
        {
            found.push((name, id.to_owned(), device));
        }
    }
    Ok(found)
}

fn activate(
    control: &Control,
    name: &str,
    directory: &Path,
    base: &File,
    description: &Description,
) -> Result<Device, DiskError> {
    let metadata = base.metadata().map_err(DiskError::system("examining", &description.base))?;
    let same = metadata.len() == description.base_bytes
        && metadata.ino() == description.base_inode
        && modified_ns(&metadata) == description.base_modified_ns;
    if !same {
        return Err(DiskError::BaseChanged { base: description.base.clone() });
    }
    let cow_path = directory.join(COW_NAME);
    let cow = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&cow_path)
        .map_err(DiskError::system("opening", &cow_path))?;
    let base = base::attach(base, &description.base)
        .map_err(DiskError::system("attaching a loop device to", &description.base))?;
    let cow = LoopDevice::attach(&cow, false, &cow_path.to_string_lossy())
        .map_err(DiskError::system("attaching a loop device to", &cow_path))?;
    let table = description.layout().table(base.number(), cow.number());
    let device_error = |step| DiskError::system(step, Path::new(name));
    control.create(name, &uuid(directory)?).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => DiskError::NameTaken { name: name.to_owned() },
        _ => device_error("making the device")(e),
    })?;
    let started = control
        .load(name, &table)
        .map_err(device_error("loading the table of"))
        .and_then(|()| control.resume(name).map_err(device_error("starting")))
        .and_then(|()| control.device(name).map_err(device_error("looking at")));
    match started {
        Ok(Some(device)) => Ok(device),
        // The loop devices are closed when this returns, and stay only where a table uses them.
        Ok(None) => Err(device_error("looking at")(io::ErrorKind::NotFound.into())),
        Err(e) => {
            let _ = remove_device(control, name);
            Err(e)
        }
    }
}

/// Removes a device, trying again while it is busy, two seconds at most; one that is gone is no error.
fn remove_device(control: &Control, name: &str) -> Result<(), DiskError> {
    for _ in 0..REMOVE_ATTEMPTS {
        match control.remove(name) {
            Ok(()) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => thread::sleep(REMOVE_RETRY),
            Err(e) => return Err(DiskError::system("removing the device", Path::new(name))(e)),
        }
    }
    Err(DiskError::Busy { name: name.to_owned() })
}

fn remove_files(directory: &Path) -> Result<(), DiskError> {
    let [cow, description, base] = [COW_NAME, DESCRIPTION_NAME, BASE_NAME].map(|name| directory.join(name));
    let new_description = whole_file::beside(&description);
    for path in [cow, description, new_description, base] {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(DiskError::system("removing", &path)(e));
            }
            _ => {}
        }
    }
    file::sync_parent(&directory.join(COW_NAME))
}

impl MappedDisk {
    fn error(&self, step: &'static str) -> impl FnOnce(io::Error) -> DiskError {
        DiskError::system(step, &self.device)
    }

    fn cow(&self) -> PathBuf {
        self.directory.join(COW_NAME)
    }
}

impl Disk for MappedDisk {
    fn image(&self) -> DiskImage {
        DiskImage { path: self.device.clone(), format: Format::Device, backing: None }
    }

    fn virtual_bytes(&self) -> u64 {
        self.layout.virtual_bytes
    }

    fn allocated_bytes(&self) -> Result<u64, DiskError> {
        file::allocated_bytes(&self.cow())
    }

    fn store(&self) -> Result<Store, DiskError> {
        Ok(store(&control()?, &self.name)?.unwrap_or(Store::Lost { state: "Released".into() }))
    }

    fn flatten(&self, to: &Path) -> Result<u64, DiskError> {
        let device = File::open(&self.device).map_err(self.error("opening"))?;
        // What the VMM wrote may wait in the device's pages, and has not reached the file yet.
        device.sync_all().map_err(self.error("syncing"))?;
        if let Store::Lost { state } = self.store()? {
            return Err(DiskError::Lost { name: self.name.clone(), state });
        }
        let cow = File::open(self.cow()).map_err(DiskError::system("opening", &self.cow()))?;
        let (layout, cow_path) = (self.layout, self.cow());
        flatten::write(to, layout.virtual_bytes, |writer: &mut SparseWriter<'_>| {
            writer.copy(&device, &self.device, 0, 0, layout.base_bytes)?;
            // Above the base the file holds the bytes as they are, so its holes can be stepped over.
            let length = layout.virtual_bytes - layout.base_bytes;
            writer.copy_data(&cow, &cow_path, layout.grown_offset_bytes(), layout.base_bytes, length)
        })
    }

    fn remove(self: Box<Self>) -> Result<(), DiskError> {
        remove_device(&control()?, &self.name)?;
        remove_files(&self.directory)
    }
}

/// Whether it is a disk, and not one that was released.
fn is_snapshot(control: &Control, name: &str) -> Result<bool, DiskError> {
    let table = control.table(name).map_err(DiskError::system("looking at", Path::new(name)))?;
    Ok(table.first().is_some_and(|target| target.kind == "snapshot"))
}

/// `None` for one that was released.
fn store(control: &Control, name: &str) -> Result<Option<Store>, DiskError> {
    let status = control.status(name).map_err(DiskError::system("looking at", Path::new(name)))?;
    let snapshot = status.first().filter(|target| target.kind == "snapshot");
    Ok(snapshot.map(|target| Store::parse(&target.parameters)))
}

impl Description {
    fn layout(&self) -> Layout {
        Layout { base_bytes: self.base_bytes, virtual_bytes: self.virtual_bytes }
    }

    fn read(directory: &Path) -> Result<Option<Description>, DiskError> {
        let path = directory.join(DESCRIPTION_NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(DiskError::system("reading", &path)(e)),
        };
        let malformed = |reason| Err(DiskError::Malformed { path: path.clone(), reason });
        let Ok(description) = serde_json::from_slice::<Description>(&text) else {
            return malformed("is not a disk's description");
        };
        let whole = |bytes: u64| bytes.is_multiple_of(SECTOR_BYTES) && bytes <= super::MAX_DISK_BYTES;
        if description.version != VERSION {
            return malformed("is of a version that this agent does not know");
        }
        if !whole(description.base_bytes)
            || !whole(description.virtual_bytes)
            || description.base_bytes == 0
            || description.virtual_bytes < description.base_bytes
        {
            return malformed("has sizes that no disk has");
        }
        Ok(Some(description))
    }

    fn write(&self, directory: &Path) -> Result<(), DiskError> {
        let path = directory.join(DESCRIPTION_NAME);
        serde_json::to_vec(self)
            .map_err(io::Error::other)
            .and_then(|text| whole_file::replace(&path, &text, MODE))
            .map_err(DiskError::system("writing", &path))
    }
}

fn control() -> Result<Control, DiskError> {
    Control::open().map_err(DiskError::system("opening", Path::new(crate::sys::dm::CONTROL_DEVICE)))
}

/// `None` where there is no device-mapper, so no device of ours either.
fn control_if_there() -> Result<Option<Control>, DiskError> {
    match Control::open() {
        Ok(control) => Ok(Some(control)),
        // ENODEV and ENXIO: the node is there, the module is not.
        Err(e)
            if e.kind() == io::ErrorKind::NotFound
                || matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) =>
        {
            Ok(None)
        }
        Err(e) => Err(DiskError::system("opening", Path::new(crate::sys::dm::CONTROL_DEVICE))(e)),
    }
}

fn device_path(device: &Device) -> PathBuf {
    PathBuf::from(format!("/dev/dm-{}", device.minor))
}

fn capsule_id(directory: &Path) -> &OsStr {
    directory.file_name().unwrap_or_default()
}

fn device_name(directory: &Path) -> String {
    format!("{NAME_PREFIX}{}", capsule_id(directory).to_string_lossy())
}

fn uuid(directory: &Path) -> Result<String, DiskError> {
    let capsules = directory.parent().unwrap_or(Path::new("/"));
    Ok(format!("{}{}", uuid_prefix(capsules)?, capsule_id(directory).to_string_lossy()))
}

/// What the identifiers of all devices of a data directory begin with.
fn uuid_prefix(capsules: &Path) -> Result<String, DiskError> {
    let path = capsules.canonicalize().map_err(DiskError::system("finding the path of", capsules))?;
    Ok(format!("{UUID_PREFIX}{:016x}-", fnv1a(path.as_os_str().as_bytes())))
}

/// FNV-1a of 64 bits: a path may be longer than an identifier. Not against an adversary: whoever chooses
/// an agent's directory is root.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn modified_ns(metadata: &fs::Metadata) -> i128 {
    i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_those_of_the_directory() {
        // The published test vectors of FNV-1a.
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
        let capsules = std::env::temp_dir();
        let of = |id: &str| uuid(&capsules.join(id)).expect("an identifier");
        assert_eq!(device_name(&capsules.join("cl-1")), "wrenn-cl-1");
        assert!(of("cl-1").starts_with("WRENN-") && of("cl-1").ends_with("-cl-1"));
        assert_ne!(of("cl-1"), uuid(Path::new("/usr/cl-1")).expect("an identifier"));
        let longest = "a".repeat(crate::layout::MAX_CAPSULE_ID);
        assert!(of(&longest).len() <= crate::sys::dm::MAX_UUID_BYTES);
        assert!(device_name(&capsules.join(&longest)).len() <= crate::sys::dm::MAX_NAME_BYTES);
    }

    #[test]
    fn a_description_is_read_back_and_a_wrong_one_refused() {
        let directory = std::env::temp_dir().join(format!("wrenn-dm-description-{}", std::process::id()));
        fs::create_dir(&directory).expect("made");
        assert_eq!(Description::read(&directory).expect("read"), None);
        let good = Description {
            version: VERSION,
            base: "/images/a".into(),
            base_bytes: 1024,
            base_inode: 7,
            base_modified_ns: 1_700_000_000_123_456_789,
            virtual_bytes: 4096,
        };
        good.write(&directory).expect("written");
        assert_eq!(Description::read(&directory).expect("read"), Some(good.clone()));
        let wrong = [
            Description { version: 2, ..good.clone() },
            Description { base_bytes: 1000, ..good.clone() },
            Description { base_bytes: 8192, ..good.clone() },
            Description { base_bytes: 0, ..good.clone() },
            Description { virtual_bytes: 1 << 60, ..good.clone() },
        ];
        for description in wrong {
            description.write(&directory).expect("written");
            let read = Description::read(&directory);
            assert!(matches!(read, Err(DiskError::Malformed { .. })), "{description:?}");
        }
        fs::write(directory.join(DESCRIPTION_NAME), "{").expect("written");
        assert!(Description::read(&directory).is_err());
        fs::remove_dir_all(&directory).expect("removed");
    }
}
