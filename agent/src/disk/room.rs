//! How much of the storage is kept for the disks that are there: they are sparse, and together promise more
//! than there is.

use super::DiskError;
use crate::sys::resources::disk_space;
use std::path::Path;

const MIB: u64 = 1 << 20;
/// What stays free at least, and what is enough on a large file system.
const MIN_RESERVE_BYTES: u64 = 64 * MIB;
const MAX_RESERVE_BYTES: u64 = 1024 * MIB;

/// How much of a file system of this size is kept free: a 64th, within bounds, but never more than an
/// eighth.
pub(super) fn reserve_bytes(size_bytes: u64) -> u64 {
    (size_bytes / 64).clamp(MIN_RESERVE_BYTES, MAX_RESERVE_BYTES).min(size_bytes / 8)
}

/// Refuses to make a disk where there is no more room than what is kept.
pub(super) fn refuse_if_short(directory: &Path) -> Result<(), DiskError> {
    let (size, free_bytes) =
        disk_space(directory).map_err(DiskError::system("looking at the space in", directory))?;
    let reserve_bytes = reserve_bytes(size);
    if free_bytes < reserve_bytes {
        return Err(DiskError::NoSpace { path: directory.to_owned(), free_bytes, reserve_bytes });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1024 * MIB;

    #[test]
    fn the_reserve_fits_the_file_system() {
        for (size, reserve) in
            [(256 * MIB, 32 * MIB), (GIB, 64 * MIB), (16 * GIB, 256 * MIB), (1000 * GIB, GIB), (0, 0)]
        {
            assert_eq!(reserve_bytes(size), reserve, "{size}");
        }
    }
}
