//! What the machine has, before and after: everything that a capsule or a stack could leave behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Programs whose processes count.
const PROGRAMS: [&str; 5] = ["qemu-system", "wrenn-cp", "wrenn-agent", "envd", "postgres"];

/// How deep groups are looked for: a slice, a unit, `wrenn`, a capsule's, and one more.
const MAX_GROUP_DEPTH: usize = 5;

/// One thing of the machine: its kind and its name.
pub type Thing = (&'static str, String);

/// Takes stock of the machine.
pub fn take_stock() -> BTreeSet<Thing> {
    let mut stock = BTreeSet::new();
    let mut add = |kind: &'static str, names: Vec<String>| stock.extend(names.into_iter().map(|n| (kind, n)));
    add("process", processes());
    add("network namespace", names_in("/run/netns"));
    add("network link", names_in("/sys/class/net"));
    add("loop device", names_in("/sys/block").into_iter().filter(|n| in_use(n)).collect());
    add("device-mapper device", names_in("/dev/mapper"));
    add("nftables table", lines(Command::new("nft").args(["list", "tables"])));
    add("route", lines(Command::new("ip").args(["route", "show", "table", "all"])));
    add("control group", control_groups());
    add("mount", mounts());
    for directory in ["/tmp", "/var/tmp", "/run", "/var/lib"] {
        let ours = names_in(directory).into_iter().filter(|n| n.contains("wrenn"));
        add("file", ours.map(|n| format!("{directory}/{n}")).collect());
    }
    stock
}

fn names_in(directory: &str) -> Vec<String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn processes() -> Vec<String> {
    names_in("/proc")
        .into_iter()
        .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
        .filter_map(|pid| {
            let name = program_of(&pid)?;
            // PostgreSQL starts and ends children of its own as it likes, such as those of its autovacuum;
            // they go with their server.
            let is_servers_child =
                name == "postgres" && program_of(&parent_of(&pid)?).as_ref() == Some(&name);
            let counts = PROGRAMS.iter().any(|p| name.starts_with(p)) && !is_servers_child;
            counts.then(|| format!("{name} ({pid})"))
        })
        .collect()
}

fn program_of(pid: &str) -> Option<String> {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(exe.file_name()?.to_string_lossy().into_owned())
}

/// Field 4 of `/proc/pid/stat` (proc(5)); the name before it may hold anything.
fn parent_of(pid: &str) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1).map(str::to_string)
}

fn in_use(device: &str) -> bool {
    Path::new("/sys/block").join(device).join("loop/backing_file").exists()
}

/// The agent's groups and all beneath them, in whichever group it runs.
fn control_groups() -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((directory, depth)) = directories.pop() {
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        for path in entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()) {
            if path.iter().any(|part| part == "wrenn") {
                found.push(path.display().to_string());
            }
            if depth < MAX_GROUP_DEPTH {
                directories.push((path, depth + 1));
            }
        }
    }
    found
}

fn mounts() -> Vec<String> {
    fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" on "))
        // Whoever makes the machine's first named namespace makes this, and it stays: see ip-netns(8).
        .filter(|mount| !mount.ends_with(" on /run/netns"))
        .collect()
}

fn lines(command: &mut Command) -> Vec<String> {
    match command.output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).lines().map(str::to_string).collect(),
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_its_program_and_its_parent() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = child.id().to_string();
        let parent = parent_of(&pid);
        let _ = child.kill();
        let _ = child.wait();
        assert_eq!(parent, Some(std::process::id().to_string()));
        assert_eq!(parent_of(&pid), None, "it is gone");
        let own = std::env::current_exe().expect("a path");
        let own = own.file_name().map(|n| n.to_string_lossy().into_owned());
        assert_eq!(program_of(&std::process::id().to_string()), own);
    }
}
