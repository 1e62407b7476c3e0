//! What capsules used, kept in a file in each one's directory for the agent after this one.
//!
//! Each capsule's file is written anew once in [`KEEP_MS`], a few capsules in each turn of the samples, and by a
//! worker: with a thousand capsules, three files of 24 KiB a second. These writes are not synced, as a kernel that
//! goes on keeps them without: an agent that is killed loses the figures of the last [`KEEP_MS`] at most, and one
//! that ends in order loses none, because it writes them all before it goes. What a power cut leaves is of use
//! only to a capsule that is paused, so the file is synced when that happens, once beside the memory's own. A power
//! cut in the midst of it may leave a damaged file: the figures then begin anew, and nothing else depends on them.

use super::SAMPLE_MS;
use super::ring::{MAX_BYTES, Usage};
use crate::agent::Agent;
use crate::capsule::CapsuleKey;
use crate::context::Report;
use crate::whole_file;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

/// What of a capsule's figures an agent that is killed may lose: about the step of the coarsest ring.
pub const KEEP_MS: u64 = 300_000;
/// The file, in the capsule's directory.
pub const FILE_NAME: &str = "usage";
const MODE: u32 = 0o600;
/// How many turns of the samples it takes until each capsule had its own.
const TURNS: u64 = KEEP_MS / SAMPLE_MS;
/// The most files that one job writes. As many capsules as an agent can have are kept in time with seven.
const MAX_BATCH: usize = 8;
/// The half of a capsule's number that says where it is in the table.
const PLACE: u64 = u32::MAX as u64;

/// What a job has come to: whose figures were kept, and why not.
pub type Outcomes = Vec<(CapsuleKey, io::Result<()>)>;

/// Whose figures are to be written, and when.
#[derive(Debug, Default)]
pub struct Keeper {
    turn: u64,
    /// Whose figures are to be written next, and whether they must outlast a power cut.
    due: BTreeMap<CapsuleKey, bool>,
    /// Whose are being written. There is one job at a time, so that no older figures take the place of newer ones.
    writing: BTreeSet<CapsuleKey>,
    /// The last file could not be written.
    failing: bool,
}

impl Keeper {
    /// A turn of the samples: of those whose figures have changed, some have theirs.
    fn begin_turn(&mut self, changed: impl Iterator<Item = CapsuleKey>) {
        self.turn = (self.turn + 1) % TURNS;
        for key in changed.filter(|key| (key & PLACE) % TURNS == self.turn) {
            self.due.entry(key).or_insert(false);
        }
    }

    /// What the next job is to write; nothing while one is under way.
    fn next_batch(&mut self) -> Vec<(CapsuleKey, bool)> {
        let mut batch = Vec::new();
        while self.writing.is_empty() && batch.len() < MAX_BATCH {
            let Some(next) = self.due.pop_first() else { break };
            batch.push(next);
        }
        batch
    }

    /// Whether nothing is being written, nor about to be.
    pub fn is_idle(&self) -> bool {
        self.due.is_empty() && self.writing.is_empty()
    }

    /// Tells of a failure once, not for each capsule again.
    fn note(&mut self, outcomes: &[(CapsuleKey, io::Result<()>)]) {
        for (_, outcome) in outcomes {
            match outcome {
                Err(e) if !self.failing => log::warn!(
                    "what capsules use is not kept for the next agent: {e}; it is tried again every {} s",
                    KEEP_MS / 1000
                ),
                _ => {}
            }
            self.failing = outcome.is_err();
        }
    }
}

impl Agent {
    /// Writes the figures of those whose turn it is; [`Report::UsageKept`] follows.
    pub(crate) fn keep_some_usage(&mut self) {
        let changed = self.capsules.values().filter(|c| c.usage.is_changed()).map(|c| c.key);
        self.keeper.begin_turn(changed);
        self.begin_keeping();
    }

    /// A capsule is paused: its figures have to outlast the host.
    pub(crate) fn keep_usage_of_paused(&mut self, key: CapsuleKey) {
        self.keeper.due.insert(key, true);
        self.begin_keeping();
    }

    fn begin_keeping(&mut self) {
        // Ends: what is due becomes less.
        while self.keeper.writing.is_empty() && !self.keeper.due.is_empty() {
            let mut files = Vec::new();
            for (key, outlasts_host) in self.keeper.next_batch() {
                let capsule = self.capsules.get_mut(&key);
                if let Some((path, usage)) = capsule.and_then(|capsule| capsule.usage_to_keep()) {
                    files.push((key, path, usage, outlasts_host));
                }
            }
            if files.is_empty() {
                continue;
            }
            self.keeper.writing = files.iter().map(|(key, ..)| *key).collect();
            self.ctx.workers.submit(move || {
                let keep = |(key, path, usage, outlasts_host): (_, PathBuf, Usage, bool)| {
                    (key, write(&path, &usage, outlasts_host))
                };
                Report::UsageKept(files.into_iter().map(keep).collect())
            });
        }
    }

    /// A job has written some.
    pub(crate) fn on_usage_kept(&mut self, outcomes: Outcomes) {
        self.keeper.writing.clear();
        self.keeper.note(&outcomes);
        for (key, outcome) in outcomes {
            if let (Some(capsule), Err(_)) = (self.capsules.get_mut(&key), outcome) {
                capsule.usage.set_changed();
            }
        }
        self.begin_keeping();
    }

