//! Network interfaces: addresses, flags and the default route, by ioctl (netdevice(7), route(7)).

use super::fd::Fd;
use super::syscall::{Errno, syscall};
use core::net::Ipv4Addr;

/// `struct ifreq` with the two members of its union that are used here (include/uapi/linux/if.h).
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    data: RequestData,
}

#[repr(C)]
union RequestData {
    address: libc::sockaddr_in,
    flags: i16,
    whole: [u8; 24],
}

/// `struct rtentry` (include/uapi/linux/route.h).
#[repr(C)]
struct RouteEntry {
    pad1: u64,
    destination: libc::sockaddr_in,
    gateway: libc::sockaddr_in,
    mask: libc::sockaddr_in,
    flags: u16,
    pad2: i16,
    pad3: u64,
    pad4: [u8; 8],
    metric: i16,
    device: *const u8,
    mtu: u64,
    window: u64,
    initial_rtt: u16,
}

/// The longest interface name, in bytes.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// A socket to configure interfaces through.
#[derive(Debug)]
pub struct Configurator {
    socket: Fd,
}

fn socket_address(ip: Ipv4Addr) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
        sin_zero: [0; 8],
    }
}

fn request(interface: &str) -> Result<InterfaceRequest, Errno> {
    let mut name = [0; libc::IFNAMSIZ];
    if interface.is_empty() || interface.len() > MAX_NAME {
        return Err(Errno(libc::EINVAL));
    }
    name[..interface.len()].copy_from_slice(interface.as_bytes());
    Ok(InterfaceRequest { name, data: RequestData { whole: [0; 24] } })
}

impl Configurator {
    /// Opens the socket.
    pub fn new() -> Result<Configurator, Errno> {
        // SAFETY: integer arguments.
        let fd =
            unsafe { syscall!(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }?;
        Ok(Configurator { socket: Fd::new(fd) })
    }

    fn ioctl(&self, number: libc::c_ulong, request: &mut InterfaceRequest) -> Result<(), Errno> {
        // SAFETY: the request is a whole `struct ifreq` and lives for the call.
        unsafe { syscall!(libc::SYS_ioctl, self.socket.raw(), number, &raw mut *request) }?;
        Ok(())
    }

    /// Brings an interface up.
    pub fn bring_up(&self, interface: &str) -> Result<(), Errno> {
        let mut request = request(interface)?;
        self.ioctl(libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
        // SAFETY: the ioctl has filled in the flags.
        let flags = unsafe { request.data.flags };
        request.data.flags = flags | (libc::IFF_UP as i16);
        self.ioctl(libc::SIOCSIFFLAGS as libc::c_ulong, &mut request)
    }

    /// Sets an interface's address and network mask.
    pub fn set_address(&self, interface: &str, ip: Ipv4Addr, mask: Ipv4Addr) -> Result<(), Errno> {
        let mut address = request(interface)?;
        address.data.address = socket_address(ip);
        self.ioctl(libc::SIOCSIFADDR as libc::c_ulong, &mut address)?;
        let mut netmask = request(interface)?;
        netmask.data.address = socket_address(mask);
        self.ioctl(libc::SIOCSIFNETMASK as libc::c_ulong, &mut netmask)
    }

    /// Adds the default route.
    pub fn set_gateway(&self, gateway: Ipv4Addr) -> Result<(), Errno> {
        let any = socket_address(Ipv4Addr::UNSPECIFIED);
        let entry = RouteEntry {
            pad1: 0,
            destination: any,
            gateway: socket_address(gateway),
            mask: any,
            flags: libc::RTF_UP | libc::RTF_GATEWAY,
            pad2: 0,
            pad3: 0,
            pad4: [0; 8],
            metric: 0,
            device: core::ptr::null(),
            mtu: 0,
            window: 0,
            initial_rtt: 0,
        };
        // SAFETY: the entry is a whole `struct rtentry` and lives for the call.
        unsafe { syscall!(libc::SYS_ioctl, self.socket.raw(), libc::SIOCADDRT, &raw const entry) }?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!(size_of::<InterfaceRequest>(), 40);
        assert_eq!(size_of::<RouteEntry>(), size_of::<libc::rtentry>());
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(request("eth0").is_ok());
        assert!(request("").is_err());
        assert!(request("a-name-of-16-chr").is_err());
    }
}
