//! Kernel interfaces, one a file, the only home of `unsafe` in this crate.

pub mod resources;
pub mod signals;
