//! A process's output: every byte numbered from 0 over all its channels, the last of them kept.

use alloc::collections::VecDeque;

/// Runs (changes of channel) that are kept at most, whatever their length.
const MAX_RUNS: usize = 4096;
/// Memory that an empty ring may keep, in bytes.
const IDLE_CAPACITY: usize = 512;

/// Consecutive bytes of one channel.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u64,
    channel: u8,
}

/// The bounded tail of an output.
#[derive(Debug)]
pub struct OutputRing {
    bytes: VecDeque<u8>,
    runs: VecDeque<Run>,
    start: u64,
    limit: usize,
}

impl OutputRing {
    /// A ring that keeps at most `limit` bytes.
    pub fn new(limit: usize) -> OutputRing {
        OutputRing { bytes: VecDeque::new(), runs: VecDeque::new(), start: 0, limit }
    }

    /// The number of the oldest byte that is kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The number that the next byte will have.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How many bytes can come before one at `from` or after it is lost.
    pub fn room_keeping(&self, from: u64) -> usize {
        let held = self.end().saturating_sub(from.max(self.start)) as usize;
        // A further run pushes the oldest out once there are too many.
        let run_fits = self.runs.len() < MAX_RUNS || self.runs.get(1).is_some_and(|run| run.start <= from);
        if run_fits { self.limit.saturating_sub(held) } else { 0 }
    }

    /// Adds output; the oldest bytes go when it does not fit.
    pub fn push(&mut self, channel: u8, bytes: &[u8]) {
        let bytes = if bytes.len() > self.limit {
            // Even a burst longer than the ring keeps every byte's number.
            let lost = bytes.len() - self.limit;
            self.forget_before(self.end());
            self.start += lost as u64;
            &bytes[lost..]
        } else {
            bytes
        };
        if bytes.is_empty() {
            return;
        }
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(self.limit);
        self.forget_before(self.start + excess as u64);
        if self.runs.back().is_none_or(|run| run.channel != channel) {
            if self.runs.len() >= MAX_RUNS
                && let Some(second) = self.runs.get(1)
            {
                self.forget_before(second.start);
            }
            self.runs.push_back(Run { start: self.end(), channel });
        }
        self.bytes.extend(bytes);
    }

    /// Drops what lies before `from`.
    pub fn forget_before(&mut self, from: u64) {
        let count = (from.saturating_sub(self.start) as usize).min(self.bytes.len());
        self.bytes.drain(..count);
        self.start += count as u64;
        while self.runs.get(1).is_some_and(|next| next.start <= self.start)
            || (self.bytes.is_empty() && !self.runs.is_empty())
        {
            self.runs.pop_front();
        }
        if self.bytes.is_empty() && self.bytes.capacity() > IDLE_CAPACITY {
            self.bytes = VecDeque::new();
            self.runs = VecDeque::new();
        }
    }

    /// The bytes of one channel from number `from` on that lie in one piece; `None` at the end. `from` is
    /// at least [`OutputRing::start`].
    pub fn piece(&self, from: u64) -> Option<(u8, &[u8])> {
        assert!(from >= self.start, "bytes before the start are gone");
        if from >= self.end() {
            return None;
        }
        let index = self.runs.partition_point(|run| run.start <= from).checked_sub(1)?;
        let run = self.runs.get(index)?;
        let end = self.runs.get(index + 1).map_or(self.end(), |next| next.start);
        let (from, to) = ((from - self.start) as usize, (end - self.start) as usize);
        let (front, back) = self.bytes.as_slices();
        let piece = if from < front.len() {
            &front[from..to.min(front.len())]
        } else {
            &back[from - front.len()..to - front.len()]
        };
        Some((run.channel, piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn all(ring: &OutputRing) -> Vec<(u8, Vec<u8>)> {
        let mut at = ring.start();
        let mut out: Vec<(u8, Vec<u8>)> = Vec::new();
        while let Some((channel, bytes)) = ring.piece(at) {
            match out.last_mut() {
                Some((last, content)) if *last == channel => content.extend_from_slice(bytes),
                _ => out.push((channel, bytes.to_vec())),
            }
            at += bytes.len() as u64;
        }
        assert_eq!(at, ring.end());
        out
    }

    #[test]
    fn channels_keep_their_order() {
        let mut ring = OutputRing::new(10);
        ring.push(1, b"abc");
        ring.push(1, b"d");
        ring.push(2, b"EF");
        assert_eq!(all(&ring), [(1, b"abcd".to_vec()), (2, b"EF".to_vec())]);
        assert_eq!(ring.piece(5), Some((2, &b"F"[..])));
        assert_eq!((ring.room_keeping(0), ring.room_keeping(4)), (4, 8));
        ring.push(1, b"ghijklm");
        assert_eq!((ring.start(), ring.end()), (3, 13));
        assert_eq!(all(&ring), [(1, b"d".to_vec()), (2, b"EF".to_vec()), (1, b"ghijklm".to_vec())]);
    }

    #[test]
    fn a_burst_longer_than_the_ring_keeps_its_tail_and_numbers() {
        let mut ring = OutputRing::new(4);
        ring.push(1, b"xy");
        ring.push(2, b"0123456789");
        assert_eq!((ring.start(), ring.end()), (8, 12));
        assert_eq!(all(&ring), [(2, b"6789".to_vec())]);
    }

    #[test]
    fn many_changes_of_channel_are_bounded() {
        let mut ring = OutputRing::new(1 << 20);
        for i in 0..MAX_RUNS as u64 * 2 {
            ring.push((i % 2) as u8, &[i as u8]);
        }
        assert_eq!(ring.runs.len(), MAX_RUNS);
        assert_eq!((ring.end(), ring.start()), (MAX_RUNS as u64 * 2, MAX_RUNS as u64));
        assert_eq!((ring.room_keeping(ring.start()), ring.room_keeping(ring.end())), (0, 1 << 20));
        assert_eq!(all(&ring).len(), MAX_RUNS);
    }

    #[test]
    fn forgetting_all_gives_the_memory_back() {
        let mut ring = OutputRing::new(1 << 16);
        ring.push(1, &[7; 5000]);
        ring.forget_before(5000);
        assert_eq!((ring.start(), ring.end(), ring.bytes.capacity()), (5000, 5000, 0));
        ring.push(2, b"a");
        assert_eq!(ring.piece(5000), Some((2, &b"a"[..])));
    }
}
