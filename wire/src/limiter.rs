//! How often somebody may present a wrong secret: pure, and bounded in memory.
//!
//! A listener asks [`FailureLimiter::wait_ms`] before it lets a peer authenticate, and tells
//! [`FailureLimiter::failed`] when a session ended with
//! [`SessionError::Auth`](crate::session::SessionError::Auth), by the peer's address, by the identity that
//! it claimed, or by each in a limiter of its own. Somebody who fails may try [`BURST`] times at once and
//! then every [`REFILL_MS`]. Limiting by identity lets others lock a client out, so it is for servers
//! whose addresses say nothing; the secrets here are random and need no more than a bound on load.

use alloc::collections::BTreeMap;
use core::net::IpAddr;

/// Failures that are free.
pub const BURST: u64 = 10;
/// Time after which one failure more is free, in milliseconds.
pub const REFILL_MS: u64 = 6_000;
/// Peers that are remembered: some 64 KiB. When there are more, those whose failures weigh least are
/// forgotten.
pub const MAX_PEERS: usize = 1024;

/// Failures of each peer. `K` is what a peer is known by.
#[derive(Debug)]
pub struct FailureLimiter<K> {
    /// When each peer's failures are all forgotten, in milliseconds: each adds [`REFILL_MS`] to it.
    clear_at_ms: BTreeMap<K, u64>,
}

impl<K: Ord + Clone> Default for FailureLimiter<K> {
    fn default() -> Self {
        FailureLimiter::new()
    }
}

impl<K: Ord + Clone> FailureLimiter<K> {
    /// Nobody has failed yet.
    pub fn new() -> FailureLimiter<K> {
        FailureLimiter { clear_at_ms: BTreeMap::new() }
    }

    /// How long this peer has to wait until it may try, in milliseconds: 0 when it may now.
    pub fn wait_ms(&self, peer: &K, now_ms: u64) -> u64 {
        let debt = self.clear_at_ms.get(peer).map_or(0, |clear| clear.saturating_sub(now_ms));
        debt.saturating_sub((BURST - 1) * REFILL_MS)
    }

    /// This peer has presented a wrong secret.
    pub fn failed(&mut self, peer: K, now_ms: u64) {
        if !self.clear_at_ms.contains_key(&peer) && self.clear_at_ms.len() >= MAX_PEERS {
            self.clear_at_ms.retain(|_, clear| *clear > now_ms);
            if self.clear_at_ms.len() >= MAX_PEERS {
                let least = self.clear_at_ms.iter().min_by_key(|(_, clear)| **clear).map(|(k, _)| k.clone());
                if let Some(least) = least {
                    self.clear_at_ms.remove(&least);
                }
            }
        }
        let clear = self.clear_at_ms.entry(peer).or_insert(now_ms);
        // One that goes on while it has to wait does not wait for longer than a burst takes to clear.
        *clear = ((*clear).max(now_ms) + REFILL_MS).min(now_ms + BURST * REFILL_MS);
    }

    /// This peer has proven who it is: its failures are forgotten.
    pub fn succeeded(&mut self, peer: &K) {
        self.clear_at_ms.remove(peer);
    }

    /// How many peers are remembered.
    pub fn len(&self) -> usize {
        self.clear_at_ms.len()
    }

    /// Whether nobody is remembered.
    pub fn is_empty(&self) -> bool {
        self.clear_at_ms.is_empty()
    }
}

/// What an address is known by: an IPv4 address itself, of an IPv6 address the first 64 bits, since one
/// host has all that follow. An IPv4 address in IPv6's form is the IPv4 address.
pub fn peer_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_then_each_try_waits() {
        let mut limiter = FailureLimiter::new();
        for _ in 0..BURST {
            assert_eq!(limiter.wait_ms(&"a", 100), 0);
            limiter.failed("a", 100);
        }
        assert_eq!(limiter.wait_ms(&"a", 100), REFILL_MS);
        assert_eq!(limiter.wait_ms(&"b", 100), 0);
        assert_eq!(limiter.wait_ms(&"a", 100 + REFILL_MS), 0);
        limiter.failed("a", 100 + REFILL_MS);
        assert_eq!(limiter.wait_ms(&"a", 100 + REFILL_MS), REFILL_MS);
        limiter.succeeded(&"a");
        assert_eq!(limiter.wait_ms(&"a", 100 + REFILL_MS), 0);
    }

    #[test]
    fn nobody_waits_for_longer_than_one_refill() {
        let mut limiter = FailureLimiter::new();
        for _ in 0..1000 {
            limiter.failed(1, 0);
        }
        assert_eq!(limiter.wait_ms(&1, 0), REFILL_MS);
    }

    #[test]
    fn memory_is_bounded_and_the_worst_are_remembered() {
        let mut limiter = FailureLimiter::new();
        for _ in 0..BURST {
            limiter.failed(u64::MAX, 0);
        }
        for peer in 0..10_000 {
            limiter.failed(peer, 1);
        }
        assert_eq!(limiter.len(), MAX_PEERS);
        assert!(limiter.wait_ms(&u64::MAX, 1) > 0);
        limiter.failed(7, 1_000_000);
        assert_eq!(limiter.len(), 1, "what has run out makes room first");
    }

    #[test]
    fn one_host_is_one_peer() {
        let peer = |text: &str| peer_of(text.parse().expect("an address"));
        assert_eq!(peer("2001:db8::1"), peer("2001:db8::ffff:2"));
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(peer("::ffff:10.0.0.1"), peer("10.0.0.1"));
    }
}
