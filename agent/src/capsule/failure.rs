//! Why a capsule could not be made, ended, or could not be removed.

use super::lifecycle::{PAUSED_RETRY_MS, Part};
use std::fmt;
use wire::message::{Code, Error};

/// A capsule's failure. The text is for the person at the far end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// A part could not be made.
    Make {
        /// Which.
        part: Part,
        /// Why, with step, path and errno.
        reason: String,
    },
    /// The storage is full; why, with path and what is left.
    NoRoom(String),
    /// A part could not be removed.
    Remove {
        /// Which.
        part: Part,
        /// Why, with step, path and errno.
        reason: String,
    },
    /// A part of one that is paused could not be removed; it is tried again and again.
    Stays {
        /// Which.
        part: Part,
        /// Why, with step, path and errno.
        reason: String,
    },
    /// It could not be saved, or no snapshot of it be made; why, with step, path and errno.
    Save(String),
    /// The machine's process ended by itself.
    MachineEnded(String),
    /// The guest powered itself off.
    ShutDownByGuest(String),
    /// The capsule was not up in time.
    Deadline {
        /// What was waited for.
        waiting_for: &'static str,
        /// How long, in milliseconds.
        after_ms: u64,
        /// The last of the guest's console, or what was tried last.
        detail: String,
    },
    /// Whoever asked for it went away or cancelled.
    Cancelled,
    /// It was destroyed on request.
    Destroyed,
    /// The agent is shutting down.
    ShuttingDown,
}

impl Failure {
    /// Whether this is an end in good order, after which the capsule has stopped rather than failed.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Failure::ShutDownByGuest(_) | Failure::Destroyed | Failure::ShuttingDown)
    }

    /// The error code that the far end gets.
    pub fn code(&self) -> Code {
        match self {
            Failure::Make { .. } | Failure::Remove { .. } | Failure::Stays { .. } | Failure::Save(_) => {
                Code::Internal
            }
            Failure::NoRoom(_) => Code::ResourceExhausted,
            Failure::MachineEnded(_) | Failure::ShutDownByGuest(_) => Code::Unavailable,
            Failure::Deadline { .. } => Code::DeadlineExceeded,
            Failure::Cancelled | Failure::Destroyed => Code::Cancelled,
            Failure::ShuttingDown => Code::ShuttingDown,
        }
    }

    /// The message that the far end gets.
    pub fn to_error(&self) -> Error {
        Error::new(self.code(), self.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Make { part, reason } => write!(f, "the {} could not be made: {reason}", part.name()),
            Failure::NoRoom(reason) => write!(f, "this host has no room for another disk: {reason}"),
            Failure::Remove { part, reason } => {
                write!(f, "the {} could not be removed: {reason}; destroy it again", part.name())
            }
            Failure::Stays { part, reason } => write!(
                f,
                "the {} that it had before could not be removed yet, which is tried again every {} s: {reason}",
                part.name(),
                PAUSED_RETRY_MS / 1000
            ),
            Failure::Save(reason) => write!(f, "the capsule could not be saved: {reason}"),
            Failure::MachineEnded(how) => write!(f, "the virtual machine ended: {how}"),
            Failure::ShutDownByGuest(how) => write!(f, "the guest shut itself down: {how}"),
            Failure::Deadline { waiting_for, after_ms, detail } => write!(
                f,
                "not up after {after_ms} ms, still waiting for the {waiting_for}: {detail}; everything \
                 was undone"
            ),
            Failure::Cancelled => f.write_str("cancelled by whoever asked for it; everything was undone"),
            Failure::Destroyed => f.write_str("destroyed"),
            Failure::ShuttingDown => f.write_str("the host is shutting down; try another"),
        }
    }
}

impl std::error::Error for Failure {}
