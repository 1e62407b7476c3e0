//! Kernel interfaces, one a file, named after what they wrap. The only home of `unsafe` in this crate's
//! host-level parts: everything here checks its arguments by type and gives safe functions back.
//!
//! - [`namespace`]: entering and pinning network namespaces
//! - [`rtnetlink`]: the socket of the routing subsystem
//! - [`tun`]: TAP devices
//! - [`pidfd`]: processes that can be waited for and killed without a race
//! - [`boot`]: telling runs of the kernel apart
//! - [`spawn`]: starting a program with nothing of ours but what it is given
//! - [`cgroup`]: limits on groups of processes
//! - [`memfd`]: files that exist only in memory
//! - [`dm`]: device-mapper devices
//! - [`loopdev`]: block devices whose content is a file
//! - [`sparse`]: files with holes
//! - [`direct`]: from memory to a disk, past the page cache
//! - [`node`]: device files, named pipes, sockets that have names and who is behind one
//! - [`passing`]: handing open files to other processes
//! - [`poll`]: waiting for one descriptor
//! - [`reflink`]: copies that share their blocks
//! - [`kvm`]: just enough of KVM to find out whether it works
//! - [`rename`]: names that change in one step
//! - [`resources`]: disk space
//!
//! What the control plane needs too is in `wire::reactor::sys`.

pub mod boot;
pub mod cgroup;
pub mod clock;
pub mod direct;
pub mod dm;
pub mod kvm;
pub mod loopdev;
pub mod memfd;
pub mod namespace;
pub mod node;
pub mod passing;
pub mod pidfd;
pub mod poll;
pub mod reflink;
pub mod rename;
pub mod resources;
pub mod rtnetlink;
pub mod sparse;
pub mod spawn;
pub mod tun;

use std::io;

/// A system call's return value as a `Result`: negative means that `errno` holds the reason.
fn check<T: Copy + Into<i64>>(returned: T) -> io::Result<T> {
    if returned.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
