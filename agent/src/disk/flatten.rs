//! A new raw image that holds what a disk holds: complete, with nothing behind it, and with holes where it
//! is zero.

use super::DiskError;
use crate::sys::sparse;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// How much is read at once.
const COPY_BYTES: usize = 1 << 20;
/// Zeros of this length at a multiple of it become a hole: a block of most file systems.
const BLOCK_BYTES: usize = 4096;
const MODE: u32 = 0o644;

/// The image while it is written.
pub(super) struct SparseWriter<'a> {
    file: &'a File,
    path: &'a Path,
    buffer: Vec<u8>,
    written_bytes: u64,
}

/// Makes the image `to` of `virtual_bytes` with `fill`, safe on the storage when this returns; gives back
/// how many bytes were not zero. On failure there is no file.
pub(super) fn write(
    to: &Path,
    virtual_bytes: u64,
    fill: impl FnOnce(&mut SparseWriter<'_>) -> Result<(), DiskError>,
) -> Result<u64, DiskError> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(to)
        .map_err(DiskError::system("creating", to))?;
    let mut writer = SparseWriter { file: &file, path: to, buffer: vec![0; COPY_BYTES], written_bytes: 0 };
    let made = file
        .set_len(virtual_bytes)
        .map_err(DiskError::system("writing", to))
        .and_then(|()| fill(&mut writer))
        .and_then(|()| file.sync_all().map_err(DiskError::system("syncing", to)))
        .and_then(|()| super::file::sync_parent(to));
    match made {
        Ok(()) => Ok(writer.written_bytes),
        Err(e) => {
            // The first error is the one to tell.
            let _ = fs::remove_file(to);
            Err(e)
        }
    }
}

/// `length` bytes in pieces of at most [`COPY_BYTES`]: where each begins, and how long it is.
fn pieces(length: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..length)
        .step_by(COPY_BYTES)
        .map(move |at| (at, usize::try_from(length - at).unwrap_or(COPY_BYTES).min(COPY_BYTES)))
}

impl SparseWriter<'_> {
    /// Copies `length` bytes of `source` at `from` to the image at `at`, but for what is zero.
    pub fn copy(
        &mut self,
        source: &File,
        source_path: &Path,
        from: u64,
        at: u64,
        length: u64,
    ) -> Result<(), DiskError> {
        for (done, count) in pieces(length) {
            let part = &mut self.buffer[..count];
            source.read_exact_at(part, from + done).map_err(DiskError::system("reading", source_path))?;
            let mut offset = at + done;
            for block in part.chunks(BLOCK_BYTES) {
                if block.iter().any(|byte| *byte != 0) {
                    self.file.write_all_at(block, offset).map_err(DiskError::system("writing", self.path))?;
                    self.written_bytes += block.len() as u64;
                }
                offset += block.len() as u64;
            }
        }
        Ok(())
    }

    /// The same for a file with holes, which are not read.
    pub fn copy_data(
        &mut self,
        source: &File,
        source_path: &Path,
        from: u64,
        at: u64,
        length: u64,
    ) -> Result<(), DiskError> {
        let end = from + length;
        let mut position = from;
        while position < end {
            let next =
                sparse::next_data(source, position).map_err(DiskError::system("reading", source_path))?;
            let Some((data, data_end)) = next.filter(|(data, _)| *data < end) else { break };
            self.copy(source, source_path, data, at + (data - from), data_end.min(end) - data)?;
            position = data_end;
        }
        Ok(())
    }

    /// Makes `length` bytes at `at` zero again.
    pub fn zero(&mut self, at: u64, length: u64) -> Result<(), DiskError> {
        self.buffer.fill(0);
        for (done, count) in pieces(length) {
            self.file
                .write_all_at(&self.buffer[..count], at + done)
                .map_err(DiskError::system("writing", self.path))?;
        }
        Ok(())
    }
}
