//! A capsule's life as a pure state machine: events in, actions out, no I/O and no clock.
//!
//! A capsule is made of [`Part`]s, each of which needs others: the record comes first, the network and
//! the disk are made side by side, the machine needs both, the guest's daemon needs the machine. The
//! capsule has one of two goals. Towards [`Goal::Up`] every absent part whose needs are present is made;
//! towards [`Goal::Down`] every present part that nothing stands on is removed. So there is one teardown,
//! right from whatever point it starts, and nothing that was begun is forgotten: a part that is being
//! made when the goal changes is waited for and then removed.
//!
//! ```text
//!            Create             all parts present
//!  pending ---------> starting -------------------> running <---------------+
//!     |                  |  failure, deadline,       | |  ^                 |
//!     |                  |  cancelled, Destroy       | |  | SnapshotDone,   | all parts present
//!     |                  |                     Pause | |  | SnapshotFailed  |
//!     |                  |                           | |  |                 |
//!     |                  |                           | +- snapshotting      |
//!     |                  |                 SaveFailed|                      |
//!     |                  |                  (runs on)v   Saved   Resume     |
//!     |                  |                      pausing -----> paused --> resuming
//!     |                  |                           |            ^         |
//!     |                  |                           |            +---------+ failure, deadline
//!     |                  v   Destroy, shutdown, machine exited
//!     |                  |                           |   paused <-> hibernated --> resuming
//!     +--------------> stopping  ------ all parts absent ------> stopped / error
//! ```
//!
//! A paused capsule has its record, its disk and an image: its memory and the state of its devices, on
//! disk. From the moment at which the image is there it is paused, and whoever asked is told; what is left of
//! its machine and network goes after that, and resuming waits for it.
//!
//! Three rules make pausing and resuming safe. The machine is removed only when the image is there
//! (or the capsule is to go). The image is given up only when a machine that was made of it is there: from
//! then on the machine writes to the disk, and the image fits the disk no more. And whoever asked gets
//! exactly one answer. So a capsule whose resuming takes too long after that point is saved again.
//!
//! A paused capsule can be packed, in the background: its memory then lies on disk compressed, and the state
//! is hibernated. Somebody who wants it meanwhile stops that, and waits until it has stopped.
//!
//! Every transition is tabled in `agent/LIFECYCLE.md`. Missing is what a control plane calls a capsule that no
//! host knows.

mod events;
mod parts;
mod remains;

pub use events::{Action, Event};
pub use parts::{Goal, PARTS, Part, Presence, Work};
pub use remains::{Fate, Remains};

use super::failure::Failure;
use parts::MOVING_PARTS;
use wire::message::CapsuleState;

/// How often a part's removal is tried before the capsule is left in error for a person.
pub const MAX_REMOVE_ATTEMPTS: u32 = 6;
/// The wait before the first further try of a removal; each next one waits twice as long.
pub const REMOVE_RETRY_MS: u64 = 50;

/// The wait before the next try where a capsule is paused and what is left of its machine or network could not be
/// removed so often. It is tried as long as the capsule is: nothing of it is lost meanwhile.
pub const PAUSED_RETRY_MS: u64 = 60_000;

/// The state machine.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    goal: Goal,
    parts: [Presence; PARTS.len()],
    /// The create has not been answered.
    creating: bool,
    /// It has been running.
    was_ready: bool,
    /// Somebody wants to hear when it is gone, or nobody will ever ask for it again.
    forget_when_down: bool,
    failure: Option<Failure>,
    remove_attempts: u32,
    /// Further tries have been given up until the next `Destroy`.
    gave_up: bool,
    /// What is under way and has to be answered.
    work: Option<Work>,
    /// There is an image on disk that fits the disk.
    image: bool,
    /// The image or a snapshot is being written, which needs the machine, disk and record.
    saving: bool,
    /// Why resuming was given up.
    resume_failure: Option<Failure>,
    /// The image's memory is packed.
    packed: bool,
    /// It is being packed, which needs the image and the record.
    packing: bool,
}

