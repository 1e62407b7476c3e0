//! epoll(7), level-triggered.

use super::fd::Fd;
use super::syscall::{Errno, syscall};

/// Events fetched with one call.
pub const BATCH: usize = 64;

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll {
    fd: Fd,
    events: [libc::epoll_event; BATCH],
}

/// What happened to one descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// The number that the descriptor was added with.
    pub token: u64,
    /// `EPOLLIN` and so on.
    pub events: u32,
}

impl Epoll {
    /// A new instance.
    pub fn new() -> Result<Epoll, Errno> {
        // SAFETY: takes a flag only.
        let fd = unsafe { syscall!(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC) }?;
        Ok(Epoll { fd: Fd::new(fd), events: [libc::epoll_event { events: 0, u64: 0 }; BATCH] })
    }

    fn control(&self, operation: i32, fd: &Fd, events: u32, token: u64) -> Result<(), Errno> {
        let event = libc::epoll_event { events, u64: token };
        // SAFETY: the event lives for the call.
        unsafe { syscall!(libc::SYS_epoll_ctl, self.fd.raw(), operation, fd.raw(), &raw const event) }?;
        Ok(())
    }

    /// Starts to watch a descriptor.
    pub fn add(&self, fd: &Fd, events: i32, token: u64) -> Result<(), Errno> {
        self.control(libc::EPOLL_CTL_ADD, fd, events as u32, token)
    }

    /// Changes what is watched for.
    pub fn modify(&self, fd: &Fd, events: i32, token: u64) -> Result<(), Errno> {
        self.control(libc::EPOLL_CTL_MOD, fd, events as u32, token)
    }

    /// Stops to watch a descriptor.
    pub fn remove(&self, fd: &Fd) {
        // It fails only for a descriptor that is not watched, which is what is wanted.
        let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
    }

    /// Waits up to `timeout_ms` (-1: without end) and returns how many events there are.
    pub fn wait(&mut self, timeout_ms: i32) -> Result<usize, Errno> {
        // SAFETY: the kernel writes at most BATCH events.
        let result = unsafe {
            syscall!(
                libc::SYS_epoll_pwait,
                self.fd.raw(),
                self.events.as_mut_ptr(),
                BATCH,
                timeout_ms,
                core::ptr::null::<u8>(),
                8
            )
        };
        match result {
            Err(Errno(libc::EINTR)) => Ok(0),
            other => other,
        }
    }

    /// The `index`th event of the last [`Epoll::wait`].
    pub fn ready(&self, index: usize) -> Ready {
        let event = self.events[index];
        Ready { token: event.u64, events: event.events }
    }
}
