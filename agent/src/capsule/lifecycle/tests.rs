//! Transitions as scripts, and a run of random worlds.

use super::*;
use Action::*;
use Part::*;

pub(super) fn broken() -> Failure {
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
fn what_stays_of_a_paused_capsules_machine_does_not_make_it_an_error() {
    let mut life = after_up(&PAUSED[..4]);
    let remove = Failure::Remove { part: Network, reason: "busy".into() };
    let stays = Failure::Stays { part: Network, reason: "busy".into() };
    let fail = |life: &mut Lifecycle| {
        for attempt in 1..MAX_REMOVE_ATTEMPTS {
            let failed = life.handle(Event::RemoveFailed(Network, remove.clone()));
            assert_eq!(failed, [RetryAfter(REMOVE_RETRY_MS << attempt)]);
            assert_eq!(life.handle(Event::RetryDue), [Remove(Network)]);
        }
        life.handle(Event::RemoveFailed(Network, remove.clone()))
    };
    assert!(!life.is_settled(), "it is being removed");
    assert_eq!(fail(&mut life), [RemainsStay(stays.clone()), RetryAfter(PAUSED_RETRY_MS)]);
    assert_eq!(life.state(), CapsuleState::Paused);
    assert!(life.is_settled() && !life.is_at_rest(), "an agent may end, nothing is packed");
    // As often as it takes, and told each time.
    for _ in 0..3 {
        assert_eq!(life.handle(Event::RetryDue), [Remove(Network)]);
        let failed = life.handle(Event::RemoveFailed(Network, remove.clone()));
        assert_eq!(failed, [RemainsStay(stays.clone()), RetryAfter(PAUSED_RETRY_MS)]);
    }
    // Whoever wants it has it tried at once, and is told.
    assert_eq!(life.handle(Event::Resume), [Remove(Network)]);
    let failed = [Failed(Work::Resume, stays.clone()), RemainsStay(stays), RetryAfter(PAUSED_RETRY_MS)];
    assert_eq!(fail(&mut life), failed);
    assert_eq!(life.state(), CapsuleState::Paused);
    assert_eq!(life.handle(Event::RetryDue), [Remove(Network)]);
    assert_eq!(life.handle(Event::Removed(Network)), []);
    assert!(life.is_at_rest() && life.has_image());
    assert_eq!(life.handle(Event::Resume), [Make(Network)]);
}

#[test]
fn destroyed_before_it_was_made() {
    let mut life = Lifecycle::new();
    assert_eq!(life.handle(Event::Shutdown), [CreateFailed(Failure::ShuttingDown), Destroyed, Forget]);
}

const PAUSED: [(Event, &[Action]); 5] = [
    (Event::Pause, &[Save]),
    (Event::Saved, &[Finished(Work::Pause), Remove(Guest)]),
    (Event::Removed(Guest), &[Remove(Machine)]),
    (Event::MachineExited(Failure::Cancelled), &[Remove(Network)]),
    (Event::Removed(Network), &[]),
];

fn after_pause(steps: &[(Event, &[Action])]) -> Lifecycle {
    let mut all = PAUSED.to_vec();
    all.extend_from_slice(steps);
    after_up(&all)
}

#[test]
fn paused_and_resumed() {
    let mut life = after_up(&[]);
    let mut states = Vec::new();
    for (event, _) in PAUSED {
        life.handle(event);
        states.push((life.state(), life.holds_machine(), life.is_settled()));
    }
    use CapsuleState::{Paused, Pausing, Running};
    let leaving = (Paused, true, false);
    assert_eq!(states, [(Pausing, true, false), leaving, leaving, leaving, (Paused, false, true)]);
    assert!(!life.holds_machine() && life.has_image());
    let life = after_pause(&[
        (Event::Resume, &[Make(Network)]),
        (Event::Made(Network), &[Make(Machine)]),
        (Event::Made(Machine), &[Make(Guest)]),
        (Event::Made(Guest), &[Finished(Work::Resume)]),
    ]);
    assert_eq!(life.state(), Running);
    assert!(life.holds_machine() && !life.has_image());
}

/// A pause is answered before the machine is gone.
#[test]
fn resuming_waits_until_the_machine_before_is_gone() {
    let leaving = &PAUSED[..3];
    let begun: Vec<(Event, &[Action])> =
        leaving.iter().cloned().chain([(Event::Hibernate, &[][..]), (Event::Resume, &[][..])]).collect();
    let gone: [(Event, &[Action]); 2] = [
        (Event::MachineExited(Failure::Cancelled), &[Remove(Network)]),
        (Event::Removed(Network), &[Make(Network)]),
    ];
    let mut life = after_up(&[begun.clone(), gone.to_vec()].concat());
    assert_eq!(life.state(), CapsuleState::Resuming);
    assert_eq!(life.handle(Event::Made(Network)), [Make(Machine)]);
    // One that is waited for too long is paused still, and can be resumed later.
    let mut life = after_up(&begun);
    assert_eq!((life.state(), life.goal()), (CapsuleState::Resuming, Goal::Paused));
    assert_eq!(life.handle(Event::Deadline(broken())), []);
    assert_eq!(life.handle(Event::Removed(Machine)), [Remove(Network)]);
    assert_eq!(life.handle(Event::Removed(Network)), [Failed(Work::Resume, broken())]);
    assert_eq!(life.state(), CapsuleState::Paused);
    assert_eq!(life.handle(Event::Resume), [Make(Network)]);
    // One that is to go does.
    let mut life = after_up(&begun);
    assert_eq!(life.handle(Event::Destroy), [Failed(Work::Resume, Failure::Destroyed)]);
    assert_eq!(life.handle(Event::Removed(Machine)), [Remove(Network), Remove(Disk)]);
}

#[test]
fn a_failed_pause_leaves_it_running() {
    let life =
        after_up(&[(Event::Pause, &[Save]), (Event::SaveFailed(broken()), &[Failed(Work::Pause, broken())])]);
    assert_eq!(life.state(), CapsuleState::Running);
    let life = after_up(&[
        (Event::Pause, &[Save]),
        (Event::GuestLost, &[]),
        (Event::SaveFailed(broken()), &[Failed(Work::Pause, broken()), Make(Guest)]),
    ]);
    assert_eq!(life.state(), CapsuleState::Running);
}

#[test]
fn a_failed_resume_leaves_it_paused_and_can_be_tried_again() {
    let life = after_pause(&[
        (Event::Resume, &[Make(Network)]),
        (Event::MakeFailed(Network, broken()), &[Failed(Work::Resume, broken())]),
        (Event::Resume, &[Make(Network)]),
        (Event::Made(Network), &[Make(Machine)]),
        (Event::MakeFailed(Machine, broken()), &[Remove(Network)]),
        (Event::Removed(Network), &[Failed(Work::Resume, broken())]),
        (Event::Resume, &[Make(Network)]),
    ]);
    assert_eq!(life.state(), CapsuleState::Resuming);
}

#[test]
fn a_guest_that_does_not_answer_after_resuming_is_saved_again() {
    let life = after_pause(&[
        (Event::Resume, &[Make(Network)]),
        (Event::Made(Network), &[Make(Machine)]),
        (Event::Made(Machine), &[Make(Guest)]),
        (Event::Deadline(broken()), &[Save]),
        (Event::Saved, &[Remove(Guest)]),
        (Event::Removed(Guest), &[Remove(Machine)]),
        (Event::Removed(Machine), &[Remove(Network)]),
        (Event::Removed(Network), &[Failed(Work::Resume, broken())]),
    ]);
    assert_eq!(life.state(), CapsuleState::Paused);
}

#[test]
fn a_machine_that_ends_while_it_is_saved_counts_by_whether_it_was_saved() {
    let ended = Event::MachineExited(broken());
    let life = after_up(&[
        (Event::Pause, &[Save]),
        (ended.clone(), &[]),
        (Event::Saved, &[Finished(Work::Pause), Remove(Guest)]),
        (Event::Removed(Guest), &[Remove(Network)]),
        (Event::Removed(Network), &[]),
    ]);
    assert_eq!(life.state(), CapsuleState::Paused);
    let life = after_up(&[
        (Event::Pause, &[Save]),
        (ended, &[]),
        (Event::SaveFailed(broken()), &[Failed(Work::Pause, broken()), Remove(Guest)]),
    ]);
    assert_eq!(life.state(), CapsuleState::Stopping);
}

#[test]
fn a_snapshot_leaves_it_running() {
    let life = after_up(&[
        (Event::Snapshot, &[MakeSnapshot]),
        (Event::Pause, &[]),
        (Event::SnapshotMade, &[Finished(Work::Snapshot)]),
        (Event::Snapshot, &[MakeSnapshot]),
        (Event::SnapshotFailed(broken()), &[Failed(Work::Snapshot, broken())]),
    ]);
    assert_eq!(life.state(), CapsuleState::Running);
}

#[test]
fn destroying_waits_for_what_is_being_written() {
    after_up(&[
        (Event::Pause, &[Save]),
        (Event::Destroy, &[Failed(Work::Pause, Failure::Destroyed)]),
        (Event::Saved, &[Remove(Guest)]),
    ]);
    after_pause(&[
        (Event::Destroy, &[Remove(Disk)]),
        (Event::Removed(Disk), &[Remove(Record)]),
        (Event::Removed(Record), &[Destroyed, Forget]),
    ]);
}

#[test]
fn what_is_asked_for_in_the_wrong_state_is_refused_and_nothing() {
    let life = after_up(&[(Event::Resume, &[])]);
    let refusal = life.check(Work::Resume).expect_err("running");
    assert_eq!(refusal, "the capsule is running; only one that is paused can be resumed");
    let life = after_pause(&[(Event::Pause, &[]), (Event::Snapshot, &[])]);
    let refusal = life.check(Work::Pause).expect_err("paused");
    assert_eq!(refusal, "the capsule is paused; only one that is running can be paused");
    let mut life = Lifecycle::paused(false);
    assert_eq!((life.state(), life.check(Work::Resume)), (CapsuleState::Paused, Ok(())));
    assert_eq!(life.handle(Event::Resume), [Make(Network)]);
}

#[test]
fn a_paused_capsule_hibernates_and_is_resumed_from_there() {
    let life = after_pause(&[
        (Event::Hibernate, &[Pack]),
        (Event::Hibernate, &[]),
        (Event::Packed, &[]),
        (Event::Hibernate, &[]),
        (Event::Pause, &[]),
    ]);
    assert_eq!((life.state(), life.is_at_rest()), (CapsuleState::Hibernated, true));
    let refusal = life.check(Work::Pause).expect_err("hibernated");
    assert_eq!(refusal, "the capsule is hibernated; only one that is running can be paused");
    let mut life = Lifecycle::paused(true);
    assert_eq!(life.state(), CapsuleState::Hibernated);
    assert_eq!(life.handle(Event::Resume), [Make(Network)]);
    assert_eq!(life.state(), CapsuleState::Resuming);
    assert_eq!(life.handle(Event::MakeFailed(Network, broken())), [Failed(Work::Resume, broken())]);
    assert_eq!(life.state(), CapsuleState::Hibernated, "nothing was unpacked");
    life.handle(Event::Resume);
    for part in [Network, Machine, Guest] {
        life.handle(Event::Made(part));
    }
    assert_eq!(life.state(), CapsuleState::Running);
    assert_eq!(life.handle(Event::Pause), [Save]);
    life.handle(Event::Saved);
    assert!(life.has_image());
    let running = after_up(&[(Event::Hibernate, &[])]);
    assert_eq!(running.state(), CapsuleState::Running);
}

#[test]
fn who_wants_a_capsule_that_is_being_packed_stops_that_and_waits_for_it() {
    for (event, packed) in [(Event::Packed, true), (Event::NotPacked, false)] {
        let life = after_pause(&[
            (Event::Hibernate, &[Pack]),
            (Event::Resume, &[StopPacking]),
            (Event::Deadline(broken()), &[Failed(Work::Resume, broken())]),
            (Event::Resume, &[StopPacking]),
            (event.clone(), &[Make(Network)]),
            (Event::MakeFailed(Network, broken()), &[Failed(Work::Resume, broken())]),
        ]);
        let state = if packed { CapsuleState::Hibernated } else { CapsuleState::Paused };
        assert_eq!(life.state(), state);
        after_pause(&[
            (Event::Hibernate, &[Pack]),
            (Event::Destroy, &[StopPacking]),
            (event, &[Remove(Disk)]),
            (Event::Removed(Disk), &[Remove(Record)]),
            (Event::Removed(Record), &[Destroyed, Forget]),
        ]);
    }
}

/// A small generator, so that the run is the same every time.
pub(super) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
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
        let (mut image, mut asked) = (false, None);
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
                (_, 5 | 6) => Some(Event::Pause),
                (_, 7 | 8) => Some(Event::Resume),
                (_, 9) => Some(Event::Snapshot),
                (_, 10..=12) => Some(Event::Hibernate),
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
                    // What a machine that ended has not written is not there.
                    Save if !world.contains(&Machine) || random.below(4) == 0 => Event::SaveFailed(broken()),
                    Save => Event::Saved,
                    MakeSnapshot if !world.contains(&Machine) || random.below(4) == 0 => {
                        Event::SnapshotFailed(broken())
                    }
                    MakeSnapshot => Event::SnapshotMade,
                    Pack if random.below(3) == 0 => Event::NotPacked,
                    Pack => Event::Packed,
                    other => panic!("{other:?} is not answered"),
                },
            };
            match &event {
                Event::Made(part) => {
                    let needed = part.needs().iter().all(|p| world.contains(p));
                    assert!(needed || life.goal() != Goal::Up, "seed {seed}: {part:?}");
                    world.insert(*part);
                    image &= *part != Machine;
                }
                Event::Removed(part) => {
                    world.remove(part);
                    assert!(part.carries().iter().all(|p| !world.contains(p)), "seed {seed}: {part:?}");
                }
                Event::GuestLost => {
                    world.remove(&Guest);
                }
                Event::Saved => image = true,
                Event::Pause | Event::Resume | Event::Snapshot => {
                    let work = match event {
                        Event::Pause => Work::Pause,
                        Event::Resume => Work::Resume,
                        _ => Work::Snapshot,
                    };
                    if life.check(work).is_ok() {
                        assert_eq!(asked.replace(work), None, "seed {seed}: two at once");
                    }
                }
                Event::MachineExited(_) => {
                    world.remove(&Machine);
                    under_way.retain(|a| *a != Remove(Machine));
                }
                _ => {}
            }
            for action in life.handle(event) {
                match action {
                    Make(part) => {
                        assert!(!under_way.contains(&Pack), "seed {seed}: {part:?} made of what is packed");
                        under_way.push(action);
                    }
                    RetryAfter(_) | Save | MakeSnapshot => under_way.push(action),
                    Pack => {
                        assert!(image && !under_way.contains(&Pack), "seed {seed}: nothing to pack");
                        under_way.push(action);
                    }
                    StopPacking => assert!(under_way.contains(&Pack), "seed {seed}: nothing to stop"),
                    Finished(work) | Failed(work, _) => {
                        assert_eq!(asked.take(), Some(work), "seed {seed}: answered unasked");
                    }
                    Remove(part) => {
                        let saving = under_way.iter().any(|a| matches!(a, Save | MakeSnapshot | Pack));
                        assert!(!saving, "seed {seed}: {part:?} removed under what is being written");
                        assert!(
                            image || life.goal() == Goal::Down,
                            "seed {seed}: {part:?} removed, no image"
                        );
                        under_way.retain(|a| *a != Make(part));
                        under_way.push(action);
                    }
                    Created | CreateFailed(_) => answers += 1,
                    Forget => forgotten = true,
                    Destroyed | DestroyFailed(_) | RemainsStay(_) | Ended => {}
                }
            }
            if life.is_at_rest() {
                assert!(image && world.iter().eq([&Record, &Disk]), "seed {seed}: paused with {world:?}");
            }
        }
        assert!(forgotten, "seed {seed}: {life:?}, under way {under_way:?}");
        assert!(world.is_empty(), "seed {seed}: {world:?} left");
        assert_eq!(asked, None, "seed {seed}: never answered");
        assert!(answers <= 1, "seed {seed}: create answered {answers} times");
    }
}
