//! What is known of one process, and the timers of all of them.

use super::groups::GroupNumber;
use super::ring::OutputRing;
use crate::connection::StreamKey;
use crate::sys::Fd;
use crate::sys::signal::Exit;
use alloc::collections::{BTreeSet, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;
use wire::codec::Bytes;

/// A process's number in envd; unlike a process id it is never used twice.
pub type ProcessKey = u32;

/// What a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// Its time runs out: SIGTERM.
    Deadline,
    /// It had time to end by itself: SIGKILL.
    Kill,
    /// It has ended, and whoever else holds its pipes had time to write.
    Drain,
    /// A watcher holds it up.
    Stall,
    /// Its result was kept long enough.
    Expire,
    /// The kernel had no memory to watch one of its pipes, and may have now.
    Watch,
}

/// How many kinds of timers there are.
const TIMER_KINDS: usize = 6;

/// The timers of all processes, in the order in which they are due.
#[derive(Debug, Default)]
pub struct Timers(BTreeSet<(u64, ProcessKey, Timer)>);

impl Timers {
    /// When the first is due, in milliseconds.
    pub fn next_ms(&self) -> Option<u64> {
        self.0.first().map(|t| t.0)
    }

    /// Takes one that is due.
    pub fn take_due(&mut self, now_ms: u64) -> Option<(ProcessKey, Timer)> {
        self.0.first().filter(|t| t.0 <= now_ms)?;
        self.0.pop_first().map(|(_, key, timer)| (key, timer))
    }
}

/// Input on its way to a process.
#[derive(Debug)]
pub struct Piece {
    /// Where it came from, for the credit.
    pub from: StreamKey,
    /// Credit to give back once it is written.
    pub cost: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The way to a process's standard input or terminal.
#[derive(Debug, Default)]
pub struct Input {
    /// The writing end; `None` when there is none or it is closed.
    pub fd: Option<Fd>,
    /// What waits, oldest first. Bounded by the windows of the streams that it came from.
    pub queue: VecDeque<Piece>,
    /// Bytes of the oldest piece that are written.
    pub written: usize,
    /// Close it when all is written.
    pub closing: bool,
    /// Whether epoll watches it.
    pub watched: bool,
}

/// One way out of a process.
#[derive(Debug)]
pub struct Output {
    /// The reading end; `None` once it has ended.
    pub fd: Option<Fd>,
    /// The DATA channel.
    pub channel: u8,
    /// Whether epoll watches it.
    pub watched: bool,
}

/// Somebody who gets the output.
#[derive(Debug)]
pub struct Watcher {
    /// The stream.
    pub key: StreamKey,
    /// The number of the next byte to send.
    pub at: u64,
}

/// How a process is being made to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopping {
    /// Nobody wants that.
    No,
    /// It was asked to.
    Asked,
    /// It was killed.
    Killed,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    /// Process, group and session id.
    pub pid: u32,
    /// Its control group, where it has one.
    pub group: Option<GroupNumber>,
    /// Name to select it by.
    pub tag: String,
    /// Program and arguments.
    pub argv: Vec<Bytes>,
    /// Directory and account, for what is told when it cannot be started.
    pub cwd: Vec<u8>,
    /// See `cwd`.
    pub user: String,
    /// Whether it outlives the stream that started it.
    pub detached: bool,
    /// The stream that waits for the start or owns the process.
    pub owner: Option<StreamKey>,
    /// When it was started, in milliseconds of the monotonic clock.
    pub started_ms: u64,
    /// Open until exec has succeeded or failed.
    pub report: Option<Fd>,
    /// Standard input or terminal.
    pub input: Input,
    /// Standard output and error, or the terminal.
    pub outputs: Vec<Output>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Its output.
    pub ring: OutputRing,
    /// Who gets it.
    pub watchers: Vec<Watcher>,
    /// Whether its end was asked for.
    pub stopping: Stopping,
    /// Whether that was because its time ran out.
    pub timed_out: bool,
    /// How and when (milliseconds) it ended.
    pub exit: Option<(Exit, u64)>,
    /// Nothing more is waited for from its pipes.
    pub drained: bool,
    /// When each timer is due.
    timers: [Option<u64>; TIMER_KINDS],
}

impl Process {
    /// A process that was just forked.
    pub fn new(pid: u32, now_ms: u64, ring_limit: usize) -> Process {
        Process {
            pid,
            group: None,
            tag: String::new(),
            argv: Vec::new(),
            cwd: Vec::new(),
            user: String::new(),
            detached: false,
            owner: None,
            started_ms: now_ms,
            report: None,
            input: Input::default(),
            outputs: Vec::new(),
            terminal: false,
            ring: OutputRing::new(ring_limit),
            watchers: Vec::new(),
            stopping: Stopping::No,
            timed_out: false,
            exit: None,
            drained: false,
            timers: [None; TIMER_KINDS],
        }
    }

    /// Whether it runs and has been told of. One that was killed has only to be reaped still: whoever killed
    /// it is not told that it runs, and its tag is free.
    pub fn is_running(&self) -> bool {
        self.is_alive() && self.report.is_none()
    }

    /// Whether it has neither ended nor been killed.
    pub fn is_alive(&self) -> bool {
        self.exit.is_none() && self.stopping != Stopping::Killed
    }

    /// Whether every way out has ended.
    pub fn outputs_ended(&self) -> bool {
        self.outputs.iter().all(|o| o.fd.is_none())
    }

    /// The first byte that a watcher still needs; the end when there is none.
    pub fn needed_from(&self) -> u64 {
        self.watchers.iter().map(|w| w.at).min().unwrap_or(self.ring.end())
    }

    /// Sets a timer, in place of an earlier one of its kind.
    pub fn set_timer(&mut self, timers: &mut Timers, key: ProcessKey, kind: Timer, at_ms: u64) {
        self.clear_timer(timers, key, kind);
        self.timers[kind as usize] = Some(at_ms);
        timers.0.insert((at_ms, key, kind));
    }

    /// Whether a timer is set.
    pub fn has_timer(&self, kind: Timer) -> bool {
        self.timers[kind as usize].is_some()
    }

    /// Takes a timer back.
    pub fn clear_timer(&mut self, timers: &mut Timers, key: ProcessKey, kind: Timer) {
        if let Some(at) = self.timers[kind as usize].take() {
            timers.0.remove(&(at, key, kind));
        }
    }

    /// Takes all timers back.
    pub fn clear_timers(&mut self, timers: &mut Timers, key: ProcessKey) {
        for kind in [Timer::Deadline, Timer::Kill, Timer::Drain, Timer::Stall, Timer::Expire, Timer::Watch] {
            self.clear_timer(timers, key, kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_come_in_order_and_go_with_their_process() {
        let mut timers = Timers::default();
        let mut a = Process::new(10, 0, 1);
        let mut b = Process::new(11, 0, 1);
        a.set_timer(&mut timers, 1, Timer::Deadline, 50);
        b.set_timer(&mut timers, 2, Timer::Drain, 40);
        a.set_timer(&mut timers, 1, Timer::Deadline, 30);
        assert_eq!(timers.next_ms(), Some(30));
        assert_eq!(timers.take_due(29), None);
        assert_eq!(timers.take_due(40), Some((1, Timer::Deadline)));
        b.clear_timers(&mut timers, 2);
        assert_eq!(timers.take_due(100), None);
    }
}
