//! Clocks and randomness.

use super::syscall::{Errno, syscall, uninterrupted};

fn read_clock(clock: i32) -> libc::timespec {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct lives for the call, which cannot fail for these clocks.
    let _ = unsafe { syscall!(libc::SYS_clock_gettime, clock, &raw mut now) };
    now
}

/// Milliseconds of the monotonic clock.
pub fn monotonic_ms() -> u64 {
    let now = read_clock(libc::CLOCK_MONOTONIC);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// Microseconds of the wall clock since the epoch.
pub fn wall_us() -> u64 {
    let now = read_clock(libc::CLOCK_REALTIME);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// Sets the wall clock, in microseconds since the epoch.
pub fn set_wall_us(time_us: u64) -> Result<(), Errno> {
    let time =
        libc::timespec { tv_sec: (time_us / 1_000_000) as i64, tv_nsec: (time_us % 1_000_000 * 1000) as i64 };
    // SAFETY: the struct lives for the call.
    unsafe { syscall!(libc::SYS_clock_settime, libc::CLOCK_REALTIME, &raw const time) }?;
    Ok(())
}

/// Waits.
pub fn sleep_us(us: u64) {
    let time = libc::timespec { tv_sec: (us / 1_000_000) as i64, tv_nsec: (us % 1_000_000 * 1000) as i64 };
    // SAFETY: the struct lives for the call. Waking early does no harm to the callers.
    let _ = unsafe { syscall!(libc::SYS_nanosleep, &raw const time, 0usize) };
}

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` (include/uapi/linux/random.h).
const RNDADDENTROPY: u32 = 0x4008_5203;
const RNDRESEEDCRNG: u32 = 0x5207;

/// Mixes at most 512 random bytes from a trusted source into the kernel's pool, and makes it use them at
/// once.
pub fn add_randomness(bytes: &[u8]) -> Result<(), Errno> {
    /// `struct rand_pool_info`.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: i32,
        buf_size: i32,
        buf: [u8; 512],
    }
    let mut info =
        PoolInfo { entropy_count: bytes.len() as i32 * 8, buf_size: bytes.len() as i32, buf: [0; 512] };
    info.buf.get_mut(..bytes.len()).ok_or(Errno(libc::EINVAL))?.copy_from_slice(bytes);
    let device = super::file::open(super::file::CURRENT, c"/dev/urandom", libc::O_RDWR, 0)?;
    // SAFETY: the struct lives for the call, and says how much of its buffer is filled.
    unsafe {
        syscall!(libc::SYS_ioctl, device.raw(), RNDADDENTROPY, &raw const info)?;
        syscall!(libc::SYS_ioctl, device.raw(), RNDRESEEDCRNG, 0usize)?;
    }
    Ok(())
}

/// Fills a buffer of at most 256 bytes with random bytes. `EAGAIN` while the kernel has none yet.
pub fn random(buffer: &mut [u8]) -> Result<(), Errno> {
    assert!(buffer.len() <= 256, "longer requests may come back short");
    // SAFETY: the buffer is writable for its length.
    let n = uninterrupted(|| unsafe {
        syscall!(libc::SYS_getrandom, buffer.as_mut_ptr(), buffer.len(), libc::GRND_NONBLOCK)
    })?;
    if n == buffer.len() { Ok(()) } else { Err(Errno(libc::EAGAIN)) }
}
