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
//!  pending ---------> starting -------------------> running
//!     |                  |  failure, deadline,         |  Destroy, shutdown, machine exited
//!     |                  v  cancelled, Destroy         v
//!     +--------------> stopping  ------ all parts absent ------> stopped / error
//! ```
//!
//! Pausing, paused, resuming, snapshotting and hibernated are states of the public API that this machine
//! has no transition into; missing is what a control plane calls a capsule that no host knows.

use super::failure::Failure;
use wire::message::CapsuleState;

/// How often a part's removal is tried before the capsule is left in error for a person.
pub const MAX_REMOVE_ATTEMPTS: u32 = 6;
/// The wait before the first further try of a removal; each next one waits twice as long.
pub const REMOVE_RETRY_MS: u64 = 50;

/// What a capsule is made of, in the order of making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Its directory with the record of what it owns.
    Record,
    /// Its slot, namespace, links and firewall.
    Network,
    /// Its writable root disk.
    Disk,
    /// Its virtual machine monitor's process.
    Machine,
    /// An authenticated, healthy session to its guest daemon.
    Guest,
}

/// Every part.
pub const PARTS: [Part; 5] = [Part::Record, Part::Network, Part::Disk, Part::Machine, Part::Guest];

impl Part {
    /// What has to be present before this part is made.
    fn needs(self) -> &'static [Part] {
        match self {
            Part::Record => &[],
            Part::Network | Part::Disk => &[Part::Record],
            Part::Machine => &[Part::Network, Part::Disk],
            Part::Guest => &[Part::Machine],
        }
    }

    /// What has to be absent before this part is removed: everything that stands on it.
    fn carries(self) -> &'static [Part] {
        match self {
            Part::Record => &[Part::Network, Part::Disk, Part::Machine, Part::Guest],
            Part::Network | Part::Disk => &[Part::Machine, Part::Guest],
            Part::Machine => &[Part::Guest],
            Part::Guest => &[],
        }
    }

    /// The part's name for a person.
    pub fn name(self) -> &'static str {
        match self {
            Part::Record => "record",
            Part::Network => "network",
            Part::Disk => "disk",
            Part::Machine => "virtual machine",
            Part::Guest => "guest daemon",
        }
    }
}

/// How far a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// There is nothing of it.
    Absent,
    /// It is being made.
    Making,
    /// It is there.
    Present,
    /// It is being removed.
    Removing,
    /// Its removal failed and is tried again later.
    Stuck,
}

/// What the capsule is on its way to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// All parts present.
    Up,
    /// All parts absent.
    Down,
}

/// What can happen to a capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Start making it.
    Create,
    /// A part is there.
    Made(Part),
    /// A part could not be made, and nothing of it is left.
    MakeFailed(Part, Failure),
    /// A part is gone.
    Removed(Part),
    /// A part could not be removed.
    RemoveFailed(Part, Failure),
    /// The wait before a further try is over.
    RetryDue,
    /// The machine's process has ended and is reaped.
    MachineExited(Failure),
    /// The session to the guest daemon broke; the machine runs.
    GuestLost,
    /// The guest daemon refuses to work with this agent.
    GuestRefused(Failure),
    /// The time for creating is over.
    Deadline(Failure),
    /// Whoever asked for the capsule is gone or does not want it any more.
    Cancel,
    /// It shall go.
    Destroy,
    /// The agent is shutting down.
    Shutdown,
}

/// What the executor has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make a part, then report `Made` or `MakeFailed`.
    Make(Part),
    /// Remove a part, then report `Removed` or `RemoveFailed` (`MachineExited` will do for the machine).
    Remove(Part),
    /// Report `RetryDue` after this many milliseconds.
    RetryAfter(u64),
    /// Tell whoever asked for it that the capsule runs.
    Created,
    /// Tell whoever asked for it that the capsule could not be made and is undone.
    CreateFailed(Failure),
    /// Tell whoever wanted it destroyed that it is gone.
    Destroyed,
    /// Tell whoever wanted it destroyed, or made, that remains are left.
    DestroyFailed(Failure),
    /// The capsule has ended by itself; nothing of it is left but what is told of it.
    Ended,
    /// Forget the capsule.
    Forget,
}

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
        }
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
        match (self.goal, &self.failure) {
            (Goal::Up, _) if self.was_ready => CapsuleState::Running,
            (Goal::Up, _) if self.presence(Part::Record) != Presence::Present => CapsuleState::Pending,
            (Goal::Up, _) => CapsuleState::Starting,
            (Goal::Down, _) if self.gave_up => CapsuleState::Error,
            (Goal::Down, Some(failure)) if down && !failure.is_orderly() => CapsuleState::Error,
            (Goal::Down, _) if down => CapsuleState::Stopped,
            (Goal::Down, _) => CapsuleState::Stopping,
        }
    }

    /// Whether nothing of it exists.
    pub fn is_down(&self) -> bool {
        self.parts.iter().all(|p| *p == Presence::Absent)
    }

    /// Takes an event and says what is to be done.
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Create => {}
            Event::Made(part) => {
                if self.presence(part) == Presence::Making {
                    self.set(part, Presence::Present);
                }
            }
            Event::MakeFailed(part, failure) => {
                self.set(part, Presence::Absent);
                self.fail(failure);
            }
            Event::Removed(part) => self.set(part, Presence::Absent),
            Event::RemoveFailed(part, failure) => self.on_remove_failed(part, failure, &mut actions),
            Event::RetryDue => self.unstick(),
            Event::MachineExited(failure) => {
                self.set(Part::Machine, Presence::Absent);
                if self.goal == Goal::Up {
                    self.fail(failure);
                }
            }
            Event::GuestLost => {
                if self.presence(Part::Guest) == Presence::Present {
                    self.set(Part::Guest, Presence::Absent);
                }
            }
            Event::GuestRefused(failure) | Event::Deadline(failure) => {
                if self.creating && self.goal == Goal::Up {
                    self.fail(failure);
                }
            }
            Event::Cancel => {
                if self.creating {
                    self.fail(Failure::Cancelled);
                }
            }
            Event::Destroy => {
                self.forget_when_down = true;
                self.remove_attempts = 0;
                self.gave_up = false;
                self.unstick();
                self.fail(Failure::Destroyed);
            }
            Event::Shutdown => {
                self.forget_when_down = true;
                self.fail(Failure::ShuttingDown);
            }
        }
        self.advance(&mut actions);
        actions
    }

    fn set(&mut self, part: Part, presence: Presence) {
        self.parts[part as usize] = presence;
    }

    /// Turns the goal to down. The first reason is the one that counts.
    fn fail(&mut self, failure: Failure) {
        self.goal = Goal::Down;
        self.failure.get_or_insert(failure);
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
        self.remove_attempts += 1;
        if self.remove_attempts < MAX_REMOVE_ATTEMPTS {
            actions.push(Action::RetryAfter(REMOVE_RETRY_MS << self.remove_attempts));
        } else if !self.gave_up {
            self.gave_up = true;
            self.creating = false;
            actions.push(Action::DestroyFailed(failure));
        }
    }

    fn advance(&mut self, actions: &mut Vec<Action>) {
        match self.goal {
            Goal::Up => self.advance_up(actions),
            Goal::Down => self.advance_down(actions),
        }
    }

    fn advance_up(&mut self, actions: &mut Vec<Action>) {
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
    }

    fn advance_down(&mut self, actions: &mut Vec<Action>) {
        for part in PARTS {
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
mod tests;
