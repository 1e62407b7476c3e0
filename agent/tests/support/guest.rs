//! A guest played by hand: frames written to and read from its TAP.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use wrenn_agent::net::{Slot, Tap};

const VNET_HEADER_BYTES: usize = 10;

/// The next frame on the TAP that `wanted` accepts, without its virtio-net header; waits up to ten seconds.
pub fn read_frame(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let mut file = File::from(tap.as_fd().try_clone_to_owned().expect("cloned"));
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let mut buffer = [0; 2_048];
        match file.read(&mut buffer) {
            Ok(count) if count >= VNET_HEADER_BYTES + 38 && wanted(&buffer[VNET_HEADER_BYTES..count]) => {
                return Some(buffer[VNET_HEADER_BYTES..count].to_vec());
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    None
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A guest's TCP SYN as an Ethernet frame.
pub fn packet(slot: Slot, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let head = [0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    let mut ip = [&head[..], &from.octets(), &to.octets()].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports = [40_000u16.to_be_bytes(), port.to_be_bytes()].concat();
    let rest = [0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
    let mut frame = [&slot.tap_mac().0[..], &mac, &[8, 0], &ip, &ports, &rest].concat();
    set_tcp_checksum(&mut frame);
    frame
}

/// An empty datagram of the guest's as an Ethernet frame, without a checksum, which UDP allows.
pub fn datagram(slot: Slot, to: Ipv4Addr) -> Vec<u8> {
    let head = [0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17, 0, 0];
    let mut ip = [&head[..], &GUEST.octets(), &to.octets()].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [40_000u16.to_be_bytes(), 9u16.to_be_bytes(), 8u16.to_be_bytes(), [0, 0]].concat();
    [&slot.tap_mac().0[..], &slot.guest_mac().0, &[8, 0], &ip, &udp].concat()
}

/// Makes a TCP segment's checksum right again after a change.
pub fn set_tcp_checksum(frame: &mut [u8]) {
    frame[50..52].copy_from_slice(&[0, 0]);
    let pseudo = [&frame[26..34], &[0, 6, 0, 20], &frame[34..54]].concat();
    let sum = checksum(&pseudo);
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
}

/// The guest sends a frame.
pub fn write_frame(tap: &Tap, frame: &[u8]) {
    let mut file = File::from(tap.as_fd().try_clone_to_owned().expect("cloned"));
    file.write_all(&[&[0; VNET_HEADER_BYTES], frame].concat()).expect("written");
}

/// The guest's address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The metadata service's address.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Whether a frame is a TCP segment with at least these flags.
pub fn is_tcp_with(flags: u8) -> impl Fn(&[u8]) -> bool {
    move |frame| frame[12..14] == [8, 0] && frame[23] == 6 && frame.len() >= 48 && frame[47] & flags == flags
}
/// A refusal.
pub const RST: u8 = 4;
/// An acceptance.
pub const SYN_ACK: u8 = 0x12;

/// The ACK that follows [`packet`]'s SYN.
pub fn acknowledgement(slot: Slot, to: Ipv4Addr, number: u32) -> Vec<u8> {
    let mut frame = packet(slot, slot.guest_mac().0, GUEST, to, 80);
    frame[38..42].copy_from_slice(&1u32.to_be_bytes());
    frame[42..46].copy_from_slice(&number.to_be_bytes());
    frame[47] = 0x10;
    set_tcp_checksum(&mut frame);
    frame
}
