//! A capsule's network: a namespace of its own with a cable to the guest and one to the host.
//!
//! ```text
//!  host                      | namespace ns-{i}                              | guest
//!  wrenn-{i} 10.12.x.y/31 ===|=== eth0 10.12.x.y+1/31      tap0 169.254.0.22 ===|=== eth0 169.254.0.21/30
//!  route 10.11.a.b via eth0  | 10.11.a.b -> guest (DNAT)   lo 169.254.169.254   | default via .22
//! ```
//!
//! - [`slot`]: numbers, and the names and addresses that follow from them
//! - [`netlink`], [`link`]: links, addresses, routes and neighbours
//! - `conntrack`: what the kernel remembers of connections
//! - [`netns`]: named namespaces and work inside them
//! - [`tap`]: the guest's cable
//! - [`policy`]: what a capsule may reach; [`firewall`]: the rules that see to it
//! - [`capsule`]: all of this for one capsule; [`host`]: what all capsules share
//! - [`metadata`]: the metadata service's protocol

pub mod capsule;
mod conntrack;
mod error;
pub mod firewall;
pub mod host;
pub mod link;
mod mac;
pub mod metadata;
pub mod netlink;
pub mod netns;
pub mod policy;
pub mod slot;
pub mod tap;

pub use capsule::{CapsuleNetwork, PolicyHandle, destroy_remains, existing_slots, taken_name};
pub use error::NetError;
pub use firewall::FirewallError;
pub use mac::MacAddress;
pub use policy::{Policy, PolicyError};
pub use slot::{Slot, SlotAllocator};
pub use tap::Tap;

use std::net::Ipv4Addr;

/// The guest's address, the same in every capsule.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The guest's gateway: `tap0` in its namespace.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// The length of their common prefix.
pub const GUEST_PREFIX: u8 = 30;
/// Where the guest finds the metadata service.
pub const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The metadata service's TCP port.
pub const METADATA_PORT: u16 = 80;
/// The TCP port on which the guest daemon listens.
pub const ENVD_PORT: u16 = 49_983;
/// The namespace's end of the veth pair.
pub const GUEST_LINK_NAME: &str = "eth0";
/// Largest packet on every link, in bytes.
pub const MTU: u32 = 1_500;