impl Default for Lifecycle {
    fn default() -> Lifecycle {
        Lifecycle::new()
    }
}

impl Lifecycle {
    /// A capsule of which nothing exists.
    pub fn new() -> Lifecycle {
        Lifecycle {
            goal: Goal::Up,
            parts: [Presence::Absent; PARTS.len()],
            creating: true,
            was_ready: false,
            forget_when_down: false,
            failure: None,
            remove_attempts: 0,
            gave_up: false,
            work: None,
            image: false,
            saving: false,
            resume_failure: None,
            packed: false,
            packing: false,
        }
    }

    /// A capsule that an earlier agent has left paused, its memory `packed` or not.
    pub fn paused(packed: bool) -> Lifecycle {
        let mut life = Lifecycle { goal: Goal::Paused, creating: false, was_ready: true, ..Lifecycle::new() };
        life.image = true;
        life.packed = packed;
        life.set(Part::Record, Presence::Present);
        life.set(Part::Disk, Presence::Present);
        life
    }

    /// A capsule that an earlier agent has left running; its guest daemon has to be reached anew, which any
    /// event begins.
    pub fn running() -> Lifecycle {
        let mut life = Lifecycle { creating: false, was_ready: true, ..Lifecycle::new() };
        for part in [Part::Record, Part::Network, Part::Disk, Part::Machine] {
            life.set(part, Presence::Present);
        }
        life
    }

    /// How far a part is.
    pub fn presence(&self, part: Part) -> Presence {
        self.parts[part as usize]
    }

    /// What the capsule is on its way to.
    pub fn goal(&self) -> Goal {
        self.goal
    }

    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// The part that is being waited for on the way up, for messages.
    pub fn waiting_for(&self) -> Option<Part> {
        PARTS.into_iter().find(|p| self.presence(*p) == Presence::Making)
    }

    /// Its state as the public API names it.
    pub fn state(&self) -> CapsuleState {
        let down = self.is_down();
        match (self.goal, self.work) {
            (Goal::Up | Goal::Paused, Some(Work::Resume)) => CapsuleState::Resuming,
            (Goal::Up, Some(Work::Snapshot)) => CapsuleState::Snapshotting,
            (Goal::Up, _) if self.was_ready => CapsuleState::Running,
            (Goal::Up, _) if self.presence(Part::Record) != Presence::Present => CapsuleState::Pending,
            (Goal::Up, _) => CapsuleState::Starting,
            (Goal::Paused, None) if self.packed => CapsuleState::Hibernated,
            (Goal::Paused, None) => CapsuleState::Paused,
            (Goal::Paused, Some(_)) => CapsuleState::Pausing,
            (Goal::Down, _) => match &self.failure {
                _ if self.gave_up => CapsuleState::Error,
                Some(failure) if down && !failure.is_orderly() => CapsuleState::Error,
                _ if down => CapsuleState::Stopped,
                _ => CapsuleState::Stopping,
            },
        }
    }

    /// Whether this may be asked for now; the error says why not, for a person.
    pub fn check(&self, work: Work) -> Result<(), String> {
        let state = self.state();
        let wanted = match work {
            Work::Pause | Work::Snapshot => CapsuleState::Running,
            Work::Resume => CapsuleState::Paused,
        };
        let is_hibernated = work == Work::Resume && state == CapsuleState::Hibernated;
        if state == wanted || is_hibernated {
            return Ok(());
        }
        let (state, wanted) = (state.name(), wanted.name());
        Err(format!("the capsule is {state}; only one that is {wanted} can be {}", work.done()))
    }

    /// Whether it is paused or hibernated, and nothing else of it is left: all of it is on disk, and nobody
    /// waits for anything.
    pub fn is_at_rest(&self) -> bool {
        matches!(self.state(), CapsuleState::Paused | CapsuleState::Hibernated) && self.has_no_machine()
    }

