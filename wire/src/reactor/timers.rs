//! Timers by key: each key has at most one, and setting it again moves it. So there are never more
//! timers than things that have one.

use std::collections::{BTreeMap, BTreeSet};

/// Timers of keys `K`, in the caller's milliseconds.
#[derive(Debug)]
pub struct Timers<K> {
    by_key: BTreeMap<K, u64>,
    by_time: BTreeSet<(u64, K)>,
}

impl<K: Ord + Copy> Default for Timers<K> {
    fn default() -> Timers<K> {
        Timers { by_key: BTreeMap::new(), by_time: BTreeSet::new() }
    }
}

impl<K: Ord + Copy> Timers<K> {
    /// Sets the timer of `key`, in place of one that it may have.
    pub fn set(&mut self, key: K, at_ms: u64) {
        match self.by_key.insert(key, at_ms) {
            Some(before) if before == at_ms => return,
            Some(before) => {
                self.by_time.remove(&(before, key));
            }
            None => {}
        }
        self.by_time.insert((at_ms, key));
    }

    /// Takes the timer of `key` away.
    pub fn clear(&mut self, key: K) {
        if let Some(before) = self.by_key.remove(&key) {
            self.by_time.remove(&(before, key));
        }
    }

    /// Sets or clears.
    pub fn update(&mut self, key: K, at_ms: Option<u64>) {
        match at_ms {
            Some(at_ms) => self.set(key, at_ms),
            None => self.clear(key),
        }
    }

    /// When the next timer is due.
    pub fn next_ms(&self) -> Option<u64> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// The next timer that is due at `now_ms`, which is then gone.
    pub fn pop_due(&mut self, now_ms: u64) -> Option<K> {
        let (at, key) = *self.by_time.first().filter(|(at, _)| *at <= now_ms)?;
        self.by_time.remove(&(at, key));
        self.by_key.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_come_in_order_and_only_once() {
        let mut timers = Timers::default();
        timers.set('a', 30);
        timers.set('b', 20);
        timers.set('c', 20);
        timers.update('a', Some(10));
        timers.set('a', 10);
        timers.update('c', None);
        assert_eq!(timers.next_ms(), Some(10));
        assert_eq!(timers.pop_due(9), None);
        assert_eq!(timers.pop_due(20), Some('a'));
        assert_eq!(timers.pop_due(20), Some('b'));
        assert_eq!(timers.pop_due(99), None);
        assert_eq!(timers.next_ms(), None);
    }
}
