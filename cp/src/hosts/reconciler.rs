//! Makes the database and a host agree on the host's capsules. The comparison is pure; the API's jobs
//! ask the host, read the records and carry the repairs out.
//!
//! The host's list is taken first and the records are read after it. A record is written before its
//! capsule is asked for, so a capsule without a record is nobody's. The other way round there is a
//! gap, in which a capsule may be finished that the list does not have yet: records that changed a
//! moment ago are left for the next time.

use std::collections::{HashMap, HashSet};
use wire::message::{CapsuleInfo, CapsuleState};

/// How long a record must not have changed before its capsule's absence means something, in
/// milliseconds. Longer than [`LIST_TIMEOUT_MS`], with room for a slow database.
pub const SETTLED_MS: u64 = 15_000;
/// How long a host may take to list its capsules, in milliseconds.
pub const LIST_TIMEOUT_MS: u64 = 8_000;
/// How long a capsule may be in a passing state before nobody is expected to wait for it any more, in
/// milliseconds: longer than a create may take.
pub const ABANDONED_MS: u64 = 60_000;

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
    /// The host has it running: note that, and what the host tells of it.
    MarkRunning(CapsuleInfo),
    /// The host has it paused or hibernated: note that, and what the host tells of it.
    MarkPaused(CapsuleInfo),
    /// It failed.
    MarkError {
        /// `cl-…`
        id: String,
        /// Why, for a person.
        reason: String,
    },
    /// The host does not know it any more.
    MarkMissing {
        /// `cl-…`
        id: String,
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
    },
}

/// Compares. At most one repair for a capsule, in the order of records, then of orphans.
pub fn compare(reported: &[CapsuleInfo], records: &[Record]) -> Vec<Repair> {
    let on_host: HashMap<&str, &CapsuleInfo> =
        reported.iter().map(|info| (info.capsule_id.as_str(), info)).collect();
    let known: HashSet<&str> = records.iter().map(|record| record.id.as_str()).collect();
    let of_records = records.iter().filter_map(|record| match on_host.get(record.id.as_str()) {
        Some(info) => present(record, info),
        None => absent(record),
    });
    let orphans = reported
        .iter()
        .filter(|info| !known.contains(info.capsule_id.as_str()))
        .map(|info| Repair::Destroy { id: info.capsule_id.clone() });
    of_records.chain(orphans).collect()
}

/// The host has a capsule that is on record.
fn present(record: &Record, info: &CapsuleInfo) -> Option<Repair> {
    let destroy = || Some(Repair::Destroy { id: record.id.clone() });
    if !record.is_here {
        return destroy();
    }
    match (record.state, info.state) {
        // Gone for everybody but the host.
        (CapsuleState::Stopped | CapsuleState::Error, _) => destroy(),
        // Somebody is just destroying it, or did not get to the end of it.
        (CapsuleState::Stopping, _) => (record.age_ms >= SETTLED_MS).then(destroy).flatten(),
        (_, CapsuleState::Error) => {
            let reason = "the host reports that it failed".to_string();
            Some(Repair::MarkError { id: record.id.clone(), reason })
        }
        (CapsuleState::Running | CapsuleState::Missing, CapsuleState::Running) => {
            Some(Repair::MarkRunning(info.clone()))
        }
        (
            CapsuleState::Paused | CapsuleState::Hibernated | CapsuleState::Missing,
            CapsuleState::Paused | CapsuleState::Hibernated,
        ) => Some(Repair::MarkPaused(info.clone())),
        // The host's word counts once nobody can be about to note an answer: it pauses idle capsules by
        // itself, and what was begun is finished there whether or not anybody heard of it.
        (_, CapsuleState::Running) => {
            (record.age_ms >= SETTLED_MS).then(|| Repair::MarkRunning(info.clone()))
        }
        (_, CapsuleState::Paused | CapsuleState::Hibernated) => {
            (record.age_ms >= SETTLED_MS).then(|| Repair::MarkPaused(info.clone()))
        }
        _ => None,
    }
}

