//! The processor's time stamp counter.

use std::io;

/// How long one measurement takes, in nanoseconds: long enough that the two readings' own time does not
/// matter.
const INTERVAL_NS: u64 = 10_000_000;
/// Measurements, of which the least disturbed counts.
const ATTEMPTS: u32 = 3;

/// Ticks of the time stamp counter in a millisecond, measured; `None` where there is no such counter. Takes
/// thirty milliseconds.
pub fn frequency_khz() -> io::Result<Option<u64>> {
    let mut best: Option<(u64, u64)> = None;
    for _ in 0..ATTEMPTS {
        let Some((start, start_error)) = reading()? else { return Ok(None) };
        std::thread::sleep(std::time::Duration::from_nanos(INTERVAL_NS));
        let Some((end, end_error)) = reading()? else { return Ok(None) };
        let elapsed_ns = end.ns.saturating_sub(start.ns).max(1);
        let ticks = end.ticks.saturating_sub(start.ticks);
        let khz = (u128::from(ticks) * 1_000_000 / u128::from(elapsed_ns)) as u64;
        let error = start_error + end_error;
        if best.is_none_or(|(least, _)| error < least) {
            best = Some((error, khz));
        }
    }
    Ok(best.map(|(_, khz)| khz).filter(|khz| *khz > 0))
}

struct Reading {
    ns: u64,
    ticks: u64,
}

/// Both clocks at the same time, and how many ticks apart the same time is.
#[cfg(target_arch = "x86_64")]
fn reading() -> io::Result<Option<(Reading, u64)>> {
    // SAFETY: RDTSC is part of every x86-64 processor and Linux lets every program use it.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let before = ticks();
    // SAFETY: clock_gettime writes one timespec, which `now` is.
    super::check(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) })?;
    let apart = ticks().saturating_sub(before);
    let ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    Ok(Some((Reading { ns, ticks: before + apart / 2 }, apart)))
}

#[cfg(not(target_arch = "x86_64"))]
fn reading() -> io::Result<Option<(Reading, u64)>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn two_measurements_agree() -> std::io::Result<()> {
        let (Some(a), Some(b)) = (super::frequency_khz()?, super::frequency_khz()?) else {
            panic!("no counter");
        };
        assert!((100_000..20_000_000).contains(&a), "{a} kHz");
        assert!(a.abs_diff(b) * 500 < a, "{a} and {b} kHz");
        Ok(())
    }
}
