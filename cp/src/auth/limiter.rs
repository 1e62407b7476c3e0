//! Bounds on failed logins: who fails too often, from one address or for one account, waits.
//!
//! The state is this process's alone and of a fixed size: several control planes allow as many times
//! the failures, which still leaves guessing a password of eight characters hopeless. API keys are random,
//! so that [`wire::limiter`] is enough for those who prove one: it knows addresses only, and no accounts.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use wire::limiter::peer_of;

/// Failures from one address for one account until both have to wait.
pub const ACCOUNT_FAILURES: u32 = 10;
/// Failures from one address, whatever the account, until it has to wait.
pub const ADDRESS_FAILURES: u32 = 100;
/// How long failures count, in seconds from the first one.
pub const WINDOW_SEC: u64 = 15 * 60;
/// How many addresses and accounts are remembered. When it is full the oldest are forgotten first.
pub const MAX_ENTRIES: usize = 10_000;
/// How many password checks may be under way or wait for a worker thread, each of which one takes for a
/// fifth of a second: the queue must stay short for everybody else.
pub const MAX_CHECKS: u32 = 8;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    address: IpAddr,
    account: Option<String>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    since_sec: u64,
}

/// Counts failed logins. Pure: the caller tells the time.
#[derive(Debug, Default)]
pub struct Limiter {
    failures: HashMap<Key, Failures>,
    running: u32,
}

/// Why a login is not even tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many failures; how many seconds are left to wait.
    Wait(u64),
    /// Too many logins are being checked right now.
    Busy,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did not take place: the database was away, or the client.
    Unknown,
    /// The password is right.
    Right,
    /// The password is wrong, or there is no such account.
    Wrong,
}

fn keys(address: IpAddr, account: &str) -> [(Key, u32); 2] {
    let address = peer_of(address);
    [
        (Key { address, account: Some(account.to_string()) }, ACCOUNT_FAILURES),
        (Key { address, account: None }, ADDRESS_FAILURES),
    ]
}

impl Limiter {
    /// Asks to check a password. `Ok` must be followed by one [`Limiter::finish`].
    ///
    /// # Errors
    /// Why it must not be checked now.
    pub fn start(&mut self, address: IpAddr, account: &str, now_sec: u64) -> Result<(), Refusal> {
        for (key, most) in keys(address, account) {
            if let Some(failures) = self.failures.get(&key) {
                let end = failures.since_sec.saturating_add(WINDOW_SEC);
                if failures.count >= most && now_sec < end {
                    return Err(Refusal::Wait(end - now_sec));
                }
            }
        }
        if self.running >= MAX_CHECKS {
            return Err(Refusal::Busy);
        }
        self.running += 1;
        Ok(())
    }

    /// Tells the outcome of a check.
    pub fn finish(&mut self, address: IpAddr, account: &str, outcome: Outcome, now_sec: u64) {
        assert!(self.running > 0, "every finish has its start");
        self.running -= 1;
        let [(of_account, _), (of_address, _)] = keys(address, account);
        match outcome {
            Outcome::Unknown => return,
            Outcome::Right => {
                self.failures.remove(&of_account);
                return;
            }
            Outcome::Wrong => {}
        }
        for key in [of_account, of_address] {
            if !self.failures.contains_key(&key) && self.failures.len() >= MAX_ENTRIES {
                self.forget_old(now_sec);
            }
            let entry = self.failures.entry(key).or_insert(Failures { count: 0, since_sec: now_sec });
            if now_sec >= entry.since_sec.saturating_add(WINDOW_SEC) {
                *entry = Failures { count: 0, since_sec: now_sec };
            }
            entry.count = entry.count.saturating_add(1);
        }
    }

    /// Makes room for a quarter of the table: what no longer counts, then the oldest.
    fn forget_old(&mut self, now_sec: u64) {
        self.failures.retain(|_, f| now_sec < f.since_sec.saturating_add(WINDOW_SEC));
        let keep = MAX_ENTRIES - MAX_ENTRIES / 4;
        if self.failures.len() <= keep {
            return;
        }
        let mut ages: Vec<u64> = self.failures.values().map(|f| f.since_sec).collect();
        ages.sort_unstable();
        let cut = ages[ages.len() - keep];
        self.failures.retain(|_, f| f.since_sec >= cut);
        // Many of the same second: then which of them go does not matter.
        while self.failures.len() > keep {
            let Some(any) = self.failures.keys().next().cloned() else { break };
            self.failures.remove(&any);
        }
    }
}

