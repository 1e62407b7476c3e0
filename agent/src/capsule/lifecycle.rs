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
mod tests {
    use super::*;
    use Action::*;
    use Part::*;

    fn broken() -> Failure {
        Failure::ShutDownByGuest("test".into())
    }

    /// Feeds events and compares the actions of each.
    fn script(steps: &[(Event, &[Action])]) -> Lifecycle {
        let mut life = Lifecycle::new();
        for (number, (event, expected)) in steps.iter().enumerate() {
            let actions = life.handle(event.clone());
            assert_eq!(actions, *expected, "step {number}: {event:?}");
        }
        life
    }

    const UP: [(Event, &[Action]); 6] = [
        (Event::Create, &[Make(Record)]),
        (Event::Made(Record), &[Make(Network), Make(Disk)]),
        (Event::Made(Disk), &[]),
        (Event::Made(Network), &[Make(Machine)]),
        (Event::Made(Machine), &[Make(Guest)]),
        (Event::Made(Guest), &[Created]),
    ];

    fn after_up(steps: &[(Event, &[Action])]) -> Lifecycle {
        let mut all = UP.to_vec();
        all.extend_from_slice(steps);
        script(&all)
    }

    #[test]
    fn created_and_destroyed() {
        let life = after_up(&[
            (Event::Destroy, &[Remove(Guest)]),
            (Event::Removed(Guest), &[Remove(Machine)]),
            (Event::MachineExited(broken()), &[Remove(Network), Remove(Disk)]),
            (Event::Removed(Network), &[]),
            (Event::Removed(Disk), &[Remove(Record)]),
            (Event::Removed(Record), &[Destroyed, Forget]),
        ]);
        assert_eq!(life.state(), CapsuleState::Stopped);
    }

    #[test]
    fn states_on_the_way() {
        let mut life = Lifecycle::new();
        let mut states = vec![life.state()];
        for (event, _) in UP {
            life.handle(event);
            states.push(life.state());
        }
        use CapsuleState::{Pending, Running, Starting, Stopping};
        assert_eq!(states, [Pending, Pending, Starting, Starting, Starting, Starting, Running]);
        life.handle(Event::Destroy);
        assert_eq!(life.state(), Stopping);
    }

    #[test]
    fn a_part_under_way_is_waited_for_and_removed() {
        script(&[
            (Event::Create, &[Make(Record)]),
            (Event::Made(Record), &[Make(Network), Make(Disk)]),
            (Event::Cancel, &[]),
            (Event::Made(Network), &[Remove(Network)]),
            (Event::Removed(Network), &[]),
            (Event::MakeFailed(Disk, broken()), &[Remove(Record)]),
            (Event::Removed(Record), &[CreateFailed(Failure::Cancelled), Forget]),
        ]);
    }

    #[test]
    fn a_guest_that_never_comes_up_fails_by_the_deadline() {
        script(&[
            (Event::Create, &[Make(Record)]),
            (Event::Made(Record), &[Make(Network), Make(Disk)]),
            (Event::Made(Network), &[]),
            (Event::Made(Disk), &[Make(Machine)]),
            (Event::Made(Machine), &[Make(Guest)]),
            (Event::Deadline(broken()), &[Remove(Guest)]),
            (Event::Removed(Guest), &[Remove(Machine)]),
            (Event::Removed(Machine), &[Remove(Network), Remove(Disk)]),
            (Event::Removed(Disk), &[]),
            (Event::Removed(Network), &[Remove(Record)]),
            (Event::Removed(Record), &[CreateFailed(broken()), Forget]),
        ]);
    }

    #[test]
    fn a_deadline_after_the_answer_is_nothing() {
        let life = after_up(&[(Event::Deadline(broken()), &[]), (Event::Cancel, &[])]);
        assert_eq!(life.state(), CapsuleState::Running);
    }

    #[test]
    fn a_machine_that_ends_takes_the_rest_along_and_stays_known() {
        let mut life = after_up(&[
            (Event::MachineExited(Failure::MachineEnded("killed".into())), &[Remove(Guest)]),
            (Event::Removed(Guest), &[Remove(Network), Remove(Disk)]),
            (Event::Removed(Disk), &[]),
            (Event::Removed(Network), &[Remove(Record)]),
            (Event::Removed(Record), &[Ended]),
        ]);
        assert_eq!(life.state(), CapsuleState::Error);
        assert_eq!(life.handle(Event::Destroy), [Destroyed, Forget]);
    }

    #[test]
    fn a_guest_that_powers_off_has_stopped() {
        let life = after_up(&[
            (Event::MachineExited(broken()), &[Remove(Guest)]),
            (Event::Removed(Guest), &[Remove(Network), Remove(Disk)]),
            (Event::Removed(Disk), &[]),
            (Event::Removed(Network), &[Remove(Record)]),
            (Event::Removed(Record), &[Ended]),
        ]);
        assert_eq!(life.state(), CapsuleState::Stopped);
    }

