//! `tap0`, the guest's cable: a TAP device in the capsule's namespace whose other end the VMM holds.

use super::error::NetError;
use super::link::Links;
use super::slot::Slot;
use super::{GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_PREFIX};
use crate::sys::tun;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Its name, the same in every namespace.
pub const NAME: &str = "tap0";

/// An open TAP device. It exists as long as somebody holds it: this value, or the VMM that inherited it.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Makes `tap0` in the calling thread's namespace, with the gateway's address and with the guest as a
    /// permanent neighbour: the first packet to the guest does not wait for an ARP answer that a booting
    /// guest cannot give.
    pub(super) fn create(links: &mut Links, slot: Slot) -> Result<Tap, NetError> {
        let tap = tun::open_tap(NAME).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => NetError::NameTaken { name: format!("{NAME} in {}", slot.namespace_name()) },
            _ => NetError::System { step: "opening", object: tun::CONTROL_DEVICE.into(), source },
        })?;
        let link = links.get(NAME)?;
        links.bring_up(link, Some(slot.tap_mac()))?;
        links.add_address(link, GATEWAY_ADDRESS, GUEST_PREFIX)?;
        links.add_neighbour(link, GUEST_ADDRESS, slot.guest_mac())?;
        Ok(Tap(tap))
    }

    /// Gives it up for a VMM that opens it by [`NAME`] as the user `uid`. It then stays until its namespace
    /// goes.
    pub fn leave_to(self, uid: u32) -> io::Result<()> {
        tun::leave_to(self.0.as_fd(), uid)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
