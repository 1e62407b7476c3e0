//! Rings of samples: the newest of each, at a fixed distance.

mod form;

pub use form::{FormError, MAX_BYTES};

use std::collections::VecDeque;

/// The whole of a capsule's virtual CPUs.
pub const FULL_CPU: u16 = 10_000;
const KIB: u64 = 1024;
/// 2020-01-01 in milliseconds since the Unix epoch: from there 32 bits count half seconds until 2088.
const EPOCH_MS: u64 = 1_577_836_800_000;

/// What a capsule used at one point in time, or on average up to it. Twelve bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sample {
    /// Hundredths of a percent of all its virtual CPUs, 0 to [`FULL_CPU`].
    pub cpu: u16,
    memory_kib: u32,
    disk_kib: u32,
}

impl Sample {
    /// A sample of `cpu` hundredths of a percent and of bytes of memory and disk, which are kept to the
    /// KiB.
    pub fn new(cpu: u64, memory: u64, disk: u64) -> Sample {
        Sample {
            cpu: u16::try_from(cpu).map_or(FULL_CPU, |cpu| cpu.min(FULL_CPU)),
            memory_kib: u32::try_from(memory.div_ceil(KIB)).unwrap_or(u32::MAX),
            disk_kib: u32::try_from(disk.div_ceil(KIB)).unwrap_or(u32::MAX),
        }
    }

    /// Resident memory in bytes.
    pub fn memory(self) -> u64 {
        u64::from(self.memory_kib) * KIB
    }

    /// Allocated space of the disk in bytes.
    pub fn disk(self) -> u64 {
        u64::from(self.disk_kib) * KIB
    }
}

/// How far back a ring goes and how far apart its samples are.
#[derive(Debug, Clone, Copy)]
struct Tier {
    step_ms: u64,
    length: usize,
}

impl Tier {
    const fn range_sec(self) -> u64 {
        self.step_ms * self.length as u64 / 1000
    }
}

/// 10 minutes of samples, 2 hours of averages of 30 s, 24 hours of averages of 5 minutes.
const TIERS: [Tier; 3] = [
    Tier { step_ms: super::SAMPLE_MS, length: 1200 },
    Tier { step_ms: 30_000, length: 240 },
    Tier { step_ms: 300_000, length: 288 },
];

/// The samples of one tier, the oldest first, and the sum of those whose average comes next.
#[derive(Debug, Clone, Default)]
struct Ring {
    /// With the time that each belongs to, in steps since [`EPOCH_MS`]. There are gaps where the
    /// capsule did not run.
    samples: VecDeque<(u32, Sample)>,
    step: u32,
    count: u64,
    cpu: u64,
    memory_kib: u64,
    disk_kib: u64,
}

impl Ring {
    fn push(&mut self, tier: Tier, unix_ms: u64, sample: Sample) {
        let step = u32::try_from(unix_ms.saturating_sub(EPOCH_MS) / tier.step_ms).unwrap_or(u32::MAX);
        if step != self.step {
            self.close(tier);
            self.step = step;
        }
        self.count += 1;
        self.cpu += u64::from(sample.cpu);
        self.memory_kib += u64::from(sample.memory_kib);
        self.disk_kib += u64::from(sample.disk_kib);
    }

    /// The step is over: its average goes into the ring.
    fn close(&mut self, tier: Tier) {
        if self.count == 0 {
            return;
        }
        let mean = |sum: u64| (sum / self.count) as u32;
        let sample = Sample {
            cpu: mean(self.cpu) as u16,
            memory_kib: mean(self.memory_kib),
            disk_kib: mean(self.disk_kib),
        };
        if self.samples.len() >= tier.length {
            self.samples.pop_front();
        }
        self.samples.push_back((self.step, sample));
        (self.count, self.cpu, self.memory_kib, self.disk_kib) = (0, 0, 0, 0);
    }
}

/// What one capsule used in the last day.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    rings: [Ring; TIERS.len()],
    /// There is something that was not kept yet.
    changed: bool,
}

impl Usage {
    /// Takes a sample, at milliseconds since the epoch.
    pub fn push(&mut self, unix_ms: u64, sample: Sample) {
        self.changed = true;
        for (ring, tier) in self.rings.iter_mut().zip(TIERS) {
            ring.push(tier, unix_ms, sample);
        }
    }

    /// Whether there is something that was not [taken](Usage::take_changed) yet, to be kept.
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    /// What was taken could not be kept.
    pub fn set_changed(&mut self) {
        self.changed = true;
    }

