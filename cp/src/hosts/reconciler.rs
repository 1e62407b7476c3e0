//! Makes the database and a host agree on the host's capsules. The comparison is pure; the API's jobs
//! ask the host, read the records and carry the repairs out.
//!
//! The host's list is taken first and the records are read after it. A record is written before its
//! capsule is asked for, so a capsule without a record is nobody's. The other way round there is a
//! gap, in which a capsule may be finished that the list does not have yet: records that changed a
//! moment ago are left for the next time. Each repair names the state that it was decided for, and is
//! not carried out in another: a request may change the record between the comparison and the repair.
//!
//! Only a host that answers is compared. What a silent host has is left as it is on record: its capsules
//! run on without it, and it lists them when it is back.

use crate::auth::id::Kind;
use std::collections::{HashMap, HashSet};
use wire::message::{CapsuleInfo, CapsuleState, SnapshotInfo};

/// How long a record must not have changed before its capsule's absence means something, in
/// milliseconds. Longer than [`LIST_TIMEOUT_MS`], with room for a slow database.
pub const SETTLED_MS: u64 = 15_000;
/// How long a host may take to list its capsules, in milliseconds.
pub const LIST_TIMEOUT_MS: u64 = 8_000;
/// How long a capsule may be in a passing state before nobody is expected to wait for it any more, in
/// milliseconds: longer than a create may take.
pub const ABANDONED_MS: u64 = 60_000;

/// How long a host must have told of a capsule that is on no record before it is destroyed, in
/// milliseconds. A database that was put back from a backup knows nothing of what was made since; this is
/// how long its operator has to notice.
pub const ORPHAN_GRACE_MS: u64 = 600_000;

/// The same of a snapshot, in milliseconds. Longer than the clones that are made of one that is on no record may
/// take, all of one request.
pub const SNAPSHOT_GRACE_MS: u64 = 1_800_000;

/// The states of a capsule that was made and that its host has to know.
pub const HELD: [CapsuleState; 6] = [
    CapsuleState::Running,
    CapsuleState::Pausing,
    CapsuleState::Paused,
    CapsuleState::Resuming,
    CapsuleState::Snapshotting,
    CapsuleState::Hibernated,
];

/// What the database knows of a capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `cl-…`
    pub id: String,
    /// Its state.
    pub state: CapsuleState,
    /// Whether this is the host that it should be on.
    pub is_here: bool,
    /// How long ago the state changed, in milliseconds.
    pub age_ms: u64,
}

/// Something to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// The host has it running, paused or hibernated: note that, and what the host tells of it.
    Note {
        /// What the host tells.
        info: CapsuleInfo,
        /// The state on record.
        from: CapsuleState,
    },
    /// It failed.
    MarkError {
        /// `cl-…`
        id: String,
        /// The state on record.
        from: CapsuleState,
        /// Why, for a person.
        reason: &'static str,
    },
    /// The host does not know it any more.
    MarkMissing {
        /// `cl-…`
        id: String,
        /// The state on record.
        from: CapsuleState,
    },
    /// It was to be destroyed and is gone.
    MarkStopped {
        /// `cl-…`
        id: String,
    },
    /// The host has it and should not.
    Destroy {
        /// `cl-…`
        id: String,
        /// Why.
        reason: Unwanted,
    },
}

/// Why a host should not have a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unwanted {
    /// It is on no record.
    Orphaned,
    /// It is on record as another host's.
    Elsewhere,
    /// Its life is over.
    Over,
    /// Its destruction was begun, and was not finished.
    Unfinished,
}

impl Unwanted {
    /// For the log and the audit log.
    pub fn name(self) -> &'static str {
        match self {
            Unwanted::Orphaned => "orphaned",
            Unwanted::Elsewhere => "elsewhere",
            Unwanted::Over => "over",
            Unwanted::Unfinished => "unfinished",
        }
    }
}

/// The capsules that a host tells of and that are on no record.
pub fn unknown(reported: &[CapsuleInfo], records: &[Record]) -> Vec<String> {
    let known: HashSet<&str> = records.iter().map(|record| record.id.as_str()).collect();
    let ids = reported.iter().map(|info| info.capsule_id.as_str()).filter(|id| !known.contains(id));
    ids.map(str::to_string).collect()
}

/// The snapshots that a host tells of and that are on no record: what was left when an answer or a control plane
/// was lost, and what deleted teams have left. Only those whose names a control plane gave.
pub fn unknown_snapshots(reported: &[SnapshotInfo], on_record: &HashSet<String>) -> Vec<String> {
    let names = reported.iter().map(|info| &info.name);
    names.filter(|name| Kind::Snapshot.accepts(name) && !on_record.contains(*name)).cloned().collect()
}

