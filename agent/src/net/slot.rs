//! Slots: every capsule on a host has a number, and everything that its network is called follows from it.
//!
//! With `i` the slot's number, 1 to 65,534:
//!
//! | what | value | slot 7 | slot 300 |
//! | --- | --- | --- | --- |
//! | network namespace | `ns-{i}` | `ns-7` | `ns-300` |
//! | veth, the host's end | `wrenn-{i}` | `wrenn-7` | `wrenn-300` |
//! | address by which the host reaches the guest | 10.11.0.0 + i | 10.11.0.7 | 10.11.1.44 |
//! | link address of the host's end | 10.12.0.0 + 2i, a /31 | 10.12.0.14 | 10.12.2.88 |
//! | link address of the namespace's end | 10.12.0.0 + 2i + 1 | 10.12.0.15 | 10.12.2.89 |
//! | Ethernet addresses | 02:fc:`role`:00:`i` | 02:fc:01:00:00:07 | 02:fc:01:00:01:2c |
//!
//! So the link addresses fill 10.12.0.0/15: slots from 32,768 on are in 10.13.0.0/16. Inside the namespace
//! every capsule is the same: `eth0` towards the host, `tap0` towards the guest.

use super::mac::MacAddress;
use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

/// The lowest slot.
pub const FIRST: Slot = Slot(1);
/// The highest slot: 10.11.255.254, the last address of its /16 that is not a broadcast address.
pub const LAST: Slot = Slot(65_534);

const NAMESPACE_PREFIX: &str = "ns-";
/// What the host's ends of all veth pairs begin with.
pub const HOST_LINK_PREFIX: &str = "wrenn-";

const HOST_ADDRESSES: u32 = u32::from_be_bytes([10, 11, 0, 0]);
const LINK_ADDRESSES: u32 = u32::from_be_bytes([10, 12, 0, 0]);

/// The number of a capsule on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u16);

/// Whose Ethernet address: the third byte of it.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Role {
    Guest = 1,
    Tap = 2,
    HostLink = 3,
    GuestLink = 4,
}

impl Slot {
    /// The slot with this number, 1 to 65,534.
    pub fn new(index: u32) -> Option<Slot> {
        let slot = Slot(u16::try_from(index).ok()?);
        (FIRST..=LAST).contains(&slot).then_some(slot)
    }

    /// Its number.
    pub fn index(self) -> u32 {
        u32::from(self.0)
    }

    /// The slot whose host-side link is called `name`.
    pub fn from_host_link_name(name: &str) -> Option<Slot> {
        let slot = Slot::new(name.strip_prefix(HOST_LINK_PREFIX)?.parse().ok()?)?;
        // `wrenn-07` or `wrenn-+7` is none of ours.
        (slot.host_link_name() == name).then_some(slot)
    }

    /// The name of its network namespace, below /run/netns.
    pub fn namespace_name(self) -> String {
        format!("{NAMESPACE_PREFIX}{}", self.0)
    }

    /// The name of the host's end of its veth pair.
    pub fn host_link_name(self) -> String {
        format!("{HOST_LINK_PREFIX}{}", self.0)
    }

    /// The address by which the host reaches the guest.
    pub fn host_ip(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(HOST_ADDRESSES + self.index())
    }

    /// The address of the host's end of its veth pair.
    pub fn host_link(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(LINK_ADDRESSES + 2 * self.index())
    }

    /// The address of the namespace's end of its veth pair.
    pub fn guest_link(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(LINK_ADDRESSES + 2 * self.index() + 1)
    }

    /// The guest's Ethernet address, the same in every slot: a capsule that is made of a snapshot has the one
    /// that it was saved with. It is seen on nothing but the capsule's own cable.
    pub fn guest_mac(self) -> MacAddress {
        MacAddress([0x02, 0xfc, Role::Guest as u8, 0, 0, 1])
    }

    /// The Ethernet address of `tap0`, the guest's gateway; the same in every slot for the same reason: the
    /// guest remembers it.
    pub fn tap_mac(self) -> MacAddress {
        MacAddress([0x02, 0xfc, Role::Tap as u8, 0, 0, 1])
    }

    /// The Ethernet address of the host's end of its veth pair.
    pub fn host_link_mac(self) -> MacAddress {
        self.mac(Role::HostLink)
    }

    /// The Ethernet address of the namespace's end of its veth pair.
    pub fn guest_link_mac(self) -> MacAddress {
        self.mac(Role::GuestLink)
    }

