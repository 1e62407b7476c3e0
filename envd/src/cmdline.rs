//! The kernel's command line, as far as an init reads it: `root=`, `rootfstype=`, `ro`/`rw` and `ip=`
//! (Documentation/admin-guide/nfs/nfsroot.rst in the kernel).

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::net::Ipv4Addr;

/// What the command line says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommandLine {
    /// Device of the root file system.
    pub root: String,
    /// Its type.
    pub root_type: String,
    /// Whether it is mounted writable.
    pub root_writable: bool,
    /// The network, when `ip=` is given and is well-formed.
    pub network: Option<Network>,
    /// `wrenn.announce`: init says on the console that it has started, for measuring the boot.
    pub announce: bool,
    /// An `ip=` that is not well-formed, for the complaint.
    pub bad_network: Option<String>,
}

/// `ip=client:server:gateway:netmask:hostname:device:autoconf:dns0:dns1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// This machine's address.
    pub address: Ipv4Addr,
    /// The default route's gateway.
    pub gateway: Option<Ipv4Addr>,
    /// The network mask; by the address's class when not given, as the kernel has it.
    pub mask: Ipv4Addr,
    /// The host name; empty when not given.
    pub host_name: String,
    /// The interface; empty for the first that is not the loopback.
    pub device: String,
    /// Name servers.
    pub name_servers: Vec<Ipv4Addr>,
}

/// The longest host name, `HOST_NAME_MAX`.
pub const MAX_HOST_NAME: usize = 64;

/// Reads the command line. The last of several equal parameters holds, as in the kernel.
pub fn parse(line: &str) -> CommandLine {
    let mut parsed = CommandLine { root_type: "ext4".to_string(), ..CommandLine::default() };
    for word in line.split_ascii_whitespace() {
        match word.split_once('=') {
            Some(("root", device)) => parsed.root = device.to_string(),
            Some(("rootfstype", kind)) => parsed.root_type = kind.to_string(),
            Some(("ip", value)) => {
                parsed.network = parse_network(value);
                parsed.bad_network = parsed.network.is_none().then(|| value.to_string());
            }
            None if word == "rw" => parsed.root_writable = true,
            None if word == "wrenn.announce" => parsed.announce = true,
            None if word == "ro" => parsed.root_writable = false,
            // What follows is for init itself, which takes nothing.
            None if word == "--" => break,
            _ => {}
        }
    }
    parsed
}

fn parse_network(value: &str) -> Option<Network> {
    let fields: Vec<&str> = value.split(':').collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or("");
    let optional = |text: &str| -> Option<Option<Ipv4Addr>> {
        if text.is_empty() { Some(None) } else { text.parse().ok().map(Some) }
    };
    let address: Ipv4Addr = field(0).parse().ok()?;
    let gateway = optional(field(2))?;
    let mask = optional(field(3))?.unwrap_or_else(|| class_mask(address));
    // A mask is ones, then zeros.
    if mask.to_bits().leading_ones() + mask.to_bits().trailing_zeros() != 32 {
        return None;
    }
    let host_name = field(4);
    if host_name.len() > MAX_HOST_NAME || !host_name.bytes().all(is_host_name_byte) {
        return None;
    }
    let device = field(5);
    if device.len() > crate::sys::link::MAX_NAME || device.contains('/') {
        return None;
    }
    // Only "no autoconfiguration" can be done without a client for it.
    if !matches!(field(6), "" | "off" | "none") {
        return None;
    }
    let mut name_servers = Vec::new();
    for index in [7, 8] {
        name_servers.extend(optional(field(index))?);
    }
    Some(Network {
        address,
        gateway,
        mask,
        host_name: host_name.to_string(),
        device: device.to_string(),
        name_servers,
    })
}

fn is_host_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' || byte == b'_'
}

fn class_mask(address: Ipv4Addr) -> Ipv4Addr {
    match address.octets()[0] {
        0..=127 => Ipv4Addr::new(255, 0, 0, 0),
        128..=191 => Ipv4Addr::new(255, 255, 0, 0),
        _ => Ipv4Addr::new(255, 255, 255, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_command_line_is_read_in_full() {
        let line = "console=ttyS0 quiet loglevel=1 root=/dev/vda rw \
            ip=169.254.0.21::169.254.0.22:255.255.255.252:cl-abc:eth0:off:1.1.1.1 panic=-1\n";
        let parsed = parse(line);
        assert_eq!((parsed.root.as_str(), parsed.root_type.as_str()), ("/dev/vda", "ext4"));
        assert!(parsed.root_writable);
        let network = parsed.network.expect("ip=");
        assert_eq!(network.address, Ipv4Addr::new(169, 254, 0, 21));
        assert_eq!(network.gateway, Some(Ipv4Addr::new(169, 254, 0, 22)));
        assert_eq!(network.mask, Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!((network.host_name.as_str(), network.device.as_str()), ("cl-abc", "eth0"));
        assert_eq!(network.name_servers, [Ipv4Addr::new(1, 1, 1, 1)]);
    }

    #[test]
    fn fields_may_be_missing() {
        let network = parse("ip=10.0.0.2").network.expect("ip=");
        assert_eq!(network.mask, Ipv4Addr::new(255, 0, 0, 0));
        assert_eq!((network.gateway, network.device.as_str()), (None, ""));
        assert_eq!(parse("quiet").network, None);
        assert!(!parse("rw ro").root_writable);
        assert_eq!(parse("a -- root=/dev/x").root, "");
    }

    #[test]
    fn nonsense_is_reported_and_not_guessed_at() {
        for bad in [
            "dhcp",
            "10.0.0.256",
            "10.0.0.1:::255.0.255.0",
            "10.0.0.1::gw",
            "10.0.0.1:::::an-interface-name-too-long",
            "10.0.0.1::::::dhcp",
            "10.0.0.1::::h/../x",
            "10.0.0.1:::::::x",
        ] {
            let parsed = parse(&alloc::format!("ip={bad}"));
            assert_eq!(parsed.network, None, "{bad}");
            assert_eq!(parsed.bad_network.as_deref(), Some(bad));
        }
    }
}
