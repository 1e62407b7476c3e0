//! One VMM's processor time and memory.

use super::ring::{FULL_CPU, Sample};
use crate::sys::clock;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// /proc/PID/statm is seven numbers.
const STATM_BYTES: usize = 160;

/// Reads one process' figures. The process must not have been reaped: its number could be another's.
#[derive(Debug)]
pub struct Probe {
    pid: u32,
    vcpus: u32,
    statm: File,
    /// Its processor time and the time by the clock when that was read, in nanoseconds.
    before: (u64, u64),
    /// Its resident memory when it was last looked at, and how much of that is shared or a file's, in bytes.
    resident: (u64, u64),
}

impl Probe {
    /// A probe of the VMM `pid`, whose guest has `vcpus` virtual CPUs.
    ///
    /// # Errors
    /// There is no such process.
    pub fn new(pid: u32, vcpus: u32) -> io::Result<Probe> {
        let statm = File::open(format!("/proc/{pid}/statm"))?;
        let before = (clock::process_ns(pid)?, clock::monotonic_ns()?);
        Ok(Probe { pid, vcpus, statm, before, resident: (0, 0) })
    }

    /// Memory that it has taken of the host, in bytes, as of the last sample. Of a guest whose memory is
    /// mapped privately from a file (`is_private`), what it has only read is the page cache's.
    pub fn touched_bytes(&self, is_private: bool) -> u64 {
        let (resident, shared) = self.resident;
        if is_private { resident.saturating_sub(shared) } else { resident }
    }

    /// The process that it reads.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What was used since the last call. `disk` is passed on.
    ///
    /// # Errors
    /// The process has ended.
    pub fn sample(&mut self, disk: u64) -> io::Result<Sample> {
        let now = (clock::process_ns(self.pid)?, clock::monotonic_ns()?);
        let (used, passed) = (now.0.saturating_sub(self.before.0), now.1.saturating_sub(self.before.1));
        self.before = now;
        let mut buffer = [0; STATM_BYTES];
        let length = self.statm.read_at(&mut buffer, 0)?;
        self.resident = resident_bytes(&buffer[..length])
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "statm has no resident size"))?;
        Ok(Sample::new(share(used, passed, self.vcpus), self.resident.0, disk))
    }
}

/// Hundredths of a percent of `vcpus` processors that `used` of `passed` nanoseconds are.
fn share(used: u64, passed: u64, vcpus: u32) -> u64 {
    let whole = u128::from(passed) * u128::from(vcpus);
    let share = (u128::from(used) * u128::from(FULL_CPU)).checked_div(whole).unwrap_or(0);
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// The second and third number of proc(5)'s statm, which are in pages: all resident memory, and what of it
/// is shared or a file's.
fn resident_bytes(statm: &[u8]) -> Option<(u64, u64)> {
    let mut numbers = std::str::from_utf8(statm).ok()?.split_ascii_whitespace().skip(1);
    let mut next = || numbers.next()?.parse::<u64>().ok()?.checked_mul(clock::page_bytes());
    Some((next()?, next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_all_virtual_cpus() {
        assert_eq!(share(500, 1000, 1), 5_000);
        assert_eq!(share(500, 1000, 2), 2_500);
        assert_eq!(share(5, 0, 1), 0);
        assert_eq!(share(u64::MAX, 1, 1), u64::MAX);
    }

    #[test]
    fn statm_is_in_pages() {
        let page = clock::page_bytes();
        assert_eq!(resident_bytes(b"100 25 3 4 0 6 0\n"), Some((25 * page, 3 * page)));
        for bad in [&b""[..], b"100", b"100 25", b"100 x 1", b"\xff \xff", b"1 99999999999999999999"] {
            assert_eq!(resident_bytes(bad), None);
        }
    }

    #[test]
    fn this_process_is_seen_to_work() {
        let mut probe = Probe::new(std::process::id(), 1).expect("a process");
        let end = clock::monotonic_ns().expect("a clock") + 30_000_000;
        while clock::monotonic_ns().expect("a clock") < end {}
        let sample = probe.sample(7).expect("a sample");
        assert!(sample.cpu > 0, "{sample:?}");
        assert!(sample.memory() > 1 << 20 && sample.disk() == 1024, "{sample:?}");
        assert_eq!(probe.touched_bytes(false), sample.memory());
        assert!((1..sample.memory()).contains(&probe.touched_bytes(true)));
        assert!(Probe::new(u32::MAX >> 4, 1).is_err());
    }
}
