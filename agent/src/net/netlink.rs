//! rtnetlink requests and answers as bytes, rtnetlink(7): linux/netlink.h, linux/rtnetlink.h,
//! linux/if_link.h, linux/neighbour.h. A message is a header, a fixed part that depends on its kind, and
//! attributes {u16 length, u16 type, value, padding to 4}. Integers are in the machine's own order,
//! addresses in the network's.

use super::mac::MacAddress;
use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

pub(super) const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;

const NLM_F_REQUEST: u16 = 0x01;
const NLM_F_ACK: u16 = 0x04;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// In an answer: the request is not quoted in full, and attributes follow its header.
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const NUD_PERMANENT: u16 = 0x80;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;

pub(super) const HEADER_SIZE: usize = 16;
const LINK_FIXED_SIZE: usize = 16;

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// Its name, at most 15 bytes.
    pub name: &'a str,
    /// Its Ethernet address.
    pub mac: MacAddress,
}

/// A request to the kernel, complete but for its sequence number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request(Vec<u8>);

impl Request {
    /// A veth pair, both ends down: `host` here, `peer` in the namespace that `namespace` refers to.
    pub fn create_veth(host: VethEnd<'_>, peer: VethEnd<'_>, mtu: u32, namespace: BorrowedFd<'_>) -> Request {
        let mut request = Request::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
        request.link(0, 0, 0);
        request.veth_end(host, mtu);
        request.nested(IFLA_LINKINFO, |r| {
            r.attribute(IFLA_INFO_KIND, b"veth");
            r.nested(IFLA_INFO_DATA, |r| {
                r.nested(VETH_INFO_PEER, |r| {
                    r.link(0, 0, 0);
                    r.veth_end(peer, mtu);
                    r.attribute(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes());
                });
            });
        });
        request
    }

    /// Brings the link `index` up, with this Ethernet address or the one that it has.
    pub fn bring_up(index: u32, mac: Option<MacAddress>) -> Request {
        let mut request = Request::new(RTM_NEWLINK, 0);
        request.link(index, IFF_UP, IFF_UP);
        if let Some(mac) = mac {
            request.attribute(IFLA_ADDRESS, &mac.0);
        }
        request
    }

    /// Deletes the link `name`; of a veth pair both ends go.
    pub fn delete_link(name: &str) -> Request {
        let mut request = Request::new(RTM_DELLINK, 0);
        request.link(0, 0, 0);
        request.name(name);
        request
    }

    /// Asks for the link `name`; the answer is read with [`Answer::Link`].
    pub fn get_link(name: &str) -> Request {
        let mut request = Request::new(RTM_GETLINK, 0);
        request.link(0, 0, 0);
        request.name(name);
        request
    }

