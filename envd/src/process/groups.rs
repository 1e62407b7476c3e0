//! A control group (cgroups(7), version 2) for each process that is started, so that it ends with all that
//! it has started, and a fork bomb or a process that eats all memory does not take envd with it.
//!
//! | group | what is in it | bounds |
//! | --- | --- | --- |
//! | `envd` | envd | memory that it keeps when it gets short, and most of the processor time |
//! | `wrenn` | everything that is started | all tasks and all memory but what the system needs |
//! | `wrenn/<n>` | one process and what it starts | most of the tasks of `wrenn`, so that others can start |
//!
//! Memory is counted for `wrenn` as a whole: a group that counts it stays in the kernel, when it is long
//! removed, for as long as a page that it was the first to read is cached.

use crate::log::log;
use crate::metrics;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file};
use alloc::collections::VecDeque;
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use core::ffi::CStr;

/// Where version 2 is mounted.
const ROOT: &CStr = c"/sys/fs/cgroup";
/// The controllers that are of use here.
const CONTROLLERS: [&str; 3] = ["pids", "memory", "cpu"];
/// Tasks of the kernel's limit that are kept for envd and the system.
const RESERVED_TASKS: u64 = 64;
/// The part of all tasks that one process's tree may not have: one in so many.
const OTHERS_SHARE: u64 = 8;
/// Memory that is kept for envd and the system: one part in so many of it, and no less than so many bytes.
const RESERVED_MEMORY_SHARE: u64 = 16;
const MIN_RESERVED_MEMORY: u64 = 16 << 20;
/// Memory of envd's that the kernel leaves alone when it gets short, in bytes.
const PROTECTED_MEMORY: u64 = 8 << 20;
/// envd's share of the processor when it is short; all processes together have 100.
const CPU_WEIGHT: u64 = 1000;
/// Groups whose process has ended and in which others run on. Of more, the oldest stays until envd starts
/// again: an empty directory.
const MAX_LEFT: usize = 4096;
/// Those that are looked at in one sweep.
const MAX_SWEPT: usize = 64;
/// Between two sweeps.
const SWEEP_MS: u64 = 1_000;
/// How many numbers are tried for a new group; those of an earlier envd's may be taken.
const MAX_TRIES: usize = 16;
/// Bytes of the kernel's tables that are looked at.
const MAX_TABLE: usize = 4096;

/// A group's number, which is its name.
pub type GroupNumber = u32;

/// The groups of everything that is started here.
#[derive(Debug, Default)]
pub struct Groups {
    /// `wrenn`; `None` where processes share envd's group.
    parent: Option<Fd>,
    /// Tasks that one tree may have; `None` where they are not counted.
    tree_tasks: Option<u64>,
    next: GroupNumber,
    left: VecDeque<GroupNumber>,
    sweep_at_ms: Option<u64>,
}

/// What a process is started into.
#[derive(Debug)]
pub struct Group {
    /// Its number.
    pub number: GroupNumber,
    /// Its directory.
    pub directory: Fd,
}

impl Groups {
    /// Makes the groups of this guest, with envd in its own. Where there is no cgroup file system, or it may
    /// not be changed, processes share envd's group, as the log says; where a controller is missing, what
    /// it bounds is not bounded.
    pub fn arrange() -> Groups {
        match Groups::try_arrange() {
            Ok(groups) => groups,
            Err((step, errno)) => {
                log!("processes have no control groups of their own: {step}: {errno}");
                Groups::default()
            }
        }
    }

