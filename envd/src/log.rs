//! A line to standard error, which is the guest's console.

use crate::sys::fd;
use alloc::string::String;
use core::fmt::{Arguments, Write};

/// The longest line, in bytes.
const MAX_LINE: usize = 1024;

/// Writes one line.
pub fn line(arguments: Arguments<'_>) {
    let mut text = String::from("envd: ");
    // Formatting into a string fails only when a value's own formatting does.
    let _ = text.write_fmt(arguments);
    let mut end = text.len().min(MAX_LINE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.push('\n');
    // There is nobody to tell when this fails.
    let _ = fd::write_raw(2, text.as_bytes());
}

/// `log!("format", ...)`: a line to the console.
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}
pub(crate) use log;
