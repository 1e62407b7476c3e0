//! The sockets of the kernel's routing subsystem, rtnetlink(7), and of its packet filter: bytes out, bytes in. What
//! the bytes mean is in [`crate::net::netlink`].

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// How long the kernel may take to answer one request.
const ANSWER_TIMEOUT_SEC: libc::time_t = 5;

/// A netlink socket. It acts on the network namespace of the thread that opened it, for ever.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket of the routing subsystem on the calling thread's network namespace.
    pub fn open() -> io::Result<Socket> {
        Socket::of(libc::NETLINK_ROUTE)
    }

    /// Opens a socket of the packet filter on the calling thread's network namespace.
    pub fn open_netfilter() -> io::Result<Socket> {
        Socket::of(libc::NETLINK_NETFILTER)
    }

    fn of(family: libc::c_int) -> io::Result<Socket> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes its arguments by value.
        let fd = super::check(unsafe { libc::socket(libc::AF_NETLINK, kind, family) })?;
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd) });
        let timeout = libc::timeval { tv_sec: ANSWER_TIMEOUT_SEC, tv_usec: 0 };
        socket.set_option(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)?;
        // An error's text beside its number, and no copy of the request.
        socket.set_option::<libc::c_int>(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &1)?;
        socket.set_option::<libc::c_int>(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &1)?;
        Ok(socket)
    }

    /// Sends one request.
    pub fn send(&self, request: &[u8]) -> io::Result<()> {
        // SAFETY: the pointer and the length describe `request`. An unconnected netlink socket sends to
        // the kernel.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
        super::check(sent as i64)?;
        Ok(())
    }

    /// Receives one datagram into `buffer` and returns its length; TimedOut when the kernel is silent.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the pointer and the length describe `buffer`, which is writable and outlives the call.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match super::check(got as i64) {
            Ok(count) => Ok(count as usize),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            Err(e) => Err(e),
        }
    }

    fn set_option<T>(&self, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
        let length = size_of::<T>() as libc::socklen_t;
        // SAFETY: the pointer and the length describe `value`, which outlives the call.
        let returned =
            unsafe { libc::setsockopt(self.0.as_raw_fd(), level, name, (value as *const T).cast(), length) };
        super::check(returned)?;
        Ok(())
    }
}
