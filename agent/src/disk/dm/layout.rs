//! What lies where in a copy-on-write file, and the device-mapper table that makes a disk of it. Pure.
//!
//! ```text
//! the disk       | the base's size: `snapshot` of it      | what is above: `linear` |
//! disk.cow       | exception store, as long as it can get | as it is                |
//! ```
//!
//! The exception store is that of Documentation/admin-guide/device-mapper/snapshot.rst with the persistent
//! format of drivers/md/dm-snap-persistent.c: one chunk of header, then areas of one chunk of metadata and
//! the chunks that it describes. The file is sparse and has room for every chunk of the base, so the store
//! cannot overflow; what can run out is the file system that it is on, and `guard` watches that.

use crate::disk::SECTOR_BYTES;
use crate::sys::dm::Target;

/// What is copied at once, in sectors. The kernel's table of copied chunks has an entry of 8 bytes a chunk
/// of the base: 256 KiB for a base of 512 MiB. Smaller chunks copy less and need more.
const CHUNK_SECTORS: u64 = 32;
const CHUNK_BYTES: u64 = CHUNK_SECTORS * SECTOR_BYTES;
/// An entry of the metadata is two u64, `struct disk_exception`.
const EXCEPTIONS_PER_AREA: u64 = CHUNK_BYTES / 16;
/// The part above the base begins at a multiple of this in the file, for the file system's sake.
const ALIGNMENT_BYTES: u64 = 1 << 20;
/// The major number of loop devices, Documentation/admin-guide/devices.txt.
const LOOP_MAJOR: u32 = 7;

/// A disk's measures, all in bytes and multiples of [`SECTOR_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// The base image's size.
    pub base_bytes: u64,
    /// The disk's size, at least the base's.
    pub virtual_bytes: u64,
}

impl Layout {
    /// Where in the copy-on-write file the part above the base begins.
    pub fn grown_offset_bytes(self) -> u64 {
        let chunks = self.base_bytes.div_ceil(CHUNK_BYTES);
        // Header, the areas in use, and one that the kernel zeroes ahead.
        let areas = chunks / EXCEPTIONS_PER_AREA + 2;
        ((1 + areas * (1 + EXCEPTIONS_PER_AREA)) * CHUNK_BYTES).next_multiple_of(ALIGNMENT_BYTES)
    }

    /// The copy-on-write file's size. Nearly all of it is a hole.
    pub fn file_bytes(self) -> u64 {
        self.grown_offset_bytes() + (self.virtual_bytes - self.base_bytes)
    }

    /// The table of the disk on two loop devices.
    pub fn table(self, base: u32, cow: u32) -> Vec<Target> {
        let base_sectors = self.base_bytes / SECTOR_BYTES;
        let mut table = vec![Target {
            start_sector: 0,
            sectors: base_sectors,
            kind: "snapshot".into(),
            parameters: format!("{LOOP_MAJOR}:{base} {LOOP_MAJOR}:{cow} P {CHUNK_SECTORS}"),
        }];
        if self.virtual_bytes > self.base_bytes {
            table.push(Target {
                start_sector: base_sectors,
                sectors: (self.virtual_bytes - self.base_bytes) / SECTOR_BYTES,
                kind: "linear".into(),
                parameters: format!("{LOOP_MAJOR}:{cow} {}", self.grown_offset_bytes() / SECTOR_BYTES),
            });
        }
        table
    }
}

/// The table of a device of `sectors` with which everything that waits fails.
pub(super) fn failing_table(sectors: u64) -> Vec<Target> {
    vec![Target { start_sector: 0, sectors, kind: "error".into(), parameters: String::new() }]
}

/// How a copy-on-write store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Store {
    /// In order.
    Good {
        /// What it takes of its file, in bytes.
        used_bytes: u64,
    },
    /// Writes to it have failed: what the guest has written is lost, and all input and output fails.
    Lost {
        /// As the kernel calls it: `Invalid`, `Overflow`...
        state: String,
    },
}

impl Store {
    /// Reads what a `snapshot` target says of itself: `USED/TOTAL METADATA` in sectors, or a word.
    pub(super) fn parse(status: &str) -> Store {
        let used = status.split_once('/').and_then(|(used, _)| used.parse::<u64>().ok());
        match used.and_then(|sectors| sectors.checked_mul(SECTOR_BYTES)) {
            Some(used_bytes) => Store::Good { used_bytes },
            None => Store::Lost { state: status.to_owned() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_as_the_kernel_wants_them() {
        let layout = Layout { base_bytes: 64 << 20, virtual_bytes: 1 << 30 };
        let table = layout.table(3, 9);
        let lines: Vec<String> = table
            .iter()
            .map(|t| format!("{} {} {} {}", t.start_sector, t.sectors, t.kind, t.parameters))
            .collect();
        // 4,096 chunks of 16 KiB: header, six areas of 1,025 chunks, rounded up to 97 MiB.
        assert_eq!(lines, ["0 131072 snapshot 7:3 7:9 P 32", "131072 1966080 linear 7:9 198656"]);
        assert_eq!(layout.file_bytes(), (97 << 20) + (960 << 20));
        let same = Layout { base_bytes: 64 << 20, virtual_bytes: 64 << 20 };
        assert_eq!(same.table(0, 1).len(), 1);
    }

    #[test]
    fn the_store_has_room_for_every_chunk_whatever_the_size() {
        for base_bytes in [512, 4096, 16 << 20, (16 << 20) + 512, 523_239_424, 4 << 40] {
            let layout = Layout { base_bytes, virtual_bytes: base_bytes };
            let chunks = base_bytes.div_ceil(CHUNK_BYTES);
            let metadata = chunks.div_ceil(EXCEPTIONS_PER_AREA) + 1;
            assert!(layout.grown_offset_bytes() >= (1 + chunks + metadata) * CHUNK_BYTES, "{base_bytes}");
        }
    }

    #[test]
    fn a_snapshots_state_is_read() {
        assert_eq!(Store::parse("64/198656 32"), Store::Good { used_bytes: 32_768 });
        for state in ["Invalid", "Overflow", "Merge failed", "Unknown", "", "/", "-1/2 3"] {
            assert_eq!(Store::parse(state), Store::Lost { state: state.to_owned() });
        }
    }
}
