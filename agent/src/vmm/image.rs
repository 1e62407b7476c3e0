//! A machine that is saved: its memory and the state of its devices, as files in its capsule's directory.
//!
//! The state of the devices is what QEMU's `xen-save-devices-state` writes: everything but memory, some
//! 160 KiB in 2 ms. Memory is taken as it lies there, by the agent:
//!
//! - Of a machine that has booted, memory is a memfd. What is not a hole in it goes to a new file.
//! - Of a machine that has been restored, memory is a private mapping of the file that it was restored
//!   from. Only pages that the machine has written are its own, as `/proc/PID/pagemap` tells; those go to
//!   a new file, a delta, and later from there into the memory's file.
//!
//! Each writing has a generation, which is in the names of its files: `memory-G`, `delta-G`, `state-G`. A
//! file that no record names is of no use. A delta is put into its memory as often as is needed: doing it
//! twice gives the same memory, so a crash in the middle is no harm.

use super::machine::{Machine, system};
use super::{Restore, VmmError};
use crate::sys::sparse;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the memory of a machine that has booted is called in `/proc/PID/maps`.
pub(super) const MEMORY_NAME: &CStr = c"guest memory";
/// How long QEMU may take for one command while a machine is saved or restored, in milliseconds. Stopping
/// a guest writes its disk out.
pub const COMMAND_TIMEOUT_MS: u64 = 20_000;
/// How long QEMU may take to read the state of its devices, in milliseconds.
pub const RESTORE_TIMEOUT_MS: u64 = 20_000;
/// How often it is asked whether it is done.
const RESTORE_POLL: Duration = Duration::from_millis(3);

const PAGE: u64 = 4_096;
/// How much is copied at a time.
const CHUNK: usize = 1 << 20;
/// The most runs of pages that a delta may have: one a page of the largest memory.
const MAX_RUNS: u64 = (1 << 40) / PAGE;
const DELTA_MAGIC: &[u8; 8] = b"WRNDLTA1";
/// The number that QEMU knows the state's file by.
const STATE_SET: u32 = 1_000;
/// Bits of an entry of `/proc/PID/pagemap`, the kernel's `admin-guide/mm/pagemap.rst`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// What a saved machine consists of: the generations of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Of the memory.
    pub memory: u64,
    /// Of what has to be put into the memory still.
    pub delta: Option<u64>,
    /// Of the state of its devices.
    pub state: u64,
}

/// How much was written, for the log and for figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whether these are only those that have changed.
    pub is_delta: bool,
}

impl Image {
    /// The files of an image in a capsule's directory, all of which it needs.
    fn names(&self) -> Vec<String> {
        let mut names = vec![name("memory", self.memory), name("state", self.state)];
        names.extend(self.delta.map(|delta| name("delta", delta)));
        names
    }

    /// Puts what has changed into the memory's file, where that has not been done. The image is then
    /// another, which has to be recorded before [`Image::clean`] removes the delta. Blocks.
    pub fn merge(&self, directory: &Path) -> Result<Image, VmmError> {
        let Some(delta) = self.delta else { return Ok(*self) };
        apply_delta(&directory.join(name("delta", delta)), &directory.join(name("memory", self.memory)))?;
        Ok(Image { delta: None, ..*self })
    }

    /// Opens the files for a machine. The image must be merged. Blocks.
    pub fn open(&self, directory: &Path) -> Result<Restore, VmmError> {
        let memory = directory.join(name("memory", self.memory));
        if self.delta.is_some() {
            return Err(VmmError::BadImage { path: memory, what: "it lacks what has changed last" });
        }
        let file = OpenOptions::new().read(true).write(true).open(&memory);
        let file = file.map_err(system("opening", &memory))?;
        let state = directory.join(name("state", self.state));
        let state = File::open(&state).map_err(system("opening", &state))?;
        Ok(Restore { memory: Arc::new(file), state: Arc::new(state) })
    }

    /// Space that it takes on the host, in bytes. Blocks.
    pub fn allocated_bytes(&self, directory: &Path) -> u64 {
        // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2).
        let sizes = self.names().into_iter().filter_map(|n| fs::metadata(directory.join(n)).ok());
        sizes.map(|m| m.blocks() * 512).sum()
    }
}

fn name(what: &str, generation: u64) -> String {
    format!("{what}-{generation}")
}

/// Removes the files of images that are in none of the generations to keep. Blocks. What cannot be removed
/// is in the way of nothing but space, so that is logged.
pub fn clean(directory: &Path, image: Option<&Image>, base: Option<u64>) {
    let mut keep: Vec<String> = image.map(Image::names).unwrap_or_default();
    keep.extend(base.map(|base| name("memory", base)));
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let is_ours = ["memory-", "delta-", "state-"].iter().any(|prefix| file.starts_with(prefix));
        if is_ours
            && !keep.contains(&file)
            && let Err(e) = fs::remove_file(entry.path())
        {
            log::warn!("removing {}: {e}", entry.path().display());
        }
    }
}

