//! Signals as a file: signalfd(2). They are blocked for every thread, so this must be done before the
//! first thread starts.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The signals that end a daemon in good order, readable from a descriptor.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Takes SIGTERM and SIGINT, as [`Signals::of`].
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn termination() -> io::Result<Signals> {
        Signals::of(&[libc::SIGTERM, libc::SIGINT])
    }

    /// Blocks these signals for this thread and those it will start, and takes them by descriptor. SIGPIPE
    /// is ignored by the Rust runtime already.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn of(numbers: &[i32]) -> io::Result<Signals> {
        // SAFETY: an all-zero sigset_t is a valid object for sigemptyset to initialise.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is a sigset_t that outlives the calls. A number that is no signal is refused.
        unsafe {
            libc::sigemptyset(&raw mut set);
            for number in numbers {
                super::check(libc::sigaddset(&raw mut set, *number))?;
            }
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `set` is initialised and only read.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        super::check(fd)?;
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        Ok(Signals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The descriptor, readable when a signal waits.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The number of the next signal that has come, or `None`. Never blocks.
    ///
    /// # Errors
    /// When the descriptor cannot be read.
    pub fn next(&self) -> io::Result<Option<i32>> {
        // SAFETY: an all-zero signalfd_siginfo is a valid one.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for `size` bytes and outlives the call.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut info).cast(), size) };
        match super::check(got as i64) {
            Ok(_) => Ok(i32::try_from(info.ssi_signo).ok()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}
