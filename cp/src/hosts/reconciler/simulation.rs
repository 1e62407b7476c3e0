//! A host, a database and two control planes, from a seed: messages are lost, the host and the control
//! planes are restarted at any moment, capsules end and are paused by themselves, records go and come back as
//! when a database is restored. Afterwards all agree.

use super::*;
use std::collections::BTreeMap;

const CAPSULES: usize = 5;
const STEPS: usize = 150;
/// What a session holds up for longer is lost with it.
const DELIVERED_MS: u64 = 10_000;

/// Knuth's MMIX generator; the high bits are good enough to pick.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % n
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    Pause,
    Resume,
    Snapshot,
    Destroy,
}

/// What a request has a host do, as `cp/src/api` does it.
#[derive(Debug, Clone)]
struct Call {
    /// Which of the two control planes.
    cp: usize,
    verb: Verb,
    id: String,
    began_ms: u64,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    ToHost,
    AtHost,
    /// Whether it was done.
    Answered(bool),
}

/// A comparison that was begun: the host's list is taken, the records are not read yet.
struct Visit {
    cp: usize,
    at_ms: u64,
    reported: Vec<CapsuleInfo>,
}

struct World {
    random: Random,
    now_ms: u64,
    /// What the host has.
    host: BTreeMap<String, CapsuleState>,
    /// State, and since when.
    records: BTreeMap<String, (CapsuleState, u64)>,
    /// Records that are gone, and since when.
    forgotten: BTreeMap<String, (CapsuleState, u64)>,
    /// Capsules on no record, and since when the host has told of them.
    orphans: BTreeMap<String, u64>,
    calls: Vec<Call>,
    visits: Vec<Visit>,
    made: usize,
}

impl World {
    /// Somebody puts an older database in place, or the newer one back, which know of other orphans.
    fn restore_database(&mut self) {
        self.orphans.clear();
        let id = format!("cl-{}", 1 + self.random.below(CAPSULES));
        if let Some((state, _)) = self.forgotten.remove(&id) {
            self.records.insert(id, (state, self.now_ms));
        } else if let Some((state, _)) = self.records.remove(&id) {
            self.forgotten.insert(id, (state, self.now_ms));
        }
    }

    /// As `db::orphans::note` does it.
    fn note_orphans(&mut self, told: &[String]) -> HashMap<String, u64> {
        let now_ms = self.now_ms;
        self.orphans.retain(|id, _| told.contains(id));
        for id in told {
            self.orphans.entry(id.clone()).or_insert(now_ms);
        }
        self.orphans.iter().map(|(id, since_ms)| (id.clone(), now_ms - since_ms)).collect()
    }

    fn put(&mut self, id: &str, from: &[CapsuleState], to: CapsuleState) -> bool {
        let now_ms = self.now_ms;
        match self.records.get_mut(id) {
            Some(record) if from.contains(&record.0) => {
                if record.0 != to {
                    *record = (to, now_ms);
                }
                true
            }
            _ => false,
        }
    }

    fn begin(&mut self) {
        use CapsuleState::{
            Hibernated, Paused, Pausing, Resuming, Running, Snapshotting, Starting, Stopping,
        };
        let cp = self.random.below(2);
        let verb =
            [Verb::Create, Verb::Pause, Verb::Resume, Verb::Snapshot, Verb::Destroy][self.random.below(5)];
        let id = if verb == Verb::Create {
            if self.made == CAPSULES {
                return;
            }
            self.made += 1;
            let id = format!("cl-{}", self.made);
            self.records.insert(id.clone(), (Starting, self.now_ms));
            id
        } else {
            format!("cl-{}", 1 + self.random.below(CAPSULES))
        };
        let is_begun = match verb {
            Verb::Create => true,
            Verb::Pause => self.put(&id, &[Running], Pausing),
            Verb::Resume => self.put(&id, &[Paused, Hibernated], Resuming),
            Verb::Snapshot => self.put(&id, &[Running], Snapshotting),
            Verb::Destroy => {
                self.random.below(4) == 0 && self.put(&id, &[&HELD[..], &[Starting]].concat(), Stopping)
            }
        };
        if is_begun {
            self.calls.push(Call { cp, verb, id, began_ms: self.now_ms, stage: Stage::ToHost });
        }
    }

