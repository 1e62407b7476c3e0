//! Owned file descriptors.

use super::syscall::{Errno, syscall, uninterrupted};
use core::sync::atomic::{AtomicU64, Ordering};

/// A descriptor that is closed when dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Fd(i32);

impl Fd {
    /// Takes ownership of a descriptor that a system call just returned.
    pub(super) fn new(raw: usize) -> Fd {
        Fd(raw as i32)
    }

    /// The number, for calls that borrow it.
    pub fn raw(&self) -> i32 {
        self.0
    }

    /// Reads; 0 at the end.
    pub fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the buffer is writable for its length.
        uninterrupted(|| unsafe { syscall!(libc::SYS_read, self.0, buffer.as_mut_ptr(), buffer.len()) })
    }

    /// Reads at an offset; 0 at the end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
        // SAFETY: the buffer is writable for its length.
        uninterrupted(|| unsafe {
            syscall!(libc::SYS_pread64, self.0, buffer.as_mut_ptr(), buffer.len(), offset)
        })
    }

    /// Writes; may take less than all.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        write_raw(self.0, bytes)
    }

    /// Writes everything to a blocking descriptor.
    pub fn write_all(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match self.write(bytes)? {
                0 => return Err(Errno(libc::EIO)),
                n => bytes = &bytes[n..],
            }
        }
        Ok(())
    }

    /// Another descriptor of the same open file.
    pub fn duplicate(&self) -> Result<Fd, Errno> {
        // SAFETY: fcntl with integer arguments.
        let fd = unsafe { syscall!(libc::SYS_fcntl, self.0, libc::F_DUPFD_CLOEXEC, 3) }?;
        Ok(Fd::new(fd))
    }

    /// Makes reads and writes return `EAGAIN` rather than wait. It is a property of the open file, so
    /// never for one that is shared with another process.
    pub fn set_nonblocking(&self) -> Result<(), Errno> {
        // SAFETY: fcntl with integer arguments.
        unsafe {
            let flags = syscall!(libc::SYS_fcntl, self.0, libc::F_GETFL)?;
            syscall!(libc::SYS_fcntl, self.0, libc::F_SETFL, flags | libc::O_NONBLOCK as usize)?;
        }
        Ok(())
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: the descriptor is owned, so nobody else uses it after this. Linux closes it even when
        // it reports an error.
        let _ = unsafe { syscall!(libc::SYS_close, self.0) };
    }
}

/// Writes to a descriptor by number: standard error, and in a forked child.
pub fn write_raw(fd: i32, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the bytes are readable for their length.
    uninterrupted(|| unsafe { syscall!(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) })
}

/// A pipe: its reading and its writing end, both closed on exec. `flags` may add `O_NONBLOCK`, to both.
pub fn pipe(flags: i32) -> Result<(Fd, Fd), Errno> {
    let mut ends = [0i32; 2];
    // SAFETY: the array takes the two descriptors.
    unsafe { syscall!(libc::SYS_pipe2, ends.as_mut_ptr(), libc::O_CLOEXEC | flags) }?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

/// Makes sure that descriptors 0 to 2 are open, so that no other file ever gets these numbers, and
/// closes every other one that was inherited.
pub fn sanitize_inherited() -> Result<(), Errno> {
    for fd in 0..3 {
        // SAFETY: fcntl with integer arguments; the path is NUL-terminated.
        unsafe {
            if syscall!(libc::SYS_fcntl, fd, libc::F_GETFD).is_err() {
                syscall!(libc::SYS_open, c"/dev/null".as_ptr(), libc::O_RDWR, 0)?;
            }
        }
    }
    // SAFETY: at start no code of this process owns a descriptor above 2.
    let _ = unsafe { syscall!(libc::SYS_close_range, 3, u32::MAX, 0) };
    Ok(())
}

/// In a process that was just forked: closes all descriptors above 2 but one, which is then 3. What is open
/// only here would seem to be in use still.
pub(super) fn keep_only(fd: &Fd) -> i32 {
    const KEPT: i32 = 3;
    // SAFETY: integer arguments. Nothing in this process uses the others any more.
    unsafe {
        if fd.raw() != KEPT {
            let _ = syscall!(libc::SYS_dup3, fd.raw(), KEPT, 0);
        }
        let _ = syscall!(libc::SYS_close_range, KEPT + 1, u32::MAX, 0);
    }
    KEPT
}

/// Makes new files have exactly the permissions that envd asks for; its children get the usual mask.
pub fn clear_umask() {
    // SAFETY: integer argument; it cannot fail.
    let _ = unsafe { syscall!(libc::SYS_umask, 0) };
}

/// Descriptors that envd itself may have.
const OWN_LIMIT: u64 = 65_536;

/// The limit of descriptors that envd was started with, for its children.
static INHERITED_LIMIT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Raises the limit of descriptors, as far as it may: two or three belong to each process.
pub fn raise_limit() {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both structs live for the calls.
    unsafe {
        let nofile = libc::RLIMIT_NOFILE;
        if syscall!(libc::SYS_prlimit64, 0, nofile, 0usize, &raw mut old).is_err() {
            return;
        }
        INHERITED_LIMIT[0].store(old.rlim_cur, Ordering::Relaxed);
        INHERITED_LIMIT[1].store(old.rlim_max, Ordering::Relaxed);
        for limit in [OWN_LIMIT.max(old.rlim_max), old.rlim_max] {
            let new = libc::rlimit64 { rlim_cur: limit, rlim_max: limit };
            if syscall!(libc::SYS_prlimit64, 0, nofile, &raw const new, 0usize).is_ok() {
                return;
            }
        }
    }
}

/// Gives a child the limit that envd was started with: programs that go through all possible descriptors
/// or use select(2) count on it.
pub(super) fn restore_limit() {
    let [soft, hard] = INHERITED_LIMIT.each_ref().map(|l| l.load(Ordering::Relaxed));
    if hard > 0 {
        let old = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
        // SAFETY: the struct lives for the call.
        let _ = unsafe { syscall!(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, &raw const old, 0usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_carries_bytes_and_ends() {
        let (reader, writer) = pipe(0).expect("pipe");
        writer.write_all(b"abc").expect("write");
        drop(writer);
        let mut buffer = [0; 8];
        assert_eq!(reader.read(&mut buffer), Ok(3));
        assert_eq!(reader.read(&mut buffer), Ok(0));
        reader.set_nonblocking().expect("fcntl");
    }
}
