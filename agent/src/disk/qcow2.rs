//! An empty qcow2 overlay, version 3, as QEMU's `docs/interop/qcow2` describes it: everything that is not in
//! the overlay is read from a raw backing image. All integers are big-endian.
//!
//! The file that [`Overlay::encode`] describes has four clusters of 64 KiB, nearly all holes:
//!
//! | cluster | holds |
//! | --- | --- |
//! | 0 | header, its extensions, the backing image's path |
//! | 1 | refcount table: one entry, which points to cluster 2 |
//! | 2 | refcount block: these four clusters are used once each |
//! | 3 | first-level table, all zeros: nothing is allocated, everything comes from behind |

use super::SECTOR_BYTES;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
const CLUSTER_BITS: u32 = 16;
/// What is allocated at once.
pub const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// Refcounts of 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Up to and with `compression_type` and its padding: a multiple of 8.
const HEADER_BYTES: u32 = 112;
/// Header extension "backing file format name".
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const BACKING_FORMAT: &[u8; 3] = b"raw";

const REFCOUNT_TABLE_CLUSTER: u64 = 1;
const REFCOUNT_BLOCK_CLUSTER: u64 = 2;
const FIRST_LEVEL_CLUSTER: u64 = 3;
const CLUSTERS: u64 = 4;

/// An entry of a table of either level.
pub const ENTRY_BYTES: usize = 8;
/// Bits 9 to 55 of an entry: where in the file what it speaks of lies.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 62 of a second-level entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a second-level entry: the cluster reads as zeros.
const ZERO: u64 = 1;

/// What one entry of the first-level table describes: a second-level table of one cluster with an entry of
/// 8 bytes a cluster, so 512 MiB.
const BYTES_PER_FIRST_LEVEL_ENTRY: u64 = CLUSTER_BYTES / 8 * CLUSTER_BYTES;

/// The largest overlay, in bytes: a first-level table of one cluster, 4 TiB.
pub const MAX_VIRTUAL_BYTES: u64 = CLUSTER_BYTES / 8 * BYTES_PER_FIRST_LEVEL_ENTRY;
/// The longest path of a backing image.
pub const MAX_BACKING_PATH_BYTES: usize = 1_023;
/// How much of a file [`Overlay::decode`] needs to see.
pub const HEAD_BYTES: usize = 4_096;
/// The length of the file that [`Overlay::encode`] describes.
pub const FILE_BYTES: u64 = CLUSTERS * CLUSTER_BYTES;

/// An overlay: how large it is and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The size that the guest sees, a multiple of 512, at most [`MAX_VIRTUAL_BYTES`].
    pub virtual_bytes: u64,
    /// The backing image's path, at most [`MAX_BACKING_PATH_BYTES`] long.
    pub backing: Vec<u8>,
}

impl Overlay {
    /// The parts of the new file that are not zero, by their offset. `None` when the size or the path is
    /// out of range.
    pub fn encode(&self) -> Option<[(u64, Vec<u8>); 3]> {
        let size_fits =
            self.virtual_bytes <= MAX_VIRTUAL_BYTES && self.virtual_bytes.is_multiple_of(SECTOR_BYTES);
        if !size_fits || self.backing.is_empty() || self.backing.len() > MAX_BACKING_PATH_BYTES {
            return None;
        }
        let refcount_table = (REFCOUNT_BLOCK_CLUSTER * CLUSTER_BYTES).to_be_bytes().to_vec();
        let refcount_block = 1u16.to_be_bytes().repeat(CLUSTERS as usize);
        Some([
            (0, self.encode_head()),
            (REFCOUNT_TABLE_CLUSTER * CLUSTER_BYTES, refcount_table),
            (REFCOUNT_BLOCK_CLUSTER * CLUSTER_BYTES, refcount_block),
        ])
    }