    /// The agent ends: all that was not kept yet is written, by itself and at once, as nobody waits for anything
    /// else. Blocks: for a thousand capsules, a fraction of a second.
    pub(crate) fn keep_all_usage(&mut self) {
        for capsule in self.capsules.values_mut() {
            // Where the time for ending is over, a worker may still be about to write an older one.
            if capsule.usage.is_changed()
                && !self.keeper.writing.contains(&capsule.key)
                && let Some((path, usage)) = capsule.usage_to_keep()
            {
                self.keeper.note(&[(capsule.key, write(&path, &usage, false))]);
            }
        }
    }
}

fn write(path: &Path, usage: &Usage, outlasts_host: bool) -> io::Result<()> {
    let bytes = usage.to_bytes();
    let written = match outlasts_host {
        true => whole_file::replace(path, &bytes, MODE),
        false => whole_file::replace_unsynced(path, &bytes, MODE),
    };
    match written {
        // It was destroyed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io::Error::new(e.kind(), format!("writing {}: {e}", path.display()))),
        Ok(()) => Ok(()),
    }
}

/// The figures that an agent before this one has kept in a capsule's directory. Those that cannot be read begin
/// anew, which is told: a capsule is not given up for them. Blocks.
pub fn load(directory: &Path) -> Usage {
    let path = directory.join(FILE_NAME);
    let text = match whole_file::read(&path, MAX_BYTES as u64, "figures' file") {
        Ok(None) => return Usage::default(),
        Ok(Some(bytes)) => match Usage::from_bytes(&bytes) {
            Ok(usage) => return usage,
            Err(e) => e.to_string(),
        },
        Err(e) => e.to_string(),
    };
    log::warn!("{}: {text}; what the capsule uses is counted anew", path.display());
    Usage::default()
}

#[cfg(test)]
mod tests {
    use super::super::ring::Sample;
    use super::*;
    use crate::agent::MAX_CAPSULES;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn each_capsule_has_its_turn_once_and_no_turn_has_many() {
        let mut keeper = Keeper::default();
        let keys = || (0..MAX_CAPSULES as u64).map(|place| place | 3 << 32);
        let mut kept = BTreeMap::new();
        for _ in 0..TURNS {
            keeper.begin_turn(keys());
            let batch = keeper.next_batch();
            assert!(batch.len() < MAX_BATCH && keeper.due.is_empty(), "{}", batch.len());
            for (key, outlasts_host) in batch {
                assert!(!outlasts_host);
                *kept.entry(key).or_insert(0) += 1;
            }
        }
        assert!(kept.len() == MAX_CAPSULES && kept.values().all(|times| *times == 1));
    }

    #[test]
    fn one_job_writes_at_a_time_and_what_is_due_meanwhile_waits() {
        let mut keeper = Keeper::default();
        assert!(keeper.is_idle() && keeper.next_batch().is_empty());
        keeper.due = (0..20).map(|key| (key, key == 19)).collect();
        let first = keeper.next_batch();
        assert_eq!(first.len(), MAX_BATCH);
        keeper.writing = first.iter().map(|(key, _)| *key).collect();
        assert!(keeper.next_batch().is_empty() && !keeper.is_idle());
        // One that must outlast the host still does when its turn comes again.
        keeper.turn = 18;
        keeper.begin_turn([19].into_iter());
        keeper.writing.clear();
        let rest: Vec<_> = [keeper.next_batch(), keeper.next_batch()].concat();
        assert_eq!((rest.len(), rest.last()), (12, Some(&(19, true))));
        assert!(keeper.is_idle());
    }

    #[test]
    fn figures_are_kept_and_what_is_damaged_begins_anew() {
        let directory = std::env::temp_dir().join(format!("wrenn-usage-{}", std::process::id()));
        fs::create_dir(&directory).expect("made");
        let path = directory.join(FILE_NAME);
        assert_eq!(load(&directory).last(600).count(), 0);
        let mut usage = Usage::default();
        for (i, outlasts_host) in [(1, false), (2, true), (3, false)] {
            usage.push(1_800_000_000_000 + i * 500, Sample::new(i, i, i));
            write(&path, &usage, outlasts_host).expect("written");
            assert_eq!(load(&directory).last(600).count() as u64, i - 1);
        }
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!((mode & 0o777, fs::read_dir(&directory).expect("listed").count()), (MODE, 1));
        let whole = fs::read(&path).expect("read");
        for bad in [&whole[..whole.len() - 1], b"", &[0; MAX_BYTES + 1]] {
            fs::write(&path, bad).expect("written");
            assert_eq!(load(&directory).last(600).count(), 0);
        }
        // A directory in its place is damage as well, and none of a capsule that is gone.
        fs::remove_file(&path).and_then(|()| fs::create_dir(&path)).expect("made");
        assert_eq!(load(&directory).last(600).count(), 0);
        assert!(write(&path, &usage, false).is_err());
        fs::remove_dir_all(&directory).expect("removed");
        write(&path, &usage, false).expect("nothing to do");
        assert!(!directory.exists());
    }
}
