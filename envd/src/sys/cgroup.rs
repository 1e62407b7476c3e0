//! One control group for everything that is started here (cgroups(7), version 2), so that a fork bomb or a
//! process that eats all memory does not take envd with it.

use super::fd::Fd;
use super::file;
use super::syscall::Errno;
use alloc::format;
use alloc::string::String;
use core::ffi::CStr;

/// Where version 2 is mounted.
const ROOT: &CStr = c"/sys/fs/cgroup/cgroup.subtree_control";
const GROUP: &CStr = c"/sys/fs/cgroup/wrenn";
/// Tasks of the kernel's limit that are kept for envd and the system.
const RESERVED_TASKS: u64 = 64;

/// Makes the group, and gives the descriptor that processes are started into. `None` where there is no
/// cgroup file system or it may not be changed: processes then share envd's group.
pub fn make() -> Option<Fd> {
    file::write_existing(ROOT, b"+pids").ok()?;
    match file::make_directory(file::CURRENT, GROUP, 0o755) {
        Ok(()) | Err(Errno(libc::EEXIST)) => {}
        Err(_) => return None,
    }
    let limit = |path: &CStr| -> Option<u64> {
        let text = String::from_utf8(file::read_file(path, 32).ok()?).ok()?;
        text.trim().parse().ok()
    };
    let all = limit(c"/proc/sys/kernel/threads-max")?.min(limit(c"/proc/sys/kernel/pid_max")?);
    let most = format!("{}", all.saturating_sub(RESERVED_TASKS).max(RESERVED_TASKS));
    file::write_existing(c"/sys/fs/cgroup/wrenn/pids.max", most.as_bytes()).ok()?;
    file::open(file::CURRENT, GROUP, libc::O_RDONLY | libc::O_DIRECTORY, 0).ok()
}