    /// Brings one call forward, or loses what is on its way.
    fn advance(&mut self) {
        if self.calls.is_empty() {
            return;
        }
        let at = self.random.below(self.calls.len());
        let mut call = self.calls.swap_remove(at);
        let is_lost = self.random.below(6) == 0;
        match call.stage {
            Stage::ToHost if is_lost => self.lost(&call),
            Stage::ToHost => {
                call.stage = if self.arrive(&call) { Stage::AtHost } else { Stage::Answered(false) };
                self.calls.push(call);
            }
            Stage::AtHost => {
                let is_done = self.finish_on_host(&call);
                call.stage = Stage::Answered(is_done);
                self.calls.push(call);
            }
            Stage::Answered(_) if is_lost => self.lost(&call),
            Stage::Answered(is_done) => self.answered(&call, is_done),
        }
    }

    /// The host begins; `false` where it refuses.
    fn arrive(&mut self, call: &Call) -> bool {
        use CapsuleState::{
            Hibernated, Paused, Pausing, Resuming, Running, Snapshotting, Starting, Stopping,
        };
        let to = match (call.verb, self.host.get(&call.id)) {
            (Verb::Create, None) => Starting,
            (Verb::Pause, Some(Running)) => Pausing,
            (Verb::Resume, Some(Paused | Hibernated)) => Resuming,
            (Verb::Snapshot, Some(Running)) => Snapshotting,
            (Verb::Destroy, Some(_)) => Stopping,
            _ => return false,
        };
        self.host.insert(call.id.clone(), to);
        true
    }

    fn finish_on_host(&mut self, call: &Call) -> bool {
        use CapsuleState::{Paused, Pausing, Resuming, Running, Snapshotting, Starting, Stopping};
        let is_done = self.random.below(4) > 0;
        let to = match (call.verb, self.host.get(&call.id)) {
            (Verb::Create, Some(Starting)) => is_done.then_some(Running),
            (Verb::Pause, Some(Pausing)) => Some(if is_done { Paused } else { Running }),
            (Verb::Resume, Some(Resuming)) => Some(if is_done { Running } else { Paused }),
            (Verb::Snapshot, Some(Snapshotting)) => Some(Running),
            (Verb::Destroy, Some(Stopping)) => None,
            // It ended, or the agent was restarted, meanwhile.
            _ => return false,
        };
        match to {
            Some(state) => self.host.insert(call.id.clone(), state),
            None => self.host.remove(&call.id),
        };
        is_done || call.verb == Verb::Destroy
    }

    /// Nobody knows what became of it.
    fn lost(&mut self, call: &Call) {
        if call.verb == Verb::Create {
            self.put(&call.id, &[CapsuleState::Starting, CapsuleState::Running], CapsuleState::Error);
        }
    }

    fn answered(&mut self, call: &Call, is_done: bool) {
        use CapsuleState::{
            Error, Hibernated, Missing, Paused, Pausing, Resuming, Running, Snapshotting, Starting, Stopped,
            Stopping,
        };
        let held = [Starting, Missing, Pausing, Paused, Hibernated, Resuming, Snapshotting, Running];
        match (call.verb, is_done) {
            (Verb::Create | Verb::Resume, true) => self.put(&call.id, &held, Running),
            (Verb::Pause, true) => self.put(&call.id, &held, Paused),
            (Verb::Snapshot, _) => self.put(&call.id, &[Snapshotting], Running),
            (Verb::Destroy, true) => self.put(&call.id, &[Stopping, Error, Missing], Stopped),
            (Verb::Create, false) => self.put(&call.id, &[Starting, Running], Error),
            (Verb::Pause, false) => self.put(&call.id, &[Pausing], Running),
            (Verb::Resume, false) => self.put(&call.id, &[Resuming], Paused),
            (Verb::Destroy, false) => false,
        };
    }

