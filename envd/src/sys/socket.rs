//! TCP sockets, all non-blocking and closed on exec.

use super::fd::Fd;
use super::syscall::{Errno, syscall, uninterrupted};
use core::net::{Ipv4Addr, SocketAddrV4, SocketAddrV6};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

fn address(at: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: at.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(at.ip().octets()) },
        sin_zero: [0; 8],
    }
}

fn stream_socket() -> Result<Fd, Errno> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: integer arguments.
    Ok(Fd::new(unsafe { syscall!(libc::SYS_socket, libc::AF_INET, kind, 0) }?))
}

fn set_option(fd: &Fd, level: i32, name: i32, value: i32) -> Result<(), Errno> {
    // SAFETY: the value lives for the call.
    unsafe { syscall!(libc::SYS_setsockopt, fd.raw(), level, name, &raw const value, size_of::<i32>()) }?;
    Ok(())
}

/// Listens; `port` 0 lets the kernel choose one.
pub fn listen(at: SocketAddrV4) -> Result<Fd, Errno> {
    let fd = stream_socket()?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let addr = address(at);
    // SAFETY: the address lives for the call.
    unsafe {
        syscall!(libc::SYS_bind, fd.raw(), &raw const addr, size_of::<libc::sockaddr_in>())?;
        syscall!(libc::SYS_listen, fd.raw(), BACKLOG)?;
    }
    Ok(fd)
}

/// Where a socket is bound.
pub fn local_address(fd: &Fd) -> Result<SocketAddrV4, Errno> {
    let mut addr = address(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    let mut length = size_of::<libc::sockaddr_in>() as u32;
    // SAFETY: address and length live for the call, and the length is the address's.
    unsafe { syscall!(libc::SYS_getsockname, fd.raw(), &raw mut addr, &raw mut length) }?;
    Ok(SocketAddrV4::new(Ipv4Addr::from(addr.sin_addr.s_addr.to_ne_bytes()), u16::from_be(addr.sin_port)))
}

/// Takes a connection that waits; `EAGAIN` when none does.
pub fn accept(listener: &Fd) -> Result<Fd, Errno> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: null pointers: the peer's address is not asked for.
    let fd = uninterrupted(|| unsafe { syscall!(libc::SYS_accept4, listener.raw(), 0usize, 0usize, flags) })?;
    let fd = Fd::new(fd);
    // Messages are small and answered: waiting to fill a segment would only add delay.
    set_option(&fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    Ok(fd)
}

/// Starts to connect. The socket is writable once it is connected or has failed; see [`take_error`].
pub fn connect(to: SocketAddrV4) -> Result<Fd, Errno> {
    let fd = stream_socket()?;
    set_option(&fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    let addr = address(to);
    // SAFETY: the address lives for the call.
    let result =
        unsafe { syscall!(libc::SYS_connect, fd.raw(), &raw const addr, size_of::<libc::sockaddr_in>()) };
    match result {
        Ok(_) | Err(Errno(libc::EINPROGRESS)) => Ok(fd),
        Err(e) => Err(e),
    }
}

/// As [`connect`], by IPv6.
pub fn connect_v6(to: SocketAddrV6) -> Result<Fd, Errno> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let addr = libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as u16,
        sin6_port: to.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
        sin6_scope_id: 0,
    };
    // SAFETY: integer arguments; the address lives for the call.
    let (fd, result) = unsafe {
        let fd = Fd::new(syscall!(libc::SYS_socket, libc::AF_INET6, kind, 0)?);
        let length = size_of::<libc::sockaddr_in6>();
        let result = syscall!(libc::SYS_connect, fd.raw(), &raw const addr, length);
        (fd, result)
    };
    set_option(&fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    match result {
        Ok(_) | Err(Errno(libc::EINPROGRESS)) => Ok(fd),
        Err(e) => Err(e),
    }
}

/// Whether a socket is connected.
pub fn is_connected(fd: &Fd) -> bool {
    let mut addr = [0u8; size_of::<libc::sockaddr_in6>()];
    let mut length = addr.len() as u32;
    // SAFETY: buffer and length live for the call, and the length is the buffer's.
    unsafe { syscall!(libc::SYS_getpeername, fd.raw(), addr.as_mut_ptr(), &raw mut length) }.is_ok()
}

/// The pending error of a socket.
pub fn take_error(fd: &Fd) -> Result<(), Errno> {
    let mut error = 0i32;
    let mut length = size_of::<i32>() as u32;
    // SAFETY: value and length live for the call, and the length is the value's.
    unsafe {
        syscall!(
            libc::SYS_getsockopt,
            fd.raw(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            &raw mut error,
            &raw mut length
        )
    }?;
    if error == 0 { Ok(()) } else { Err(Errno(error)) }
}

/// Sends; may take less than all. A closed peer is an error, never a signal.
pub fn send(fd: &Fd, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the bytes are readable for their length; no address is given.
    uninterrupted(|| unsafe {
        syscall!(libc::SYS_sendto, fd.raw(), bytes.as_ptr(), bytes.len(), libc::MSG_NOSIGNAL, 0usize, 0usize)
    })
}

/// Ends the sending half.
pub fn shutdown_send(fd: &Fd) {
    // SAFETY: integer arguments. It fails only when the connection is gone already.
    let _ = unsafe { syscall!(libc::SYS_shutdown, fd.raw(), libc::SHUT_WR) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_connection_carries_bytes() {
        let listener = listen(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("listen");
        let at = local_address(&listener).expect("address");
        assert_eq!(*at.ip(), Ipv4Addr::LOCALHOST);
        assert_eq!(accept(&listener), Err(Errno(libc::EAGAIN)));
        let client = connect(at).expect("connect");
        super::super::clock::sleep_us(10_000);
        take_error(&client).expect("connected");
        let server = accept(&listener).expect("accept");
        assert_eq!(send(&client, b"hi"), Ok(2));
        super::super::clock::sleep_us(10_000);
        let mut buffer = [0; 4];
        assert_eq!(server.read(&mut buffer), Ok(2));
        shutdown_send(&client);
    }
}
