//! The system call instruction and its error numbers.

use core::fmt;

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("envd runs on Linux x86-64 only");

/// An error number, `errno(3)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

impl Errno {
    /// The symbolic name, such as `ENOENT`; `E?` for one that has no name here.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    fn entry(self) -> &'static (i32, &'static str, &'static str) {
        NAMES.iter().find(|e| e.0 == self.0).unwrap_or(&(0, "E?", "unknown error"))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, name, text) = self.entry();
        if *number == 0 { write!(f, "error {}", self.0) } else { write!(f, "{text} ({name})") }
    }
}

/// Errors that a person may come to see, with what strerror(3) says of them.
const NAMES: [(i32, &str, &str); 37] = [
    (libc::EPERM, "EPERM", "operation not permitted"),
    (libc::ENOENT, "ENOENT", "no such file or directory"),
    (libc::ESRCH, "ESRCH", "no such process"),
    (libc::EINTR, "EINTR", "interrupted"),
    (libc::EIO, "EIO", "input/output error"),
    (libc::ENXIO, "ENXIO", "no such device or address"),
    (libc::E2BIG, "E2BIG", "argument list too long"),
    (libc::ENOEXEC, "ENOEXEC", "not an executable format"),
    (libc::EBADF, "EBADF", "bad file descriptor"),
    (libc::EAGAIN, "EAGAIN", "resource temporarily unavailable"),
    (libc::ENOMEM, "ENOMEM", "out of memory"),
    (libc::EACCES, "EACCES", "permission denied"),
    (libc::EFAULT, "EFAULT", "bad address"),
    (libc::EBUSY, "EBUSY", "device or resource busy"),
    (libc::EEXIST, "EEXIST", "file exists"),
    (libc::EXDEV, "EXDEV", "not on the same file system"),
    (libc::ENODEV, "ENODEV", "no such device"),
    (libc::ENOTDIR, "ENOTDIR", "not a directory"),
    (libc::EISDIR, "EISDIR", "is a directory"),
    (libc::EINVAL, "EINVAL", "invalid argument"),
    (libc::ENFILE, "ENFILE", "too many open files in the system"),
    (libc::EMFILE, "EMFILE", "too many open files"),
    (libc::ETXTBSY, "ETXTBSY", "text file busy"),
    (libc::EFBIG, "EFBIG", "file too large"),
    (libc::ENOSPC, "ENOSPC", "no space left on device"),
    (libc::EROFS, "EROFS", "read-only file system"),
    (libc::EPIPE, "EPIPE", "broken pipe"),
    (libc::ENAMETOOLONG, "ENAMETOOLONG", "file name too long"),
    (libc::ENOTEMPTY, "ENOTEMPTY", "directory not empty"),
    (libc::ELOOP, "ELOOP", "too many symbolic links"),
    (libc::EDQUOT, "EDQUOT", "disk quota exceeded"),
    (libc::EADDRINUSE, "EADDRINUSE", "address in use"),
    (libc::ENETUNREACH, "ENETUNREACH", "network unreachable"),
    (libc::ECONNRESET, "ECONNRESET", "connection reset"),
    (libc::ETIMEDOUT, "ETIMEDOUT", "timed out"),
    (libc::ECONNREFUSED, "ECONNREFUSED", "connection refused"),
    (libc::EHOSTUNREACH, "EHOSTUNREACH", "no route to host"),
];

/// Makes a system call and gives its result, or its errno.
///
/// # Safety
/// The arguments must be what the call takes; pointers must be valid for what it does with them.
#[inline(always)]
pub unsafe fn raw(number: libc::c_long, a: [usize; 6]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the x86-64 Linux system call convention: number in rax, arguments in rdi, rsi, rdx, r10,
    // r8, r9; rcx and r11 are overwritten; the stack is not touched. The caller answers for the rest.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a[0],
            in("rsi") a[1],
            in("rdx") a[2],
            in("r10") a[3],
            in("r8") a[4],
            in("r9") a[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // The kernel returns errors as -4095 to -1.
    if (-4095..0).contains(&result) { Err(Errno(-result as i32)) } else { Ok(result as usize) }
}

/// `syscall!(libc::SYS_close, fd)`: each argument is cast to `usize` (sign-extended for integers).
macro_rules! syscall {
    ($n:expr) => {
        $crate::sys::syscall::raw($n, [0; 6])
    };
    ($n:expr, $a:expr) => {
        $crate::sys::syscall::raw($n, [$a as usize, 0, 0, 0, 0, 0])
    };
    ($n:expr, $a:expr, $b:expr) => {
        $crate::sys::syscall::raw($n, [$a as usize, $b as usize, 0, 0, 0, 0])
    };
    ($n:expr, $a:expr, $b:expr, $c:expr $(,)?) => {
        $crate::sys::syscall::raw($n, [$a as usize, $b as usize, $c as usize, 0, 0, 0])
    };
    ($n:expr, $a:expr, $b:expr, $c:expr, $d:expr $(,)?) => {
        $crate::sys::syscall::raw($n, [$a as usize, $b as usize, $c as usize, $d as usize, 0, 0])
    };
    ($n:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr $(,)?) => {
        $crate::sys::syscall::raw(
            $n,
            [$a as usize, $b as usize, $c as usize, $d as usize, $e as usize, 0],
        )
    };
    ($n:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr $(,)?) => {
        $crate::sys::syscall::raw(
            $n,
            [$a as usize, $b as usize, $c as usize, $d as usize, $e as usize, $f as usize],
        )
    };
}
pub(crate) use syscall;

/// Makes a call again for as long as a signal interrupts it. envd blocks all its signals, so this ends.
#[inline]
pub fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno(libc::EINTR)) => continue,
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn results_and_errors_are_told_apart() {
        // SAFETY: getpid takes nothing; close of a bad descriptor does nothing.
        let (pid, bad) = unsafe { (syscall!(libc::SYS_getpid), syscall!(libc::SYS_close, -1i32)) };
        assert_eq!(pid, Ok(std::process::id() as usize));
        assert_eq!(bad, Err(Errno(libc::EBADF)));
        assert_eq!(Errno(libc::ENOENT).to_string(), "no such file or directory (ENOENT)");
        assert_eq!(Errno(4000).to_string(), "error 4000");
    }
}
