//! The hosts: the one live wire session to each, calls and relays over them, where a new capsule goes,
//! and the reconciler that makes the database and the hosts agree.

pub mod credential;
pub mod error;
pub mod relay;
pub mod reply;
pub mod sessions;
pub mod translators;

pub mod reconciler;
pub mod scheduler;
