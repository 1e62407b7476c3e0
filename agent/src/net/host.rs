//! What all capsules of a host share: one firewall table, and forwarding where a capsule may reach the
//! internet.

use super::capsule::PolicyHandle;
use super::error::NetError;
use super::firewall::{self, FirewallError};
use super::slot::Slot;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
const LINKS: &str = "/sys/class/net";

/// How many links go into one transaction: some 50 bytes each, of what [`firewall::load`] takes.
const LINKS_AT_ONCE: usize = 512;
/// A removal takes milliseconds.
const LOCK_RETRY: Duration = Duration::from_millis(5);
const LOCK_ATTEMPTS: u32 = 400;

/// Puts the host's firewall table in place, and lets the host forward IPv4 packets if `forwarding`, which
/// capsules with internet need. May be called again. Forwarding stays on afterwards: others may have come
/// to rely on it. Blocks for milliseconds.
pub fn install(forwarding: bool) -> Result<(), NetError> {
    let _held = hold()?;
    firewall::load(&firewall::host_rules(), None)?;
    if forwarding {
        let enabled = fs::read_to_string(FORWARDING).map_err(NetError::system("reading", FORWARDING))?;
        if enabled.trim() == "0" {
            fs::write(FORWARDING, "1").map_err(NetError::system("writing", FORWARDING))?;
        }
    }
    Ok(())
}

/// Takes the host's firewall table away unless a capsule's link is there or being made, ours or another
/// agent's. Returns whether it is gone.
pub fn remove_if_unused() -> Result<bool, NetError> {
    let lock = open_lock()?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(e)) => return Err(NetError::system("locking", LINKS)(e)),
    }
    if !links().map_err(NetError::system("listing", LINKS))?.is_empty() {
        return Ok(false);
    }
    match firewall::load(&firewall::host_removal(), None) {
        Err(FirewallError::Refused { .. }) if !is_installed()? => Ok(true),
        other => Ok(other.map(|()| true)?),
    }
}

/// Puts the table in place again where somebody has removed it, as whoever loads a firewall of his own does
/// (`nft flush ruleset`), and these capsules' links with it. Without it a guest with internet would reach the
/// host's own public addresses. Returns whether it was gone. Blocks for milliseconds.
pub fn mend(networks: &[PolicyHandle]) -> Result<bool, NetError> {
    if networks.is_empty() {
        return Ok(false);
    }
    let is_gone = !is_installed()?;
    if is_gone {
        install(true)?;
    }
    // Also where it is there: another capsule's creation may have been first to put it in place, empty.
    for some in networks.chunks(LINKS_AT_ONCE) {
        PolicyHandle::admit_again(some)?;
    }
    Ok(is_gone)
}

/// Keeps [`remove_if_unused`], of whichever agent on this host, from taking the table away until the result
/// is dropped: long enough to make a link, which then keeps it.
pub(super) fn hold() -> Result<File, NetError> {
    let lock = open_lock()?;
    for _ in 0..LOCK_ATTEMPTS {
        match lock.try_lock_shared() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
            Err(TryLockError::Error(e)) => return Err(NetError::system("locking", LINKS)(e)),
        }
    }
    Err(NetError::system("locking", LINKS)(io::ErrorKind::TimedOut.into()))
}

/// The directory of this namespace's links: every agent finds the same one, and nobody has to remove it.
fn open_lock() -> Result<File, NetError> {
    File::open(LINKS).map_err(NetError::system("opening", LINKS))
}

/// Puts the table in place if another agent has removed it, and lets a capsule's link out to the internet
/// if its policy says so.
pub(super) fn admit(slot: Slot, lets_out: bool) -> Result<(), NetError> {
    // Asking first: the kernel takes five times as long to replace rules as to add some.
    if !is_installed()? {
        firewall::load(&firewall::host_rules(), None)?;
    }
    if lets_out {
        firewall::load(&firewall::host_element(slot, true), None)?;
    }
    Ok(())
}

/// Takes a capsule's link out of the set of links with internet.
pub(super) fn shut_in(slot: Slot) -> Result<(), NetError> {
    match firewall::load(&firewall::host_element(slot, false), None) {
        // Where the table is not in place there is no set to be in.
        Err(FirewallError::Refused { .. }) if !is_installed()? => Ok(()),
        other => Ok(other?),
    }
}

/// Takes a capsule's link, which is being removed, out of everything in the table.
pub(super) fn forget(slot: Slot) -> Result<(), NetError> {
    match firewall::load(&firewall::host_forgetting(slot), None) {
        // There is no table, or it is one that an agent of an earlier version has put in place anew.
        Err(FirewallError::Refused { .. }) if !is_installed()? => shut_in(slot),
        other => Ok(other?),
    }
}

/// Whether the host's firewall table is in place.
pub fn is_installed() -> Result<bool, NetError> {
    match firewall::load(&firewall::host_query(), None) {
        Ok(()) => Ok(true),
        Err(FirewallError::Refused { .. }) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether the host has a link of this name.
pub(super) fn has_link(name: &str) -> bool {
    fs::symlink_metadata(Path::new(LINKS).join(name)).is_ok()
}

/// The slots whose links are on the host, in order.
pub(super) fn links() -> io::Result<Vec<Slot>> {
    let mut slots = Vec::new();
    for entry in fs::read_dir(LINKS)? {
        slots.extend(entry?.file_name().to_str().and_then(Slot::from_host_link_name));
    }
    slots.sort_unstable();
    Ok(slots)
}
