//! Copying what is in memory to a disk without a copy of it in between: open(2) with O_DIRECT, and mmap(2).
//!
//! The disk takes the bytes from where they lie. Through the page cache a page would have to be found and
//! filled for each first, which takes longer than the disk does, and would push others out.

use super::sparse::{self, next_data};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// What positions, lengths and addresses have to be multiples of: no disk here has larger sectors.
const ALIGNMENT: u64 = 4_096;
/// How much the disk is given at a time by one writer.
const ORDER_BYTES: u64 = 8 << 20;
/// How many write at a time.
const WRITERS: usize = 2;

/// Copies what is not a hole in `from` to the same place in the file at `to`, which is there, empty and as
/// long. Returns how many bytes that were; they last once the file is synced. Where the file system wants the
/// page cache, or the length is none for a disk, they go through that. Blocks.
pub fn copy_data(from: &File, to: &Path) -> io::Result<u64> {
    let length = from.metadata()?.len();
    let buffered = || sparse::copy_data(from, &OpenOptions::new().write(true).open(to)?);
    if length == 0 || !length.is_multiple_of(ALIGNMENT) {
        return buffered();
    }
    match OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(to) {
        Ok(direct) => write_data(from, &direct),
        // The file system knows no such thing.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => buffered(),
        Err(e) => Err(e),
    }
}

fn write_data(from: &File, to: &File) -> io::Result<u64> {
    reserve(from, to)?;
    let orders = Mutex::new(Orders { from, at: 0, end: 0 });
    let next = || orders.lock().unwrap_or_else(PoisonError::into_inner).next();
    // While the pages of one order are looked up, or let go, the disk is busy with another.
    let write = || {
        let mut total = 0;
        while let Some((begin, end)) = next()? {
            Mapping::new(from, begin, end - begin)?.write(to)?;
            total += end - begin;
        }
        Ok(total)
    };
    thread::scope(|scope| {
        // Where there can be no further thread, this one does it all.
        let begin = |_| thread::Builder::new().spawn_scoped(scope, write).ok();
        let others: Vec<_> = (1..WRITERS).filter_map(begin).collect();
        let ours: io::Result<u64> = write();
        let ended = |_| io::Error::other("a thread that writes has ended");
        others.into_iter().try_fold(ours?, |sum, other| Ok(sum + other.join().map_err(ended)??))
    })
}

/// Makes room for what is not a hole: there is too little before anything is written, not in the midst of it,
/// and writers need not wait for each other to take some.
fn reserve(from: &File, to: &File) -> io::Result<()> {
    let mut at = 0;
    while let Some((begin, end)) = next_data(from, at)? {
        at = end;
        match sparse::reserve(to, begin, end - begin) {
            // Then it is made as it is needed.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
            other => other?,
        }
    }
    Ok(())
}

/// What is still to be written.
struct Orders<'a> {
    from: &'a File,
    at: u64,
    end: u64,
}

impl Orders<'_> {
    /// The next one: at most [`ORDER_BYTES`].
    fn next(&mut self) -> io::Result<Option<(u64, u64)>> {
        if self.at >= self.end {
            let Some((begin, end)) = next_data(self.from, self.at)? else { return Ok(None) };
            // What a hole has of a sector is zeros.
            self.at = (begin / ALIGNMENT * ALIGNMENT).max(self.end);
            self.end = end.next_multiple_of(ALIGNMENT);
        }
        let begin = self.at;
        self.at = self.end.min(begin + ORDER_BYTES);
        Ok(Some((begin, self.at)))
    }
}

/// A piece of a file in the address space, which nobody looks at but the kernel.
struct Mapping {
    start: *mut libc::c_void,
    length: usize,
    /// Where in the file it begins.
    at: u64,
}

impl Mapping {
    /// Of `length` bytes from `at` on, which begins a page.
    fn new(file: &File, at: u64, length: u64) -> io::Result<Mapping> {
        let too_large = || io::Error::from(io::ErrorKind::FileTooLarge);
        let length = usize::try_from(length).map_err(|_| too_large())?;
        let offset = libc::off64_t::try_from(at).map_err(|_| too_large())?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap64(ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { start, length, at })
    }

    /// Writes all of it to the same place in another file.
    fn write(&self, to: &File) -> io::Result<()> {
        let mut done = 0;
        while done < self.length {
            let position =
                libc::off64_t::try_from(self.at + done as u64).map_err(|_| io::ErrorKind::FileTooLarge)?;
            // SAFETY: what is written begins and ends within the mapping. The kernel alone reads it, and fails
            // with EFAULT where the file has become shorter.
            let written =
                unsafe { libc::pwrite64(to.as_raw_fd(), self.start.add(done), self.length - done, position) };
            match usize::try_from(written) {
                Ok(written) if done + written == self.length => return Ok(()),
                // The next one has to begin with a sector.
                Ok(written) if written as u64 >= ALIGNMENT => {
                    done += written - written % ALIGNMENT as usize;
                }
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody has its address any more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;
    use std::fs;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::PathBuf;

    /// A memory of which little is used.
    fn memory(length: u64) -> File {
        let file = File::from(memfd::private(c"test", length, 0, 0).expect("made"));
        file.write_all_at(&[7; 20_000], 4_096).expect("written");
        file.write_all_at(&vec![9; 20 << 20], 30 << 20).expect("written");
        file
    }

    fn copy_to(directory: &Path, from: &File) -> (u64, PathBuf) {
        let path = directory.join(format!("wrenn-direct-{}", std::process::id()));
        let file = File::create(&path).expect("made");
        file.set_len(from.metadata().expect("there").len()).expect("sized");
        (copy_data(from, &path).expect("copied"), path)
    }

    /// One of the two takes no direct writes on most machines, the other does.
    #[test]
    fn what_is_used_of_a_memory_is_copied_and_the_rest_is_holes() {
        for directory in ["/dev/shm", "/var/tmp"] {
            for length in [64 << 20, (50 << 20) + 100] {
                let from = memory(length);
                let (copied, path) = copy_to(Path::new(directory), &from);
                let (file, mut original) = (fs::read(&path).expect("read"), vec![0; length as usize]);
                from.read_exact_at(&mut original, 0).expect("read");
                let blocks = fs::metadata(&path).expect("there").blocks();
                fs::remove_file(&path).expect("removed");
                assert!(file == original, "{directory}, {length}");
                assert_eq!(copied, (20 << 20) + 20_480, "{directory}");
                assert!(blocks * 512 < 21 << 20, "{directory}: {blocks} blocks");
            }
        }
    }
}
