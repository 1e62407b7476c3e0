//! Starting a process: fork, new session, credentials, descriptors, exec.
//!
//! The child reports the step that failed through a pipe that exec closes, so the parent learns of a
//! success by the pipe's end, without waiting for it.

use super::fd::{Fd, pipe, restore_limit, write_raw};
use super::signal;
use super::syscall::{Errno, syscall};
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::{CStr, c_char};

/// What to start, in the form that needs no memory between fork and exec.
#[derive(Debug)]
pub struct Plan {
    /// Paths to try, in order.
    pub candidates: Vec<CString>,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// Environment, `NAME=value` each.
    pub environment: Vec<CString>,
    /// Working directory.
    pub cwd: CString,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// Whether descriptor 0 is a terminal that becomes the controlling one.
    pub terminal: bool,
    /// Whether to change user and groups: false only where envd itself does not run as root.
    pub switch_user: bool,
}

/// The child's step that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Session, terminal or descriptors.
    Setup,
    /// User or groups.
    Credentials,
    /// The working directory.
    Directory,
    /// The program.
    Exec,
}

/// What the child writes before it gives up: its step and the errno.
const REPORT_LEN: usize = 5;
/// The exit code of a child that gave up, as shells have it.
const CHILD_FAILED: i32 = 127;

/// The parent's side of a start.
#[derive(Debug)]
pub struct Started {
    /// The child's process id, which is also its session and process group.
    pub pid: u32,
    /// Ends when the program runs; see [`read_report`].
    pub report: Fd,
}

/// The flag that makes use of `cgroup` (include/uapi/linux/sched.h).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` up to the control group (include/uapi/linux/sched.h).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The control group that a process is started in.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Its directory.
    pub group: &'a Fd,
    /// Whether it bounds tasks, so that the kernel's bound for each account is not needed.
    pub counts_tasks: bool,
}

/// Forks, into a control group where one is given. When the group is full the child is made outside of it:
/// it may be what is needed to clean up.
///
/// # Safety
/// The child runs on a copy of the caller's stack and memory; it must make system calls only.
unsafe fn fork(place: Option<Place<'_>>) -> Result<usize, Errno> {
    if let Some(Place { group, .. }) = place {
        let arguments = CloneArguments {
            flags: CLONE_INTO_CGROUP,
            exit_signal: libc::SIGCHLD as u64,
            cgroup: group.raw() as u64,
            ..CloneArguments::default()
        };
        // SAFETY: the struct lives for the call, which takes its length; without a stack of its own the
        // child is a fork. The caller answers for what the child does.
        let result = unsafe { syscall!(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>()) };
        if result.is_ok() {
            return result;
        }
    }
    // SAFETY: as above.
    unsafe { syscall!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }
}

/// What the kernel adds to a process's share of the memory, in thousandths, when it looks for what to kill.
const OOM_SCORE: &[u8] = b"500";

/// Lifts the bound on an account's processes: an account that had reached it could start nothing more, not
/// even what ends the others.
fn lift_task_limit() {
    let none = libc::rlimit64 { rlim_cur: libc::RLIM64_INFINITY, rlim_max: libc::RLIM64_INFINITY };
    // SAFETY: the struct lives for the call. Where it may not be lifted, it holds.
    let _ = unsafe { syscall!(libc::SYS_prlimit64, 0, libc::RLIMIT_NPROC, &raw const none, 0usize) };
}

/// Starts a process with the three descriptors as its standard ones, in a control group where one is given.
pub fn spawn(plan: &Plan, stdio: [&Fd; 3], place: Option<Place<'_>>) -> Result<Started, Errno> {
    let argv = pointers(&plan.argv);
    let environment = pointers(&plan.environment);
    // For a script without an interpreter line: `/bin/sh`, the script, its arguments.
    let mut shell_argv: Vec<*const c_char> = Vec::with_capacity(argv.len() + 1);
    shell_argv.push(c"/bin/sh".as_ptr());
    shell_argv.extend_from_slice(&argv);
    let (report, child_report) = pipe(libc::O_NONBLOCK)?;
    let numbers = [stdio[0].raw(), stdio[1].raw(), stdio[2].raw()];
    // SAFETY: all signals are blocked in parent and child. The child makes system calls only, on memory
    // that was prepared here, and never returns.
    let pid = unsafe { fork(place) }?;
    if pid == 0 {
        if place.is_some_and(|p| p.counts_tasks) {
            lift_task_limit();
        }
        let (step, errno) = child(plan, &argv, &environment, &mut shell_argv, numbers);
        let code = errno.0.to_ne_bytes();
        let _ = write_raw(child_report.raw(), &[step as u8, code[0], code[1], code[2], code[3]]);
        super::boot::exit(CHILD_FAILED);
    }
    Ok(Started { pid: pid as u32, report })
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain(core::iter::once(core::ptr::null())).collect()
}

