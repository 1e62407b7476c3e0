//! What the machine has: statvfs(3) for disk space.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Size and free space of the file system that holds `path`, in bytes.
pub fn disk_space(path: &Path) -> io::Result<(u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: an all-zero statvfs is a valid one.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is NUL-terminated and `stat` is one statvfs; both outlive the call.
    super::check(unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) })?;
    Ok((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_space() {
        let (size, free) = super::disk_space(std::path::Path::new("/")).expect("root");
        assert!(size > 0 && free <= size);
        assert!(super::disk_space(std::path::Path::new("/nowhere/at/all")).is_err());
    }
}