/// Those of them that are deleted now, given how long the host has told of each, in milliseconds.
pub fn doomed_snapshots(orphans: &HashMap<String, u64>) -> Vec<String> {
    let due = orphans.iter().filter(|(_, age_ms)| **age_ms >= SNAPSHOT_GRACE_MS);
    due.map(|(name, _)| name.clone()).collect()
}

/// Compares. At most one repair for a capsule, in the order of records, then of orphans. `orphans` says how
/// long the host has told of those that are on no record, in milliseconds.
pub fn compare(reported: &[CapsuleInfo], records: &[Record], orphans: &HashMap<String, u64>) -> Vec<Repair> {
    let on_host: HashMap<&str, &CapsuleInfo> =
        reported.iter().map(|info| (info.capsule_id.as_str(), info)).collect();
    let of_records =
        records.iter().filter_map(|record| decide(record, on_host.get(record.id.as_str()).copied()));
    let is_due = |id: &String| orphans.get(id).is_some_and(|age_ms| *age_ms >= ORPHAN_GRACE_MS);
    let of_orphans = unknown(reported, records)
        .into_iter()
        .filter(is_due)
        .map(|id| Repair::Destroy { id, reason: Unwanted::Orphaned });
    of_records.chain(of_orphans).collect()
}

/// What to do about one capsule that is on record, given what the host tells of it.
pub fn decide(record: &Record, reported: Option<&CapsuleInfo>) -> Option<Repair> {
    match reported {
        Some(info) => present(record, info),
        None => absent(record),
    }
}

/// The host has a capsule that is on record.
fn present(record: &Record, info: &CapsuleInfo) -> Option<Repair> {
    let (id, from) = (record.id.clone(), record.state);
    let is_settled = record.age_ms >= SETTLED_MS;
    let unwanted = match record.state {
        _ if !record.is_here => Some(Unwanted::Elsewhere),
        CapsuleState::Stopped | CapsuleState::Error => Some(Unwanted::Over),
        CapsuleState::Stopping => Some(Unwanted::Unfinished),
        _ => None,
    };
    if let Some(reason) = unwanted {
        // Somebody may be just destroying it.
        return is_settled.then_some(Repair::Destroy { id, reason });
    }
    match info.state {
        CapsuleState::Error => {
            Some(Repair::MarkError { id, from, reason: "the host reports that it failed" })
        }
        // The host's word counts once nobody can be about to note an answer: it pauses idle capsules by
        // itself, and what was begun is finished there whether or not anybody heard of it. What agrees, and
        // what was missing, needs no waiting.
        CapsuleState::Running | CapsuleState::Paused | CapsuleState::Hibernated => {
            let is_clear = record.state == info.state || record.state == CapsuleState::Missing;
            (is_clear || is_settled).then(|| Repair::Note { info: info.clone(), from })
        }
        // It is at work, and will have come to an end at one of the next comparisons.
        _ => None,
    }
}

