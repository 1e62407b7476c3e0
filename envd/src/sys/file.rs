//! Paths, directories and metadata.

use super::fd::Fd;
use super::syscall::{Errno, syscall, uninterrupted};
use alloc::vec::Vec;
use core::ffi::CStr;

/// The directory that relative paths start from when none is given.
pub const CURRENT: i32 = libc::AT_FDCWD;

/// Metadata of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Type and permissions, inode(7).
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content, in seconds since the epoch.
    pub modified_sec: i64,
    /// The device that holds it.
    pub device: u64,
    /// Its number on the device.
    pub inode: u64,
}

impl Metadata {
    fn from_stat(stat: &libc::stat) -> Metadata {
        Metadata {
            mode: stat.st_mode,
            size: stat.st_size as u64,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified_sec: stat.st_mtime,
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFLNK
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// Opens a path. `O_CLOEXEC` is added.
pub fn open(directory: i32, path: &CStr, flags: i32, mode: u32) -> Result<Fd, Errno> {
    // SAFETY: the path is NUL-terminated.
    let fd = uninterrupted(|| unsafe {
        syscall!(libc::SYS_openat, directory, path.as_ptr(), flags | libc::O_CLOEXEC, mode)
    })?;
    Ok(Fd::new(fd))
}

/// Metadata of an open file.
pub fn metadata(fd: &Fd) -> Result<Metadata, Errno> {
    metadata_at(fd.raw(), c"", libc::AT_EMPTY_PATH)
}

/// Metadata of a path; `flags` such as `AT_SYMLINK_NOFOLLOW`.
pub fn metadata_at(directory: i32, path: &CStr, flags: i32) -> Result<Metadata, Errno> {
    // SAFETY: an all-zero stat is a valid value; path and struct live for the call.
    let stat = unsafe {
        let mut stat: libc::stat = core::mem::zeroed();
        syscall!(libc::SYS_newfstatat, directory, path.as_ptr(), &raw mut stat, flags)?;
        stat
    };
    Ok(Metadata::from_stat(&stat))
}

/// Where a symbolic link points.
pub fn read_link(directory: i32, path: &CStr) -> Result<Vec<u8>, Errno> {
    let mut buffer = alloc::vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: path and buffer live for the call.
    let n = unsafe {
        syscall!(libc::SYS_readlinkat, directory, path.as_ptr(), buffer.as_mut_ptr(), buffer.len())
    }?;
    buffer.truncate(n);
    Ok(buffer)
}

/// Makes one directory.
pub fn make_directory(directory: i32, path: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: the path is NUL-terminated.
    unsafe { syscall!(libc::SYS_mkdirat, directory, path.as_ptr(), mode) }?;
    Ok(())
}

/// Makes a symbolic link at `path`.
pub fn symlink(target: &CStr, path: &CStr) -> Result<(), Errno> {
    // SAFETY: both are NUL-terminated.
    unsafe { syscall!(libc::SYS_symlinkat, target.as_ptr(), CURRENT, path.as_ptr()) }?;
    Ok(())
}

/// Removes a name; `flags` is 0 or `AT_REMOVEDIR`.
pub fn unlink(directory: i32, path: &CStr, flags: i32) -> Result<(), Errno> {
    // SAFETY: the path is NUL-terminated.
    unsafe { syscall!(libc::SYS_unlinkat, directory, path.as_ptr(), flags) }?;
    Ok(())
}

/// Renames, over what is there.
pub fn rename(from_directory: i32, from: &CStr, to_directory: i32, to: &CStr) -> Result<(), Errno> {
    // SAFETY: both paths are NUL-terminated.
    unsafe { syscall!(libc::SYS_renameat2, from_directory, from.as_ptr(), to_directory, to.as_ptr(), 0) }?;
    Ok(())
}

/// Sets permission bits of an open file.
pub fn set_mode(fd: &Fd, mode: u32) -> Result<(), Errno> {
    // SAFETY: integer arguments.
    unsafe { syscall!(libc::SYS_fchmod, fd.raw(), mode) }?;
    Ok(())
}

/// Sets permission bits of a path, following links.
pub fn set_mode_at(path: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: the path is NUL-terminated.
    unsafe { syscall!(libc::SYS_fchmodat, CURRENT, path.as_ptr(), mode) }?;
    Ok(())
}

/// Sets the owner of an open file; `u32::MAX` keeps one.
pub fn set_owner(fd: &Fd, uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: integer arguments.
    unsafe { syscall!(libc::SYS_fchown, fd.raw(), uid, gid) }?;
    Ok(())
}

/// Waits until a file's content is on its device.
pub fn sync(fd: &Fd) -> Result<(), Errno> {
    // SAFETY: integer argument.
    uninterrupted(|| unsafe { syscall!(libc::SYS_fsync, fd.raw()) })?;
    Ok(())
}

/// Has a file's content written to its device and waits for that, without its metadata.
fn sync_content(fd: i32) -> Result<(), Errno> {
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: integer arguments; a length of 0 is the whole file.
    uninterrupted(|| unsafe { syscall!(libc::SYS_sync_file_range, fd, 0, 0, flags) })?;
    Ok(())
}

/// What a helper waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// That the content so far is on the device.
    Content,
    /// That the file is on the device with all that is needed to find it.
    Whole,
}

/// Waits in a process of its own, which ends with the errno as its exit code, 0 for none. Its process id.
pub fn sync_apart(fd: &Fd, sync: Sync) -> Result<u32, Errno> {
    super::boot::fork(|| {
        let kept = super::fd::keep_only(fd);
        let result = match sync {
            Sync::Content => sync_content(kept),
            // SAFETY: integer argument.
            Sync::Whole => uninterrupted(|| unsafe { syscall!(libc::SYS_fsync, kept) }).map(drop),
        };
        result.err().map_or(0, |errno| errno.0)
    })
}

/// Moves the position of an open file to an offset from its start.
pub fn seek(fd: &Fd, offset: u64) -> Result<(), Errno> {
    // SAFETY: integer arguments.
    unsafe { syscall!(libc::SYS_lseek, fd.raw(), offset, libc::SEEK_SET) }?;
    Ok(())
}

/// Size of the file system that holds a path, and what an ordinary user can still write, in bytes.
pub fn space(path: &CStr) -> Result<(u64, u64), Errno> {
    // SAFETY: an all-zero statfs is a valid value; path and struct live for the call.
    let stat = unsafe {
        let mut stat: libc::statfs = core::mem::zeroed();
        syscall!(libc::SYS_statfs, path.as_ptr(), &raw mut stat)?;
        stat
    };
    let block = stat.f_bsize as u64;
    Ok((stat.f_blocks * block, stat.f_bavail * block))
}

/// Bytes of one directory read.
const DIRECTORY_BUFFER: usize = 16 * 1024;
/// `d_name` in `struct linux_dirent64` (include/linux/dirent.h).
const NAME_OFFSET: usize = 19;
/// And of its type.
const TYPE_OFFSET: usize = 18;

/// Calls `each` with the name of every entry but `.` and `..`, until it returns false.
pub fn read_directory(fd: &Fd, mut each: impl FnMut(&CStr) -> bool) -> Result<(), Errno> {
    read_entries(fd, |name, _| each(name))
}

/// As [`read_directory`], with each entry's type: `DT_DIR` and so on, `DT_UNKNOWN` where the file system does
/// not say.
pub fn read_entries(fd: &Fd, mut each: impl FnMut(&CStr, u8) -> bool) -> Result<(), Errno> {
    let mut buffer = alloc::vec![0u8; DIRECTORY_BUFFER];
    loop {
        // SAFETY: the buffer is writable for its length.
        let n = unsafe { syscall!(libc::SYS_getdents64, fd.raw(), buffer.as_mut_ptr(), buffer.len()) }?;
        if n == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..n];
        while rest.len() > NAME_OFFSET {
            let length = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
            let Some(entry) = rest.get(..length).filter(|e| e.len() > NAME_OFFSET) else {
                return Err(Errno(libc::EIO));
            };
            let name = CStr::from_bytes_until_nul(&entry[NAME_OFFSET..]).map_err(|_| Errno(libc::EIO))?;
            if name != c"." && name != c".." && !each(name, entry[TYPE_OFFSET]) {
                return Ok(());
            }
            rest = &rest[length..];
        }
    }
}

/// Reads a whole small file, at most `limit` bytes of it.
pub fn read_file(path: &CStr, limit: usize) -> Result<Vec<u8>, Errno> {
    let fd = open(CURRENT, path, libc::O_RDONLY, 0)?;
    let mut content = Vec::new();
    let mut chunk = [0u8; 4096];
    while content.len() < limit {
        let want = chunk.len().min(limit - content.len());
        match fd.read(&mut chunk[..want])? {
            0 => break,
            n => content.extend_from_slice(&chunk[..n]),
        }
    }
    Ok(content)
}

/// The same; empty where there is no such file or it may not be read. That nothing can be had for the
/// moment, such as a descriptor, is an error still.
pub fn read_if_any(path: &CStr, limit: usize) -> Result<Vec<u8>, Errno> {
    match read_file(path, limit) {
        Err(Errno(libc::ENOENT | libc::EACCES)) => Ok(Vec::new()),
        other => other,
    }
}

/// Writes to a file that is there: a setting of the kernel's.
pub fn write_existing(path: &CStr, content: &[u8]) -> Result<(), Errno> {
    open(CURRENT, path, libc::O_WRONLY, 0)?.write_all(content)
}

/// Replaces the content of a small file, which is made with `mode` when it is not there.
pub fn write_file(path: &CStr, content: &[u8], mode: u32) -> Result<(), Errno> {
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC;
    open(CURRENT, path, flags, mode)?.write_all(content)
}

/// Size of the file system of an open file, in blocks of `block_bytes`, statfs(2). What the file system
/// keeps for itself does not count, so it is a little less than its disk's.
pub fn total_blocks(fd: &Fd, block_bytes: u64) -> Result<u64, Errno> {
    let mut stat = core::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel writes the struct.
    unsafe { syscall!(libc::SYS_fstatfs, fd.raw(), stat.as_mut_ptr()) }?;
    // SAFETY: all zeros is a valid statfs, and the kernel has filled it.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_blocks.saturating_mul(stat.f_bsize as u64) / block_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::ffi::CString;

    #[test]
    fn a_directory_is_read_to_its_end() {
        let directory = std::env::temp_dir().join(std::format!("envd-dir-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("mkdir");
        for i in 0..1000 {
            std::fs::write(directory.join(std::format!("a rather long file name {i:04}")), b"")
                .expect("write");
        }
        let path = CString::new(directory.to_str().expect("utf-8")).expect("no NUL");
        let fd = open(CURRENT, &path, libc::O_RDONLY | libc::O_DIRECTORY, 0).expect("open");
        assert!(metadata(&fd).expect("stat").is_directory());
        let mut names = 0;
        read_directory(&fd, |_| {
            names += 1;
            true
        })
        .expect("getdents");
        assert_eq!(names, 1000);
        std::fs::remove_dir_all(&directory).expect("clean up");
    }
}