    /// Gives the link `index` an address, with the route to its subnet.
    pub fn add_address(index: u32, address: Ipv4Addr, prefix: u8) -> Request {
        let mut request = Request::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL);
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        request.0.extend([AF_INET, prefix, 0, RT_SCOPE_UNIVERSE]);
        request.0.extend(index.to_ne_bytes());
        request.attribute(IFA_LOCAL, &address.octets());
        request.attribute(IFA_ADDRESS, &address.octets());
        request
    }

    /// A route to `destination`/`prefix` (0.0.0.0/0 is the default route) through `gateway`, which is
    /// reached directly over the link `index`.
    pub fn add_route(destination: Ipv4Addr, prefix: u8, gateway: Ipv4Addr, index: u32) -> Request {
        let mut request = Request::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL);
        // struct rtmsg: family, destination and source prefix length, tos, table, protocol, scope, type,
        // flags.
        request.0.extend([
            AF_INET,
            prefix,
            0,
            0,
            RT_TABLE_MAIN,
            RTPROT_STATIC,
            RT_SCOPE_UNIVERSE,
            RTN_UNICAST,
        ]);
        request.0.extend(0u32.to_ne_bytes());
        if prefix > 0 {
            request.attribute(RTA_DST, &destination.octets());
        }
        request.attribute(RTA_GATEWAY, &gateway.octets());
        request.attribute(RTA_OIF, &index.to_ne_bytes());
        request
    }

    /// A neighbour that never expires: no packet to it waits for ARP.
    pub fn add_neighbour(index: u32, address: Ipv4Addr, mac: MacAddress) -> Request {
        let mut request = Request::new(RTM_NEWNEIGH, NLM_F_CREATE);
        // struct ndmsg: family, padding, index, state, flags, type.
        request.0.extend([AF_INET, 0, 0, 0]);
        request.0.extend(index.to_ne_bytes());
        request.0.extend(NUD_PERMANENT.to_ne_bytes());
        request.0.extend([0, RTN_UNICAST]);
        request.attribute(NDA_DST, &address.octets());
        request.attribute(NDA_LLADDR, &mac.0);
        request
    }

    /// The bytes to send, with this sequence number.
    pub fn into_bytes(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }

    pub(super) fn new(kind: u16, flags: u16) -> Request {
        // struct nlmsghdr: length, kind, flags, sequence, port.
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        Request(bytes)
    }

    /// struct ifinfomsg: family, padding, type, index, flags, which flags to change.
    fn link(&mut self, index: u32, flags: u32, change: u32) {
        self.0.extend([AF_UNSPEC, 0, 0, 0]);
        self.0.extend(index.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend(change.to_ne_bytes());
    }

    fn veth_end(&mut self, end: VethEnd<'_>, mtu: u32) {
        self.name(end.name);
        self.attribute(IFLA_ADDRESS, &end.mac.0);
        self.attribute(IFLA_MTU, &mtu.to_ne_bytes());
    }

    fn name(&mut self, name: &str) {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(IFLA_IFNAME, &bytes);
    }

    /// The part that comes before attributes and depends on the kind.
    pub(super) fn fixed(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nested(kind, |r| r.0.extend(value));
    }

    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Request)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        fill(self);
        // The length is without the padding. Nothing here comes near 64 KiB.
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(aligned(self.0.len()), 0);
    }
}

/// A link as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its number, for ever within its namespace.
    pub index: u32,
    /// Its Ethernet address, where it has one.
    pub mac: Option<MacAddress>,
}

/// One message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The request was carried out.
    Done,
    /// It was refused.
    Refused(Refusal),
    /// A link, as asked for; `Done` follows.
    Link(Link),
    /// Something that nobody here asked for.
    Other,
}

/// Why the kernel refused a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The errno, positive.
    pub errno: i32,
    /// The kernel's own words, where it has any.
    pub text: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.errno))?;
        match &self.text {
            Some(text) => write!(f, ": {text}"),
            None => Ok(()),
        }
    }
}

/// Takes the first message with this sequence number out of a datagram's `bytes` and leaves what follows;
/// `None` when there is none left, or nothing that can be read.
pub fn next_answer(bytes: &mut &[u8], sequence: u32) -> Option<Answer> {
    while bytes.len() >= HEADER_SIZE {
        let length = u32_at(bytes, 0)? as usize;
        if length < HEADER_SIZE || length > bytes.len() {
            return None;
        }
        let (message, rest) = (&bytes[..length], &bytes[aligned(length).min(bytes.len())..]);
        *bytes = rest;
        if u32_at(message, 8)? == sequence {
            return Some(match u16_at(message, 4)? {
                NLMSG_ERROR => decode_error(message)?,
                RTM_NEWLINK => Answer::Link(decode_link(message)?),
                _ => Answer::Other,
            });
        }
    }
    None
}

/// struct nlmsgerr: negative errno, the request's header, perhaps the rest of it, perhaps attributes.
pub(super) fn decode_error(message: &[u8]) -> Option<Answer> {
    let errno = i32::from_ne_bytes(message.get(16..20)?.try_into().ok()?).checked_neg()?;
    if errno == 0 {
        return Some(Answer::Done);
    }
    let flags = u16_at(message, 6)?;
    let quoted = if flags & NLM_F_CAPPED != 0 { HEADER_SIZE } else { u32_at(message, 20)? as usize };
    let text = if flags & NLM_F_ACK_TLVS != 0 {
        message
            .get(20 + aligned(quoted)..)
            .and_then(|bytes| attributes(bytes).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG))
            .map(|(_, value)| String::from_utf8_lossy(value).trim_end_matches('\0').to_owned())
    } else {
        None
    };
    Some(Answer::Refused(Refusal { errno, text }))
}

