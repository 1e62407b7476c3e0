//! Wrenn's host agent as a library: what `wrenn-agent` is made of, so that tests can drive its parts.
//!
//! - [`cli`], [`config`], [`layout`]: what the operator says and what is on disk
//! - [`startup`]: from there to a running agent
//! - [`agent`]: the event loop; [`context`]: what all its parts share; [`ending`]: how it ends
//! - [`orders`]: telling it to
//! - [`mending`]: the host's firewall table, which others may remove
//! - [`sessions`], [`service`], [`forward`]: what it does for a control plane, over wire sessions
//! - [`registration`], [`cp_client`]: how the control plane knows of this host
//! - [`capsule`]: one microVM with everything that belongs to it
//! - [`worker`]: what blocks
//! - [`net`]: one network namespace a capsule, its TAP, its firewall and its metadata service
//! - [`disk`]: the private writable disk of a capsule
//! - [`vmm`]: the virtual machine monitors (QEMU)
//! - [`snapshots`]: running capsules written down under a name, from which others start
//! - [`zstd`]: compressing large files by that program
//! - [`sys`]: the kernel interfaces the above need, the only home of `unsafe`

mod access;
pub mod agent;
pub mod capsule;
pub mod cli;
pub mod config;
pub mod context;
pub mod cp_client;
pub mod disk;
pub mod ending;
pub mod forward;
pub mod layout;
pub mod mending;
pub mod metrics;
pub mod net;
pub mod orders;
pub mod registration;
pub mod service;
pub mod sessions;
pub mod snapshots;
pub mod startup;
pub mod sys;
pub mod vmm;
mod whole_file;
pub mod worker;
pub mod zstd;
