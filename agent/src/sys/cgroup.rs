//! Control groups, version 2 (the kernel's Documentation/admin-guide/cgroup-v2.rst): what all processes of
//! a capsule may use together, and an end that none of them escapes.
//!
//! Where the agent's own group is `SOMEWHERE/agent`, as systemd makes it for `Delegate=` with
//! `DelegateSubgroup=agent`, the capsules' groups are `SOMEWHERE/wrenn/ID`; else `/sys/fs/cgroup/wrenn/ID`. A
//! group that has groups with limits may have no process itself, so a unit's own group is of no use without
//! that setting: systemd could not start the agent in it again.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where distributions mount version 2.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The group that holds those of capsules.
pub const NAME: &str = "wrenn";
/// The agent's own group beneath one that is delegated to it.
const AGENT_NAME: &str = "agent";
/// What limits come from.
const CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "io"];
/// Without one of these there is no limit worth the name.
const NEEDED: [&str; 2] = ["memory", "pids"];
/// The period of `cpu.max`, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// The most that `cpu.weight` takes.
const MAX_WEIGHT: u64 = 10_000;
/// `cpu.weight` and `io.weight` of one virtual CPU, and of a group that nobody gave one.
const DEFAULT_WEIGHT: u64 = 100;
/// How long killed processes may take to end: they may have to give back much memory.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(10);
const REMOVE_INTERVAL: Duration = Duration::from_millis(5);

/// Why there are no limits, or why a group stays.
#[derive(Debug)]
pub enum CgroupError {
    /// Version 2 is not mounted where it should be.
    NotMounted,
    /// The kernel, or whoever delegated, gives none of what is needed.
    NoControllers {
        /// The group whose controllers were looked at.
        path: PathBuf,
    },
    /// A call failed.
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// Its processes do not end although they were killed.
    Populated(PathBuf),
}

impl fmt::Display for CgroupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CgroupError::NotMounted => write!(
                f,
                "control groups version 2 are not mounted at {ROOT}; boot with systemd.unified_cgroup_hierarchy=1, \
                 or mount them there"
            ),
            CgroupError::NoControllers { path } => write!(
                f,
                "{} has not the controllers memory and pids; under systemd give the agent's unit \
                 Delegate=cpu io memory pids",
                path.display()
            ),
            CgroupError::Io { step, path, source } => write!(f, "{step} {}: {source}", path.display()),
            CgroupError::Populated(path) => {
                write!(f, "the processes in {} do not end although they were killed", path.display())
            }
        }
    }
}

impl std::error::Error for CgroupError {}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { step, path, source }
}

/// What the processes of a group may use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes, page cache and kernel memory included; more ends them all. None of it is swapped.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Processor time in thousandths of one processor.
    pub cpu_thousandths: u64,
    /// Share of processors and disks where they are short, 1 to 10,000.
    pub weight: u64,
}

impl Limits {
    /// The files of a group and what is written into them.
    fn files(&self) -> [(&'static str, String); 7] {
        let quota_us = self.cpu_thousandths * CPU_PERIOD_US / 1000;
        let weight = self.weight.clamp(1, MAX_WEIGHT);
        [
            ("memory.max", self.memory_bytes.to_string()),
            ("memory.swap.max", "0".into()),
            ("memory.oom.group", "1".into()),
            ("pids.max", self.pids.to_string()),
            ("cpu.max", format!("{quota_us} {CPU_PERIOD_US}")),
            ("cpu.weight", weight.to_string()),
            ("io.weight", format!("default {weight}")),
        ]
    }

    /// The weight of a machine with so many virtual CPUs.
    pub fn weight_of(vcpus: u32) -> u64 {
        (u64::from(vcpus) * DEFAULT_WEIGHT).min(MAX_WEIGHT)
    }
}

/// The group that holds those of capsules.
#[derive(Debug)]
pub struct Groups {
    directory: PathBuf,
    missing: Vec<&'static str>,
}

impl Groups {
    /// Makes it, or finds it, with all controllers that there are.
    ///
    /// # Errors
    /// Control groups cannot be used here.
    pub fn prepare() -> Result<Groups, CgroupError> {
        let path = Path::new("/proc/self/cgroup");
        let own = fs::read_to_string(path).map_err(failed("reading", path))?;
        Groups::prepare_in(&parent(Path::new(ROOT), &own))
    }

