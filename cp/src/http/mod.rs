//! The public HTTP face: the server's loop and connections, the router, and what handlers see.

pub mod context;
pub mod handler;
