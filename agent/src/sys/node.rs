//! Special files: mknod(2); and Unix sockets, unix(7): connecting, and who is at the other end.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Makes a block device file for the device `number` that its owner alone may use.
pub fn make_block(path: &Path, number: libc::dev_t) -> io::Result<()> {
    make(path, libc::S_IFBLK, number)
}

/// Makes a named pipe that its owner alone may use.
pub fn make_fifo(path: &Path) -> io::Result<()> {
    make(path, libc::S_IFIFO, 0)
}

fn make(path: &Path, kind: libc::mode_t, number: libc::dev_t) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    super::check(unsafe { libc::mknod(path.as_ptr(), kind | 0o600, number) })?;
    Ok(())
}

/// The process that listens on the socket that a stream is connected to, by its number.
pub fn peer_pid(stream: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: SO_PEERCRED writes at most `length` bytes, which is the size of `peer`, and `length` itself.
    super::check(unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    })?;
    u32::try_from(peer.pid).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Connects to a socket of the file system, without waiting, and gives a stream that does not wait either.
///
/// # Errors
/// What the kernel says: `WouldBlock` where more connections wait for whoever listens than fit, connect(2), for
/// which a blocking connect would wait without an end.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    mio::net::UnixStream::connect(path).map(UnixStream::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileTypeExt;

    #[test]
    fn a_pipe_is_made_once_and_a_peer_is_known() -> io::Result<()> {
        let path = std::env::temp_dir().join(format!("wrenn-node-{}", std::process::id()));
        make_fifo(&path)?;
        assert!(std::fs::metadata(&path)?.file_type().is_fifo());
        assert_eq!(make_fifo(&path).map_err(|e| e.kind()), Err(io::ErrorKind::AlreadyExists));
        std::fs::remove_file(&path)?;
        let (one, _other) = UnixStream::pair()?;
        assert_eq!(peer_pid(one.as_fd())?, std::process::id());
        Ok(())
    }

    #[test]
    fn a_listener_that_accepts_nobody_holds_nobody_up() -> io::Result<()> {
        let path = std::env::temp_dir().join(format!("wrenn-backlog-{}", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path)?;
        // SAFETY: no pointers; a second listen only changes how many may wait.
        crate::sys::check(unsafe { libc::listen(listener.as_raw_fd(), 0) })?;
        let first = connect(&path)?;
        assert_eq!(connect(&path).map_err(|e| e.kind()).err(), Some(io::ErrorKind::WouldBlock));
        let (mut accepted, _) = listener.accept()?;
        std::io::Write::write_all(&mut accepted, b"x")?;
        let mut read = [0];
        assert_eq!(std::io::Read::read(&mut &first, &mut read)?, 1);
        let again = std::io::Read::read(&mut &first, &mut read);
        assert_eq!(again.map_err(|e| e.kind()), Err(io::ErrorKind::WouldBlock));
        std::fs::remove_file(&path)
    }
}