    fn try_arrange() -> Result<Groups, (&'static str, Errno)> {
        let during = |step: &'static str| move |errno: Errno| (step, errno);
        let root = file::open(file::CURRENT, ROOT, libc::O_RDONLY | libc::O_DIRECTORY, 0)
            .map_err(during("open /sys/fs/cgroup"))?;
        let offered = file::read_file(c"/sys/fs/cgroup/cgroup.controllers", MAX_TABLE)
            .map_err(during("read /sys/fs/cgroup/cgroup.controllers (is it version 2?)"))?;
        let offered = String::from_utf8_lossy(&offered);
        for name in CONTROLLERS {
            let there = offered.split_ascii_whitespace().any(|offered| offered == name);
            let used = if there { use_controller(&root, name) } else { Err(Errno(libc::ENOENT)) };
            if let Err(e) = used {
                log!("control groups do not bound processes' {name}: {e}");
            }
        }
        make_directory(&root, c"envd").map_err(during("make /sys/fs/cgroup/envd"))?;
        make_directory(&root, c"wrenn").map_err(during("make /sys/fs/cgroup/wrenn"))?;
        let parent = file::open(root.raw(), c"wrenn", libc::O_RDONLY | libc::O_DIRECTORY, 0)
            .map_err(during("open /sys/fs/cgroup/wrenn"))?;
        // What of the following fails has been told of: its controller is not there.
        let _ = write(&root, c"envd/memory.min", PROTECTED_MEMORY);
        let _ = write(&root, c"envd/cpu.weight", CPU_WEIGHT);
        write(&root, c"envd/cgroup.procs", 0).map_err(during("move to /sys/fs/cgroup/envd"))?;
        let table = |path: &CStr| String::from_utf8(file::read_file(path, MAX_TABLE).ok()?).ok();
        let memory = table(c"/proc/meminfo").map_or(0, |table| metrics::memory(&table, "MemTotal"));
        if memory > 0 {
            let _ = write(&parent, c"memory.max", most_memory(memory));
        }
        let number = |path: &CStr| -> Option<u64> { table(path)?.trim().parse().ok() };
        let tasks = [c"/proc/sys/kernel/threads-max", c"/proc/sys/kernel/pid_max"].map(number);
        let tasks = most_tasks(tasks.into_iter().flatten().min().unwrap_or(u64::from(u32::MAX)));
        let counted = write(&parent, c"pids.max", tasks).is_ok();
        for name in ["pids", "cpu"] {
            let _ = use_controller(&parent, name);
        }
        let mut groups = Groups {
            tree_tasks: counted.then(|| tasks - tasks / OTHERS_SHARE),
            parent: Some(parent),
            ..Groups::default()
        };
        groups.take_over();
        Ok(groups)
    }

    /// Takes over what an envd before this one has left.
    fn take_over(&mut self) {
        let Some(parent) = &self.parent else { return };
        let mut numbers = VecDeque::new();
        // What is not found here stays: an empty directory, or processes that nobody asks for.
        let _ = file::read_directory(parent, |name| {
            if let Some(number) = crate::users::number(name.to_bytes()) {
                numbers.push_back(number);
            }
            numbers.len() < MAX_LEFT
        });
        self.next = numbers.iter().max().map_or(0, |last| last.wrapping_add(1));
        numbers.retain(|number| !remove(parent, *number));
        if !numbers.is_empty() {
            log!(
                "envd was started again: what it ran before is not listed any more and its output is lost; \
                 {} of its processes, or what they had started, run on",
                numbers.len()
            );
        }
        self.left = numbers;
        self.sweep_at_ms = (!self.left.is_empty()).then_some(0);
    }

    /// Makes a group for a process. `None` where that cannot be: it then goes without.
    pub fn make(&mut self) -> Option<Group> {
        let parent = self.parent.as_ref()?;
        for _ in 0..MAX_TRIES {
            let number = self.next;
            self.next = number.wrapping_add(1);
            match file::make_directory(parent.raw(), &path(number, ""), 0o755) {
                Ok(()) => {}
                Err(Errno(libc::EEXIST)) => continue,
                Err(_) => return None,
            }
            let flags = libc::O_RDONLY | libc::O_DIRECTORY;
            let Ok(directory) = file::open(parent.raw(), &path(number, ""), flags, 0) else {
                remove(parent, number);
                return None;
            };
            if let Some(tasks) = self.tree_tasks {
                // The bound of all holds where this one cannot be set.
                let _ = write(&directory, c"pids.max", tasks);
            }
            return Some(Group { number, directory });
        }
        None
    }

    /// Whether tasks are counted, so that no other bound on them is needed.
    pub fn count_tasks(&self) -> bool {
        self.tree_tasks.is_some()
    }

    /// Kills everything in a group, and whatever it starts meanwhile. Whether the kernel can do that.
    pub fn kill(&self, number: GroupNumber) -> bool {
        let Some(parent) = &self.parent else { return false };
        file::open(parent.raw(), &path(number, "/cgroup.kill"), libc::O_WRONLY, 0)
            .and_then(|kill| kill.write_all(b"1"))
            .is_ok()
    }

    /// A group's process has been reaped: the group goes, or is looked at again until it is empty.
    pub fn release(&mut self, number: GroupNumber, now_ms: u64) {
        let Some(parent) = &self.parent else { return };
        if remove(parent, number) {
            return;
        }
        if self.left.len() >= MAX_LEFT {
            self.left.pop_front();
        }
        self.left.push_back(number);
        self.sweep_at_ms.get_or_insert(now_ms + SWEEP_MS);
    }

