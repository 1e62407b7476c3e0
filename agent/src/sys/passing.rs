//! Handing an open file to another process over a Unix socket: SCM_RIGHTS, unix(7).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// Room for one control message with one descriptor, with the alignment that cmsg(3) wants.
#[repr(align(8))]
struct Control([u8; 64]);

/// Sends `bytes`, at least one, and with the first of them `file`. Returns how many bytes were taken; the
/// file has gone with them.
///
/// # Errors
/// As sendmsg(2); `WouldBlock` where the socket does not take any now.
pub fn send_with_file(socket: BorrowedFd<'_>, bytes: &[u8], file: BorrowedFd<'_>) -> io::Result<usize> {
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([0; 64]);
    let fd: RawFd = file.as_raw_fd();
    let fd_bytes = size_of::<RawFd>() as u32;
    // SAFETY: an all-zero msghdr is a valid one. CMSG_SPACE of one descriptor is 24, which `control` has
    // room for; CMSG_FIRSTHDR then points into it, and CMSG_DATA to room for the descriptor. sendmsg reads
    // `bytes`, which outlives the call and which it does not write to.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(fd_bytes) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(fd_bytes) as usize;
        std::ptr::copy_nonoverlapping(
            (&raw const fd).cast::<u8>(),
            libc::CMSG_DATA(header),
            size_of::<RawFd>(),
        );
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
    };
    super::check(sent as i64).map(|count| count as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_come_with_a_file() -> io::Result<()> {
        let (ours, mut theirs) = UnixStream::pair()?;
        let file = std::fs::File::open("/dev/null")?;
        assert_eq!(send_with_file(ours.as_fd(), b"hello", file.as_fd())?, 5);
        let mut bytes = [0; 5];
        // A plain read takes the bytes and drops the descriptor.
        theirs.read_exact(&mut bytes)?;
        assert_eq!(&bytes, b"hello");
        drop(theirs);
        let refused = send_with_file(ours.as_fd(), b"x", file.as_fd()).map_err(|e| e.raw_os_error());
        assert_eq!(refused, Err(Some(libc::EPIPE)));
        Ok(())
    }
}