impl Machine {
    /// Stands the guest still and writes an image to `directory` under `generation`, on disk when this
    /// returns. `base` is the generation of the memory that the machine was restored from. The files belong
    /// to `owner`, whom the machine runs as. After a failure the guest still stands. Blocks.
    pub fn save(
        &mut self,
        directory: &Path,
        generation: u64,
        base: Option<u64>,
        owner: u32,
    ) -> Result<(Image, Written), VmmError> {
        self.call("stop", None, None, COMMAND_TIMEOUT_MS)?;
        let state = directory.join(name("state", generation));
        self.save_devices(&state)?;
        let mapping = Mapping::find(self.pid())?;
        let base_file = base.map(|base| directory.join(name("memory", base)));
        let (image, written) = match &base_file {
            // The base is this capsule's own, so that it may be brought up to date.
            Some(base_file) if mapping.is_of(base_file) => {
                let delta = directory.join(name("delta", generation));
                let bytes = mapping.write_delta(self.pid(), &delta)?;
                let memory = base.unwrap_or(generation);
                let image = Image { memory, delta: Some(generation), state: generation };
                (image, Written { memory_bytes: bytes, is_delta: true })
            }
            _ => {
                let memory = directory.join(name("memory", generation));
                let bytes = mapping.write_all(self.pid(), &memory, owner)?;
                let image = Image { memory: generation, delta: None, state: generation };
                (image, Written { memory_bytes: bytes, is_delta: false })
            }
        };
        let handle = File::open(directory).map_err(system("opening", directory))?;
        handle.sync_all().map_err(system("writing out", directory))?;
        Ok((image, written))
    }

    /// Lets a guest that stands still go on. Blocks.
    pub fn go_on(&mut self) -> Result<(), VmmError> {
        self.call("cont", None, None, COMMAND_TIMEOUT_MS).map(drop)
    }

    /// Sees to it that the guest of a machine runs which another agent may have left in the midst of saving
    /// or restoring it. Blocks.
    pub fn run_on(&mut self) -> Result<(), VmmError> {
        let status = self.call("query-status", None, None, COMMAND_TIMEOUT_MS)?;
        // A set that was left would be written to in place of the next one.
        match self.call("remove-fd", Some(json!({"fdset-id": STATE_SET})), None, COMMAND_TIMEOUT_MS) {
            // There is none, as a rule.
            Ok(_) | Err(VmmError::Refused { .. }) => {}
            Err(e) => return Err(e),
        }
        match status["status"].as_str() {
            Some("running") => Ok(()),
            _ => self.go_on(),
        }
    }

    /// Waits until a machine that was started of an image has taken it; the guest then stands still.
    /// Blocks.
    pub fn wait_until_restored(&mut self) -> Result<(), VmmError> {
        let end = Instant::now() + Duration::from_millis(RESTORE_TIMEOUT_MS);
        while Instant::now() < end {
            let status = self.call("query-status", None, None, COMMAND_TIMEOUT_MS)?;
            match status["status"].as_str() {
                Some("inmigrate") => std::thread::sleep(RESTORE_POLL),
                Some("paused" | "prelaunch") => return Ok(()),
                other => {
                    let why = format!("the machine is {}", other.unwrap_or("in no state"));
                    return Err(VmmError::Refused { command: "query-status", why });
                }
            }
        }
        Err(VmmError::NoAnswer { command: "query-status" })
    }

    fn save_devices(&mut self, path: &Path) -> Result<(), VmmError> {
        // QEMU wants exactly the access that it will ask for.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = file.map_err(system("making", path))?;
        let set = json!({"fdset-id": STATE_SET});
        self.call("add-fd", Some(set.clone()), Some(file.as_fd()), COMMAND_TIMEOUT_MS)?;
        let arguments = json!({"filename": format!("/dev/fdset/{STATE_SET}"), "live": false});
        let saved = self.call("xen-save-devices-state", Some(arguments), None, COMMAND_TIMEOUT_MS);
        self.call("remove-fd", Some(set), None, COMMAND_TIMEOUT_MS)?;
        saved?;
        file.sync_all().map_err(system("writing out", path))
    }
}

/// Where a machine's memory lies in its address space.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    is_private: bool,
    device: (u32, u32),
    inode: u64,
}

