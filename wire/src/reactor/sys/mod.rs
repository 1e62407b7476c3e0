//! Kernel interfaces that both daemons use, one a file. The only home of `unsafe` in this crate.
//!
//! - [`random`]: the kernel's random numbers
//! - [`resources`]: the limit of open files
//! - [`signals`]: signals as a descriptor

pub mod random;
pub mod resources;
pub mod signals;

use std::io;

/// A system call's return value as a `Result`: negative means that `errno` holds the reason.
fn check<T: Copy + Into<i64>>(returned: T) -> io::Result<T> {
    if returned.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
