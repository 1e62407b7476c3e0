//! What network policies are made of, for those who check what a person asks and those who carry it out.

use core::net::Ipv4Addr;

/// The most rules of each list of [`CapsuleNetwork`](crate::message::CapsuleNetwork).
pub const MAX_RULES: usize = 64;
/// The least kilobits a second of a limit: less would not carry a packet a second.
pub const MIN_KBIT: u32 = 16;
/// The most kilobits a second that a limit may be; where there is more, there need be no limit.
pub const MAX_KBIT: u32 = 100_000_000;
/// The most packets a second that a limit may be.
pub const MAX_PACKETS: u32 = 100_000_000;

/// Networks that are not the public internet, which no capsule reaches whatever its policy says: address and
/// length of prefix. From IANA's special-purpose address registry (RFC 6890 and updates), and multicast.
pub const NOT_INTERNET: [(Ipv4Addr, u8); 15] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// The network of this prefix, at most 32 long, that an address is in: its bits beyond the prefix are zero.
pub fn network_of(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let bits =
        32u32.checked_sub(u32::from(prefix)).and_then(|zeros| u32::MAX.checked_shl(zeros)).unwrap_or(0);
    Ipv4Addr::from_bits(address.to_bits() & bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_keeps_its_bits() {
        let address = Ipv4Addr::new(203, 0, 113, 255);
        for (prefix, network) in
            [(0, [0; 4]), (8, [203, 0, 0, 0]), (25, [203, 0, 113, 128]), (32, [203, 0, 113, 255])]
        {
            assert_eq!(network_of(address, prefix), Ipv4Addr::from(network), "/{prefix}");
        }
        for (address, prefix) in NOT_INTERNET {
            assert_eq!(network_of(address, prefix), address);
        }
    }
}
