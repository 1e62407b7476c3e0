//! The `envd` program.
//!
//! With the feature `freestanding` (and `panic = "abort"`) it needs no C library and no standard library:
//! its own few lines start it, and the binary holds nothing but envd. Without, it is an ordinary program,
//! which is what the tests run. Both call the kernel in the same way.

#![cfg_attr(all(feature = "freestanding", panic = "abort"), no_std, no_main)]

#[cfg(all(feature = "freestanding", panic = "abort"))]
mod freestanding;

#[cfg(not(all(feature = "freestanding", panic = "abort")))]
fn main() {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    std::process::exit(envd::entry::run(arguments.iter().map(String::as_str)));
}
