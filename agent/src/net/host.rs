//! What all capsules of a host share: one firewall table, and forwarding where a capsule may reach the
//! internet.

use super::error::NetError;
use super::firewall::{self, FirewallError};
use super::slot::Slot;
use std::fs;
use std::io;

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
const LINKS: &str = "/sys/class/net";

/// Puts the host's firewall table in place, and lets the host forward IPv4 packets if `forwarding`, which
/// capsules with internet need. May be called again. Forwarding stays on afterwards: others may have come
/// to rely on it. Blocks for milliseconds.
pub fn install(forwarding: bool) -> Result<(), NetError> {
    firewall::load(&firewall::host_rules(), None)?;
    if forwarding {
        let enabled = fs::read_to_string(FORWARDING).map_err(NetError::system("reading", FORWARDING))?;
        if enabled.trim() == "0" {
            fs::write(FORWARDING, "1").map_err(NetError::system("writing", FORWARDING))?;
        }
    }
    Ok(())
}

/// Takes the host's firewall table away unless a capsule's link is there, ours or another agent's. Returns
/// whether it is gone.
pub fn remove_if_unused() -> Result<bool, NetError> {
    if !links().map_err(NetError::system("listing", LINKS))?.is_empty() {
        return Ok(false);
    }
    match firewall::load(&firewall::host_removal(), None) {
        Err(FirewallError::Refused { .. }) if !is_installed()? => Ok(true),
        other => Ok(other.map(|()| true)?),
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

/// The slots whose links are on the host, in order.
pub(super) fn links() -> io::Result<Vec<Slot>> {
    let mut slots = Vec::new();
    for entry in fs::read_dir(LINKS)? {
        slots.extend(entry?.file_name().to_str().and_then(Slot::from_host_link_name));
    }
    slots.sort_unstable();
    Ok(slots)
}