static LOGINS: Mutex<Option<Limiter>> = Mutex::new(None);

fn logins() -> MutexGuard<'static, Option<Limiter>> {
    // A count that a panicking thread left half changed is still a count.
    LOGINS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A login whose password may be checked now.
#[derive(Debug)]
pub struct Attempt {
    address: IpAddr,
    account: String,
    outcome: Outcome,
    now_sec: u64,
}

impl Attempt {
    /// Asks this process's limiter.
    ///
    /// # Errors
    /// Why the password must not be checked now.
    pub fn start(address: IpAddr, account: &str, now_sec: u64) -> Result<Attempt, Refusal> {
        logins().get_or_insert_default().start(address, account, now_sec)?;
        Ok(Attempt { address, account: account.to_string(), outcome: Outcome::Unknown, now_sec })
    }

    /// Tells the outcome. Without it the check counts as one that did not take place.
    pub fn finish(mut self, is_right: bool) {
        self.outcome = if is_right { Outcome::Right } else { Outcome::Wrong };
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        logins().get_or_insert_default().finish(self.address, &self.account, self.outcome, self.now_sec);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    fn fail(limiter: &mut Limiter, address: IpAddr, account: &str, now: u64) -> Result<(), Refusal> {
        limiter.start(address, account, now)?;
        limiter.finish(address, account, Outcome::Wrong, now);
        Ok(())
    }

    #[test]
    fn the_eleventh_failure_waits_and_only_where_it_failed() {
        let mut limiter = Limiter::default();
        for second in 0..u64::from(ACCOUNT_FAILURES) {
            assert_eq!(fail(&mut limiter, HERE, "a@b", second), Ok(()));
        }
        assert_eq!(limiter.start(HERE, "a@b", 100), Err(Refusal::Wait(WINDOW_SEC - 100)));
        assert_eq!(fail(&mut limiter, HERE, "c@d", 100), Ok(()), "another account");
        assert_eq!(fail(&mut limiter, THERE, "a@b", 100), Ok(()), "another address");
        assert_eq!(fail(&mut limiter, HERE, "a@b", WINDOW_SEC), Ok(()), "the time is over");
        assert_eq!(fail(&mut limiter, HERE, "a@b", WINDOW_SEC), Ok(()), "and counted anew");
    }

    #[test]
    fn a_right_password_clears_the_account() {
        let mut limiter = Limiter::default();
        for _ in 0..ACCOUNT_FAILURES - 1 {
            fail(&mut limiter, HERE, "a@b", 0).expect("below the bound");
        }
        limiter.start(HERE, "a@b", 0).expect("below the bound");
        limiter.finish(HERE, "a@b", Outcome::Right, 0);
        assert_eq!(fail(&mut limiter, HERE, "a@b", 0), Ok(()));
    }

    #[test]
    fn one_address_cannot_try_account_after_account() {
        let mut limiter = Limiter::default();
        for n in 0..ADDRESS_FAILURES {
            assert_eq!(fail(&mut limiter, HERE, &format!("{n}@b"), 0), Ok(()));
        }
        assert_eq!(limiter.start(HERE, "new@b", 1), Err(Refusal::Wait(WINDOW_SEC - 1)));
    }

    #[test]
    fn few_are_checked_at_once() {
        let mut limiter = Limiter::default();
        for _ in 0..MAX_CHECKS {
            limiter.start(HERE, "a@b", 0).expect("below the bound");
        }
        assert_eq!(limiter.start(THERE, "c@d", 0), Err(Refusal::Busy));
        limiter.finish(HERE, "a@b", Outcome::Right, 0);
        assert_eq!(limiter.start(THERE, "c@d", 0), Ok(()));
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        let [(here, _), _] = keys("2001:db8::1".parse().expect("an address"), "a@b");
        let [(near, _), _] = keys("2001:db8::ffff:1".parse().expect("an address"), "a@b");
        assert_eq!(here, near);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut limiter = Limiter::default();
        for n in 0..3 * MAX_ENTRIES as u32 {
            let address = IpAddr::V4(Ipv4Addr::from(n));
            fail(&mut limiter, address, "a@b", u64::from(n) / 5000).expect("new");
            assert!(limiter.failures.len() <= MAX_ENTRIES);
        }
    }
}
