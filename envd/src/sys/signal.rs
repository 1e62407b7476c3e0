//! Signals, and children that have ended.

use super::fd::Fd;
use super::syscall::{Errno, syscall};

/// The kernel's signal set: signal n is bit n-1.
type SignalSet = u64;
/// Highest signal number.
pub const MAX_SIGNAL: u32 = 64;
const SET_BYTES: usize = 8;

/// `struct sigaction` as the kernel has it on x86-64 (arch/x86/include/uapi/asm/signal.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct KernelSigaction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: SignalSet,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code; 0 when a signal ended it.
    pub code: u32,
    /// Signal; 0 when it exited.
    pub signal: u32,
}

fn set_mask(set: SignalSet) -> Result<(), Errno> {
    // SAFETY: the set lives for the call.
    unsafe { syscall!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const set, 0usize, SET_BYTES) }?;
    Ok(())
}

/// Blocks every signal and gives a descriptor that is readable when a child has ended or the process is
/// asked to end. Signals are never ignored: a child inherits that, while a mask is easily reset.
pub fn block_all() -> Result<Fd, Errno> {
    set_mask(SignalSet::MAX)?;
    for signal in 1..=MAX_SIGNAL {
        let mut old = KernelSigaction::default();
        let default = KernelSigaction::default();
        // SAFETY: both structs live for the calls; a default action refers to no code.
        unsafe {
            if syscall!(libc::SYS_rt_sigaction, signal, 0usize, &raw mut old, SET_BYTES).is_ok()
                && old.handler == libc::SIG_IGN
            {
                let _ = syscall!(libc::SYS_rt_sigaction, signal, &raw const default, 0usize, SET_BYTES);
            }
        }
    }
    let wanted: SignalSet = bit(libc::SIGCHLD) | bit(libc::SIGTERM) | bit(libc::SIGINT);
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the set lives for the call.
    let fd = unsafe { syscall!(libc::SYS_signalfd4, -1i32, &raw const wanted, SET_BYTES, flags) }?;
    Ok(Fd::new(fd))
}

fn bit(signal: i32) -> SignalSet {
    1 << (signal - 1)
}

/// Unblocks every signal: for a child before exec.
pub(super) fn unblock_all() {
    let _ = set_mask(0);
}

/// Takes one signal from the descriptor of [`block_all`].
pub fn next(fd: &Fd) -> Option<i32> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    match fd.read(&mut info) {
        Ok(n) if n == info.len() => Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]])),
        _ => None,
    }
}

/// Sends a signal to a process group. The group must have a member that is not reaped yet.
pub fn kill_group(group: u32, signal: u32) -> Result<(), Errno> {
    assert!(group > 1, "0 and 1 would mean other groups");
    // SAFETY: integer arguments.
    unsafe { syscall!(libc::SYS_kill, -(group as i32), signal) }?;
    Ok(())
}

/// Sends a signal to a child that is not reaped yet.
pub fn send(child: u32, signal: u32) -> Result<(), Errno> {
    assert!(child > 1, "0 and 1 would mean others");
    // SAFETY: integer arguments.
    unsafe { syscall!(libc::SYS_kill, child, signal) }?;
    Ok(())
}

/// The id of a child that has ended and is not reaped yet.
pub fn ended_child() -> Option<u32> {
    // SAFETY: an all-zero siginfo_t is a valid value.
    let mut info: libc::siginfo_t = unsafe { core::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the struct lives for the call; for a child's end the kernel fills in si_pid, and leaves it 0
    // when there is none.
    let pid = unsafe {
        syscall!(libc::SYS_waitid, libc::P_ALL, 0, &raw mut info, options, 0usize).ok()?;
        info.si_pid()
    };
    (pid > 0).then_some(pid as u32)
}

/// Reaps a child that has ended.
pub fn reap(pid: u32) -> Option<Exit> {
    let mut status = 0i32;
    // SAFETY: the status lives for the call.
    let got = unsafe { syscall!(libc::SYS_wait4, pid, &raw mut status, libc::WNOHANG, 0usize) };
    (got == Ok(pid as usize)).then(|| decode_status(status))
}

/// Reads a wait status (wait(2)).
fn decode_status(status: i32) -> Exit {
    let signal = (status & 0x7f) as u32;
    let code = (status >> 8 & 0xff) as u32;
    if signal == 0 { Exit { code, signal: 0 } } else { Exit { code: 0, signal } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_are_told_exactly() {
        assert_eq!(decode_status(0x0300), Exit { code: 3, signal: 0 });
        assert_eq!(decode_status(0x0009), Exit { code: 0, signal: 9 });
        assert_eq!(decode_status(0x0086), Exit { code: 0, signal: 6 });
        assert_eq!(decode_status(0xff00), Exit { code: 255, signal: 0 });
    }
}
