//! Clocks: the machine's, and the processor time of other processes.

use std::io;

/// Since the machine started, in nanoseconds.
pub fn monotonic_ns() -> io::Result<u64> {
    read(libc::CLOCK_MONOTONIC)
}

/// How long ago a process started, in milliseconds, by its start time in /proc/PID/stat (proc(5)): in clock
/// ticks since the machine booted, time asleep included.
pub fn age_ms(start_ticks: u64) -> io::Result<u64> {
    // SAFETY: sysconf takes a number and touches nothing of ours.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    let started_ms = start_ticks.saturating_mul(1000) / per_second;
    Ok((read(libc::CLOCK_BOOTTIME)? / 1_000_000).saturating_sub(started_ms))
}

/// The processor time of all threads of a process, in nanoseconds.
pub fn process_ns(pid: u32) -> io::Result<u64> {
    // linux/posix-timers.h: the clock of a process is its inverted number above three bits, of which 2 says
    // that it counts what the scheduler has given. clock_getcpuclockid(3) does the same.
    let inverted = !i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    read((inverted << 3) | 2)
}

fn read(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to `time`, which is writable and outlives the call.
    super::check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Ok(seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0)))
}

/// The size of a page, in bytes.
pub fn page_bytes() -> u64 {
    // SAFETY: sysconf takes a number and touches nothing of ours.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pidfd::Process;

    #[test]
    fn a_process_is_as_old_as_the_kernel_says() {
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let started = Process::child(sleeper.id()).expect("there").start_ticks();
        let now = age_ms(started).expect("a clock");
        // The kernel counts in hundredths of a second.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let later = age_ms(started).expect("a clock");
        assert!(later >= now + 20 && later < now + 60_000, "{now} {later}");
        assert!(age_ms(0).expect("a clock") > later, "as old as the machine");
        assert_eq!(age_ms(u64::MAX).expect("a clock"), 0);
        sleeper.kill().and_then(|()| sleeper.wait()).expect("ended");
    }
}
