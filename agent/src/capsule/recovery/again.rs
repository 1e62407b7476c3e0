//! What goes wrong with a capsule in passing, while the agent starts, is tried again: a capsule that is left alone
//! is one that nobody can use until the next start.

use super::RecoveryError;
use crate::net::NetError;
use crate::net::firewall::FirewallError;
use crate::vmm::VmmError;
use std::io;
use std::time::{Duration, Instant};

/// How often what failed in passing is tried again.
const RETRIES: u32 = 3;
/// The wait before the first further try; each next one waits twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// No further try begins after this: others wait for the agent to start, and a VMM that does not answer takes twenty
/// seconds of each.
const AT_MOST: Duration = Duration::from_secs(60);

/// Tries again what `attempt` gives back, until nothing is left or the tries are used up. It is told whether it is
/// asked for the last time, and then gives nothing back. Blocks.
pub(super) fn try_again<T>(mut left: Vec<T>, mut attempt: impl FnMut(T, bool) -> Option<T>) {
    let began = Instant::now();
    for number in 0..RETRIES {
        if left.is_empty() {
            return;
        }
        std::thread::sleep(FIRST_WAIT * (1 << number));
        let mut still = Vec::new();
        for one in left {
            let is_last = number + 1 == RETRIES || began.elapsed() > AT_MOST;
            still.extend(attempt(one, is_last));
        }
        left = still;
    }
}

impl RecoveryError {
    /// Whether the same may work a moment later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            RecoveryError::Io { source, .. } => is_passing(source),
            RecoveryError::Vmm(e) => is_passing_of_vmm(e),
            RecoveryError::Net(NetError::Firewall(FirewallError::TimedOut)) => true,
            RecoveryError::Net(NetError::Firewall(FirewallError::Run(e))) => is_passing(e),
            RecoveryError::Net(NetError::System { source, .. }) => is_passing(source),
            _ => false,
        }
    }
}

fn is_passing_of_vmm(error: &VmmError) -> bool {
    match error {
        VmmError::System { source, .. } => is_passing(source),
        // It is about to end, or had not noticed yet that the agent before this one is gone.
        VmmError::NoAnswer { .. } | VmmError::MonitorClosed => true,
        VmmError::Said(error, _) => is_passing_of_vmm(error),
        _ => false,
    }
}

fn is_passing(error: &io::Error) -> bool {
    let is_busy = matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::TimedOut
            | io::ErrorKind::Interrupted
            | io::ErrorKind::OutOfMemory
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ResourceBusy
    );
    is_busy || matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_tried_until_it_works_and_not_for_ever() {
        let mut tried = Vec::new();
        try_again(vec![1, 2, 99], |one: u32, is_last| {
            tried.push((one, is_last));
            (one > tried.iter().filter(|(of, _)| *of == one).count() as u32 && !is_last).then_some(one)
        });
        let expected = [(1, false), (2, false), (99, false), (2, false), (99, false), (99, true)];
        assert_eq!(tried, expected);
        try_again(Vec::<u32>::new(), |_, _| unreachable!("there is nothing"));
    }

    #[test]
    fn what_passes_is_told_from_what_stays() {
        let io = |errno| RecoveryError::Io {
            step: "opening",
            path: "/x".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        for errno in
            [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::ETIMEDOUT, libc::ENOMEM, libc::ECONNREFUSED]
        {
            assert!(io(errno).is_passing(), "{errno}");
        }
        for errno in [libc::ENOENT, libc::EACCES, libc::EIO, libc::ENOSPC] {
            assert!(!io(errno).is_passing(), "{errno}");
        }
        let silent = VmmError::NoAnswer { command: "query-status" };
        assert!(RecoveryError::Vmm(VmmError::Said(Box::new(silent), "no".into())).is_passing());
        let refused = VmmError::Refused { command: "cont", why: "no".into() };
        assert!(!RecoveryError::Vmm(refused).is_passing());
        assert!(!RecoveryError::Incomplete("/x".into()).is_passing());
    }
}