/// A capsule that is on record is not in the host's list.
fn absent(record: &Record) -> Option<Repair> {
    let (id, from) = (record.id.clone(), record.state);
    if !record.is_here || record.age_ms < SETTLED_MS {
        return None;
    }
    match record.state {
        state if HELD.contains(&state) => Some(Repair::MarkMissing { id, from }),
        CapsuleState::Stopping => Some(Repair::MarkStopped { id }),
        CapsuleState::Pending | CapsuleState::Starting if record.age_ms >= ABANDONED_MS => {
            let reason = "it was not finished: its control plane or its host stopped meanwhile";
            Some(Repair::MarkError { id, from, reason })
        }
        _ => None,
    }
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [CapsuleState; 12] = [
        CapsuleState::Pending,
        CapsuleState::Starting,
        CapsuleState::Running,
        CapsuleState::Pausing,
        CapsuleState::Paused,
        CapsuleState::Resuming,
        CapsuleState::Snapshotting,
        CapsuleState::Hibernated,
        CapsuleState::Stopping,
        CapsuleState::Stopped,
        CapsuleState::Missing,
        CapsuleState::Error,
    ];

    /// A line for each state on record, in the order of [`STATES`]; a letter for each that the host tells, the
    /// first for a capsule that it does not know. Large letters hold at once, small ones once the record has
    /// settled: note, destroy, missing, stopped, error; error for what is not there once it is abandoned.
    const TABLE: [&str; 12] = [
        "e..n.n..n...E",
        "e..n.n..n...E",
        "m..N.n..n...E",
        "m..n.n..n...E",
        "m..n.N..n...E",
        "m..n.n..n...E",
        "m..n.n..n...E",
        "m..n.n..N...E",
        "sdddddddddddd",
        ".dddddddddddd",
        "...N.N..N...E",
        ".dddddddddddd",
    ];

    const OLD_MS: u64 = 3_600_000;

    fn info(state: CapsuleState) -> CapsuleInfo {
        CapsuleInfo { capsule_id: "cl-a".into(), state, ..CapsuleInfo::default() }
    }

    fn letter(repair: Option<&Repair>) -> char {
        match repair {
            None => '.',
            Some(Repair::Note { .. }) => 'n',
            Some(Repair::MarkError { .. }) => 'e',
            Some(Repair::MarkMissing { .. }) => 'm',
            Some(Repair::MarkStopped { .. }) => 's',
            Some(Repair::Destroy { .. }) => 'd',
        }
    }

    #[test]
    fn every_state_on_record_meets_every_report() {
        for (state, line) in STATES.into_iter().zip(TABLE) {
            let reports = std::iter::once(None).chain(STATES.into_iter().map(|s| Some(info(s))));
            for (report, expected) in reports.zip(line.chars()) {
                let is_at_once = expected.is_ascii_uppercase();
                let from_ms = if report.is_none() && expected == 'e' { ABANDONED_MS } else { SETTLED_MS };
                for (age_ms, is_early) in [(0, true), (from_ms - 1, true), (from_ms, false), (OLD_MS, false)]
                {
                    let record = Record { id: "cl-a".into(), state, is_here: true, age_ms };
                    let repair = decide(&record, report.as_ref());
                    let expected = if is_early && !is_at_once { '.' } else { expected.to_ascii_lowercase() };
                    assert_eq!(letter(repair.as_ref()), expected, "{state:?} {age_ms} ms, {report:?}");
                    match repair {
                        Some(Repair::Note { info, from }) => {
                            assert_eq!((Some(&info), from), (report.as_ref(), state));
                        }
                        Some(Repair::MarkError { from, .. } | Repair::MarkMissing { from, .. }) => {
                            assert_eq!(from, state);
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    #[test]
    fn another_hosts_capsule_is_destroyed_here_and_not_judged() {
        for state in STATES {
            let record = |age_ms| Record { id: "cl-a".into(), state, is_here: false, age_ms };
            for reported in STATES {
                assert_eq!(decide(&record(SETTLED_MS - 1), Some(&info(reported))), None);
                assert_eq!(
                    decide(&record(SETTLED_MS), Some(&info(reported))),
                    Some(Repair::Destroy { id: "cl-a".into(), reason: Unwanted::Elsewhere })
                );
            }
            assert_eq!(decide(&record(OLD_MS), None), None, "{state:?}");
        }
    }

    #[test]
    fn only_snapshots_that_control_planes_named_are_orphans_and_have_their_grace() {
        let (kept, left) = (Kind::Snapshot.new_id(), Kind::Snapshot.new_id());
        let named = |name: &str| SnapshotInfo { name: name.into(), ..SnapshotInfo::default() };
        let reported = [&kept, &left, "golden", "snap-golden", "cl-0000000000000000000000009"].map(named);
        assert_eq!(unknown_snapshots(&reported, &HashSet::from([kept])), [left.as_str()]);
        let after = |age_ms| doomed_snapshots(&HashMap::from([(left.clone(), age_ms)]));
        assert_eq!(after(SNAPSHOT_GRACE_MS - 1), Vec::<String>::new());
        assert_eq!(after(SNAPSHOT_GRACE_MS), [left.as_str()]);
    }

    #[test]
    fn an_orphan_has_its_grace() {
        let reported = [info(CapsuleState::Running)];
        let after = |age_ms| compare(&reported, &[], &HashMap::from([("cl-a".to_string(), age_ms)]));
        assert_eq!(unknown(&reported, &[]), ["cl-a"]);
        assert_eq!(after(ORPHAN_GRACE_MS - 1), []);
        let destroy = Repair::Destroy { id: "cl-a".into(), reason: Unwanted::Orphaned };
        assert_eq!(after(ORPHAN_GRACE_MS), [destroy]);
        assert_eq!(compare(&reported, &[], &HashMap::new()), [], "never before it was watched");
        // What is on record again is no orphan, however long it was one.
        let record = Record { id: "cl-a".into(), state: CapsuleState::Paused, is_here: true, age_ms: 0 };
        assert_eq!(unknown(&reported, std::slice::from_ref(&record)), Vec::<String>::new());
        assert_eq!(compare(&reported, &[record], &HashMap::from([("cl-a".to_string(), OLD_MS)])), []);
    }
}
