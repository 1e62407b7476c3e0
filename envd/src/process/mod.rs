//! Processes: how one is started, what is known of it, who supervises it.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`control`] | what is asked of processes that run already |
//! | [`groups`] | a control group for each |
//! | [`request`] | from a start message to what the kernel needs |
//! | [`ring`] | output, numbered by byte, pure |
//! | [`streams`] | what flows in and out of one process |
//! | [`table`] | what is known of one process, and timers, pure |
//! | [`supervisor`] | all processes: input, output, watchers, ends |

mod control;
pub mod groups;
pub mod request;
pub mod ring;
mod streams;
pub mod supervisor;
pub mod table;

pub use supervisor::Supervisor;
pub use table::ProcessKey;