    /// Whether the parts that a paused capsule does not have are gone.
    fn has_no_machine(&self) -> bool {
        MOVING_PARTS.iter().all(|p| self.presence(*p) == Presence::Absent)
    }

    /// Whether its memory is being packed.
    pub fn is_packing(&self) -> bool {
        self.packing
    }

    /// Whether it has, or is about to have, a machine.
    pub fn holds_machine(&self) -> bool {
        self.goal == Goal::Up || !self.has_no_machine()
    }

    /// Whether there is an image that the machine is to be made of.
    pub fn has_image(&self) -> bool {
        self.image
    }

    /// Whether an agent after this one could go on with it as it is: nothing of it is being made, written or
    /// removed. Its guest daemon may have to be reached, which the next one has to do anyway.
    pub fn is_settled(&self) -> bool {
        let lasting = PARTS.into_iter().filter(|part| *part != Part::Guest);
        let moving = |part| matches!(self.presence(part), Presence::Making | Presence::Removing);
        let is_still = !self.creating
            && !self.saving
            && !self.packing
            && self.work.is_none()
            && !lasting.into_iter().any(moving);
        let is_there = match self.goal {
            Goal::Up => true,
            // What is left of its machine is the next agent's to remove as well.
            Goal::Paused => self.has_no_machine() || self.remove_attempts >= MAX_REMOVE_ATTEMPTS,
            Goal::Down => self.is_down(),
        };
        is_still && (is_there || self.gave_up)
    }

    /// Whether nothing of it exists.
    pub fn is_down(&self) -> bool {
        !self.saving && !self.packing && self.parts.iter().all(|p| *p == Presence::Absent)
    }

