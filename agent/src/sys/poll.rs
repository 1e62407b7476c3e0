//! Waiting for one descriptor: poll(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Waits until one of `events` (`POLLIN`, `POLLOUT`) is there for `fd`, it is hung up, or the time is over;
/// which of these it was shows when the descriptor is used. A signal ends the wait early. Blocks.
pub fn wait(fd: BorrowedFd<'_>, events: libc::c_short, at_most: Duration) -> io::Result<()> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // At least a millisecond: rounding down would spin.
    let timeout_ms = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX).max(1);
    // SAFETY: `poll` is one pollfd, as the count says, and outlives the call.
    match super::check(unsafe { libc::poll(&raw mut poll, 1, timeout_ms) }) {
        Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(()),
    }
}