impl Mapping {
    /// The machine's memory: by far the largest mapping of a file that it can write to.
    fn find(pid: u32) -> Result<Mapping, VmmError> {
        let path = PathBuf::from(format!("/proc/{pid}/maps"));
        let text = fs::read_to_string(&path).map_err(system("reading", &path))?;
        let largest = text.lines().filter_map(Mapping::parse).max_by_key(|m| m.end - m.start);
        largest.ok_or(VmmError::BadImage { path, what: "the machine has no memory there" })
    }

    /// A line of `/proc/PID/maps`, proc(5), of a file that can be read and written from its beginning.
    fn parse(line: &str) -> Option<Mapping> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let mode = fields.next()?;
        let offset = fields.next()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode: u64 = fields.next()?.parse().ok()?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        let is_memory = mode.starts_with("rw") && inode != 0 && hex(offset) == Some(0);
        is_memory.then_some(())?;
        let is_private = mode.ends_with('p');
        Some(Mapping { start: hex(start)?, end: hex(end)?, is_private, device, inode })
    }

    fn is_of(&self, file: &Path) -> bool {
        fs::metadata(file).is_ok_and(|m| {
            let device = (libc::major(m.dev()), libc::minor(m.dev()));
            self.is_private && (device, m.ino()) == (self.device, self.inode)
        })
    }

    fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE
    }

    /// Writes all of the memory to a new file, with holes where nothing is. Returns how much.
    fn write_all(&self, pid: u32, path: &Path, owner: u32) -> Result<u64, VmmError> {
        let to = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
        let to = to.map_err(system("making", path))?;
        to.set_len(self.end - self.start).map_err(system("making", path))?;
        fchown(&to, Some(owner), Some(owner)).map_err(system("giving away", path))?;
        // By way of the mapping: the agent that started the machine may have ended.
        let source = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end));
        let from = File::open(&source).map_err(system("opening", &source))?;
        let mut bytes = sparse::copy_data(&from, &to).map_err(system("writing", path))?;
        if self.is_private {
            bytes += self.each_changed(pid, |offset, page| {
                to.write_all_at(page, offset).map_err(system("writing", path))
            })?;
        }
        to.sync_all().map_err(system("writing out", path))?;
        Ok(bytes)
    }

    /// Writes the pages that the machine has changed to a new file: each run of them as its offset and
    /// length, big-endian, and the bytes; in the end a run of no length. Returns how much.
    fn write_delta(&self, pid: u32, path: &Path) -> Result<u64, VmmError> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = file.map_err(system("making", path))?;
        let mut out = BufWriter::with_capacity(CHUNK, &file);
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(system("writing", path));
        put(DELTA_MAGIC)?;
        let bytes = self.each_changed(pid, |offset, run| {
            put(&offset.to_be_bytes())?;
            put(&(run.len() as u64).to_be_bytes())?;
            put(run)
        })?;
        put(&[0; 16])?;
        out.flush().map_err(system("writing", path))?;
        drop(out);
        file.sync_all().map_err(system("writing out", path))?;
        Ok(bytes)
    }

    /// Calls `take` with each run of changed pages and its offset. Returns the bytes of all.
    fn each_changed(
        &self,
        pid: u32,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), VmmError>,
    ) -> Result<u64, VmmError> {
        let map_path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        let memory_path = PathBuf::from(format!("/proc/{pid}/mem"));
        let map = File::open(&map_path).map_err(system("opening", &map_path))?;
        let memory = File::open(&memory_path).map_err(system("opening", &memory_path))?;
        let mut entries = vec![0; CHUNK / PAGE as usize * 8];
        let mut run = vec![0; CHUNK];
        let (mut page, mut total) = (0, 0);
        while page < self.pages() {
            // As many pages as fit into one run.
            let count = (self.pages() - page).min(CHUNK as u64 / PAGE);
            let known = &mut entries[..count as usize * 8];
            let first = self.start / PAGE + page;
            map.read_exact_at(known, first * 8).map_err(system("reading", &map_path))?;
            for (from, pages) in runs(known) {
                let bytes = &mut run[..(pages * PAGE) as usize];
                let offset = (page + from) * PAGE;
                memory.read_exact_at(bytes, self.start + offset).map_err(system("reading", &memory_path))?;
                take(offset, bytes)?;
                total += pages * PAGE;
            }
            page += count;
        }
        Ok(total)
    }
}

