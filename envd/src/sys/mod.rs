//! The kernel's interface: the only place in this crate with `unsafe`.
//!
//! System calls are made directly, without a C library, so that the same code runs as the freestanding
//! guest binary, under a test harness, and in a child between fork and exec.
//!
//! | module | kernel interface |
//! | --- | --- |
//! | [`syscall`] | the `syscall` instruction and errno |
//! | [`fd`] | owned descriptors, read, write, pipes |
//! | [`epoll`] | epoll(7) |
//! | [`signal`] | signal masks, signalfd(2), kill(2), waitid(2) |
//! | [`spawn`] | fork, credentials, execve(2) |
//! | [`pty`] | pseudoterminals |
//! | [`socket`] | TCP sockets |
//! | [`mod@file`] | paths, directories, metadata |
//! | [`inotify`] | inotify(7) |
//! | [`credentials`] | file system ids of the caller |
//! | [`boot`] | mounts, modules, host name, power |
//! | [`link`] | addresses and routes by ioctl |
//! | [`memory`] | pages |
//! | [`clock`] | clocks and randomness |

pub mod boot;
pub mod clock;
pub mod credentials;
pub mod epoll;
pub mod fd;
pub mod file;
pub mod inotify;
pub mod link;
pub mod memory;
pub mod pty;
pub mod signal;
pub mod socket;
pub mod spawn;
pub mod syscall;

pub use fd::Fd;
pub use syscall::Errno;
