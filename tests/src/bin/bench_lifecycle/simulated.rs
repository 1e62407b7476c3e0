//! What deciding costs, as the number of capsules grows: the agent's own state machine and timers, with a
//! world that does at once what it is told.

use std::collections::VecDeque;
use std::time::{Duration, Instant};
use wire::message::CapsuleState;
use wire::reactor::Timers;
use wrenn_agent::capsule::failure::Failure;
use wrenn_agent::capsule::lifecycle::{Action, Event, Lifecycle, Part};
use wrenn_agent::capsule::table::Table;
use wrenn_tests::percentile;

const SIZES: [u64; 3] = [10, 100, 1_000];
/// Lives that are measured at a time, and how often.
const LIVES: u32 = 500;
const BATCHES: usize = 101;
/// Timers of each capsule that are set while it runs.
const IDLE_MS: u64 = 600_000;

/// Capsules that run, and the timers of all.
#[derive(Default)]
struct World {
    capsules: Table<Lifecycle>,
    timers: Timers<u64>,
    now_ms: u64,
}

impl World {
    /// Feeds an event to a capsule and does what that leads to.
    fn apply(&mut self, key: u64, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(capsule) = self.capsules.get_mut(&key) else { return };
            for action in capsule.handle(event) {
                match action {
                    Action::Make(part) => events.push_back(Event::Made(part)),
                    Action::Remove(Part::Machine) => {
                        events.push_back(Event::MachineExited(Failure::Destroyed));
                    }
                    Action::Remove(part) => events.push_back(Event::Removed(part)),
                    Action::Save => events.push_back(Event::Saved),
                    Action::Created | Action::Finished(_) => {
                        self.timers.set(key, self.now_ms + IDLE_MS);
                    }
                    Action::Forget => {
                        self.capsules.remove(&key);
                        self.timers.clear(key);
                        return;
                    }
                    _ => {}
                }
            }
        }
    }

    fn create(&mut self) -> u64 {
        let key = self.capsules.insert(|_| Lifecycle::new());
        self.apply(key, Event::Create);
        key
    }

    /// One life among the others: made, paused, resumed, destroyed.
    fn live(&mut self) {
        self.now_ms += 1;
        let key = self.create();
        self.apply(key, Event::Pause);
        assert_eq!(self.state(key), Some(CapsuleState::Paused));
        self.apply(key, Event::Resume);
        assert_eq!(self.state(key), Some(CapsuleState::Running));
        self.apply(key, Event::Destroy);
        assert_eq!(self.state(key), None, "nothing is left of it");
    }

    fn state(&self, key: u64) -> Option<CapsuleState> {
        self.capsules.get(&key).map(Lifecycle::state)
    }
}

/// A world of so many capsules, and how long lives among them took.
struct Run {
    size: u64,
    world: World,
    batches: Vec<Duration>,
}

impl Run {
    fn new(size: u64) -> Run {
        let mut world = World::default();
        (0..size).for_each(|_| _ = world.create());
        Run { size, world, batches: Vec::with_capacity(BATCHES) }
    }

    fn batch(&mut self) {
        let began = Instant::now();
        for _ in 0..LIVES {
            self.world.live();
        }
        self.batches.push(began.elapsed());
    }
}

/// Measures and tells.
pub fn measure() {
    let mut runs = SIZES.map(Run::new);
    // In turns, so that all see the same machine; the first turn warms up.
    runs.iter_mut().for_each(Run::batch);
    runs.iter_mut().for_each(|run| run.batches.clear());
    for _ in 0..BATCHES {
        runs.iter_mut().for_each(Run::batch);
    }
    let took = runs.map(|mut run| (run.size, percentile(&mut run.batches, 0.5) / LIVES));
    for (size, life) in took {
        let ratio = life.as_secs_f64() / took[0].1.as_secs_f64();
        let what = format!("decisions, of {size}");
        println!("{what:<24} {:8.2} us a life, ratio to {} {ratio:.2}", life.as_secs_f64() * 1e6, SIZES[0]);
    }
}
