//! What is looked at once a second: the guest's figures, kept for ten minutes, and its ports.

use crate::connection::{Connections, StreamKey, Task};
use crate::ports::{self, Listening};
use crate::sys::file;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;
use core::ffi::CStr;
use wire::message::{Code, Done, Error, GuestMetricsReply, PortChange};

/// The time between two looks, in milliseconds.
pub const PERIOD_MS: u64 = 1_000;
/// Figures that are kept: ten minutes' worth, some 60 KiB.
pub const HISTORY: usize = 600;
/// Streams that may watch the ports at once.
const MAX_WATCHERS: usize = 64;
/// Processes, and descriptors of each, that are looked through for the owner of a socket.
const MAX_PROCESSES: usize = 4096;
const MAX_DESCRIPTORS: usize = 1024;

/// The figures and ports of the last looks.
#[derive(Debug, Default)]
pub struct Sampler {
    due_ms: u64,
    history: VecDeque<GuestMetricsReply>,
    ports: BTreeMap<u16, Listening>,
    watchers: Vec<StreamKey>,
}

impl Sampler {
    /// When [`Sampler::handle_timeout`] is due.
    pub fn next_timeout_ms(&self) -> u64 {
        self.due_ms
    }

    /// Looks, when it is time.
    pub fn handle_timeout(&mut self, now_ms: u64, own_port: u16, connections: &mut Connections) {
        if now_ms < self.due_ms {
            return;
        }
        // What was missed, while the guest stood still, stays missing.
        self.due_ms = now_ms + PERIOD_MS;
        // Figures that cannot be read are a gap; who asks for the present ones is told why.
        if let Ok(figures) = crate::metrics::now() {
            self.keep(figures);
        }
        if !self.watchers.is_empty()
            && let Ok(ports) = ports::listening(own_port)
        {
            let changes = changes(&self.ports, &ports);
            self.ports = ports;
            for change in changes {
                let change = with_owner(change, &self.ports);
                for watcher in &self.watchers {
                    connections.send(*watcher, &change);
                }
            }
        }
    }

    fn keep(&mut self, figures: GuestMetricsReply) {
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(figures);
    }

    /// The figures that were taken later than this.
    pub fn since(&self, after_ms: u64) -> impl Iterator<Item = &GuestMetricsReply> {
        self.history.iter().filter(move |figures| figures.at_ms > after_ms)
    }

    /// Tells a stream of the ports from now on.
    pub fn watch(
        &mut self,
        key: StreamKey,
        own_port: u16,
        connections: &mut Connections,
    ) -> Result<(), Error> {
        if self.watchers.len() >= MAX_WATCHERS {
            let text = format!("{MAX_WATCHERS} streams watch the ports already: end some first");
            return Err(Error::new(Code::ResourceExhausted, text));
        }
        // Others hear of what has changed since the last look at the next one.
        let ports = ports::listening(own_port)?;
        if self.watchers.is_empty() {
            self.ports = ports;
        }
        for change in changes(&BTreeMap::new(), &self.ports) {
            connections.send(key, &with_owner(change, &self.ports));
        }
        connections.send(key, &Done {});
        connections.set_task(key, Task::Sampler);
        self.watchers.push(key);
        Ok(())
    }

    /// A stream that watched is gone.
    pub fn on_stream_gone(&mut self, key: StreamKey) {
        self.watchers.retain(|watcher| *watcher != key);
    }
}

/// What is different, the ports that are gone first. Nobody's pid is looked for yet.
fn changes(before: &BTreeMap<u16, Listening>, now: &BTreeMap<u16, Listening>) -> Vec<PortChange> {
    let change = |port: &u16, of: &Listening, listening| PortChange {
        port: *port,
        listening,
        loopback_only: of.loopback_only,
        user: of.user,
        pid: 0,
    };
    let gone = before.iter().filter(|(port, _)| !now.contains_key(port));
    let new = now.iter().filter(|(port, of)| before.get(port) != Some(*of));
    gone.map(|(port, of)| change(port, of, false))
        .chain(new.map(|(port, of)| change(port, of, true)))
        .collect()
}

fn with_owner(change: PortChange, ports: &BTreeMap<u16, Listening>) -> PortChange {
    let inode = ports.get(&change.port).filter(|_| change.listening).map(|l| l.inode);
    let pid = inode.filter(|inode| *inode != 0).and_then(owner).unwrap_or(0);
    PortChange { pid, ..change }
}

/// The process that has a socket open, from `/proc/PID/fd` (proc(5)).
fn owner(inode: u64) -> Option<u32> {
    let wanted = format!("socket:[{inode}]");
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let processes = file::open(file::CURRENT, c"/proc", flags, 0).ok()?;
    let (mut found, mut looked) = (None, 0);
    // A process that ends meanwhile is passed over.
    let _ = file::read_directory(&processes, |name| {
        let Some(pid) = number(name) else { return true };
        looked += 1;
        if has_open(pid, wanted.as_bytes()) {
            found = Some(pid);
        }
        found.is_none() && looked < MAX_PROCESSES
    });
    found
}

fn number(name: &CStr) -> Option<u32> {
    name.to_str().ok()?.parse().ok()
}

fn has_open(pid: u32, wanted: &[u8]) -> bool {
    let Ok(path) = CString::new(format!("/proc/{pid}/fd")) else { return false };
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let Ok(descriptors) = file::open(file::CURRENT, &path, flags, 0) else { return false };
    let (mut found, mut looked) = (false, 0);
    let _ = file::read_directory(&descriptors, |name| {
        looked += 1;
        found = file::read_link(descriptors.raw(), name).is_ok_and(|target| target == wanted);
        !found && looked < MAX_DESCRIPTORS
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_figures_make_room() {
        let mut sampler = Sampler::default();
        for second in 1..=HISTORY as u64 + 5 {
            sampler.keep(GuestMetricsReply { at_ms: second * PERIOD_MS, ..GuestMetricsReply::default() });
        }
        assert_eq!(sampler.since(0).count(), HISTORY);
        assert_eq!(sampler.since(0).next().map(|f| f.at_ms), Some(6 * PERIOD_MS));
        let late: Vec<u64> = sampler.since(603 * PERIOD_MS).map(|f| f.at_ms).collect();
        assert_eq!(late, [604 * PERIOD_MS, 605 * PERIOD_MS]);
    }

    #[test]
    fn what_is_new_gone_or_somebody_elses_is_a_change() {
        let of = |user, inode| Listening { loopback_only: true, user, inode };
        let before = BTreeMap::from([(22, of(0, 1)), (80, of(0, 2)), (90, of(0, 3))]);
        let now = BTreeMap::from([(22, of(0, 1)), (80, of(7, 9)), (8080, of(0, 4))]);
        let told: Vec<(u16, bool, u32)> =
            changes(&before, &now).iter().map(|c| (c.port, c.listening, c.user)).collect();
        assert_eq!(told, [(90, false, 0), (80, true, 7), (8080, true, 0)]);
        assert!(changes(&now, &now).is_empty());
    }
}
