//! What the host's kernel remembers of a capsule's connections, ctnetlink: linux/netfilter/nfnetlink.h,
//! linux/netfilter/nfnetlink_conntrack.h. Messages are built as in [`super::netlink`]; after the header comes struct
//! nfgenmsg, and the kind has the subsystem in its upper byte.
//!
//! An entry lives on when its connection's link has gone, up to days, and a capsule that gets the same slot has the
//! same addresses: what comes from outside for the old one's connections would be let through to it. So entries go
//! with the network. Those in the capsule's namespace go with that.

use super::error::NetError;
use super::netlink::{
    Answer, HEADER_SIZE, NLMSG_ERROR, Refusal, Request, aligned, attributes, decode_error, u16_at, u32_at,
};
use super::slot::Slot;
use crate::sys::rtnetlink::Socket;
use std::io;
use std::net::Ipv4Addr;

const SUBSYSTEM: u16 = 1 << 8;
const IPCTNL_MSG_CT_NEW: u16 = SUBSYSTEM;
const IPCTNL_MSG_CT_GET: u16 = SUBSYSTEM | 1;
const IPCTNL_MSG_CT_DELETE: u16 = SUBSYSTEM | 2;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_DONE: u16 = 3;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Marks an attribute of attributes.
const NLA_F_NESTED: u16 = 0x8000;
/// struct nfgenmsg: family, version, resource.
const IPV4: [u8; 4] = [libc::AF_INET as u8, 0, 0, 0];

/// Room for one datagram: the kernel puts up to 32 KiB of entries into one.
const ANSWER_BYTES: usize = 64 * 1024;
/// Datagrams read for one list: as a kernel before 5.8 knows no filter and lists all entries, some hundred
/// thousand of 250 bytes each.
const MAX_DATAGRAMS: usize = 4_096;
/// Entries deleted of one list: twice what a capsule may have.
const MAX_ENTRIES: usize = 2 * super::firewall::MAX_CONNECTIONS as usize;

/// Which end of a connection, as it was opened, has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

impl End {
    fn attribute(self) -> u16 {
        match self {
            End::Source => CTA_IP_V4_SRC,
            End::Destination => CTA_IP_V4_DST,
        }
    }

    /// For the filter: what is compared.
    fn flag(self) -> u32 {
        match self {
            End::Source => 1,
            End::Destination => 2,
        }
    }
}

/// Makes the kernel forget the connections of a slot: those that its guest has opened, and the host's to it.
/// Returns how many there were. Blocks for milliseconds.
pub(super) fn forget(slot: Slot) -> Result<usize, NetError> {
    let of_guest = forget_with(End::Source, slot.guest_link())?;
    Ok(of_guest + forget_with(End::Destination, slot.host_ip())?)
}

fn forget_with(end: End, address: Ipv4Addr) -> Result<usize, NetError> {
    let failed = |step| move |source| NetError::system(step, address)(source);
    let socket = Socket::open_netfilter().map_err(failed("opening a ctnetlink socket for"))?;
    let tuples = list(&socket, end, address).map_err(failed("listing the connections of"))?;
    for (sequence, tuple) in (2..).zip(&tuples) {
        delete(&socket, tuple, sequence).map_err(failed("forgetting a connection of"))?;
    }
    Ok(tuples.len())
}