    /// The same beneath a given group.
    pub fn prepare_in(parent: &Path) -> Result<Groups, CgroupError> {
        let available = match fs::read_to_string(parent.join("cgroup.controllers")) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(CgroupError::NotMounted),
            Err(e) => return Err(failed("reading the controllers of", parent)(e)),
        };
        let (there, missing): (Vec<_>, Vec<_>) =
            CONTROLLERS.into_iter().partition(|name| available.split_whitespace().any(|have| have == *name));
        if NEEDED.iter().any(|name| missing.contains(name)) {
            return Err(CgroupError::NoControllers { path: parent.to_owned() });
        }
        let directory = parent.join(NAME);
        enable(parent, &there)?;
        match fs::create_dir(&directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("making the group", &directory)(e));
            }
            _ => {}
        }
        enable(&directory, &there)?;
        Ok(Groups { directory, missing })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What capsules are not limited in, because the kernel does not offer it.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// The group of one capsule, which need not exist.
    pub fn of(&self, capsule_id: &str, limits: Limits) -> Group {
        Group { path: self.directory.join(capsule_id), limits }
    }

    /// Removes it where it has no groups. Another agent on this machine may use it, which is no error.
    pub fn remove_if_unused(&self) -> Result<(), CgroupError> {
        match fs::remove_dir(&self.directory) {
            Err(e) if is_busy(&e) || e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(failed("removing", &self.directory)),
        }
    }
}

/// Where groups may be made, by the text of /proc/self/cgroup.
fn parent(root: &Path, own: &str) -> PathBuf {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let own = Path::new(own);
    match (own.file_name(), own.parent()) {
        (Some(name), Some(parent)) if name == AGENT_NAME && parent != Path::new("") => root.join(parent),
        _ => root.to_owned(),
    }
}

/// Lets the groups in `directory` have limits of these kinds.
fn enable(directory: &Path, controllers: &[&str]) -> Result<(), CgroupError> {
    let path = directory.join("cgroup.subtree_control");
    let on = fs::read_to_string(&path).map_err(failed("reading", &path))?;
    for controller in controllers.iter().filter(|name| !on.split_whitespace().any(|have| have == **name)) {
        write(&path, &format!("+{controller}")).map_err(failed("enabling controllers in", &path))?;
    }
    Ok(())
}

/// One call of write(2), as the files of control groups want it.
fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

/// The group of one capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    path: PathBuf,
    limits: Limits,
}

impl Group {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Makes it, or takes it as it is, and sets its limits. What writes `0` into the file that this returns
    /// is in it.
    pub fn make(&self) -> Result<File, CgroupError> {
        match fs::create_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("making the group", &self.path)(e));
            }
            _ => {}
        }
        for (name, value) in self.limits.files() {
            let path = self.path.join(name);
            match write(&path, &value) {
                // Its controller is not there, which was told at the start, or the kernel has no swap.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(failed("setting", &path))?,
            }
        }
        let procs = self.path.join("cgroup.procs");
        OpenOptions::new().write(true).open(&procs).map_err(failed("opening", &procs))
    }
}

/// Whether the kernel has ended processes of a group because they took too much memory.
pub fn ran_out_of_memory(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("memory.events")).unwrap_or_default();
    let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    kills.is_some_and(|count| count.trim().parse::<u64>().is_ok_and(|count| count > 0))
}

