//! The development stack and what the end-to-end tests share.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`http`] | a small blocking HTTP/1.1 client, independent of the project's own codec |
//! | [`process`] | child processes with logs, pid files and bounded waits |
//! | [`postgres`] | a private PostgreSQL |
//! | [`stack`] | PostgreSQL, control plane and host agent together |
//! | [`leftovers`] | what the machine has before and after |

pub mod http;
pub mod leftovers;
pub mod postgres;
pub mod process;
pub mod stack;

use std::fmt;

/// A failure of the stack or of a check: what was being done and what came of it.
#[derive(Debug)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Failure(text)
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Failure(text.to_string())
    }
}

/// What the stack's functions return.
pub type Result<T> = std::result::Result<T, Failure>;

/// Adds what was being done to an error.
pub trait Context<T> {
    /// Names the step that failed.
    fn context(self, step: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, step: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Failure(format!("{step}: {e}")))
    }
}

/// The value below which `part` (0 to 1) of the samples lie.
pub fn percentile(samples: &mut [std::time::Duration], part: f64) -> std::time::Duration {
    samples.sort_unstable();
    let at = (samples.len() as f64 * part) as usize;
    samples.get(at.min(samples.len().saturating_sub(1))).copied().unwrap_or_default()
}
