//! How a running agent ends: it hands its capsules over to the next one, pauses them all first, or destroys
//! them. Each has a signal, so that systemd needs to know of nothing else; `wrenn-agent drain` and
//! `wrenn-agent terminate` send theirs ([`crate::orders`]).

use crate::agent::{Agent, Dirty, Outcome};
use crate::capsule::CapsuleKey;
use crate::capsule::failure::Failure;
use crate::capsule::lifecycle::Event as LifeEvent;
use crate::context::TimerKey;
use std::collections::BTreeSet;
use wire::message::CapsuleState;

/// How the agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Capsules run on, for the next agent to take over. What is under way is finished or taken back.
    HandOver,
    /// Capsules that run are paused, as before the host is rebooted.
    Drain,
    /// All capsules are destroyed, paused ones too.
    Terminate,
}

impl Ending {
    /// Every signal that an agent takes.
    pub const SIGNALS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2];

    /// What a signal asks for.
    pub fn of_signal(signal: i32) -> Ending {
        match signal {
            libc::SIGUSR1 => Ending::Drain,
            libc::SIGUSR2 => Ending::Terminate,
            _ => Ending::HandOver,
        }
    }

    /// The signal that asks for it.
    pub fn signal(self) -> i32 {
        match self {
            Ending::HandOver => libc::SIGTERM,
            Ending::Drain => libc::SIGUSR1,
            Ending::Terminate => libc::SIGUSR2,
        }
    }

    /// How long it may take, in milliseconds. Handing over waits for what is under way and has to be shorter
    /// than the patience of systemd; draining writes the memory of every capsule out.
    pub fn limit_ms(self) -> u64 {
        match self {
            Ending::HandOver | Ending::Terminate => 45_000,
            Ending::Drain => 600_000,
        }
    }

    /// What is done with the capsules, for the log.
    fn doing(self) -> &'static str {
        match self {
            Ending::HandOver => "leaving as they are",
            Ending::Drain => "pausing",
            Ending::Terminate => "destroying",
        }
    }
}

/// An ending that is under way.
#[derive(Debug)]
pub struct Progress {
    ending: Ending,
    /// Those that were told to pause: one that cannot be paused is not asked again and again.
    asked: BTreeSet<CapsuleKey>,
}

impl Agent {
    /// Signals have come.
    pub(crate) fn on_signals(&mut self) {
        // The kernel keeps at most one of each number.
        while let Ok(Some(signal)) = self.signals.next() {
            let ending = Ending::of_signal(signal);
            log::info!("signal {signal}: {} {} capsules, then ending", ending.doing(), self.capsules.len());
            self.begin_ending(ending);
        }
    }

    /// Begins to end. A later order takes the place of an earlier one.
    fn begin_ending(&mut self, ending: Ending) {
        if self.ending.is_none() {
            for (id, peer) in &mut self.peers {
                peer.link.session.drain("the host agent is shutting down");
                self.dirty.insert(Dirty::Peer(*id));
            }
        }
        self.ending = Some(Progress { ending, asked: BTreeSet::new() });
        self.ctx.timers.set(TimerKey::Shutdown, self.ctx.now_ms() + ending.limit_ms());
        let keys: Vec<CapsuleKey> = self.capsules.keys().copied().collect();
        for key in keys {
            if let Some(capsule) = self.capsules.get(&key) {
                // What is packed in the background stays as it is.
                capsule.stop_packing();
            }
            self.apply(
                key,
                match ending {
                    // Nobody will be there to hear that a create or a resume has got through.
                    Ending::HandOver | Ending::Drain => LifeEvent::Deadline(Failure::ShuttingDown),
                    Ending::Terminate => LifeEvent::Shutdown,
                },
            );
        }
    }

    /// Goes on with an ending that is under way. The outcome, once there is nothing to wait for.
    pub(crate) fn continue_ending(&mut self) -> Option<Outcome> {
        let progress = self.ending.as_mut()?;
        let ending = progress.ending;
        if ending == Ending::Drain {
            let runs = |key: &CapsuleKey| {
                self.capsules.get(key).is_some_and(|capsule| {
                    capsule.lifecycle.is_settled() && capsule.state() == CapsuleState::Running
                })
            };
            let asked: Vec<CapsuleKey> = self.capsules.keys().copied().filter(runs).collect();
            for key in asked {
                if self.ending.as_mut().is_some_and(|progress| progress.asked.insert(key)) {
                    if let Some(capsule) = self.capsules.get_mut(&key) {
                        capsule.begun_ms = self.ctx.now_ms();
                    }
                    self.apply(key, LifeEvent::Pause);
                }
            }
        }
        let settled = self.capsules.values().all(|capsule| capsule.lifecycle.is_settled());
        // What those that are paused used is on disk before the host may go down.
        (settled && self.keeper.is_idle()).then(|| self.outcome_of(ending))
    }

    /// The time for ending is over.
    pub(crate) fn give_up_ending(&mut self) -> Outcome {
        let ending = self.ending.as_ref().map_or(Ending::HandOver, |progress| progress.ending);
        log::error!("{} capsules: not done after {} s", ending.doing(), ending.limit_ms() / 1000);
        self.outcome_of(ending)
    }

    fn outcome_of(&self, ending: Ending) -> Outcome {
        let left = self.capsules.values().filter(|capsule| match ending {
            Ending::HandOver => !capsule.lifecycle.is_settled(),
            Ending::Drain => capsule.lifecycle.holds_machine(),
            Ending::Terminate => !capsule.lifecycle.is_down(),
        });
        match left.count() {
            0 => Outcome::Clean,
            count => Outcome::Remains(count),
        }
    }
}