    fn encode_head(&self) -> Vec<u8> {
        let first_level_entries = self.virtual_bytes.div_ceil(BYTES_PER_FIRST_LEVEL_ENTRY) as u32;
        // Two extensions: the backing format, padded to 8 bytes, and the end.
        let backing_offset = u64::from(HEADER_BYTES) + 16 + 8;
        let mut head = Vec::with_capacity(HEAD_BYTES);
        head.extend(MAGIC);
        head.extend(VERSION.to_be_bytes());
        head.extend(backing_offset.to_be_bytes());
        head.extend((self.backing.len() as u32).to_be_bytes());
        head.extend(CLUSTER_BITS.to_be_bytes());
        head.extend(self.virtual_bytes.to_be_bytes());
        head.extend(0u32.to_be_bytes()); // encryption: none
        head.extend(first_level_entries.to_be_bytes());
        head.extend((FIRST_LEVEL_CLUSTER * CLUSTER_BYTES).to_be_bytes());
        head.extend((REFCOUNT_TABLE_CLUSTER * CLUSTER_BYTES).to_be_bytes());
        head.extend(1u32.to_be_bytes()); // clusters of the refcount table
        head.extend(0u32.to_be_bytes()); // internal snapshots: none
        head.extend(0u64.to_be_bytes()); // their table: none
        head.extend([0; 24]); // incompatible, compatible and autoclear features: none
        head.extend(REFCOUNT_ORDER.to_be_bytes());
        head.extend(HEADER_BYTES.to_be_bytes());
        head.extend([0; 8]); // compression type: zlib, which nothing here uses; padding
        head.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
        head.extend((BACKING_FORMAT.len() as u32).to_be_bytes());
        head.extend(BACKING_FORMAT);
        head.extend([0; 5]);
        head.extend([0; 8]); // end of the extensions
        debug_assert_eq!(head.len() as u64, backing_offset);
        head.extend(&self.backing);
        head
    }

    /// Reads the head of an overlay, at least its first cluster's [`HEAD_BYTES`]. The error says what is
    /// wrong.
    pub fn decode(head: &[u8]) -> Result<Overlay, &'static str> {
        let u32_at = |at: usize| Some(u32::from_be_bytes(head.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_be_bytes(head.get(at..at + 8)?.try_into().ok()?));
        if head.get(..4) != Some(&MAGIC[..]) {
            return Err("this is no qcow2 file");
        }
        if u32_at(4) != Some(VERSION) {
            return Err("this is not version 3 of qcow2");
        }
        let (Some(offset), Some(length), Some(virtual_bytes)) = (u64_at(8), u32_at(16), u64_at(24)) else {
            return Err("the qcow2 header is cut off");
        };
        let (offset, length) = (offset.min(u64::from(u32::MAX)) as usize, length as usize);
        if virtual_bytes > MAX_VIRTUAL_BYTES || length > MAX_BACKING_PATH_BYTES {
            return Err("the qcow2 header has a size out of range");
        }
        match head.get(offset..offset + length) {
            Some(backing) if length > 0 => Ok(Overlay { virtual_bytes, backing: backing.to_vec() }),
            _ => Err("the qcow2 header names no backing image"),
        }
    }
}

/// Where a cluster's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// In the image behind, or zero where that ends.
    Behind,
    /// It is zero.
    Zero,
    /// In this file.
    Own {
        /// Where, in bytes.
        offset: u64,
    },
}

/// Where the first-level table is and how long, in bytes, by the head of an overlay that [`Overlay::encode`]
/// has begun. The error says what is wrong.
pub fn first_level(head: &[u8]) -> Result<(u64, usize), &'static str> {
    let overlay = Overlay::decode(head)?;
    let cut = "the qcow2 header is cut off";
    let entries = number::<4>(head, 36).map(u32::from_be_bytes).ok_or(cut)?;
    let offset = number::<8>(head, 40).map(u64::from_be_bytes).ok_or(cut)?;
    if u64::from(entries) != overlay.virtual_bytes.div_ceil(BYTES_PER_FIRST_LEVEL_ENTRY) {
        return Err("the qcow2 first-level table does not have the disk's size");
    }
    Ok((offset, entries as usize * ENTRY_BYTES))
}

/// Where the second-level table of a first-level entry is; `None` when none of its clusters is allocated.
pub fn second_level(entry: &[u8]) -> Result<Option<u64>, &'static str> {
    let entry = number::<8>(entry, 0).map(u64::from_be_bytes).ok_or("a qcow2 table is cut off")?;
    Ok(Some(entry & OFFSET_MASK).filter(|offset| *offset != 0))
}

/// What a second-level entry says.
pub fn cluster(entry: &[u8]) -> Result<Cluster, &'static str> {
    let entry = number::<8>(entry, 0).map(u64::from_be_bytes).ok_or("a qcow2 table is cut off")?;
    match (entry & COMPRESSED, entry & ZERO, entry & OFFSET_MASK) {
        (0, 0, 0) => Ok(Cluster::Behind),
        (0, 0, offset) => Ok(Cluster::Own { offset }),
        (0, _, _) => Ok(Cluster::Zero),
        _ => Err("a qcow2 cluster is compressed, which nothing here makes"),
    }
}

