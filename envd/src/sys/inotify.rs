//! inotify(7).

use super::fd::Fd;
use super::syscall::{Errno, syscall};
use core::ffi::CStr;

/// What is watched for: changes of entries, and of the directory itself only its end.
const WATCHED: u32 = libc::IN_CREATE
    | libc::IN_MODIFY
    | libc::IN_ATTRIB
    | libc::IN_DELETE
    | libc::IN_MOVED_FROM
    | libc::IN_MOVED_TO
    | libc::IN_ONLYDIR
    | libc::IN_DONT_FOLLOW
    | libc::IN_EXCL_UNLINK;
/// Bytes of `struct inotify_event` before the name.
const HEADER: usize = 16;

/// One event, as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'a> {
    /// Which watch; -1 for an overflow.
    pub watch: i32,
    /// `IN_CREATE` and so on.
    pub mask: u32,
    /// The same for both halves of a move.
    pub cookie: u32,
    /// The entry's name; empty for the directory itself.
    pub name: &'a [u8],
}

/// A new instance, non-blocking.
pub fn new() -> Result<Fd, Errno> {
    // SAFETY: takes flags only.
    let fd = unsafe { syscall!(libc::SYS_inotify_init1, libc::IN_CLOEXEC | libc::IN_NONBLOCK) }?;
    Ok(Fd::new(fd))
}

/// Watches a directory; the same number again when it is watched already.
pub fn add(instance: &Fd, path: &CStr) -> Result<i32, Errno> {
    // SAFETY: the path is NUL-terminated.
    let watch = unsafe { syscall!(libc::SYS_inotify_add_watch, instance.raw(), path.as_ptr(), WATCHED) }?;
    Ok(watch as i32)
}

/// Ends a watch.
pub fn remove(instance: &Fd, watch: i32) {
    // SAFETY: integer arguments. It fails only when the watch has ended by itself.
    let _ = unsafe { syscall!(libc::SYS_inotify_rm_watch, instance.raw(), watch) };
}

/// The events in what was read from an instance.
pub fn events(bytes: &[u8]) -> impl Iterator<Item = Event<'_>> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let word = |at: usize| rest.get(at..at + 4).map(|b| [b[0], b[1], b[2], b[3]]);
        let (watch, mask, cookie, length) = (word(0)?, word(4)?, word(8)?, word(12)?);
        let length = u32::from_ne_bytes(length) as usize;
        let name = rest.get(HEADER..HEADER.checked_add(length)?)?;
        rest = &rest[HEADER + length..];
        // Names are padded with NUL bytes.
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        Some(Event {
            watch: i32::from_ne_bytes(watch),
            mask: u32::from_ne_bytes(mask),
            cookie: u32::from_ne_bytes(cookie),
            name: &name[..end],
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn events_are_cut_from_what_was_read() {
        let mut bytes = Vec::new();
        for (watch, mask, cookie, name) in [(1i32, 0x100u32, 0u32, &b"a\0\0\0"[..]), (2, 0x40, 7, b"")] {
            bytes.extend_from_slice(&watch.to_ne_bytes());
            bytes.extend_from_slice(&mask.to_ne_bytes());
            bytes.extend_from_slice(&cookie.to_ne_bytes());
            bytes.extend_from_slice(&(name.len() as u32).to_ne_bytes());
            bytes.extend_from_slice(name);
        }
        let all: Vec<_> = events(&bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0], Event { watch: 1, mask: 0x100, cookie: 0, name: b"a" });
        assert_eq!(all[1], Event { watch: 2, mask: 0x40, cookie: 7, name: b"" });
        for end in 0..bytes.len() {
            assert!(events(&bytes[..end]).count() < 2);
        }
    }
}