/// Everything between fork and exec. Returns only when a step failed.
fn child(
    plan: &Plan,
    argv: &[*const c_char],
    environment: &[*const c_char],
    shell_argv: &mut [*const c_char],
    stdio: [i32; 3],
) -> (Step, Errno) {
    if let Err(e) = setup(plan, stdio) {
        return (Step::Setup, e);
    }
    if plan.switch_user
        && let Err(e) = become_user(plan.uid, plan.gid, &plan.groups)
    {
        return (Step::Credentials, e);
    }
    // SAFETY: the path is NUL-terminated.
    if let Err(e) = unsafe { syscall!(libc::SYS_chdir, plan.cwd.as_ptr()) } {
        return (Step::Directory, e);
    }
    (Step::Exec, exec(plan, argv, environment, shell_argv))
}

fn setup(plan: &Plan, stdio: [i32; 3]) -> Result<(), Errno> {
    // SAFETY: integer arguments and NUL-terminated paths. The descriptors are above 2, see
    // `fd::sanitize_inherited`, so none is overwritten before it is copied.
    unsafe {
        syscall!(libc::SYS_setsid)?;
        for (target, source) in stdio.iter().enumerate() {
            syscall!(libc::SYS_dup3, *source, target, 0)?;
        }
        if plan.terminal {
            syscall!(libc::SYS_ioctl, 0, libc::TIOCSCTTY, 0)?;
        }
        syscall!(libc::SYS_umask, 0o022)?;
        // envd and the system's own are the last that the kernel should take memory from.
        if let Ok(fd) = syscall!(
            libc::SYS_open,
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
            0
        ) {
            let _ = write_raw(fd as i32, OOM_SCORE);
            let _ = syscall!(libc::SYS_close, fd);
        }
    }
    restore_limit();
    signal::unblock_all();
    Ok(())
}

/// Gives up root for good.
fn become_user(uid: u32, gid: u32, groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: the list is readable for its length; integer arguments otherwise.
    unsafe {
        syscall!(libc::SYS_setgroups, groups.len(), groups.as_ptr())?;
        syscall!(libc::SYS_setresgid, gid, gid, gid)?;
        syscall!(libc::SYS_setresuid, uid, uid, uid)?;
    }
    Ok(())
}

/// Tries every candidate. What a person should hear of is a program that is there but may not be run.
fn exec(
    plan: &Plan,
    argv: &[*const c_char],
    environment: &[*const c_char],
    shell_argv: &mut [*const c_char],
) -> Errno {
    let mut worst = Errno(libc::ENOENT);
    for path in &plan.candidates {
        let error = exec_one(path, argv, environment);
        match error.0 {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => worst = error,
            libc::ENOEXEC => {
                if let Some(script) = shell_argv.get_mut(1) {
                    *script = path.as_ptr();
                }
                return exec_one(c"/bin/sh", shell_argv, environment);
            }
            _ => return error,
        }
    }
    worst
}

fn exec_one(path: &CStr, argv: &[*const c_char], environment: &[*const c_char]) -> Errno {
    // SAFETY: the path is NUL-terminated; both lists end in a null pointer and point to NUL-terminated
    // strings that live until exec replaces the process.
    match unsafe { syscall!(libc::SYS_execve, path.as_ptr(), argv.as_ptr(), environment.as_ptr()) } {
        Ok(_) => Errno(libc::EIO),
        Err(e) => e,
    }
}

/// Replaces this process. Returns only when that failed.
pub fn replace(path: &CStr, argv: &[CString], environment: &[CString]) -> Errno {
    signal::unblock_all();
    exec_one(path, &pointers(argv), &pointers(environment))
}

/// Reads the report pipe once it is readable. `Ok` when the program runs.
pub fn read_report(report: &Fd) -> Result<(), (Step, Errno)> {
    let mut bytes = [0; REPORT_LEN];
    match report.read(&mut bytes) {
        Ok(REPORT_LEN) => {
            let errno = i32::from_ne_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
            let step = match bytes[0] {
                0 => Step::Setup,
                1 => Step::Credentials,
                2 => Step::Directory,
                _ => Step::Exec,
            };
            Err((step, Errno(errno)))
        }
        // The end: exec closed the child's copy. A pipe write this short is never split.
        Ok(_) => Ok(()),
        Err(e) => Err((Step::Setup, e)),
    }
}
