//! Control groups of a real kernel: what takes too much is stopped, and nobody else.

use crate::Case;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use wrenn_agent::sys::cgroup::{Group, Groups, Limits, NAME, ROOT, ran_out_of_memory, remove};
use wrenn_agent::sys::spawn::{Confinement, spawn};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

pub const CASES: &[Case] = &[
    ("processes are in their group before they run", processes_are_in_their_group_before_they_run),
    ("who takes too much memory ends alone", who_takes_too_much_memory_ends_alone),
    ("who forks without end is stopped", who_forks_without_end_is_stopped),
    ("limits apply beneath a delegated group", limits_apply_beneath_a_delegated_group),
];

/// The groups of capsules that there are.
pub fn remains() -> Vec<String> {
    let entries = fs::read_dir(Path::new(ROOT).join(NAME)).into_iter().flatten().flatten();
    entries.filter(|e| e.path().is_dir()).map(|e| e.path().display().to_string()).collect()
}

fn limits() -> Limits {
    Limits { memory_bytes: 64 * MIB, pids: 8, cpu_thousandths: 500, weight: 100 }
}

/// Starts a script as a VMM is started.
fn start(group: &Group, script: &str) -> Child {
    let procs = group.make().expect("made");
    let mut command = Command::new("/bin/bash");
    command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let confinement = Confinement { group: Some(procs.as_fd()), ..Confinement::default() };
    spawn(&mut command, &confinement).expect("started")
}

fn read(group: &Group, file: &str) -> String {
    fs::read_to_string(group.path().join(file)).expect("readable").trim().to_string()
}

fn processes(group: &Group) -> usize {
    read(group, "cgroup.procs").lines().count()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn processes_are_in_their_group_before_they_run(_: &Path) {
    let groups = Groups::prepare().expect("prepared");
    assert!(groups.missing().iter().all(|name| *name == "io"), "{:?}", groups.missing());
    let group = groups.of("cl-placed", limits());
    let ran = start(&group, "cat /proc/self/cgroup").wait_with_output().expect("ran");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "0::/wrenn/cl-placed\n");
    for (file, value) in [
        ("memory.max", "67108864"),
        ("memory.oom.group", "1"),
        ("pids.max", "8"),
        ("cpu.max", "50000 100000"),
        ("cpu.weight", "100"),
    ] {
        assert_eq!(read(&group, file), value, "{file}");
    }
    // Found again as an agent after a restart does, with other limits.
    let groups = Groups::prepare().expect("found");
    let again = groups.of("cl-placed", Limits { pids: 9, ..limits() });
    drop(again.make().expect("taken as it is"));
    assert_eq!(read(&group, "pids.max"), "9");
    groups.remove_if_unused().expect("it is used, which is no error");
    remove(group.path()).expect("removed");
    remove(group.path()).expect("nothing to remove");
    groups.remove_if_unused().expect("removed");
    assert!(!groups.directory().exists());
}

fn who_takes_too_much_memory_ends_alone(_: &Path) {
    let groups = Groups::prepare().expect("prepared");
    let (greedy, modest) = (groups.of("cl-greedy", limits()), groups.of("cl-modest", limits()));
    let mut other = start(&modest, "exec 3<&0; cat <&3 & exec cat");
    wait_for("the modest one is there", || processes(&modest) >= 2);
    // A helper that takes nothing goes with it: what is left of a machine is of no use.
    let mut child = start(&greedy, "exec 3<&0; cat <&3 & read; printf -v x '%*s' 200000000 ''; read");
    wait_for("the greedy one is there", || processes(&greedy) == 2);
    assert!(!ran_out_of_memory(greedy.path()));
    let mut order = child.stdin.take().expect("a pipe");
    std::io::Write::write_all(&mut order, b"\n").expect("told");
    let status = child.wait().expect("ended");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
    wait_for("its helper ends", || processes(&greedy) == 0);
    assert!(ran_out_of_memory(greedy.path()) && !ran_out_of_memory(modest.path()));
    assert_eq!(processes(&modest), 2);
    assert!(other.try_wait().expect("asked").is_none(), "the other runs on");
    // Removal ends what is inside.
    remove(modest.path()).expect("removed");
    assert!(other.wait().expect("ended").code().is_none());
    remove(greedy.path()).expect("removed");
    groups.remove_if_unused().expect("removed");
}

fn who_forks_without_end_is_stopped(_: &Path) {
    let groups = Groups::prepare().expect("prepared");
    let group = groups.of("cl-forks", limits());
    let mut child = start(&group, "exec 3<&0; for i in {1..40}; do cat <&3 & done; read");
    wait_for("it forks", || !read(&group, "pids.events").ends_with(" 0"));
    assert!(read(&group, "pids.current").parse::<u64>().expect("a number") <= 8);
    assert!(Command::new("/bin/cat").stdin(Stdio::null()).status().expect("others can").success());
    remove(group.path()).expect("removed");
    child.wait().expect("ended");
    groups.remove_if_unused().expect("removed");
}

fn limits_apply_beneath_a_delegated_group(_: &Path) {
    let unit = Path::new(ROOT).join("wrenn-test.service");
    let own = unit.join("agent");
    fs::create_dir_all(&own).expect("made");
    // As systemd does for Delegate=.
    fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+memory +pids +cpu").expect("enabled");
    let groups = Groups::prepare_in(&unit).expect("prepared");
    let group = groups.of("cl-below", limits());
    let mut child = start(&group, "read");
    assert_eq!((processes(&group), read(&group, "pids.max").as_str()), (1, "8"));
    remove(group.path()).expect("removed");
    child.wait().expect("ended");
    groups.remove_if_unused().expect("removed");
    for directory in [own, unit] {
        fs::remove_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    }
}