fn decode_link(message: &[u8]) -> Option<Link> {
    let index = u32_at(message, HEADER_SIZE + 4)?;
    let mac = attributes(message.get(HEADER_SIZE + LINK_FIXED_SIZE..)?)
        .find(|(kind, _)| *kind == IFLA_ADDRESS)
        .and_then(|(_, value)| value.try_into().ok())
        .map(MacAddress);
    Some(Link { index, mac })
}

pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let value = bytes.get(4..length)?;
        bytes = &bytes[aligned(length).min(bytes.len())..];
        Some((kind, value))
    })
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// `length` rounded up to 4, saturating: a length from outside must not wrap to a small one.
pub(super) fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_bytes_that_ip_sends() {
        // `ip address add 169.254.0.22/30 dev <3>` as strace shows it, on a little-endian machine.
        let bytes = Request::add_address(3, Ipv4Addr::new(169, 254, 0, 22), 30).into_bytes(7);
        if cfg!(target_endian = "little") {
            let expected = [
                40, 0, 0, 0, 20, 0, 0x05, 0x06, 7, 0, 0, 0, 0, 0, 0, 0, // header
                2, 30, 0, 0, 3, 0, 0, 0, // ifaddrmsg
                8, 0, 2, 0, 169, 254, 0, 22, // IFA_LOCAL
                8, 0, 1, 0, 169, 254, 0, 22, // IFA_ADDRESS
            ];
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn attributes_nest_and_pad() {
        let mut request = Request::new(RTM_NEWLINK, 0);
        request.nested(IFLA_LINKINFO, |r| r.attribute(IFLA_INFO_KIND, b"veth!"));
        let bytes = request.into_bytes(0);
        assert_eq!(bytes.len(), HEADER_SIZE + 4 + 12);
        let outer: Vec<_> = attributes(&bytes[HEADER_SIZE..]).collect();
        assert_eq!(outer.len(), 1);
        assert_eq!(outer[0].0, IFLA_LINKINFO);
        let inner: Vec<_> = attributes(outer[0].1).collect();
        assert_eq!(inner, [(IFLA_INFO_KIND, &b"veth!"[..])]);
    }

    fn error_message(sequence: u32, flags: u16, errno: i32, tail: &[u8]) -> Vec<u8> {
        let mut bytes = ((36 + tail.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(errno.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes.extend(tail);
        bytes
    }

    #[test]
    fn an_acknowledgement_and_a_refusal_are_read() {
        assert_eq!(next_answer(&mut &error_message(5, 0, 0, &[])[..], 5), Some(Answer::Done));
        let mut tail = 9u16.to_ne_bytes().to_vec();
        tail.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
        tail.extend(b"busy\0\0\0\0");
        let bytes = error_message(5, NLM_F_CAPPED | NLM_F_ACK_TLVS, -libc::EBUSY, &tail);
        let refusal = Refusal { errno: libc::EBUSY, text: Some("busy".into()) };
        assert_eq!(next_answer(&mut &bytes[..], 5), Some(Answer::Refused(refusal)));
    }

    #[test]
    fn answers_to_others_are_passed_over() {
        let mut bytes = error_message(4, 0, -1, &[]);
        bytes.extend(error_message(5, 0, 0, &[]));
        let mut rest = &bytes[..];
        assert_eq!(next_answer(&mut rest, 5), Some(Answer::Done));
        assert_eq!(next_answer(&mut rest, 5), None);
    }

    #[test]
    fn no_truncation_or_wrong_length_is_believed() {
        let whole = error_message(5, NLM_F_CAPPED | NLM_F_ACK_TLVS, -1, &[200, 0, 1, 0]);
        for cut in 0..whole.len() {
            assert_eq!(next_answer(&mut &whole[..cut], 5), None);
        }
        for length in [0u32, 15, 19, u32::MAX] {
            let mut bytes = whole.clone();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(next_answer(&mut &bytes[..], 5), None, "{length}");
        }
        let mut bytes = error_message(5, NLM_F_ACK_TLVS, i32::MIN, &[]);
        assert_eq!(next_answer(&mut &bytes[..], 5), None);
        bytes[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        bytes[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(next_answer(&mut &bytes[..], 5), Some(Answer::Refused(Refusal { errno: 1, text: None })));
    }
}