    #[test]
    fn a_lost_session_is_made_again() {
        let life = after_up(&[(Event::GuestLost, &[Make(Guest)]), (Event::Made(Guest), &[])]);
        assert_eq!(life.state(), CapsuleState::Running);
    }

    #[test]
    fn removal_is_tried_again_and_given_up_in_error() {
        let mut life = after_up(&[
            (Event::Destroy, &[Remove(Guest)]),
            (Event::Removed(Guest), &[Remove(Machine)]),
            (Event::Removed(Machine), &[Remove(Network), Remove(Disk)]),
            (Event::Removed(Disk), &[]),
        ]);
        for attempt in 1..MAX_REMOVE_ATTEMPTS {
            let failed = life.handle(Event::RemoveFailed(Network, broken()));
            assert_eq!(failed, [RetryAfter(REMOVE_RETRY_MS << attempt)]);
            assert_eq!(life.handle(Event::RetryDue), [Remove(Network)]);
        }
        assert_eq!(life.handle(Event::RemoveFailed(Network, broken())), [DestroyFailed(broken())]);
        assert_eq!(life.state(), CapsuleState::Error);
        // A person has it tried again.
        assert_eq!(life.handle(Event::Destroy), [Remove(Network)]);
        assert_eq!(life.handle(Event::Removed(Network)), [Remove(Record)]);
        assert_eq!(life.handle(Event::Removed(Record)), [Destroyed, Forget]);
    }

    #[test]
    fn destroyed_before_it_was_made() {
        let mut life = Lifecycle::new();
        assert_eq!(life.handle(Event::Shutdown), [CreateFailed(Failure::ShuttingDown), Destroyed, Forget]);
    }

    /// A small generator, so that the run is the same every time.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % bound as u64) as usize
        }
    }

    /// What the world does with the actions: parts come and go in any order, fail, and disturbances come
    /// at any time. Whatever happens, no part is made over another's absence or removed from under
    /// another, and once told to go the capsule goes with nothing left.
    #[test]
    fn every_interleaving_ends_with_nothing_left() {
        for seed in 1..=20_000 {
            let mut random = Random(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
            let mut life = Lifecycle::new();
            let mut world = std::collections::BTreeSet::new();
            let mut under_way: Vec<Action> = life.handle(Event::Create);
            let mut answers = 0;
            let mut forgotten = false;
            for step in 0..400 {
                if forgotten {
                    break;
                }
                let disturbance = match (step, random.below(40)) {
                    (200, _) => Some(Event::Destroy),
                    (_, 0) => Some(Event::Destroy),
                    (_, 1) => Some(Event::Cancel),
                    (_, 2) => Some(Event::Deadline(broken())),
                    (_, 3) if world.contains(&Guest) => Some(Event::GuestLost),
                    (_, 4) if world.contains(&Machine) => Some(Event::MachineExited(broken())),
                    _ => None,
                };
                let event = match disturbance {
                    Some(event) => event,
                    None if under_way.is_empty() => continue,
                    None => match under_way.swap_remove(random.below(under_way.len())) {
                        Make(part) if random.below(12) == 0 => Event::MakeFailed(part, broken()),
                        Make(part) => Event::Made(part),
                        Remove(part) if random.below(12) == 0 && step < 200 => {
                            Event::RemoveFailed(part, broken())
                        }
                        Remove(part) => Event::Removed(part),
                        RetryAfter(_) => Event::RetryDue,
                        other => panic!("{other:?} is not answered"),
                    },
                };
                match &event {
                    Event::Made(part) => {
                        assert!(part.needs().iter().all(|p| world.contains(p)) || life.goal() == Goal::Down);
                        world.insert(*part);
                    }
                    Event::Removed(part) => {
                        world.remove(part);
                        assert!(part.carries().iter().all(|p| !world.contains(p)), "seed {seed}: {part:?}");
                    }
                    Event::GuestLost => {
                        world.remove(&Guest);
                    }
                    Event::MachineExited(_) => {
                        world.remove(&Machine);
                        under_way.retain(|a| *a != Remove(Machine));
                    }
                    _ => {}
                }
                for action in life.handle(event) {
                    match action {
                        Make(_) | RetryAfter(_) => under_way.push(action),
                        Remove(part) => {
                            under_way.retain(|a| *a != Make(part));
                            under_way.push(action);
                        }
                        Created | CreateFailed(_) => answers += 1,
                        Forget => forgotten = true,
                        Destroyed | DestroyFailed(_) | Ended => {}
                    }
                }
            }
            assert!(forgotten, "seed {seed}: {life:?}, under way {under_way:?}");
            assert!(world.is_empty(), "seed {seed}: {world:?} left");
            assert!(answers <= 1, "seed {seed}: create answered {answers} times");
        }
    }
}