/// The runs of pages that are a process's own, of a piece of its page map: first and count.
fn runs(entries: &[u8]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (page, entry) in (0u64..).zip(entries.as_chunks::<8>().0) {
        let entry = u64::from_ne_bytes(*entry);
        if entry & (PRESENT | SWAPPED) == 0 || entry & OF_FILE != 0 {
            continue;
        }
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// Puts a delta's pages into a memory file, on disk when this returns.
fn apply_delta(delta: &Path, memory: &Path) -> Result<(), VmmError> {
    let bad = |what| VmmError::BadImage { path: delta.to_owned(), what };
    let from = File::open(delta).map_err(system("opening", delta))?;
    let mut from = BufReader::with_capacity(CHUNK, from);
    let to = OpenOptions::new().write(true).open(memory).map_err(system("opening", memory))?;
    let length = to.metadata().map_err(system("examining", memory))?.len();
    let mut magic = [0; 8];
    from.read_exact(&mut magic).map_err(system("reading", delta))?;
    if &magic != DELTA_MAGIC {
        return Err(bad("it is not what changed in a memory"));
    }
    let mut buffer = vec![0; CHUNK];
    for _ in 0..MAX_RUNS {
        let mut head = [0; 16];
        from.read_exact(&mut head).map_err(system("reading", delta))?;
        let field = |at: usize| head[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (offset, count) = (field(0), field(8));
        if count == 0 {
            return to.sync_all().map_err(system("writing out", memory));
        }
        if count > CHUNK as u64 || offset.checked_add(count).is_none_or(|end| end > length) {
            return Err(bad("it has pages outside the memory"));
        }
        let bytes = &mut buffer[..count as usize];
        from.read_exact(bytes).map_err(system("reading", delta))?;
        to.write_all_at(bytes, offset).map_err(system("writing", memory))?;
    }
    Err(bad("it does not end"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("wrenn-image-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("made");
        path
    }

    #[test]
    fn the_memory_is_found_among_the_mappings() {
        let maps = "7f88abfff000-7f88cbfff000 rw-p 00000000 fe:00 10084515   /var/x/memory-1\n";
        let expected = Mapping {
            start: 0x7f88_abff_f000,
            end: 0x7f88_cbff_f000,
            is_private: true,
            device: (0xfe, 0),
            inode: 10_084_515,
        };
        assert_eq!(Mapping::parse(maps), Some(expected.clone()));
        assert_eq!(expected.pages(), 131_072);
        for other in [
            "7f88abfff000-7f88cbfff000 r--p 00000000 fe:00 10084515 /usr/bin/qemu",
            "7f88abfff000-7f88cbfff000 rw-p 00000000 00:00 0",
            "7f88abfff000-7f88cbfff000 rw-p 00001000 fe:00 7 /usr/bin/qemu",
            "",
            "x",
        ] {
            assert_eq!(Mapping::parse(other), None, "{other}");
        }
        let shared = "7f-8f rw-s 00000000 00:01 77 /memfd:guest memory (deleted)";
        assert!(Mapping::parse(shared).is_some_and(|m| !m.is_private && m.device == (0, 1)));
    }

    #[test]
    fn runs_are_pages_that_are_the_machines_own() {
        let entries = [0, PRESENT, SWAPPED, PRESENT | OF_FILE, PRESENT, 0, OF_FILE, PRESENT];
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_ne_bytes()).collect();
        assert_eq!(runs(&bytes), [(1, 2), (4, 1), (7, 1)]);
    }

    #[test]
    fn a_delta_is_put_into_the_memory_as_often_as_one_likes() {
        let directory = directory("delta");
        let mut delta = DELTA_MAGIC.to_vec();
        for (offset, byte) in [(4_096u64, 7u8), (12_288, 8)] {
            delta.extend(offset.to_be_bytes());
            delta.extend(4_096u64.to_be_bytes());
            delta.extend([byte; 4_096]);
        }
        let unfinished = delta.clone();
        delta.extend([0; 16]);
        fs::write(directory.join("memory-1"), [1; 16_384]).expect("written");
        fs::write(directory.join("delta-2"), &delta).expect("written");
        fs::write(directory.join("state-2"), b"state").expect("written");
        let image = Image { memory: 1, delta: Some(2), state: 2 };
        assert!(matches!(image.open(&directory), Err(VmmError::BadImage { .. })));
        for _ in 0..2 {
            assert_eq!(image.merge(&directory).expect("merged"), Image { delta: None, ..image });
            let memory = fs::read(directory.join("memory-1")).expect("read");
            let expected = [[1; 4_096], [7; 4_096], [1; 4_096], [8; 4_096]].concat();
            assert!(memory == expected);
        }
        let merged = Image { delta: None, ..image };
        clean(&directory, Some(&merged), None);
        assert!(!directory.join("delta-2").exists() && merged.open(&directory).is_ok());
        for bad in [&unfinished[..], &delta[1..], b"", &[&DELTA_MAGIC[..], &[255; 16]].concat()] {
            fs::write(directory.join("delta-2"), bad).expect("written");
            assert!(image.merge(&directory).is_err());
        }
        clean(&directory, None, None);
        assert_eq!(fs::read_dir(&directory).expect("listed").count(), 0);
        fs::remove_dir_all(&directory).expect("removed");
    }
}
