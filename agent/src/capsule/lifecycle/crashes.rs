//! A run of random worlds in which the agent dies at any moment, with jobs half done and the journal saying
//! what it says by then, and the next one takes over what it finds.

use super::tests::{Random, broken};
use super::*;
use std::collections::BTreeSet;

/// Worlds that are run.
const SEEDS: u64 = 100_000;
/// Turns until the capsule is told to go, and until it has to be gone.
const TURNS_ALIVE: u32 = 60;
const TURNS: u32 = 200;

/// What is there, whoever knows of it, and what the journal has.
struct World {
    there: BTreeSet<Part>,
    journal: Remains,
    under_way: Vec<Action>,
    life: Lifecycle,
    /// The capsule is no agent's business any more.
    over: bool,
    /// How often it was adopted, kept and cleared away.
    fates: [u32; 3],
}

impl World {
    fn new() -> World {
        let mut life = Lifecycle::new();
        let under_way = life.handle(Event::Create);
        World {
            there: BTreeSet::new(),
            journal: Remains::default(),
            under_way,
            life,
            over: false,
            fates: [0; 3],
        }
    }

    fn has(&self, part: Part) -> bool {
        self.there.contains(&part)
    }

    /// Does a part of what a job does, as far as `steps` says, and what the journal has with it.
    fn work(&mut self, action: &Action, steps: usize) {
        let goal = self.life.goal();
        match action {
            Action::Make(Part::Machine) if self.journal.image => {
                // Started, recorded while still paused; the image given up; the guest goes on.
                if steps > 0 {
                    self.there.insert(Part::Machine);
                }
                self.journal.image &= steps < 2;
            }
            Action::Make(Part::Guest) => {
                // It has answered; that is noted; whoever asked is told.
                self.journal.ready |= steps > 1;
                if steps > 2 {
                    self.there.insert(Part::Guest);
                }
            }
            Action::Make(part) if steps > 0 => {
                self.there.insert(*part);
            }
            Action::Remove(part) => {
                // The intent comes before the deed.
                self.journal.destroying |= goal == Goal::Down && steps > 0 && *part != Part::Guest;
                if steps > 1 {
                    self.there.remove(part);
                }
            }
            Action::Save => self.journal.image |= steps > 1,
            _ => {}
        }
    }

    fn done(&mut self, action: &Action) {
        self.work(action, usize::MAX);
    }

    fn handle(&mut self, event: Event) {
        for action in self.life.handle(event) {
            match action {
                Action::Make(_)
                | Action::RetryAfter(_)
                | Action::Save
                | Action::MakeSnapshot
                | Action::Pack => {
                    self.under_way.push(action);
                }
                Action::Remove(part) => {
                    self.under_way.retain(|a| *a != Action::Make(part));
                    self.under_way.push(action);
                }
                Action::Forget | Action::Ended => self.over = true,
                _ => {}
            }
        }
    }

    /// The agent dies, perhaps the machine with it, and the next one finds what is there.
    fn crash(&mut self, random: &mut Random, seed: u64) {
        let (state, had_guest) = (self.life.state(), self.has(Part::Guest));
        for action in std::mem::take(&mut self.under_way) {
            self.work(&action, random.below(4));
        }
        if random.below(4) == 0 {
            self.there.remove(&Part::Machine);
        }
        self.there.remove(&Part::Guest);
        let remains = Remains { machine: self.has(Part::Machine), ..self.journal };
        let fate = remains.fate();
        if matches!(state, CapsuleState::Paused | CapsuleState::Hibernated) {
            assert_eq!(fate, Fate::Kept, "seed {seed}: a paused capsule is lost, {remains:?}");
        }
        if had_guest && state == CapsuleState::Running && remains.machine {
            assert_eq!(fate, Fate::Adopted, "seed {seed}: a running capsule is lost, {remains:?}");
        }
        match fate {
            Fate::Adopted => {
                self.fates[0] += 1;
                for part in [Part::Record, Part::Network, Part::Disk, Part::Machine] {
                    assert!(self.has(part), "seed {seed}: adopted without its {}", part.name());
                }
                self.life = Lifecycle::running();
                self.handle(Event::GuestLost);
            }
            Fate::Kept => {
                self.fates[1] += 1;
                assert!(self.has(Part::Record) && self.has(Part::Disk), "seed {seed}: kept without its disk");
                self.there.remove(&Part::Machine);
                self.there.remove(&Part::Network);
                self.life = Lifecycle::paused(random.below(2) == 0);
            }
            Fate::Cleared(_) => {
                self.fates[2] += 1;
                self.there.clear();
                self.over = true;
            }
        }
    }

