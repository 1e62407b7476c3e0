//! Why a host did not do what it was asked, and how the API tells it.

use crate::http::handler::Response;
use std::fmt;
use wire::message::{Code, Error};

/// Why a call to a host has no reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostError {
    /// The address of the host is not `IP:PORT`.
    BadAddress {
        /// What the record has.
        address: String,
    },
    /// No connection could be made, or none was made in time.
    Unreachable {
        /// The agent's address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The connection was lost while the call was under way; whether it was carried out is unknown.
    Lost {
        /// The agent's address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The host did not answer in time.
    TimedOut {
        /// How long was waited, in milliseconds.
        after_ms: u64,
    },
    /// Too many calls to the host, or in all, are under way.
    Busy,
    /// This control plane is being shut down.
    ShuttingDown,
    /// The client that asked has gone away.
    Cancelled,
    /// The agent or the guest daemon answered with an error.
    Remote(Error),
    /// The answer makes no sense.
    BadReply(String),
}

/// For whoever uses capsules: where a host is, is for its operator, who finds it in the log.
impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostError::BadAddress { .. } => {
                f.write_str("the host's address on record is not IP:PORT; register the host anew")
            }
            HostError::Unreachable { reason, .. } => {
                write!(f, "the host agent cannot be reached: {reason}")
            }
            HostError::Lost { reason, .. } => {
                write!(f, "the connection to the host agent was lost: {reason}")
            }
            HostError::TimedOut { after_ms } => {
                write!(f, "the host did not answer within {}.{} s", after_ms / 1000, after_ms % 1000 / 100)
            }
            HostError::Busy => f.write_str("too many requests to the host are under way; try again"),
            HostError::ShuttingDown => f.write_str("the control plane is being shut down; try again"),
            HostError::Cancelled => f.write_str("the client went away"),
            HostError::Remote(error) => f.write_str(&error.text),
            HostError::BadReply(what) => write!(f, "the host's answer makes no sense: {what}"),
        }
    }
}

impl std::error::Error for HostError {}

impl HostError {
    /// Whether the host is known not to have done it, so that another may be asked.
    pub fn is_untouched(&self) -> bool {
        matches!(
            self,
            HostError::BadAddress { .. }
                | HostError::Unreachable { .. }
                | HostError::Busy
                | HostError::ShuttingDown
        )
    }

    /// The code of an error that the agent or the guest daemon answered with.
    pub fn remote_code(&self) -> Option<Code> {
        match self {
            HostError::Remote(error) => Some(error.code()),
            _ => None,
        }
    }
}

impl From<HostError> for Response {
    /// The API's answer to a failed call.
    fn from(error: HostError) -> Response {
        let (status, code) = match &error {
            HostError::BadAddress { .. }
            | HostError::Unreachable { .. }
            | HostError::Lost { .. }
            | HostError::Busy
            | HostError::ShuttingDown
            | HostError::Cancelled => (503, "host_unavailable"),
            HostError::TimedOut { .. } | HostError::BadReply(_) => (502, "agent_error"),
            HostError::Remote(remote) => match remote.code() {
                Code::InvalidRequest => (400, "invalid_request"),
                Code::NotFound => (404, "not_found"),
                Code::AlreadyExists => (409, "conflict"),
                Code::InvalidState => (409, "invalid_state"),
                Code::PermissionDenied => (403, "forbidden"),
                Code::Unavailable | Code::ResourceExhausted | Code::ShuttingDown => (503, "host_unavailable"),
                _ => (502, "agent_error"),
            },
        };
        Response::error(status, code, &error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_become_the_codes_that_clients_map() {
        let unreachable = HostError::Unreachable { address: "10.0.0.1:1".into(), reason: "refused".into() };
        let response = Response::from(unreachable);
        assert_eq!(response.status, 503);
        assert_eq!(
            response.body,
            br#"{"error":{"code":"host_unavailable","message":"the host agent cannot be reached: refused"}}"#
        );
        for (code, status) in [
            (Code::NotFound, 404),
            (Code::InvalidRequest, 400),
            (Code::InvalidState, 409),
            (Code::Internal, 502),
            (Code::Unavailable, 503),
        ] {
            assert_eq!(Response::from(HostError::Remote(Error::new(code, "x"))).status, status);
        }
        assert!(HostError::TimedOut { after_ms: 1500 }.to_string().contains("1.5 s"));
    }
}