/// Where on the disk the cluster is that entry `second` of the second-level table `first` speaks of.
pub fn cluster_offset(first: usize, second: usize) -> u64 {
    first as u64 * BYTES_PER_FIRST_LEVEL_ENTRY + second as u64 * CLUSTER_BYTES
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(virtual_bytes: u64) -> Overlay {
        Overlay { virtual_bytes, backing: b"/images/minimal/rootfs.ext4".to_vec() }
    }

    #[test]
    fn the_header_is_as_the_specification_has_it() {
        let Some([(0, head), (65_536, table), (131_072, block)]) = overlay(1 << 30).encode() else {
            panic!("not encoded");
        };
        assert_eq!(&head[..8], b"QFI\xfb\0\0\0\x03");
        assert_eq!(&head[8..20], [0, 0, 0, 0, 0, 0, 0, 136, 0, 0, 0, 27]);
        assert_eq!(&head[20..32], [0, 0, 0, 16, 0, 0, 0, 0, 0x40, 0, 0, 0]);
        assert_eq!(&head[36..48], [0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0]);
        assert_eq!(&head[48..60], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
        assert_eq!(&head[96..104], [0, 0, 0, 4, 0, 0, 0, 112]);
        assert_eq!(&head[112..123], b"\xe2\x79\x2a\xca\0\0\0\x03raw");
        assert_eq!(&head[136..], b"/images/minimal/rootfs.ext4");
        assert_eq!(table, [0, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(block, [0, 1, 0, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn what_is_written_is_read_again() {
        for size in [512, 1 << 30, (1 << 30) + 512, MAX_VIRTUAL_BYTES] {
            let overlay = overlay(size);
            let decoded = overlay.encode().map(|parts| Overlay::decode(&parts[0].1));
            assert_eq!(decoded, Some(Ok(overlay)));
        }
    }

    #[test]
    fn tables_are_read() {
        let Some([(_, head), ..]) = overlay((1 << 30) + 512).encode() else { panic!("not encoded") };
        let mut head = head;
        assert_eq!(first_level(&head), Ok((3 << 16, 24)));
        head[39] = 4;
        assert!(first_level(&head).is_err());
        let entry = |value: u64| cluster(&value.to_be_bytes());
        assert_eq!(entry(0), Ok(Cluster::Behind));
        // "Copied" is bit 63.
        assert_eq!(entry(1 << 63 | 5 << 16), Ok(Cluster::Own { offset: 5 << 16 }));
        assert_eq!(entry(1 << 63 | 5 << 16 | 1), Ok(Cluster::Zero));
        assert_eq!(entry(1), Ok(Cluster::Zero));
        assert!(entry(1 << 62 | 5 << 16).is_err());
        assert!(cluster(&[0; 7]).is_err());
        assert_eq!(second_level(&(1 << 63 | 4u64 << 16).to_be_bytes()), Ok(Some(4 << 16)));
        assert_eq!(second_level(&[0; 8]), Ok(None));
        assert_eq!(cluster_offset(1, 2), (512 << 20) + (128 << 10));
    }

    #[test]
    fn sizes_and_paths_out_of_range_are_refused() {
        assert_eq!(overlay(513).encode(), None);
        assert_eq!(overlay(MAX_VIRTUAL_BYTES + 512).encode(), None);
        let long = |length| Overlay { virtual_bytes: 512, backing: vec![b'x'; length] };
        assert_eq!(long(0).encode(), None);
        assert!(long(MAX_BACKING_PATH_BYTES).encode().is_some());
        assert_eq!(long(MAX_BACKING_PATH_BYTES + 1).encode(), None);
    }

    #[test]
    fn no_truncated_or_damaged_header_is_believed() {
        let Some([(_, head), ..]) = overlay(1 << 30).encode() else { panic!("not encoded") };
        for cut in 0..head.len() {
            assert!(Overlay::decode(&head[..cut]).is_err(), "{cut}");
        }
        for (at, value) in [(0, 0), (7, 2), (8, 255), (15, 255), (16, 255), (24, 255)] {
            let mut damaged = head.clone();
            damaged[at] = value;
            assert!(Overlay::decode(&damaged).is_err(), "{at}");
        }
    }
}
