//! What the machine has: statvfs(3) for disk space, proc(5) for memory.

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

/// Memory that the kernel could give to programs now without swapping, in bytes: what is free, and most of
/// what caches files.
pub fn available_memory_bytes() -> io::Result<u64> {
    meminfo(&std::fs::read_to_string("/proc/meminfo")?, "MemAvailable:")
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemAvailable line"))
}

/// A value of proc(5)'s meminfo, which is in KiB, in bytes.
pub fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_memory() {
        let available = super::available_memory_bytes().expect("this machine");
        assert!(available > 1 << 20);
        let text = "MemTotal:       24634212 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(super::meminfo(text, "MemAvailable:"), Some(1 << 20));
        assert_eq!(super::meminfo(text, "MemTotal:"), Some(24_634_212 << 10));
        for bad in ["", "MemFree: 1 kB", "MemAvailable: x kB", "MemAvailable: 1"] {
            assert_eq!(super::meminfo(bad, "MemAvailable:"), None);
        }
    }

    #[test]
    fn there_is_space() {
        let (size, free) = super::disk_space(std::path::Path::new("/")).expect("root");
        assert!(size > 0 && free <= size);
        assert!(super::disk_space(std::path::Path::new("/nowhere/at/all")).is_err());
    }
}