fn list_request(end: End, address: Ipv4Addr) -> Request {
    let mut request = Request::new(IPCTNL_MSG_CT_GET, NLM_F_DUMP);
    request.fixed(&IPV4);
    request.nested(CTA_TUPLE_ORIG | NLA_F_NESTED, |r| {
        r.nested(CTA_TUPLE_IP | NLA_F_NESTED, |r| r.attribute(end.attribute(), &address.octets()));
    });
    request.nested(CTA_FILTER | NLA_F_NESTED, |r| {
        r.attribute(CTA_FILTER_ORIG_FLAGS, &end.flag().to_ne_bytes());
        r.attribute(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
    });
    request
}

/// The addresses and ports of the connections one end of which has this address, as the kernel has them.
fn list(socket: &Socket, end: End, address: Ipv4Addr) -> io::Result<Vec<Vec<u8>>> {
    socket.send(&list_request(end, address).into_bytes(1))?;
    let mut buffer = vec![0; ANSWER_BYTES];
    let mut found = Vec::new();
    for _ in 0..MAX_DATAGRAMS {
        let length = socket.receive(&mut buffer)?;
        let mut bytes = &buffer[..length];
        while let Some(message) = next_message(&mut bytes, 1) {
            match u16_at(message, 4) {
                Some(NLMSG_DONE) => return Ok(found),
                Some(NLMSG_ERROR) => acknowledged(message)?,
                Some(IPCTNL_MSG_CT_NEW) if found.len() < MAX_ENTRIES => {
                    found.extend(
                        tuple_of(message).filter(|tuple| has(tuple, end, address)).map(<[u8]>::to_vec),
                    );
                }
                _ => {}
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel's list of connections does not end"))
}

fn delete(socket: &Socket, tuple: &[u8], sequence: u32) -> io::Result<()> {
    let mut request = Request::new(IPCTNL_MSG_CT_DELETE, 0);
    request.fixed(&IPV4);
    request.attribute(CTA_TUPLE_ORIG | NLA_F_NESTED, tuple);
    socket.send(&request.into_bytes(sequence))?;
    let mut buffer = [0; 1_024];
    for _ in 0..MAX_DATAGRAMS {
        let length = socket.receive(&mut buffer)?;
        let mut bytes = &buffer[..length];
        match next_message(&mut bytes, sequence).map(acknowledged) {
            None => {}
            // It has ended by itself.
            Some(Err(e)) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            Some(answer) => return answer,
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn acknowledged(message: &[u8]) -> io::Result<()> {
    match decode_error(message) {
        Some(Answer::Refused(Refusal { errno, .. })) => Err(io::Error::from_raw_os_error(errno)),
        _ => Ok(()),
    }
}

/// Takes the first message with this sequence number out of a datagram.
fn next_message<'a>(bytes: &mut &'a [u8], sequence: u32) -> Option<&'a [u8]> {
    while bytes.len() >= HEADER_SIZE {
        let length = u32_at(bytes, 0)? as usize;
        if length < HEADER_SIZE {
            return None;
        }
        let message = bytes.get(..length)?;
        *bytes = &bytes[aligned(length).min(bytes.len())..];
        if u32_at(message, 8)? == sequence {
            return Some(message);
        }
    }
    None
}

/// The attribute of an entry that tells its connection apart, without its header.
fn tuple_of(message: &[u8]) -> Option<&[u8]> {
    inner(message.get(HEADER_SIZE + IPV4.len()..)?, CTA_TUPLE_ORIG)
}

fn has(tuple: &[u8], end: End, address: Ipv4Addr) -> bool {
    inner(tuple, CTA_TUPLE_IP).and_then(|ip| inner(ip, end.attribute())) == Some(&address.octets()[..])
}

fn inner(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| kind & !NLA_F_NESTED == wanted).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_other_addresses_are_left_and_nonsense_is_none() {
        let (ours, other) = (Ipv4Addr::new(10, 12, 0, 15), Ipv4Addr::new(10, 12, 0, 17));
        // An entry looks as the question for it does, up to what is asked.
        let mut bytes = list_request(End::Source, ours).into_bytes(1);
        bytes[4..6].copy_from_slice(&IPCTNL_MSG_CT_NEW.to_ne_bytes());
        assert_eq!(next_message(&mut &bytes[..], 2), None);
        let message = next_message(&mut &bytes[..], 1).expect("whole");
        let tuple = tuple_of(message).expect("a tuple");
        assert!(has(tuple, End::Source, ours));
        assert!(!has(tuple, End::Source, other) && !has(tuple, End::Destination, ours));
        for cut in 0..bytes.len() {
            assert_eq!(next_message(&mut &bytes[..cut], 1), None, "{cut}");
            assert!(tuple_of(&bytes[..cut]).is_none_or(|tuple| cut >= HEADER_SIZE + 4 + tuple.len()));
        }
        bytes[..4].copy_from_slice(&15u32.to_ne_bytes());
        assert_eq!(next_message(&mut &bytes[..], 1), None);
    }
}
