//! Processes by descriptor: pidfd_open(2), pidfd_send_signal(2), waitid(2). A pidfd names one process for
//! ever, so a signal can never hit another one that was given the same number.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Status(i32),
    /// This signal ended it.
    Signal(i32),
    /// It has ended, but it was not our child (an earlier agent had started it), so nobody told us how.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Status(status) => write!(f, "exited with status {status}"),
            Exit::Signal(signal) => write!(f, "ended by signal {signal}"),
            Exit::Unknown => f.write_str("ended"),
        }
    }
}

/// A process that this agent, or an agent before it, has started.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    start_ticks: u64,
    pidfd: OwnedFd,
    exit: Option<Exit>,
}

impl Process {
    /// The child `pid`, which must not have been waited for.
    pub fn child(pid: u32) -> io::Result<Process> {
        let pidfd = open(pid)?;
        Ok(Process { pid, start_ticks: start_ticks(pid)?, pidfd, exit: None })
    }

    /// The process `pid` if it still is the one that started at `start_ticks`; NotFound when it is not.
    pub fn adopt(pid: u32, start_ticks_then: u64) -> io::Result<Process> {
        let pidfd = open(pid).map_err(not_found)?;
        // Read after the descriptor is open: from here on the number cannot go to another process unseen.
        let now = start_ticks(pid).map_err(not_found)?;
        if now != start_ticks_then {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Process { pid, start_ticks: now, pidfd, exit: None })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it started, in clock ticks since boot: with the number, an identity that lasts until reboot.
    pub fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// A descriptor that polls readable once the process has ended.
    pub fn exit_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }

    /// How it ended, or `None` while it runs. Never blocks.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            self.exit = wait(&self.pidfd, libc::WNOHANG)?;
        }
        Ok(self.exit)
    }

    /// Waits at most `timeout_ms` for its end.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<Option<Exit>> {
        let mut poll = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `poll` is one pollfd, as the count says, and outlives the call.
        super::check(unsafe { libc::poll(&raw mut poll, 1, timeout_ms) })?;
        self.try_wait()
    }

    /// Sends it SIGKILL. A process that has ended already is no error.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// Sends it a signal. A process that has ended already is no error.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        if self.exit.is_some() {
            return Ok(());
        }
        // SAFETY: the arguments go by value; a null siginfo is allowed.
        let returned = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                number,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match super::check(returned) {
            Err(e) if e.raw_os_error() != Some(libc::ESRCH) => Err(e),
            _ => Ok(()),
        }
    }
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes its arguments by value.
    let fd = super::check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn wait(pidfd: &OwnedFd, flags: libc::c_int) -> io::Result<Option<Exit>> {
    // SAFETY: an all-zero siginfo_t is a valid one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = pidfd.as_raw_fd() as libc::id_t;
    // SAFETY: waitid writes one siginfo_t, which `info` is.
    let returned = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | flags) };
    match super::check(returned) {
        Ok(_) => {}
        Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(ended(pidfd)?.then_some(Exit::Unknown)),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(None),
        Err(e) => return Err(e),
    }
    // SAFETY: waitid has filled in the fields of a child's state change, or left them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok(match (pid, info.si_code) {
        (0, _) => None,
        (_, libc::CLD_EXITED) => Some(Exit::Status(status)),
        _ => Some(Exit::Signal(status)),
    })
}

fn ended(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one pollfd, as the count says, and outlives the call.
    Ok(super::check(unsafe { libc::poll(&raw mut poll, 1, 0) })? > 0)
}

/// Field 22 of /proc/PID/stat, proc(5).
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the name in parentheses and may itself hold anything, parentheses included.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19))
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not as proc(5) has it")))
}

fn not_found(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => io::ErrorKind::NotFound.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_is_waited_for_killed_and_told_apart() -> io::Result<()> {
        let mut process = Process::child(Command::new("sleep").arg("60").spawn()?.id())?;
        assert_eq!(process.try_wait()?, None);
        let again = Process::adopt(process.pid(), process.start_ticks())?;
        assert_eq!(again.pid(), process.pid());
        let other = Process::adopt(process.pid(), process.start_ticks() + 1);
        assert_eq!(other.map(|p| p.pid()).map_err(|e| e.kind()), Err(io::ErrorKind::NotFound));
        process.kill()?;
        assert_eq!(process.wait(5_000)?, Some(Exit::Signal(libc::SIGKILL)));
        assert_eq!(process.try_wait()?, Some(Exit::Signal(libc::SIGKILL)));
        process.kill()?;
        Ok(())
    }

    #[test]
    fn an_exit_status_is_reported() -> io::Result<()> {
        let mut process = Process::child(Command::new("sh").args(["-c", "exit 7"]).spawn()?.id())?;
        assert_eq!(process.wait(5_000)?, Some(Exit::Status(7)));
        Ok(())
    }

    #[test]
    fn a_process_that_is_not_our_child_still_ends() -> io::Result<()> {
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 0.3 & echo $!"]);
        let output = shell.stdout(std::process::Stdio::piped()).spawn()?;
        let mut line = String::new();
        use std::io::BufRead;
        let stdout = output.stdout.ok_or(io::ErrorKind::NotFound)?;
        io::BufReader::new(stdout).read_line(&mut line)?;
        let pid = line.trim().parse().map_err(io::Error::other)?;
        let mut process = Process::adopt(pid, start_ticks(pid)?)?;
        assert_eq!(process.wait(5_000)?, Some(Exit::Unknown));
        Ok(())
    }
}