    /// The agent is killed and comes back: what ran runs, what was not ready is cleared away.
    fn restart_host(&mut self) {
        use CapsuleState::{Paused, Pausing, Resuming, Running, Snapshotting, Starting, Stopping};
        let random = &mut self.random;
        self.host.retain(|_, state| {
            *state = match *state {
                Starting | Stopping => return false,
                Pausing if random.below(2) == 0 => Paused,
                Pausing | Snapshotting => Running,
                Resuming => Paused,
                other => other,
            };
            true
        });
        for call in std::mem::take(&mut self.calls) {
            match call.stage {
                Stage::Answered(_) => self.calls.push(call),
                Stage::ToHost | Stage::AtHost => self.lost(&call),
            }
        }
    }

    /// A control plane is killed: the host finishes what it has begun, and nobody takes the answers.
    fn restart_cp(&mut self) {
        let cp = self.random.below(2);
        self.visits.retain(|visit| visit.cp != cp);
        for call in std::mem::take(&mut self.calls) {
            if call.cp != cp {
                self.calls.push(call);
            } else if call.stage == Stage::AtHost {
                self.finish_on_host(&call);
            }
        }
    }

    /// Something happens by itself.
    fn drift(&mut self) {
        let id = format!("cl-{}", 1 + self.random.below(CAPSULES));
        let to = match (self.host.get(&id), self.random.below(4)) {
            (Some(CapsuleState::Running), 0) => None,
            (Some(CapsuleState::Running), _) => Some(CapsuleState::Paused),
            (Some(CapsuleState::Paused), 0) => Some(CapsuleState::Hibernated),
            _ => return,
        };
        match to {
            Some(state) => self.host.insert(id, state),
            None => self.host.remove(&id),
        };
    }

    fn list(&mut self) {
        let info = |(id, state): (&String, &CapsuleState)| CapsuleInfo {
            capsule_id: id.clone(),
            state: *state,
            ..CapsuleInfo::default()
        };
        let reported = self.host.iter().map(info).collect();
        let cp = self.random.below(2);
        self.visits.push(Visit { cp, at_ms: self.now_ms, reported });
    }

    /// The records are read, and the repairs are carried out a moment later.
    fn repair(&mut self) {
        if self.visits.is_empty() {
            return;
        }
        let at = self.random.below(self.visits.len());
        let visit = self.visits.swap_remove(at);
        let is_over = |s| matches!(s, CapsuleState::Stopped | CapsuleState::Error | CapsuleState::Missing);
        let records: Vec<Record> = self
            .records
            .iter()
            .filter(|(id, (state, _))| {
                !is_over(*state) || visit.reported.iter().any(|info| info.capsule_id == **id)
            })
            .map(|(id, (state, since_ms))| Record {
                id: id.clone(),
                state: *state,
                is_here: true,
                age_ms: self.now_ms - since_ms,
            })
            .collect();
        let orphans = self.note_orphans(&unknown(&visit.reported, &records));
        let repairs = compare(&visit.reported, &records, &orphans);
        // Requests come between.
        self.begin();
        for repair in repairs {
            self.carry_out(repair);
        }
    }

