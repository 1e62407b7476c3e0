//! Files with holes: lseek(2) with SEEK_DATA and SEEK_HOLE.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// How much is copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// The next stretch of `file` at or after `from` that is not a hole, as (beginning, end); `None` when there
/// is only hole up to the end. A file system without holes has one stretch. Moves the file's position.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    match seek(file, from, libc::SEEK_DATA) {
        Ok(begin) => seek(file, begin, libc::SEEK_HOLE).map(|end| Some((begin, end))),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Copies what is not a hole to the same place. Returns how many bytes that were. Blocks.
pub fn copy_data(from: &File, to: &File) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let (mut at, mut total) = (0, 0);
    while let Some((begin, end)) = next_data(from, at)? {
        at = begin;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            from.read_exact_at(&mut buffer[..wanted], at)?;
            to.write_all_at(&buffer[..wanted], at)?;
            at += wanted as u64;
            total += wanted as u64;
        }
    }
    Ok(total)
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
    }
}
