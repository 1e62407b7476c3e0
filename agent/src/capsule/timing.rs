//! What becomes due by time alone: a capsule that idles or has run for too long is paused, one that has been
//! paused for long hibernates.

use super::{Capsule, CapsuleTimer};
use crate::context::{Context, TimerKey};
use crate::sys::clock;
use wire::message::CapsuleState;

/// How long a capsule that has run for too long and could not be paused runs on until that is tried again.
const RUN_TIME_RETRY_MS: u64 = 60_000;

impl Capsule {
    /// It is in use, or begins to run: its idle time starts anew.
    pub fn note_use(&mut self, ctx: &mut Context) {
        self.active_ms = ctx.now_ms();
        self.watch_time(ctx);
    }

    /// What was asked of it has been done: it may be another machine now that runs.
    pub fn note_change(&mut self, ctx: &mut Context) {
        self.runs_until_ms = 0;
        self.note_use(ctx);
    }

    /// Whether it has been idle for its time; where it has not, it is looked at again when it may be. One
    /// that somebody has a stream to is not idle.
    pub fn is_idle(&mut self, ctx: &mut Context) -> bool {
        if !self.forwards.is_empty() {
            self.active_ms = ctx.now_ms();
        }
        let idle_ms = ctx.now_ms() - self.active_ms;
        let is_idle = self.spec.timeout_sec > 0 && idle_ms >= self.idle_limit_ms();
        if !is_idle {
            self.watch_time(ctx);
        }
        is_idle
    }

    /// Whether it has run for as long as any capsule of this host may; if so, the next try is a while off.
    pub fn has_run_out(&mut self, ctx: &mut Context) -> bool {
        let has_run_out = self.state() == CapsuleState::Running
            && self.run_end_ms(ctx).is_some_and(|end| end <= ctx.now_ms());
        if has_run_out {
            self.runs_until_ms = ctx.now_ms() + RUN_TIME_RETRY_MS;
        }
        self.watch_time(ctx);
        has_run_out
    }

    fn idle_limit_ms(&self) -> u64 {
        u64::from(self.spec.timeout_sec) * 1000
    }

    /// When it has run for `WRENN_MAX_RUN_SEC`, on the agent's clock. Its machine's age tells, which no agent
    /// that ends and no wall clock that is set changes.
    fn run_end_ms(&self, ctx: &Context) -> Option<u64> {
        let limit_ms = ctx.host.config.max_run_ms;
        let machine = self.record.machine.as_ref().filter(|_| limit_ms > 0)?;
        let age_ms = clock::age_ms(machine.start_ticks).unwrap_or_else(|e| {
            log::warn!("capsule {}: how long it has run is not known: {e}", self.spec.id);
            0
        });
        Some((ctx.now_ms() + limit_ms.saturating_sub(age_ms)).max(self.runs_until_ms))
    }

    fn watch_time(&self, ctx: &mut Context) {
        let timer = |timer| TimerKey::Capsule(self.key, timer);
        if self.state() == CapsuleState::Running {
            if self.spec.timeout_sec > 0 {
                ctx.timers.set(timer(CapsuleTimer::Idle), self.active_ms + self.idle_limit_ms());
            }
            if let Some(end_ms) = self.run_end_ms(ctx) {
                ctx.timers.set(timer(CapsuleTimer::RunTime), end_ms);
            }
        }
        let hibernate_after_ms = ctx.host.config.hibernate_after_ms;
        if hibernate_after_ms > 0 && self.state() == CapsuleState::Paused {
            ctx.timers.set(timer(CapsuleTimer::Hibernate), self.active_ms + hibernate_after_ms);
        }
    }
}
