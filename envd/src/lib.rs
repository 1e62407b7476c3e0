//! envd, the guest daemon of a Wrenn capsule: its init, its processes, its terminals, its files.
//!
//! One static binary, one thread. `envd init` (or `/init` of the initramfs) takes the guest from the
//! kernel to tini; tini runs envd's guard, and that envd, which listens for the host agent and does what it is asked.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`init`] | the guest's start |
//! | [`entry`] | the program's arguments |
//! | [`guard`] | envd is started again when something has ended it |
//! | [`daemon`] | the event loop |
//! | [`connection`] | sessions with host agents |
//! | [`service`] | messages become work |
//! | [`process`] | processes and terminals |
//! | [`guest`] | time, randomness and defaults from the agent |
//! | [`host_name`] | a copy of a guest gets a name of its own |
//! | [`files`] | files on behalf of a user |
//! | [`ports`] | TCP ports of the guest |
//! | [`sampler`] | what is looked at once a second: figures and ports |
//! | [`metrics`] | what the guest uses |
//! | [`identity`] | who the capsule is and who may talk to it |
//! | [`trust`] | what is refused until the agent has brought a guest up to date |
//! | [`cmdline`], [`json`], [`metadata`], [`options`], [`token`], [`users`] | pure parsers and tables |
//! | [`sys`] | the kernel's interface, all of the crate's `unsafe` |

#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod cmdline;
pub mod connection;
pub mod daemon;
pub mod entry;
pub mod files;
pub mod guard;
pub mod guest;
pub mod host_name;
pub mod identity;
pub mod init;
pub mod json;
pub mod log;
pub mod metadata;
pub mod metrics;
pub mod options;
pub mod ports;
pub mod process;
pub mod sampler;
pub mod service;
pub mod sys;
pub mod token;
pub mod trust;
pub mod users;