    fn carry_out(&mut self, repair: Repair) {
        match repair {
            Repair::Note { info, from } => self.put(&info.capsule_id, &[from], info.state),
            Repair::MarkError { id, from, .. } => self.put(&id, &[from], CapsuleState::Error),
            Repair::MarkMissing { id, from } => self.put(&id, &[from], CapsuleState::Missing),
            Repair::MarkStopped { id } => self.put(&id, &[CapsuleState::Stopping], CapsuleState::Stopped),
            Repair::Destroy { id, reason: Unwanted::Orphaned } => {
                let since_ms = self.forgotten.get(&id).map(|(_, since_ms)| *since_ms);
                let is_due = since_ms.is_some_and(|since_ms| self.now_ms - since_ms >= ORPHAN_GRACE_MS);
                assert!(is_due, "{id} is destroyed as an orphan at {}, gone since {since_ms:?}", self.now_ms);
                self.host.remove(&id).is_some()
            }
            Repair::Destroy { id, .. } => {
                let on_record = self.records.get(&id).map(|record| record.0);
                let is_wanted = on_record.is_some_and(|s| HELD.contains(&s) || s == CapsuleState::Missing);
                assert!(!is_wanted, "{id} is destroyed and is {on_record:?}");
                self.host.remove(&id).is_some()
            }
        };
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        let now_ms = self.now_ms;
        self.visits.retain(|visit| now_ms - visit.at_ms <= LIST_TIMEOUT_MS);
        for call in std::mem::take(&mut self.calls) {
            // What a session does not get through in time ends with it.
            if call.stage != Stage::AtHost && now_ms - call.began_ms > DELIVERED_MS {
                self.lost(&call);
            } else {
                self.calls.push(call);
            }
        }
    }

    fn step(&mut self) {
        match self.random.below(21) {
            0..=4 => self.begin(),
            5..=11 => self.advance(),
            12 => self.restart_host(),
            13 => self.restart_cp(),
            14 => self.drift(),
            15..=16 => self.list(),
            17..=18 => self.repair(),
            19 if self.random.below(4) == 0 => self.restore_database(),
            _ => {
                let most_ms = if self.random.below(4) == 0 { 400_000 } else { 20_000 };
                let ms = self.random.below(most_ms) as u64;
                self.pass(ms);
            }
        }
    }

    /// Nothing new is asked for; what is under way comes to its end.
    fn settle(&mut self) {
        self.visits.clear();
        for call in std::mem::take(&mut self.calls) {
            match call.stage {
                Stage::AtHost => {
                    self.finish_on_host(&call);
                    self.lost(&call);
                }
                Stage::ToHost | Stage::Answered(_) => self.lost(&call),
            }
        }
        self.made = CAPSULES;
        for _ in 0..4 {
            self.now_ms += ABANDONED_MS.max(ORPHAN_GRACE_MS);
            self.list();
            let visit = self.visits.pop().expect("a list was taken");
            let records: Vec<Record> = self
                .records
                .iter()
                .map(|(id, (state, since))| Record {
                    id: id.clone(),
                    state: *state,
                    is_here: true,
                    age_ms: self.now_ms - since,
                })
                .collect();
            let orphans = self.note_orphans(&unknown(&visit.reported, &records));
            compare(&visit.reported, &records, &orphans)
                .into_iter()
                .for_each(|repair| self.carry_out(repair));
        }
    }
}

#[test]
fn whatever_is_lost_and_whoever_restarts_all_agree_in_the_end() {
    for seed in 0..20_000 {
        let mut world = World {
            random: Random(seed),
            now_ms: 0,
            host: BTreeMap::new(),
            records: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            orphans: BTreeMap::new(),
            calls: Vec::new(),
            visits: Vec::new(),
            made: 0,
        };
        for _ in 0..STEPS {
            world.step();
        }
        world.settle();
        for (id, (state, _)) in &world.records {
            let on_host = world.host.get(id).copied();
            let is_agreed = match state {
                CapsuleState::Running | CapsuleState::Paused | CapsuleState::Hibernated => {
                    on_host == Some(*state)
                }
                CapsuleState::Stopped | CapsuleState::Missing | CapsuleState::Error => on_host.is_none(),
                _ => false,
            };
            assert!(is_agreed, "seed {seed}: {id} is {state:?} on record and {on_host:?} on the host");
        }
        assert!(world.host.keys().all(|id| world.records.contains_key(id)), "seed {seed}: an orphan");
    }
}
