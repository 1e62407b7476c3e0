//! Wrenn.
fn main() {}
