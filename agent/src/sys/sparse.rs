//! Files with holes: lseek(2) with SEEK_DATA and SEEK_HOLE. And writing them out early: sync_file_range(2).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// How much is copied at a time.
const COPY_BYTES: usize = 1 << 20;
/// How much is written before the disk is told to begin with it: so much less is left when the file is synced.
const BEHIND_BYTES: u64 = 4 << 20;
/// The least that is worth a hole of its own in a file that has none.
const HOLE_BYTES: usize = 64 * 1024;
/// What is a hole or none as a whole.
const BLOCK_BYTES: usize = 4096;

/// The next stretch of `file` at or after `from` that is not a hole, as (beginning, end); `None` when there
/// is only hole up to the end. A file system without holes has one stretch. Moves the file's position.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    match seek(file, from, libc::SEEK_DATA) {
        Ok(begin) => seek(file, begin, libc::SEEK_HOLE).map(|end| Some((begin, end))),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Has the disk begin to write what a file got while more is put into it, so that the disk is not idle
/// meanwhile. A promise of nothing: what has to last is synced in the end.
#[derive(Debug)]
pub struct WriteBehind<'a> {
    file: &'a File,
    begun: u64,
}

impl<'a> WriteBehind<'a> {
    /// For a file that is written from its beginning to its end.
    pub fn new(file: &'a File) -> WriteBehind<'a> {
        WriteBehind { file, begun: 0 }
    }

    /// All up to `end` has been written. Blocks when the disk has more to do than it takes orders for.
    pub fn written_to(&mut self, end: u64) {
        if end.saturating_sub(self.begun) < BEHIND_BYTES {
            return;
        }
        let range = (libc::off64_t::try_from(self.begun), libc::off64_t::try_from(end - self.begun));
        if let (Ok(begin), Ok(length)) = range {
            // Where it fails nothing is lost but time: syncing in the end tells what is wrong.
            // SAFETY: sync_file_range takes its arguments by value.
            let _ = unsafe {
                libc::sync_file_range(self.file.as_raw_fd(), begin, length, libc::SYNC_FILE_RANGE_WRITE)
            };
        }
        self.begun = end;
    }
}

/// Copies what is not a hole to the same place, of which the disk begins to write what is there. Returns how
/// many bytes that were. Blocks.
pub fn copy_data(from: &File, to: &File) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let (mut at, mut total) = (0, 0);
    let mut behind = WriteBehind::new(to);
    while let Some((begin, end)) = next_data(from, at)? {
        at = begin;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            from.read_exact_at(&mut buffer[..wanted], at)?;
            to.write_all_at(&buffer[..wanted], at)?;
            at += wanted as u64;
            total += wanted as u64;
            behind.written_to(at);
        }
    }
    Ok(total)
}

/// As [`copy_data`], to an empty file of the same length: blocks that hold nothing but zeros become holes.
/// Returns how many bytes were written. Blocks.
pub fn copy_used(from: &File, to: &File) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let (mut at, mut total) = (0, 0);
    while let Some((begin, end)) = next_data(from, at)? {
        at = begin;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let bytes = &mut buffer[..wanted];
            from.read_exact_at(bytes, at)?;
            let mut offset = at;
            for run in bytes.chunks(BLOCK_BYTES).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b))
            {
                let length: usize = run.iter().map(|block| block.len()).sum();
                if !is_zero(run[0]) {
                    let start = usize::try_from(offset - at).unwrap_or(0);
                    to.write_all_at(&bytes[start..start + length], offset)?;
                    total += length as u64;
                }
                offset += length as u64;
            }
            at += wanted as u64;
        }
    }
    Ok(total)
}

/// Gives back the space of stretches of a file, open for writing, that hold nothing but zeros. Where the file
/// system has no holes, nothing changes. Blocks for as long as reading it takes.
pub fn dig_holes(file: &File) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some((begin, end)) = next_data(file, at)? {
        at = begin;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            file.read_exact_at(&mut buffer[..wanted], at)?;
            for (index, stretch) in (0u64..).zip(buffer[..wanted].chunks(HOLE_BYTES)) {
                if is_zero(stretch) && !punch(file, at + index * HOLE_BYTES as u64, stretch.len())? {
                    return Ok(());
                }
            }
            at += wanted as u64;
        }
    }
    Ok(())
}

/// Makes room for `length` bytes from `at` on in a file that is open for writing and so long; what is there stays.
///
/// # Errors
/// EOPNOTSUPP where the file system knows no such thing.
pub fn reserve(file: &File, at: u64, length: u64) -> io::Result<()> {
    let (Ok(at), Ok(length)) = (libc::off64_t::try_from(at), libc::off64_t::try_from(length)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: fallocate takes its arguments by value.
    super::check(unsafe { libc::fallocate64(file.as_raw_fd(), 0, at, length) }).map(drop)
}

/// Whether that could be done.
fn punch(file: &File, at: u64, length: usize) -> io::Result<bool> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (Ok(at), Ok(length)) = (libc::off_t::try_from(at), libc::off_t::try_from(length)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: fallocate takes its arguments by value.
    match super::check(unsafe { libc::fallocate(file.as_raw_fd(), mode, at, length) }) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        other => other.map(|_| true),
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<u64> {
    let from = libc::off_t::try_from(from).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: lseek touches no memory of ours.
    let at = super::check(unsafe { libc::lseek(file.as_raw_fd(), from, whence) })?;
    u64::try_from(at).map_err(|_| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_stepped_over() {
        let path = std::env::temp_dir().join(format!("wrenn-sparse-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("created");
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(next_data(&file, 0).expect("looked"), None);
        file.set_len(4 << 20).expect("sized");
        file.write_all_at(&[1; 4096], 1 << 20).expect("written");
        let (begin, end) = next_data(&file, 0).expect("looked").expect("data");
        assert!(begin <= 1 << 20, "{begin}");
        assert!(((1 << 20) + 4096..=4 << 20).contains(&end), "{end}");
        let copy = File::options().read(true).write(true).create_new(true).open(&path).expect("created");
        std::fs::remove_file(&path).expect("removed");
        copy.set_len(4 << 20).expect("sized");
        let copied = copy_data(&file, &copy).expect("copied");
        assert!((4096..=2 << 20).contains(&copied), "{copied}");
        let mut found = [0; 4096];
        copy.read_exact_at(&mut found, 1 << 20).expect("read");
        assert_eq!(found, [1; 4096]);
        // The same as it would be if somebody had written all of it.
        file.write_all_at(&[0; 1 << 16], 0).expect("written");
        file.write_all_at(b"end", (4 << 20) - 3).expect("written");
        let used = File::options().read(true).write(true).create_new(true).open(&path).expect("created");
        std::fs::remove_file(&path).expect("removed");
        used.set_len(4 << 20).expect("sized");
        assert_eq!(copy_used(&file, &used).expect("copied"), 2 * 4096);
        let all = |file: &File| {
            let mut bytes = vec![0; 4 << 20];
            file.read_exact_at(&mut bytes, 0).expect("read");
            bytes
        };
        assert!(all(&file) == all(&used));
        let full = File::options().read(true).write(true).create_new(true).open(&path).expect("created");
        std::fs::remove_file(&path).expect("removed");
        full.write_all_at(&all(&file), 0).expect("written");
        let blocks = |file: &File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("there"));
        let before = blocks(&full);
        dig_holes(&full).expect("dug");
        assert!(all(&full) == all(&file) && blocks(&full) <= before);
    }
}
