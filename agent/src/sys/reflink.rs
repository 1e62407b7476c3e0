//! Copies that share their blocks with the original until one is written: the FICLONE ioctl.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `FICLONE`, `_IOW(0x94, 9, int)`, linux/fs.h.
const FICLONE: libc::Ioctl = 0x4004_9409;

/// Makes `to` (open for writing, empty) a copy of `from`. Fails with EOPNOTSUPP, EXDEV, EINVAL or ENOTTY
/// where the filesystem has no such thing, see [`unsupported`].
pub fn clone(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes the source descriptor by value and touches no memory of ours.
    super::check(unsafe { libc::ioctl(to.as_raw_fd(), FICLONE, from.as_raw_fd()) })?;
    Ok(())
}

/// Whether this error of [`clone`] means that the filesystem cannot do it, rather than that it failed.
pub fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EXDEV | libc::EINVAL | libc::ENOTTY | libc::ENOSYS)
    )
}
