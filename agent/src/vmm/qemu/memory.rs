//! The memory of a machine in QEMU, taken as it lies there, by the agent:
//!
//! - Of a machine that has booted, memory is a memfd. What is not a hole in it goes to a new file.
//! - Of a machine that has been restored, memory is a private mapping of the file that it was restored
//!   from. Only pages that the machine has written are its own, as `/proc/PID/pagemap` tells; those go to
//!   a new file.

use crate::sys::direct;
use crate::vmm::VmmError;
use crate::vmm::image::{self, CHUNK, PAGE};
use crate::vmm::machine::system;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

/// Bits of an entry of `/proc/PID/pagemap`, the kernel's `admin-guide/mm/pagemap.rst`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Where a machine's memory lies in its address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    start: u64,
    end: u64,
    is_private: bool,
    device: (u32, u32),
    inode: u64,
}

impl Mapping {
    /// The machine's memory: by far the largest mapping of a file that it can write to.
    pub fn find(pid: u32) -> Result<Mapping, VmmError> {
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

    /// Whether it is a private mapping of this file.
    pub fn is_of(&self, file: &Path) -> bool {
        fs::metadata(file).is_ok_and(|m| {
            let device = (libc::major(m.dev()), libc::minor(m.dev()));
            self.is_private && (device, m.ino()) == (self.device, self.inode)
        })
    }

    fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE
    }

    /// Writes all of the memory to a new file, with holes where nothing is. Returns how much.
    pub fn write_all(&self, pid: u32, path: &Path, owner: u32) -> Result<u64, VmmError> {
        let to = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
        let to = to.map_err(system("making", path))?;
        to.set_len(self.end - self.start).map_err(system("making", path))?;
        fchown(&to, Some(owner), Some(owner)).map_err(system("giving away", path))?;
        // By way of the mapping: the agent that started the machine may have ended.
        let source = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end));
        let from = File::open(&source).map_err(system("opening", &source))?;
        let mut bytes = direct::copy_data(&from, path).map_err(system("writing", path))?;
        if self.is_private {
            bytes += self.each_changed(pid, |offset, page| {
                to.write_all_at(page, offset).map_err(system("writing", path))
            })?;
        }
        to.sync_all().map_err(system("writing out", path))?;
        Ok(bytes)
    }

    /// Writes the pages that the machine has changed to a new file, on disk when this returns. Returns how
    /// much.
    pub fn write_delta(&self, pid: u32, path: &Path) -> Result<u64, VmmError> {
        image::write_delta(path, |put| self.each_changed(pid, put))
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
