//! TAP devices: /dev/net/tun and TUNSETIFF, linux/if_tun.h.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// `TUNSETIFF`, `_IOW('T', 202, int)`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// `TUNSETPERSIST` and `TUNSETOWNER`, `_IOW('T', 203, int)` and `_IOW('T', 204, int)`.
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNSETOWNER: libc::Ioctl = 0x4004_54cc;

/// The control device.
pub const CONTROL_DEVICE: &str = "/dev/net/tun";

/// Makes the TAP device `name` in the calling thread's network namespace. It carries a virtio-net header
/// (so that checksums and segmentation can be left to the other end), lives as long as the descriptor,
/// and EBUSY means that the name is taken.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file: File =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(CONTROL_DEVICE)?;
    // SAFETY: an all-zero ifreq is a valid one: it is plain integers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // IFF_TUN_EXCL refuses to attach to a device that somebody else has made.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    super::check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    Ok(file.into())
}

/// Lets the user `uid` open the TAP device of `tap` by its name, and keeps it when that descriptor is closed:
/// it then goes with its namespace.
pub fn leave_to(tap: BorrowedFd<'_>, uid: u32) -> io::Result<()> {
    // SAFETY: both take an integer by value and touch no memory of ours.
    unsafe {
        super::check(libc::ioctl(tap.as_raw_fd(), TUNSETOWNER, libc::c_ulong::from(uid)))?;
        super::check(libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, 1 as libc::c_ulong))?;
    }
    Ok(())
}