    fn wants_destroying(&self) -> bool {
        self.life.goal() != Goal::Down || self.life.state() == CapsuleState::Error
    }

    fn turn(&mut self, random: &mut Random, turn: u32, seed: u64) {
        let alive = turn < TURNS_ALIVE;
        let event = match random.below(30) {
            // A destroy that an agent has died of, or that did not get through, is asked for again.
            _ if !alive && self.wants_destroying() => Event::Destroy,
            0 if turn < TURNS / 2 => return self.crash(random, seed),
            1 if alive => Event::Pause,
            2 | 3 if alive => Event::Resume,
            4 if alive => Event::Snapshot,
            8 if alive => Event::Hibernate,
            5 if alive => Event::Deadline(broken()),
            6 if self.has(Part::Guest) => {
                self.there.remove(&Part::Guest);
                Event::GuestLost
            }
            7 if alive && self.has(Part::Machine) && random.below(8) == 0 => {
                self.there.remove(&Part::Machine);
                self.under_way.retain(|a| *a != Action::Remove(Part::Machine));
                Event::MachineExited(broken())
            }
            _ if self.under_way.is_empty() => return,
            _ => {
                let action = self.under_way.swap_remove(random.below(self.under_way.len()));
                self.outcome(&action, random.below(10) == 0 && alive)
            }
        };
        self.handle(event);
    }

    /// How a job ends: a full disk, a failed sync and a slow device are failures and late ends.
    fn outcome(&mut self, action: &Action, fails: bool) -> Event {
        let lacks_machine = !self.has(Part::Machine);
        match action {
            Action::Make(part) if fails => Event::MakeFailed(*part, broken()),
            Action::Make(part) => {
                self.done(action);
                Event::Made(*part)
            }
            Action::Remove(part) if fails => Event::RemoveFailed(*part, broken()),
            Action::Remove(part) => {
                self.done(action);
                Event::Removed(*part)
            }
            Action::Save if fails || lacks_machine => Event::SaveFailed(broken()),
            Action::Save => {
                self.done(action);
                Event::Saved
            }
            Action::Pack if fails => Event::NotPacked,
            Action::Pack => Event::Packed,
            Action::MakeSnapshot if fails || lacks_machine => Event::SnapshotFailed(broken()),
            Action::MakeSnapshot => Event::SnapshotMade,
            _ => Event::RetryDue,
        }
    }
}

#[test]
fn agents_that_die_at_any_moment_lose_and_leave_nothing() {
    let mut fates = [0; 3];
    for seed in 1..=SEEDS {
        let mut random = Random(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        let mut world = World::new();
        for turn in 0..TURNS {
            if world.over {
                break;
            }
            world.turn(&mut random, turn, seed);
        }
        assert!(world.over, "seed {seed}: {:?}, under way {:?}", world.life, world.under_way);
        assert!(world.there.is_empty(), "seed {seed}: {:?} left", world.there);
        fates.iter_mut().zip(world.fates).for_each(|(sum, count)| *sum += count);
    }
    eprintln!("{SEEDS} worlds: {} adopted, {} kept paused, {} cleared away", fates[0], fates[1], fates[2]);
    assert!(fates.iter().all(|count| *count > 1_000), "{fates:?}");
}
