//! What is looked at once a second: the guest's figures, kept for ten minutes, and its ports.

use crate::connection::{Connections, StreamKey, Task};
use crate::ports::{self, Listening};
use crate::sys::file;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
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
/// Processes and descriptors of theirs that one look goes through for the owners of sockets: some 20 ms. A
/// guest with more, or that opens ports by the thousand, does not hold envd up; it has owners untold.
const MAX_LOOKS: usize = 16_384;

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
            let changes = with_owners(changes(&self.ports, &ports), &ports);
            self.ports = ports;
            for change in changes {
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
        for change in with_owners(changes(&BTreeMap::new(), &self.ports), &self.ports) {
            connections.send(key, &change);
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

/// The changes with the processes that listen now.
fn with_owners(mut changes: Vec<PortChange>, ports: &BTreeMap<u16, Listening>) -> Vec<PortChange> {
    let inode_of = |change: &PortChange| {
        ports.get(&change.port).filter(|l| change.listening && l.inode != 0).map(|l| l.inode)
    };
    let owners = owners(changes.iter().filter_map(inode_of).collect());
    for change in &mut changes {
        change.pid = inode_of(change).and_then(|inode| owners.get(&inode).copied()).unwrap_or(0);
    }
    changes
}

/// The processes that have these sockets open, from `/proc/PID/fd` (proc(5)), all in one pass.
fn owners(mut wanted: BTreeSet<u64>) -> BTreeMap<u64, u32> {
    let mut found = BTreeMap::new();
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let Ok(processes) = file::open(file::CURRENT, c"/proc", flags, 0) else { return found };
    let mut looks = 0;
    // A process that ends meanwhile is passed over.
    let _ = file::read_directory(&processes, |name| {
        if wanted.is_empty() || looks >= MAX_LOOKS {
            return false;
        }
        let Some(pid) = number(name) else { return true };
        looks += 1;
        let Ok(path) = CString::new(format!("/proc/{pid}/fd")) else { return true };
        let Ok(descriptors) = file::open(file::CURRENT, &path, flags, 0) else { return true };
        let _ = file::read_directory(&descriptors, |name| {
            looks += 1;
            let target = file::read_link(descriptors.raw(), name).unwrap_or_default();
            if let Some(inode) = socket_inode(&target).filter(|inode| wanted.remove(inode)) {
                found.insert(inode, pid);
            }
            looks < MAX_LOOKS && !wanted.is_empty()
        });
        true
    });
    found
}

/// What `/proc/PID/fd` links a socket to: `socket:[inode]`.
fn socket_inode(target: &[u8]) -> Option<u64> {
    core::str::from_utf8(target).ok()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn number(name: &CStr) -> Option<u32> {
    name.to_str().ok()?.parse().ok()
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
    fn sockets_are_known_by_their_links() {
        assert_eq!(socket_inode(b"socket:[4711]"), Some(4711));
        for other in [b"".as_slice(), b"pipe:[4711]", b"socket:[]", b"socket:[4711", b"/dev/null", b"\xff"] {
            assert_eq!(socket_inode(other), None);
        }
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