/// Whether this can be the group of a capsule, so that a record cannot name anything else.
pub fn is_group_of(path: &Path, capsule_id: &str) -> bool {
    let plain = path
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::RootDir));
    plain && path.starts_with(ROOT) && path.ends_with(Path::new(NAME).join(capsule_id))
}

/// Ends everything in a group and removes it; one that is not there is no error. Blocks for as long as the
/// processes take to end.
pub fn remove(path: &Path) -> Result<(), CgroupError> {
    match write(&path.join("cgroup.kill"), "1") {
        // There is no group, or the kernel is older than this file (5.14): then the processes are ended by
        // those who know them.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => other.map_err(failed("ending the processes in", path))?,
    }
    let end = Instant::now() + REMOVE_TIMEOUT;
    loop {
        match fs::remove_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if is_busy(&e) && Instant::now() < end => std::thread::sleep(REMOVE_INTERVAL),
            Err(e) if is_busy(&e) => return Err(CgroupError::Populated(path.to_owned())),
            other => return other.map_err(failed("removing", path)),
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::DirectoryNotEmpty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_made_where_they_may_be() {
        let root = Path::new("/r");
        for (own, expected) in [
            ("0::/\n", "/r"),
            ("", "/r"),
            ("0::/user.slice/user-0.slice/session-1.scope\n", "/r"),
            // A unit's own group holds the agent: no groups with limits can be in it.
            ("0::/system.slice/wrenn-agent.service\n", "/r"),
            ("0::/system.slice/wrenn-agent.service/agent\n", "/r/system.slice/wrenn-agent.service"),
            ("9:name=systemd:/x\n0::/a/agent\n", "/r/a"),
            // Version 1 has other lines alone.
            ("4:memory:/a/agent\n", "/r"),
            ("0::/agent\n", "/r"),
        ] {
            assert_eq!(parent(root, own), Path::new(expected), "{own:?}");
        }
    }

    #[test]
    fn limits_as_the_kernel_reads_them() {
        let limits = Limits { memory_bytes: 1 << 30, pids: 130, cpu_thousandths: 2_500, weight: 200 };
        assert_eq!(
            limits.files().map(|(name, value)| format!("{name}={value}")),
            [
                "memory.max=1073741824",
                "memory.swap.max=0",
                "memory.oom.group=1",
                "pids.max=130",
                "cpu.max=250000 100000",
                "cpu.weight=200",
                "io.weight=default 200",
            ]
        );
        assert_eq!([1, 2, 64, 101].map(Limits::weight_of), [100, 200, 6_400, 10_000]);
    }

    #[test]
    fn only_capsules_groups_are_removed() {
        assert!(is_group_of(Path::new("/sys/fs/cgroup/wrenn/cl-1"), "cl-1"));
        assert!(is_group_of(Path::new("/sys/fs/cgroup/system.slice/a.service/wrenn/cl-1"), "cl-1"));
        for other in [
            "/sys/fs/cgroup/wrenn/cl-2",
            "/sys/fs/cgroup/cl-1",
            "/tmp/wrenn/cl-1",
            "/sys/fs/cgroup/../../tmp/wrenn/cl-1",
            "wrenn/cl-1",
        ] {
            assert!(!is_group_of(Path::new(other), "cl-1"), "{other}");
        }
    }

    #[test]
    fn without_control_groups_that_is_said() {
        let directory = std::env::temp_dir().join(format!("wrenn-cgroup-{}", std::process::id()));
        fs::create_dir(&directory).expect("made");
        assert!(matches!(Groups::prepare_in(&directory), Err(CgroupError::NotMounted)));
        fs::write(directory.join("cgroup.controllers"), "hugetlb cpu\n").expect("written");
        let refused = Groups::prepare_in(&directory);
        assert!(matches!(refused, Err(CgroupError::NoControllers { .. })), "{refused:?}");
        assert!(remove(&directory.join("none")).is_ok(), "what is not there is removed");
        fs::remove_dir_all(&directory).expect("removed");
    }
}