    /// When [`Groups::sweep`] is due.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.sweep_at_ms
    }

    /// Removes groups that have become empty, when it is time.
    pub fn sweep(&mut self, now_ms: u64) {
        let Some(parent) = self.parent.as_ref().filter(|_| self.sweep_at_ms.is_some_and(|at| at <= now_ms))
        else {
            return;
        };
        for _ in 0..self.left.len().min(MAX_SWEPT) {
            let Some(number) = self.left.pop_front() else { break };
            if !remove(parent, number) {
                self.left.push_back(number);
            }
        }
        self.sweep_at_ms = (!self.left.is_empty()).then_some(now_ms + SWEEP_MS);
    }
}

/// Tasks that everything that is started may have together, of all that the kernel has.
fn most_tasks(all: u64) -> u64 {
    all.saturating_sub(RESERVED_TASKS).max(RESERVED_TASKS)
}

/// The same for memory, in bytes.
fn most_memory(all: u64) -> u64 {
    all.saturating_sub(MIN_RESERVED_MEMORY.max(all / RESERVED_MEMORY_SHARE)).max(all / 2)
}

fn path(number: GroupNumber, rest: &str) -> CString {
    CString::new(format!("{number}{rest}")).unwrap_or_default()
}

fn make_directory(at: &Fd, path: &CStr) -> Result<(), Errno> {
    match file::make_directory(at.raw(), path, 0o755) {
        Ok(()) | Err(Errno(libc::EEXIST)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Lets the groups beneath one be bounded by a controller.
fn use_controller(group: &Fd, name: &str) -> Result<(), Errno> {
    file::open(group.raw(), c"cgroup.subtree_control", libc::O_WRONLY, 0)?
        .write_all(format!("+{name}").as_bytes())
}

fn write(group: &Fd, path: &CStr, number: u64) -> Result<(), Errno> {
    file::open(group.raw(), path, libc::O_WRONLY, 0)?.write_all(format!("{number}").as_bytes())
}

/// Removes a group. Whether it is gone: it is not while anything runs in it.
fn remove(parent: &Fd, number: GroupNumber) -> bool {
    matches!(
        file::unlink(parent.raw(), &path(number, ""), libc::AT_REMOVEDIR),
        Ok(()) | Err(Errno(libc::ENOENT))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_keeps_its_part() {
        assert_eq!(most_tasks(1800), 1736);
        assert_eq!(most_tasks(20), 64);
        assert_eq!(most_memory(256 << 20), 240 << 20);
        assert_eq!(most_memory(1024 << 20), 960 << 20);
        assert_eq!(most_memory(24 << 20), 12 << 20);
    }

    /// Directories stand for groups: what a full one does not let go of is looked at again.
    #[test]
    fn groups_go_when_they_are_empty() {
        let place = std::env::temp_dir().join(std::format!("envd-groups-{}", std::process::id()));
        std::fs::create_dir_all(place.join("7")).expect("mkdir");
        let opened = CString::new(place.to_str().expect("utf-8")).expect("no NUL");
        let parent = file::open(file::CURRENT, &opened, libc::O_RDONLY | libc::O_DIRECTORY, 0).expect("open");
        let mut groups = Groups { parent: Some(parent), next: 7, ..Groups::default() };
        let (first, second) = (groups.make().expect("made"), groups.make().expect("made"));
        assert_eq!((first.number, second.number), (8, 9), "7 is taken");
        std::fs::create_dir(place.join("8/busy")).expect("mkdir");
        groups.release(8, 0);
        groups.release(9, 0);
        assert!(place.join("8").exists() && !place.join("9").exists());
        assert_eq!(groups.next_timeout_ms(), Some(SWEEP_MS));
        groups.sweep(SWEEP_MS);
        assert_eq!(groups.next_timeout_ms(), Some(2 * SWEEP_MS), "it is still busy");
        std::fs::remove_dir(place.join("8/busy")).expect("rmdir");
        groups.sweep(2 * SWEEP_MS - 1);
        assert!(place.join("8").exists(), "it is not time yet");
        groups.sweep(2 * SWEEP_MS);
        assert!(!place.join("8").exists());
        assert_eq!(groups.next_timeout_ms(), None);
        // As after a restart of envd.
        std::fs::create_dir_all(place.join("12/busy")).expect("mkdir");
        groups.take_over();
        assert!(!place.join("7").exists() && groups.left == [12] && groups.next == 13);
        std::fs::remove_dir_all(&place).expect("clean up");
    }
}
