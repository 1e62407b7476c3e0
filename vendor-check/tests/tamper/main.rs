//! What vendor-check is for: attacks that it must catch, and evidence that others must accept.

mod cargo_holes;
mod corpus;
mod evidence;
mod robustness;
mod support;