    /// Takes an event and says what is to be done.
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Create => {}
            Event::Made(part) => {
                if self.presence(part) == Presence::Making {
                    self.set(part, Presence::Present);
                    // A machine that was made of the image runs and writes to the disk.
                    self.image &= part != Part::Machine;
                    self.packed &= self.image;
                }
            }
            Event::MakeFailed(part, failure) => {
                self.set(part, Presence::Absent);
                if self.image && self.goal != Goal::Down {
                    self.give_up_resume(failure);
                } else {
                    self.fail(failure, &mut actions);
                }
            }
            Event::Removed(part) => self.set(part, Presence::Absent),
            Event::RemoveFailed(part, failure) => self.on_remove_failed(part, failure, &mut actions),
            Event::RetryDue => self.unstick(),
            Event::MachineExited(failure) => {
                self.set(Part::Machine, Presence::Absent);
                // Where it is being saved, what comes of that decides.
                if self.goal != Goal::Down && !self.image && !self.saving {
                    self.fail(failure, &mut actions);
                }
            }
            Event::GuestLost => {
                if self.presence(Part::Guest) == Presence::Present {
                    self.set(Part::Guest, Presence::Absent);
                }
            }
            Event::GuestRefused(failure) | Event::Deadline(failure) => {
                if self.goal == Goal::Up && self.creating {
                    self.fail(failure, &mut actions);
                } else if self.goal != Goal::Down && self.work == Some(Work::Resume) {
                    self.give_up_resume(failure);
                }
            }
            Event::Cancel => {
                if self.creating {
                    self.fail(Failure::Cancelled, &mut actions);
                }
            }
            Event::Pause => {
                if self.check(Work::Pause).is_ok() {
                    self.goal = Goal::Paused;
                    self.work = Some(Work::Pause);
                    self.remove_attempts = 0;
                }
            }
            Event::Resume => {
                if self.check(Work::Resume).is_ok() {
                    self.stop_packing(&mut actions);
                    // Up it goes when nothing is left of the machine before.
                    self.work = Some(Work::Resume);
                    self.resume_failure = None;
                    self.remove_attempts = 0;
                    self.unstick();
                }
            }
            Event::Snapshot => {
                if self.check(Work::Snapshot).is_ok() {
                    self.work = Some(Work::Snapshot);
                    self.saving = true;
                    actions.push(Action::MakeSnapshot);
                }
            }
            Event::Saved => {
                self.saving = false;
                self.image = true;
                self.packed = false;
            }
            Event::Hibernate => {
                if self.state() == CapsuleState::Paused && self.is_at_rest() && !self.packing {
                    self.packing = true;
                    actions.push(Action::Pack);
                }
            }
            Event::Packed => {
                self.packing = false;
                self.packed = true;
            }
            Event::NotPacked => self.packing = false,
            Event::SaveFailed(failure) => self.on_not_saved(failure, &mut actions),
            Event::SnapshotMade => {
                self.saving = false;
                if self.work.take().is_some() {
                    actions.push(Action::Finished(Work::Snapshot));
                }
                self.look_for_machine(&mut actions);
            }
            Event::SnapshotFailed(failure) => {
                self.saving = false;
                if self.work.take().is_some() {
                    actions.push(Action::Failed(Work::Snapshot, failure));
                }
                self.look_for_machine(&mut actions);
            }
            Event::Destroy => {
                self.forget_when_down = true;
                self.remove_attempts = 0;
                self.gave_up = false;
                self.unstick();
                self.fail(Failure::Destroyed, &mut actions);
            }
            Event::Shutdown => {
                self.forget_when_down = true;
                self.fail(Failure::ShuttingDown, &mut actions);
            }
        }
        self.advance(&mut actions);
        actions
    }

    fn set(&mut self, part: Part, presence: Presence) {
        self.parts[part as usize] = presence;
    }

    fn stop_packing(&mut self, actions: &mut Vec<Action>) {
        if self.packing {
            actions.push(Action::StopPacking);
        }
    }

    /// Turns the goal to down. The first reason is the one that counts.
    fn fail(&mut self, failure: Failure, actions: &mut Vec<Action>) {
        self.stop_packing(actions);
        self.goal = Goal::Down;
        if let Some(work) = self.work.take() {
            actions.push(Action::Failed(work, failure.clone()));
        }
        self.failure.get_or_insert(failure);
    }

    /// Back to paused; the answer is given once it is.
    fn give_up_resume(&mut self, failure: Failure) {
        self.goal = Goal::Paused;
        self.resume_failure.get_or_insert(failure);
    }

    fn on_not_saved(&mut self, failure: Failure, actions: &mut Vec<Action>) {
        self.saving = false;
        if self.goal != Goal::Paused {
            return;
        }
        if self.presence(Part::Machine) != Presence::Present {
            self.fail(failure, actions);
            return;
        }
        self.goal = Goal::Up;
        let failure = self.resume_failure.take().unwrap_or(failure);
        if let Some(work) = self.work.take() {
            actions.push(Action::Failed(work, failure));
        }
    }

    /// The machine may have ended while it was being saved.
    fn look_for_machine(&mut self, actions: &mut Vec<Action>) {
        if self.goal == Goal::Up && self.presence(Part::Machine) == Presence::Absent {
            let text = "the virtual machine ended while a snapshot was made of it";
            self.fail(Failure::MachineEnded(text.into()), actions);
        }
    }

    fn unstick(&mut self) {
        for part in PARTS {
            if self.presence(part) == Presence::Stuck {
                self.set(part, Presence::Present);
            }
        }
    }

    fn on_remove_failed(&mut self, part: Part, failure: Failure, actions: &mut Vec<Action>) {
        // A machine that ended while its removal was given up on is absent already.
        if self.presence(part) == Presence::Removing {
            self.set(part, Presence::Stuck);
        }
        self.remove_attempts = self.remove_attempts.saturating_add(1);
        if self.remove_attempts < MAX_REMOVE_ATTEMPTS {
            actions.push(Action::RetryAfter(REMOVE_RETRY_MS << self.remove_attempts));
        } else if self.image && self.goal == Goal::Paused {
            // All of it is on disk. Whoever wants it to go on is told that it cannot yet.
            let failure = match failure {
                Failure::Remove { part, reason } => Failure::Stays { part, reason },
                other => other,
            };
            if let Some(work) = self.work.take() {
                self.resume_failure = None;
                actions.push(Action::Failed(work, failure.clone()));
            }
            actions.push(Action::RemainsStay(failure));
            actions.push(Action::RetryAfter(PAUSED_RETRY_MS));
        } else if !self.gave_up {
            self.gave_up = true;
            self.creating = false;
            if let Some(work) = self.work.take() {
                actions.push(Action::Failed(work, failure.clone()));
            }
            actions.push(Action::DestroyFailed(failure));
        }
    }

    fn advance(&mut self, actions: &mut Vec<Action>) {
        match self.goal {
            Goal::Up => self.advance_up(actions),
            Goal::Paused => self.advance_paused(actions),
            Goal::Down => self.advance_down(actions),
        }
    }

    fn advance_up(&mut self, actions: &mut Vec<Action>) {
        if self.saving || self.packing {
            // A machine that ends now is not made again, and none is made of what is being packed.
            return;
        }
        for part in PARTS {
            let ready = part.needs().iter().all(|p| self.presence(*p) == Presence::Present);
            if ready && self.presence(part) == Presence::Absent {
                self.set(part, Presence::Making);
                actions.push(Action::Make(part));
            }
        }
        if self.creating && self.presence(Part::Guest) == Presence::Present {
            self.creating = false;
            self.was_ready = true;
            actions.push(Action::Created);
        }
        if self.work == Some(Work::Resume) && self.presence(Part::Guest) == Presence::Present {
            self.work = None;
            actions.push(Action::Finished(Work::Resume));
        }
    }

    fn advance_paused(&mut self, actions: &mut Vec<Action>) {
        if self.saving {
            return;
        }
        if !self.image {
            // One that is being made of an image will want to be saved again.
            if self.presence(Part::Machine) == Presence::Present {
                self.saving = true;
                actions.push(Action::Save);
            }
            return;
        }
        if self.work == Some(Work::Pause) {
            self.work = None;
            actions.push(Action::Finished(Work::Pause));
        }
        self.remove_free(&MOVING_PARTS, actions);
        if !self.has_no_machine() || self.work != Some(Work::Resume) {
            return;
        }
        match self.resume_failure.take() {
            Some(failure) => {
                self.work = None;
                actions.push(Action::Failed(Work::Resume, failure));
            }
            None => {
                self.goal = Goal::Up;
                self.advance_up(actions);
            }
        }
    }

    /// Removes those of the parts that are there and that nothing stands on.
    fn remove_free(&mut self, parts: &[Part], actions: &mut Vec<Action>) {
        for part in parts.iter().copied() {
            let free = part.carries().iter().all(|p| self.presence(*p) == Presence::Absent);
            // Connecting to the guest can take until the deadline and leaves nothing behind: it is
            // stopped at once. Everything else that is being made is waited for.
            let there = match self.presence(part) {
                Presence::Present => true,
                Presence::Making => part == Part::Guest,
                _ => false,
            };
            if free && there {
                self.set(part, Presence::Removing);
                actions.push(Action::Remove(part));
            }
        }
    }

    fn advance_down(&mut self, actions: &mut Vec<Action>) {
        if self.saving || self.packing {
            // What is being written needs what would be removed.
            return;
        }
        self.remove_free(&PARTS, actions);
        if !self.is_down() {
            return;
        }
        let failure = self.failure.clone().unwrap_or(Failure::Destroyed);
        let was_creating = std::mem::take(&mut self.creating);
        if was_creating {
            actions.push(Action::CreateFailed(failure));
        }
        if self.forget_when_down {
            actions.push(Action::Destroyed);
        }
        if was_creating || self.forget_when_down {
            actions.push(Action::Forget);
        } else {
            actions.push(Action::Ended);
        }
    }
}

#[cfg(test)]
mod crashes;
#[cfg(test)]
mod tests;
