//! Files that exist only in memory: memfd_create(2) and its seals, fcntl(2).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, fchown};

/// A memory file of `size_bytes` zero bytes that belongs to `uid`:`gid` and only that user may open.
/// `name` is what `/proc/PID/maps` shows.
pub fn private(name: &CStr, size_bytes: u64, uid: u32, gid: u32) -> io::Result<OwnedFd> {
    let file = create(name, libc::MFD_CLOEXEC)?;
    file.set_len(size_bytes)?;
    fchown(&file, Some(uid), Some(gid))?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(file.into())
}

/// A memory file with what `source` holds, holes included, that nobody can write to any more, though anybody
/// who is given it may open it for writing: what maps it privately wants that.
pub fn sealed_copy(name: &CStr, source: &File) -> io::Result<File> {
    let file = create(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)?;
    file.set_len(source.metadata()?.len())?;
    super::sparse::copy_data(source, &file)?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours.
    super::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// A file that keeps the first `limit_bytes` written to it and refuses the rest: where a child's standard
/// error goes when it must neither block nor fill a disk.
#[derive(Debug)]
pub struct Capture {
    file: File,
    limit_bytes: u64,
}

impl Capture {
    /// An empty capture.
    pub fn new(name: &CStr, limit_bytes: u64) -> io::Result<Capture> {
        let file = create(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)?;
        file.set_len(limit_bytes)?;
        let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours.
        super::check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
        Ok(Capture { file, limit_bytes })
    }

    /// A second handle on the same file, to become the child's output.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// What was written so far, as text.
    pub fn text(&self) -> String {
        let mut bytes = vec![0; self.limit_bytes as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], filled as u64) {
                Ok(0) | Err(_) => break,
                Ok(count) => filled += count,
            }
        }
        // What nobody has written yet reads as zeros.
        let written = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        String::from_utf8_lossy(&bytes[..written]).trim_end().to_owned()
    }
}

fn create(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = super::check(unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_capture_keeps_the_beginning_and_refuses_the_rest() -> io::Result<()> {
        let capture = Capture::new(c"test", 16)?;
        let mut writer = capture.writer()?;
        assert_eq!(capture.text(), "");
        writer.write_all(b"0123456789\n")?;
        assert!(writer.write_all(b"does not fit").is_err());
        assert_eq!(capture.text(), "0123456789");
        Ok(())
    }
}
