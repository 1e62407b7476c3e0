//! What can go wrong with a capsule's network.

use super::firewall::FirewallError;
use super::netlink::Refusal;
use std::fmt;
use std::io;

/// Why a capsule's network could not be made, changed or removed.
#[derive(Debug)]
pub enum NetError {
    /// Something of this name is there already and is not ours to take: another agent's, or a leftover.
    NameTaken {
        /// The namespace or link.
        name: String,
    },
    /// The kernel refused a change to links, addresses, routes or neighbours.
    Refused {
        /// What was to be done.
        step: &'static str,
        /// To which link or address.
        object: String,
        /// Why not.
        refusal: Refusal,
    },
    /// A system call failed.
    System {
        /// What was to be done.
        step: &'static str,
        /// To which file, link or address.
        object: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The firewall rules could not be put in place.
    Firewall(FirewallError),
    /// The network is being taken away.
    Ended,
    /// A newer change was made already.
    Superseded {
        /// The revision that came too late.
        revision: u64,
        /// The one that holds.
        by: u64,
    },
}

impl NetError {
    /// For `map_err`: a system call that failed in this step on this object.
    pub(super) fn system(
        step: &'static str,
        object: impl fmt::Display,
    ) -> impl FnOnce(io::Error) -> NetError {
        let object = object.to_string();
        move |source| NetError::System { step, object, source }
    }

    /// The errno behind it, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetError::NameTaken { .. } => Some(libc::EEXIST),
            NetError::Refused { refusal, .. } => Some(refusal.errno),
            NetError::System { source, .. } => source.raw_os_error(),
            NetError::Firewall(_) | NetError::Ended | NetError::Superseded { .. } => None,
        }
    }
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetError::NameTaken { name } => write!(
                f,
                "{name} exists already: another agent runs on this host, or something was left behind \
                 (look with `ip netns` and `ip link`)"
            ),
            NetError::Refused { step, object, refusal } => write!(f, "{step} {object}: {refusal}"),
            NetError::System { step, object, source } => {
                write!(f, "{step} {object}: {source}")?;
                match source.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => {
                        f.write_str(" (run the agent as root or with CAP_NET_ADMIN and CAP_SYS_ADMIN)")
                    }
                    _ => Ok(()),
                }
            }
            NetError::Firewall(error) => error.fmt(f),
            NetError::Ended => f.write_str("the capsule is going away"),
            NetError::Superseded { revision, by } => {
                write!(f, "the network policy of revision {revision} comes too late: {by} holds already")
            }
        }
    }
}

impl std::error::Error for NetError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            NetError::System { source, .. } => Some(source),
            NetError::Firewall(error) => Some(error),
            NetError::NameTaken { .. }
            | NetError::Refused { .. }
            | NetError::Ended
            | NetError::Superseded { .. } => None,
        }
    }
}

impl From<FirewallError> for NetError {
    fn from(error: FirewallError) -> NetError {
        NetError::Firewall(error)
    }
}
