//! Network namespaces: unshare(2), setns(2), and the bind mounts that give them names, mount(2).
//!
//! A namespace belongs to a thread, so nothing here may run on a thread that goes on to do other work:
//! callers use a helper thread of its own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The calling thread's network namespace, as a file.
pub const OWN_NETWORK: &str = "/proc/thread-self/ns/net";

/// Moves the calling thread into a new, empty network namespace.
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: unshare takes flags by value; only this thread's namespace changes.
    super::check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Moves the calling thread into the network namespace that `namespace` refers to.
pub fn enter_network(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns takes its arguments by value; only this thread's namespace changes.
    super::check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Mounts the file or directory `source` over the existing `target`; `recursive` takes the mounts below
/// it along.
pub fn bind_mount(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let recursive = if recursive { libc::MS_REC } else { 0 };
    mount(source, target, libc::MS_BIND | recursive)
}

/// Makes the mount at `target` propagate what happens below it to its copies in other mount namespaces.
/// EINVAL when `target` is not a mount.
pub fn make_shared(target: &Path) -> io::Result<()> {
    mount(Path::new(""), target, libc::MS_SHARED | libc::MS_REC)
}

/// Takes away the topmost mount at `target`, even when it is still in use by somebody. EINVAL when there
/// is none.
pub fn unmount(target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: `target` is a NUL-terminated string that outlives the call.
    super::check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) })?;
    Ok(())
}

fn mount(source: &Path, target: &Path, flags: libc::c_ulong) -> io::Result<()> {
    let (source, target) = (c_path(source)?, c_path(target)?);
    // SAFETY: the strings are NUL-terminated and outlive the call; the data argument may be null.
    let returned =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), c"none".as_ptr(), flags, std::ptr::null()) };
    super::check(returned)?;
    Ok(())
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