/// A capsule that is on record is not in the host's list.
fn absent(record: &Record) -> Option<Repair> {
    let id = record.id.clone();
    if !record.is_here || record.age_ms < SETTLED_MS {
        return None;
    }
    match record.state {
        state if HELD.contains(&state) => Some(Repair::MarkMissing { id }),
        CapsuleState::Stopping => Some(Repair::MarkStopped { id }),
        CapsuleState::Pending | CapsuleState::Starting if record.age_ms >= ABANDONED_MS => {
            let reason = "it was not finished: its control plane or its host stopped meanwhile".to_string();
            Some(Repair::MarkError { id, reason })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn info(id: &str, state: CapsuleState) -> CapsuleInfo {
        CapsuleInfo { capsule_id: id.into(), state, ..CapsuleInfo::default() }
    }

    fn record(id: &str, state: CapsuleState, age_ms: u64) -> Record {
        Record { id: id.into(), state, is_here: true, age_ms }
    }

    const OLD: u64 = 3_600_000;

    #[test]
    fn agreement_needs_nothing_but_fresh_facts() {
        let running = info("cl-a", CapsuleState::Running);
        let records = [record("cl-a", CapsuleState::Running, OLD)];
        assert_eq!(compare(std::slice::from_ref(&running), &records), [Repair::MarkRunning(running.clone())]);
        assert_eq!(compare(&[], &[]), []);
        let starting = [record("cl-b", CapsuleState::Starting, 100)];
        assert_eq!(compare(&[info("cl-b", CapsuleState::Starting)], &starting), []);
    }

    #[test]
    fn a_capsule_that_vanished_is_missing_once_it_has_settled() {
        let gone = |age| compare(&[], &[record("cl-a", CapsuleState::Running, age)]);
        assert_eq!(gone(SETTLED_MS - 1), []);
        assert_eq!(gone(SETTLED_MS), [Repair::MarkMissing { id: "cl-a".into() }]);
        let stopping = [record("cl-a", CapsuleState::Stopping, OLD)];
        assert_eq!(compare(&[], &stopping), [Repair::MarkStopped { id: "cl-a".into() }]);
    }

    #[test]
    fn an_abandoned_start_ends_as_it_did_on_the_host() {
        let starting = |age| [record("cl-a", CapsuleState::Starting, age)];
        assert_eq!(compare(&[], &starting(ABANDONED_MS - 1)), []);
        assert!(matches!(compare(&[], &starting(ABANDONED_MS))[..], [Repair::MarkError { .. }]));
        let running = info("cl-a", CapsuleState::Running);
        assert_eq!(compare(std::slice::from_ref(&running), &starting(SETTLED_MS - 1)), []);
        assert_eq!(
            compare(std::slice::from_ref(&running), &starting(SETTLED_MS)),
            [Repair::MarkRunning(running)]
        );
    }

    #[test]
    fn a_host_pauses_by_itself_and_finishes_what_nobody_waited_for() {
        use CapsuleState::{Missing, Paused, Pausing, Resuming, Running, Snapshotting};
        let (paused, running) = (info("cl-a", Paused), info("cl-a", Running));
        for (state, reported, repair) in [
            (Running, &paused, Repair::MarkPaused(paused.clone())),
            (Pausing, &paused, Repair::MarkPaused(paused.clone())),
            (Resuming, &paused, Repair::MarkPaused(paused.clone())),
            (Pausing, &running, Repair::MarkRunning(running.clone())),
            (Resuming, &running, Repair::MarkRunning(running.clone())),
            (Snapshotting, &running, Repair::MarkRunning(running.clone())),
            (Paused, &running, Repair::MarkRunning(running.clone())),
        ] {
            let compared = |age| compare(std::slice::from_ref(reported), &[record("cl-a", state, age)]);
            assert_eq!(compared(SETTLED_MS), [repair], "{state:?}");
            assert_eq!(compared(SETTLED_MS - 1), [], "{state:?}: the answer may be on its way");
        }
        let missing = [record("cl-a", Missing, 0)];
        assert_eq!(compare(std::slice::from_ref(&paused), &missing), [Repair::MarkPaused(paused)]);
        for state in HELD {
            let gone = compare(&[], &[record("cl-a", state, SETTLED_MS)]);
            assert_eq!(gone, [Repair::MarkMissing { id: "cl-a".into() }], "{state:?}");
        }
        assert_eq!(compare(&[info("cl-a", Pausing)], &[record("cl-a", Running, OLD)]), []);
    }

    #[test]
    fn what_should_not_be_there_is_destroyed() {
        let destroy = [Repair::Destroy { id: "cl-a".into() }];
        let here = [info("cl-a", CapsuleState::Running)];
        assert_eq!(compare(&here, &[]), destroy, "nobody's");
        for state in [CapsuleState::Stopped, CapsuleState::Error] {
            assert_eq!(compare(&here, &[record("cl-a", state, 0)]), destroy, "{state:?}");
        }
        assert_eq!(compare(&here, &[record("cl-a", CapsuleState::Stopping, 0)]), [], "just being destroyed");
        assert_eq!(compare(&here, &[record("cl-a", CapsuleState::Stopping, OLD)]), destroy);
        let elsewhere = Record { is_here: false, ..record("cl-a", CapsuleState::Running, OLD) };
        assert_eq!(compare(&here, std::slice::from_ref(&elsewhere)), destroy);
        assert_eq!(compare(&[], &[elsewhere]), [], "not ours to judge");
    }

    #[test]
    fn a_capsule_that_comes_back_runs_again_and_a_failed_one_is_told() {
        let running = info("cl-a", CapsuleState::Running);
        let missing = [record("cl-a", CapsuleState::Missing, 0)];
        assert_eq!(compare(std::slice::from_ref(&running), &missing), [Repair::MarkRunning(running)]);
        let failed = [info("cl-a", CapsuleState::Error)];
        let repairs = compare(&failed, &[record("cl-a", CapsuleState::Running, 0)]);
        assert!(matches!(repairs[..], [Repair::MarkError { .. }]));
    }

    /// A host and its records, and what the repairs do to them.
    struct World {
        host: BTreeMap<String, CapsuleState>,
        records: BTreeMap<String, Record>,
    }

    impl World {
        /// Anything that can be, from a seed.
        fn new(seed: u64) -> World {
            // Knuth's MMIX generator; the high bits are good enough to pick states.
            let mut number = seed;
            let mut pick = |n: usize| {
                number =
                    number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                usize::try_from(number >> 33).unwrap_or(0) % n
            };
            let mut world = World { host: BTreeMap::new(), records: BTreeMap::new() };
            for n in 0..12 {
                let id = format!("cl-{n}");
                if pick(3) > 0 {
                    let states = [
                        CapsuleState::Running,
                        CapsuleState::Paused,
                        CapsuleState::Hibernated,
                        CapsuleState::Error,
                    ];
                    world.host.insert(id.clone(), states[pick(4)]);
                }
                if pick(4) > 0 {
                    let states = [
                        CapsuleState::Starting,
                        CapsuleState::Running,
                        CapsuleState::Stopping,
                        CapsuleState::Stopped,
                        CapsuleState::Missing,
                        CapsuleState::Error,
                        CapsuleState::Pausing,
                        CapsuleState::Paused,
                        CapsuleState::Resuming,
                        CapsuleState::Snapshotting,
                        CapsuleState::Hibernated,
                    ];
                    let state = states[pick(states.len())];
                    let record = Record { is_here: pick(5) > 0, ..record(&id, state, OLD) };
                    world.records.insert(id, record);
                }
            }
            world
        }

        fn repairs(&self) -> Vec<Repair> {
            let reported: Vec<_> = self.host.iter().map(|(id, state)| info(id, *state)).collect();
            // As the database is asked: those that should be here, and those that are reported.
            let is_asked_for = |r: &&Record| {
                let is_over = [CapsuleState::Stopped, CapsuleState::Error, CapsuleState::Missing];
                self.host.contains_key(&r.id) || r.is_here && !is_over.contains(&r.state)
            };
            let records: Vec<_> = self.records.values().filter(is_asked_for).cloned().collect();
            compare(&reported, &records)
        }

        fn carry_out(&mut self, repair: Repair) {
            let (id, state) = match repair {
                Repair::MarkRunning(info) => (info.capsule_id, CapsuleState::Running),
                Repair::MarkPaused(info) => (info.capsule_id, info.state),
                Repair::MarkError { id, .. } => (id, CapsuleState::Error),
                Repair::MarkMissing { id } => (id, CapsuleState::Missing),
                Repair::MarkStopped { id } => (id, CapsuleState::Stopped),
                Repair::Destroy { id } => {
                    let wanted = self.records.get(&id).filter(|r| r.is_here).map(|r| r.state);
                    let lives = self.host.remove(&id).is_some_and(|state| state != CapsuleState::Error);
                    let is_wanted = wanted.is_some_and(|s| HELD.contains(&s) || s == CapsuleState::Missing);
                    assert!(!(lives && is_wanted), "a capsule in use was destroyed");
                    return;
                }
            };
            self.records.get_mut(&id).expect("a record is repaired").state = state;
        }
    }

    #[test]
    fn any_world_is_in_order_after_a_few_rounds() {
        for seed in 0..20_000 {
            let mut world = World::new(seed);
            for _ in 0..3 {
                world.repairs().into_iter().for_each(|repair| world.carry_out(repair));
            }
            for repair in world.repairs() {
                let is_news = matches!(repair, Repair::MarkRunning(_) | Repair::MarkPaused(_));
                assert!(is_news, "seed {seed}: still {repair:?}");
            }
            for (id, state) in &world.host {
                let record = world.records.get(id).expect("every capsule is on record");
                assert_eq!((record.is_here, record.state), (true, *state), "seed {seed}: {id}");
            }
            for record in world.records.values().filter(|r| r.is_here && HELD.contains(&r.state)) {
                assert!(world.host.contains_key(&record.id), "seed {seed}: {} does not run", record.id);
            }
        }
    }
}