    /// All of it as it is now, to be kept.
    pub fn take_changed(&mut self) -> Usage {
        self.changed = false;
        self.clone()
    }

    /// The samples of the last `range_sec` seconds before the newest, the oldest first, from the finest
    /// ring that goes back so far. Each comes with the end of its step in milliseconds since the epoch.
    pub fn last(&self, range_sec: u32) -> impl Iterator<Item = (u64, Sample)> {
        let range_sec = u64::from(range_sec);
        let index = TIERS.iter().position(|t| t.range_sec() >= range_sec).unwrap_or(TIERS.len() - 1);
        let (ring, tier) = (&self.rings[index], TIERS[index]);
        let steps = u32::try_from((range_sec * 1000).div_ceil(tier.step_ms)).unwrap_or(u32::MAX);
        let oldest = self.rings[index].step.saturating_sub(steps);
        let samples = ring.samples.iter().filter(move |(step, _)| *step >= oldest);
        samples.map(move |(step, sample)| (EPOCH_MS + (u64::from(*step) + 1) * tier.step_ms, *sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: u64 = 1_800_000_000_000;

    fn day_of(usage: &mut Usage, begin: u64, sample: impl Fn(u64) -> Sample) {
        for i in 0..24 * 7200 {
            usage.push(begin + i * 500, sample(i));
        }
    }

    #[test]
    fn each_range_has_the_finest_samples_that_go_back_so_far() {
        let mut usage = Usage::default();
        // More than a day: every ring has gone round.
        day_of(&mut usage, NOON, |_| Sample::new(1, 1, 1));
        day_of(&mut usage, NOON + 86_400_000, |i| Sample::new(i % 100, 4096 * i, 1024));
        for (range_sec, count, step_ms) in [
            (300, 600, 500),
            (600, 1200, 500),
            (3_600, 120, 30_000),
            (7_200, 240, 30_000),
            (21_600, 72, 300_000),
            (43_200, 144, 300_000),
            (86_400, 288, 300_000),
        ] {
            let points: Vec<_> = usage.last(range_sec).collect();
            // The step that is not over is not told.
            assert!((count - 1..=count).contains(&points.len()), "{range_sec}: {}", points.len());
            assert!(points.windows(2).all(|p| p[1].0 - p[0].0 == step_ms), "{range_sec}");
            assert!(points.iter().all(|p| p.1.disk() == 1024));
            assert!(points.last().is_some_and(|p| p.0 <= NOON + 2 * 86_400_000));
        }
        // An average of 60 samples: of 0..60 or 40..100 and so on.
        let (_, average) = usage.last(7_200).nth(7).expect("averages");
        assert!((29..70).contains(&average.cpu), "{average:?}");
    }

    #[test]
    fn a_capsule_that_did_not_run_has_a_gap() {
        let mut usage = Usage::default();
        assert_eq!(usage.last(600).count(), 0);
        usage.push(NOON, Sample::new(5, 10, 20));
        usage.push(NOON + 60_000, Sample::new(6, 10, 20));
        usage.push(NOON + 60_500, Sample::new(7, 10, 20));
        let points: Vec<_> =
            usage.last(600).map(|(at, s)| (at - NOON, s.cpu, s.memory(), s.disk())).collect();
        assert_eq!(points, [(500, 5, 1024, 1024), (60_500, 6, 1024, 1024)]);
        assert_eq!(usage.last(30).count(), 1);
    }

    #[test]
    fn samples_are_within_their_bounds() {
        let sample = Sample::new(20_000, u64::MAX, 1);
        assert_eq!((sample.cpu, sample.memory(), sample.disk()), (FULL_CPU, (1 << 42) - 1024, 1024));
        // A clock that jumps neither panics nor grows anything.
        let mut usage = Usage::default();
        for at in [u64::MAX, 0, NOON, 1, u64::MAX - 1] {
            usage.push(at, sample);
        }
        assert!(usage.last(86_400).count() <= 5);
    }

    #[test]
    fn a_capsules_rings_are_small() {
        let mut usage = Usage::default();
        day_of(&mut usage, NOON, |i| Sample::new(i % 9, i, i));
        let bytes: usize =
            usage.rings.iter().map(|r| r.samples.capacity() * size_of::<(u32, Sample)>()).sum();
        assert!(bytes <= 48 * 1024, "{bytes} bytes");
    }
}
