//! Starting a program with nothing of this process but what it is given: session, namespace, user, groups,
//! descriptors and limits are settled between fork(2) and execve(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Most supplementary groups that [`spawn`] sets.
const MAX_GROUPS: usize = 4;

/// The nice value of what runs in the background, setpriority(2).
const LOWEST_PRIORITY: libc::c_int = 19;
/// linux/ioprio.h: this process, and class 3 (idle) above 13 bits of a level that it has not.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// A user to run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User id, real, effective and saved.
    pub uid: u32,
    /// Group id, real, effective and saved.
    pub gid: u32,
}

/// What the new process gets and what it does not.
#[derive(Debug, Default)]
pub struct Confinement<'a> {
    /// The network namespace to run in; ours when there is none.
    pub namespace: Option<BorrowedFd<'a>>,
    /// The `cgroup.procs` of the control group that it is in before it runs; ours when there is none.
    pub group: Option<BorrowedFd<'a>>,
    /// The user to run as; ours when there is none. With it come exactly `groups`.
    pub identity: Option<Identity>,
    /// Supplementary groups, at most four, looked at only with an `identity`.
    pub groups: &'a [u32],
    /// Descriptors that it keeps under the same numbers. All others but 0, 1 and 2 are closed.
    pub inherit: &'a [BorrowedFd<'a>],
    /// Whether it ends with the thread that starts it.
    pub ends_with_us: bool,
    /// Whether processors and disks are for everybody else first.
    pub in_background: bool,
    /// Whether it gets memory by small pages only, even where it asks for huge ones.
    pub small_pages: bool,
}

/// Starts `command`, confined, in a session of its own, without core dumps (they would hold a guest's
/// memory) and without a way to gain privileges. It outlives this process unless it is told to end with it.
pub fn spawn(command: &mut Command, confinement: &Confinement<'_>) -> io::Result<Child> {
    if confinement.groups.len() > MAX_GROUPS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut groups = [0; MAX_GROUPS];
    groups[..confinement.groups.len()].copy_from_slice(confinement.groups);
    let child = ChildSetup {
        namespace: confinement.namespace.map(|fd| fd.as_raw_fd()),
        group: confinement.group.map(|fd| fd.as_raw_fd()),
        identity: confinement.identity,
        groups,
        group_count: confinement.groups.len(),
        ends_with_us: confinement.ends_with_us,
        in_background: confinement.in_background,
        small_pages: confinement.small_pages,
        inherit: confinement.inherit.iter().map(|fd| fd.as_raw_fd()).collect(),
    };
    // SAFETY: `apply` makes system calls only and neither allocates nor takes a lock, as a hook between
    // fork and exec of a program with several threads must. The raw descriptors in it are borrowed until
    // after `spawn` has returned, so they are open when it runs.
    unsafe { command.pre_exec(move || child.apply()) };
    command.spawn()
}

struct ChildSetup {
    namespace: Option<RawFd>,
    group: Option<RawFd>,
    identity: Option<Identity>,
    groups: [libc::gid_t; MAX_GROUPS],
    group_count: usize,
    ends_with_us: bool,
    in_background: bool,
    small_pages: bool,
    inherit: Vec<RawFd>,
}

impl ChildSetup {
    fn apply(&self) -> io::Result<()> {
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: every call takes plain integers, or a pointer to a local that outlives it.
        unsafe {
            super::check(libc::setsid())?;
            libc::umask(0o077);
            super::check(libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core))?;
            if let Some(group) = self.group {
                // While it still may: 0 is the process that writes it.
                super::check(libc::write(group, c"0".as_ptr().cast(), 1) as i64)?;
            }
            if let Some(namespace) = self.namespace {
                super::check(libc::setns(namespace, libc::CLONE_NEWNET))?;
            }
            if let Some(Identity { uid, gid }) = self.identity {
                // The user last: after it there is no right left to change the groups.
                super::check(libc::setgroups(self.group_count, self.groups.as_ptr()))?;
                super::check(libc::setresgid(gid, gid, gid))?;
                super::check(libc::setresuid(uid, uid, uid))?;
            }
            super::check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            if self.ends_with_us {
                // After the user: a change of that takes it back.
                super::check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            }
            if self.in_background {
                super::check(libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST_PRIORITY))?;
                super::check(libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE))?;
            }
            if self.small_pages {
                super::check(libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0))?;
            }
            // On exec, not now: the standard library still has a pipe to tell us of a failure.
            let close_on_exec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            super::check(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, close_on_exec))?;
            for fd in &self.inherit {
                super::check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::process::Stdio;

    #[test]
    fn the_child_keeps_only_what_it_is_given() -> io::Result<()> {
        let (kept, dropped) = (File::open("/dev/null")?, File::open("/dev/null")?);
        let mut command = Command::new("/bin/sh");
        command.env_clear().args(["-c", "ls /proc/$$/fd; cut -d' ' -f6 /proc/$$/stat; echo $$; ulimit -c"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let inherit = [kept.as_fd()];
        let child = spawn(&mut command, &Confinement { inherit: &inherit, ..Confinement::default() })?;
        let output = String::from_utf8_lossy(&child.wait_with_output()?.stdout).into_owned();
        let lines: Vec<&str> = output.lines().collect();
        assert!(lines.contains(&kept.as_raw_fd().to_string().as_str()), "{lines:?}");
        assert!(!lines.contains(&dropped.as_raw_fd().to_string().as_str()), "{lines:?}");
        let [.., session, pid, core] = lines[..] else { return Err(io::ErrorKind::InvalidData.into()) };
        assert_eq!(session, pid);
        assert_eq!(core, "0");
        Ok(())
    }

    #[test]
    fn a_program_gets_small_pages_where_that_is_wanted() -> io::Result<()> {
        for (small_pages, expected) in [(true, "THP_enabled:\t0"), (false, "THP_enabled:\t1")] {
            let mut command = Command::new("/bin/cat");
            command.arg("/proc/self/status").stdin(Stdio::null()).stdout(Stdio::piped());
            let child = spawn(&mut command, &Confinement { small_pages, ..Confinement::default() })?;
            let output = String::from_utf8_lossy(&child.wait_with_output()?.stdout).into_owned();
            // Kernels without huge pages have no such line.
            let told = output.lines().find(|line| line.starts_with("THP_enabled:"));
            assert!(told.is_none_or(|line| line == expected), "{told:?} in place of {expected}");
        }
        Ok(())
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_of_spawn() {
        let spawned = spawn(&mut Command::new("/nonexistent/program"), &Confinement::default());
        assert_eq!(spawned.map(|_| ()).map_err(|e| e.kind()), Err(io::ErrorKind::NotFound));
    }
}