    fn mac(self, role: Role) -> MacAddress {
        let [high, low] = self.0.to_be_bytes();
        MacAddress([0x02, 0xfc, role as u8, 0, high, low])
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which slots are taken. It goes round: a slot that was given back is the last to be given out again, so
/// that what the kernel still remembers of its old owner (conntrack entries, neighbours) has gone by then.
#[derive(Debug)]
pub struct SlotAllocator {
    first: Slot,
    last: Slot,
    next: Slot,
    /// One bit a slot.
    taken: Vec<u64>,
    in_use: usize,
    /// Those of them that turned out to be somebody else's, who may have given them back since.
    aside: BTreeSet<Slot>,
}

impl SlotAllocator {
    /// An allocator of the slots from `first` to `last`, all free.
    pub fn new(first: Slot, last: Slot) -> SlotAllocator {
        let words = usize::from(last.0) / 64 + 1;
        SlotAllocator { first, last, next: first, taken: vec![0; words], in_use: 0, aside: BTreeSet::new() }
    }

    /// Takes a free slot; `None` when there is none. Those that were set aside come last.
    pub fn allocate(&mut self) -> Option<Slot> {
        self.allocate_free().or_else(|| {
            for slot in std::mem::take(&mut self.aside) {
                self.release(slot);
            }
            self.allocate_free()
        })
    }

    fn allocate_free(&mut self) -> Option<Slot> {
        let mut candidate = self.next;
        loop {
            let after = if candidate >= self.last { self.first } else { Slot(candidate.0 + 1) };
            if self.reserve(candidate) {
                self.next = after;
                return Some(candidate);
            }
            if after == self.next {
                return None;
            }
            candidate = after;
        }
    }

    /// Takes this slot, as for a capsule that was there before us; false when it is taken or not ours.
    pub fn reserve(&mut self, slot: Slot) -> bool {
        if slot < self.first || slot > self.last || self.is_taken(slot) {
            return false;
        }
        self.taken[usize::from(slot.0) / 64] |= 1 << (slot.0 % 64);
        self.in_use += 1;
        true
    }

    /// A slot, taken or not, is somebody else's at the moment: it is not given out as long as there are others.
    pub fn set_aside(&mut self, slot: Slot) {
        self.reserve(slot);
        if self.is_taken(slot) {
            self.aside.insert(slot);
        }
    }

    /// Gives a slot back; one that was not taken stays free.
    pub fn release(&mut self, slot: Slot) {
        if self.is_taken(slot) {
            self.taken[usize::from(slot.0) / 64] &= !(1 << (slot.0 % 64));
            self.in_use -= 1;
        }
    }

    /// How many slots are taken.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    fn is_taken(&self, slot: Slot) -> bool {
        self.taken.get(usize::from(slot.0) / 64).is_some_and(|word| word >> (slot.0 % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn slot(index: u32) -> Slot {
        Slot::new(index).unwrap_or(FIRST)
    }

    #[test]
    fn names_and_addresses_are_as_the_table_has_them() {
        let s = slot(300);
        assert_eq!(s.namespace_name(), "ns-300");
        assert_eq!(s.host_link_name(), "wrenn-300");
        assert_eq!(s.host_ip(), Ipv4Addr::new(10, 11, 1, 44));
        assert_eq!(s.host_link(), Ipv4Addr::new(10, 12, 2, 88));
        assert_eq!(s.guest_link(), Ipv4Addr::new(10, 12, 2, 89));
        assert_eq!(
            (s.guest_mac().to_string(), LAST.guest_mac()),
            ("02:fc:01:00:00:01".into(), s.guest_mac())
        );
        assert_eq!((s.tap_mac().to_string(), LAST.tap_mac()), ("02:fc:02:00:00:01".into(), s.tap_mac()));
        assert_eq!(LAST.host_ip(), Ipv4Addr::new(10, 11, 255, 254));
        assert_eq!(LAST.guest_link(), Ipv4Addr::new(10, 13, 255, 253));
        assert_eq!(LAST.host_link_name().len(), 11);
    }

    #[test]
    fn numbers_out_of_range_and_names_of_others_are_no_slots() {
        assert_eq!(Slot::new(0), None);
        assert_eq!(Slot::new(65_535), None);
        assert_eq!(Slot::new(65_536 + 7), None);
        assert_eq!(Slot::from_host_link_name("wrenn-7"), Slot::new(7));
        for name in ["wrenn-", "wrenn-07", "wrenn-+7", "wrenn-65535", "veth7", "wrenn-7x"] {
            assert_eq!(Slot::from_host_link_name(name), None, "{name}");
        }
    }

    #[test]
    fn no_two_slots_share_an_address() {
        let mut seen = HashSet::new();
        for s in (1..=65_534).filter_map(Slot::new) {
            assert!(seen.insert(s.host_ip()) && seen.insert(s.host_link()) && seen.insert(s.guest_link()));
        }
    }

    #[test]
    fn a_freed_slot_comes_back_last() {
        let mut slots = SlotAllocator::new(slot(1), slot(4));
        let all: Vec<_> = std::iter::from_fn(|| slots.allocate()).map(Slot::index).collect();
        assert_eq!(all, [1, 2, 3, 4]);
        slots.release(slot(2));
        slots.release(slot(2));
        assert_eq!(slots.in_use(), 3);
        assert_eq!(slots.allocate(), Some(slot(2)));
        slots.release(slot(1));
        slots.release(slot(4));
        assert_eq!(slots.allocate(), Some(slot(4)));
        assert_eq!(slots.allocate(), Some(slot(1)));
        assert_eq!(slots.allocate(), None);
    }

    #[test]
    fn a_strangers_slot_is_tried_again_when_there_is_no_other() {
        let mut slots = SlotAllocator::new(slot(1), slot(3));
        slots.set_aside(slot(2));
        slots.set_aside(slot(2));
        slots.set_aside(slot(9));
        assert_eq!((slots.allocate(), slots.allocate()), (Some(slot(1)), Some(slot(3))));
        assert_eq!((slots.allocate(), slots.allocate()), (Some(slot(2)), None));
        // It still is the stranger's: set aside again, it keeps nobody else out.
        slots.set_aside(slot(2));
        slots.release(slot(3));
        assert_eq!((slots.allocate(), slots.allocate()), (Some(slot(3)), Some(slot(2))));
        assert_eq!((slots.allocate(), slots.in_use()), (None, 3));
    }

    #[test]
    fn a_reserved_slot_is_passed_over() {
        let mut slots = SlotAllocator::new(slot(10), slot(12));
        assert!(slots.reserve(slot(11)));
        assert!(!slots.reserve(slot(11)));
        assert!(!slots.reserve(slot(13)));
        assert!(!slots.reserve(slot(9)));
        assert_eq!(slots.allocate(), Some(slot(10)));
        assert_eq!(slots.allocate(), Some(slot(12)));
        assert_eq!(slots.allocate(), None);
    }
}
