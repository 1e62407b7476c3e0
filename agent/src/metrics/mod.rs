//! What capsules use of their host, sampled twice a second and kept in memory for a day: three rings a
//! capsule, each coarser and longer than the one before, of at most 48 KiB together.
//!
//! - [`ring`]: samples, averages and the rings
//! - [`probe`]: reading one VMM's figures
//! - [`keeping`]: keeping them for the agent after this one

pub mod keeping;
pub mod probe;
pub mod ring;

pub use probe::Probe;
pub use ring::{Sample, Usage};

use crate::agent::Agent;
use crate::context::{PeerId, TimerKey};
use std::time::{SystemTime, UNIX_EPOCH};
use wire::message::{CapsuleMetrics, CapsuleMetricsReply, Code};
use wire::session::StreamId;

/// How often a capsule is looked at, in milliseconds.
pub const SAMPLE_MS: u64 = 500;
/// The disk is looked at once or twice in so many samples: it changes slowly, and asking may be a call into the
/// device-mapper.
const SAMPLES_PER_DISK: u64 = 10;
/// The longest range that is told, in seconds.
const MAX_RANGE_SEC: u32 = 86_400;

impl Agent {
    /// Takes a sample of every capsule that runs, and looks after those that stand still.
    pub(crate) fn sample_usage(&mut self) {
        let now_ms = self.ctx.now_ms();
        self.ctx.timers.set(TimerKey::Sample, now_ms + SAMPLE_MS);
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let unix_ms = u64::try_from(unix_ms).unwrap_or(u64::MAX);
        // At least once in each period, though samples are a little more than their distance apart.
        let with_disk = now_ms % (SAMPLE_MS * SAMPLES_PER_DISK) < 2 * SAMPLE_MS;
        for capsule in self.capsules.values_mut() {
            capsule.sample_usage(unix_ms, with_disk);
            capsule.go_on_if_room();
        }
        self.keep_some_usage();
    }

    /// Answers what a capsule has used.
    pub(crate) fn on_metrics(&mut self, waiter: (PeerId, StreamId), request: &CapsuleMetrics) {
        let Some(key) = self.find(waiter, &request.capsule_id) else { return };
        if !(1..=MAX_RANGE_SEC).contains(&request.range_sec) {
            let text = format!("range_sec is {}, but may be 1 to {MAX_RANGE_SEC}", request.range_sec);
            self.answer_error(waiter, Code::InvalidRequest, text);
            return;
        }
        let Some(capsule) = self.capsules.get(&key) else { return };
        let mut reply = CapsuleMetricsReply::default();
        for (unix_ms, sample) in capsule.usage.last(request.range_sec) {
            reply.times.push(unix_ms / 1000);
            reply.cpu.push(u32::from(sample.cpu));
            reply.memory.push(sample.memory());
            reply.disk.push(sample.disk());
        }
        self.answer(waiter, &reply);
    }
}
