//! Processes: how one is started, what is known of it, who supervises it.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`request`] | from a start message to what the kernel needs |
//! | [`ring`] | output, numbered by byte, pure |
//! | [`table`] | what is known of one process, and timers, pure |
//! | [`supervisor`] | all processes: input, output, watchers, ends |

pub mod request;
pub mod ring;
pub mod supervisor;
pub mod table;

pub use supervisor::Supervisor;
pub use table::ProcessKey;
