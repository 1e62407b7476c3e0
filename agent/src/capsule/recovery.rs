//! At the start of the agent: goes on with what one before it has left, as the capsules' journals have it.
//! What runs is adopted, what is paused is kept, what was half made or half taken away is cleared away, and
//! what no journal names is left alone.

mod again;

use super::journal::{self, History};
use super::lifecycle::{Fate, Remains};
use super::record::{self, Record};
use crate::disk::{self, Backend, Disk, DiskError};
use crate::layout::{Layout, is_capsule_id};
use crate::metrics::{Usage, keeping};
use crate::net::slot::Slot;
use crate::net::{CapsuleNetwork, NetError, Policy, destroy_remains, netns};
use crate::sys::cgroup::{self, CgroupError};
use crate::sys::pidfd::Process;
use crate::vmm::{Machine, VmmError, image};
use crate::whole_file;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How long a process may take to end once it is killed, in milliseconds.
const KILL_TIMEOUT_MS: i32 = 10_000;
/// The most directories that are looked at.
const MAX_DIRECTORIES: usize = 65_536;
/// What agents before the journal wrote instead of it.
const OLD_RECORD_NAME: &str = "record.json";

/// Why something could not be cleared away.
#[derive(Debug)]
pub enum RecoveryError {
    /// A file system call or a signal failed.
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// A process did not end.
    StillRuns {
        /// Its number.
        pid: u32,
    },
    /// The control group could not be removed.
    Group(CgroupError),
    /// The network could not be removed.
    Net(NetError),
    /// The disk could not be removed, or cannot be used.
    Disk(DiskError),
    /// The machine runs, but cannot be talked to.
    Vmm(VmmError),
    /// A capsule lacks its disk, or its record its slot.
    Incomplete(PathBuf),
    /// A directory has another capsule's record, as a copy of its directory has.
    OfAnother {
        /// The directory.
        path: PathBuf,
        /// Whose record it is.
        capsule_id: String,
    },
}

impl fmt::Display for RecoveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecoveryError::Io { step, path, source } => write!(f, "{step} {}: {source}", path.display()),
            RecoveryError::StillRuns { pid } => write!(f, "process {pid} did not end although it was killed"),
            RecoveryError::Group(e) => e.fmt(f),
            RecoveryError::Net(e) => e.fmt(f),
            RecoveryError::Disk(e) => e.fmt(f),
            RecoveryError::Vmm(e) => e.fmt(f),
            RecoveryError::Incomplete(path) => {
                write!(f, "{} lacks its disk or its record a slot", path.display())
            }
            RecoveryError::OfAnother { path, capsule_id } => write!(
                f,
                "the journal in {} is that of the capsule {capsule_id:?}; move copies of capsules out of there",
                path.display()
            ),
        }
    }
}

impl std::error::Error for RecoveryError {}

/// A paused capsule as it lies on disk.
#[derive(Debug)]
pub struct LeftPaused {
    /// Its record, which names no machine.
    pub record: Record,
    /// Its slot, of which nothing exists.
    pub slot: Slot,
    /// Its disk.
    pub disk: Box<dyn Disk>,
    /// What it used.
    pub usage: Usage,
}

/// A capsule that runs.
#[derive(Debug)]
pub struct LeftRunning {
    /// Its record.
    pub record: Record,
    /// Its network.
    pub network: CapsuleNetwork,
    /// Its disk.
    pub disk: Box<dyn Disk>,
    /// Its machine, whose guest runs.
    pub machine: Machine,
    /// What it used.
    pub usage: Usage,
}

/// What becomes of capsules that are whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// They are taken over.
    Over,
    /// They are cleared away as well.
    Away,
}

/// What was found and done.
#[derive(Debug, Default)]
pub struct Summary {
    /// Capsules that run.
    pub running: Vec<LeftRunning>,
    /// Capsules that are paused and whole.
    pub paused: Vec<LeftPaused>,
    /// Capsules that were cleared away.
    pub cleared: usize,
    /// Capsules that could neither be taken over nor cleared away, with their slots, which must not be
    /// given out.
    pub left: Vec<(String, Option<Slot>)>,
}

/// What a capsule's journal comes to.
enum Found {
    Running(Box<LeftRunning>),
    Paused(Box<LeftPaused>),
    Cleared(&'static str),
}

/// Goes through every capsule that has a directory. Blocks.
///
/// # Errors
/// The directory of capsules cannot be listed. What goes wrong with one capsule is logged, and it is
/// left for the next start.
pub fn recover(layout: &Layout, take: Take) -> Result<Summary, RecoveryError> {
    let sandboxes = layout.sandboxes();
    let entries = fs::read_dir(&sandboxes).map_err(|source| RecoveryError::Io {
        step: "listing",
        path: sandboxes.clone(),
        source,
    })?;
    let mut summary = Summary::default();
    let mut again = Vec::new();
    for entry in entries.take(MAX_DIRECTORIES).flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_capsule_id(&name) || !entry.file_type().is_ok_and(|t| t.is_dir()) {
            log::warn!("{} is not a capsule's directory: left alone", entry.path().display());
            continue;
        }
        again.extend(look_at(&mut summary, entry.path(), take, false));
    }
    again::try_again(again, |path, is_last| look_at(&mut summary, path, take, is_last));
    // A directory that somebody else has removed leaves the disk's device without an owner.
    for name in disk::clear_orphans(&sandboxes).map_err(RecoveryError::Disk)? {
        log::warn!("the device {name} belonged to no capsule: removed");
    }
    Ok(summary)
}

/// Recovers what is in one capsule's directory, and notes what came of it. The directory is given back where that is
/// to be tried again, which may not be after the last time.
fn look_at(summary: &mut Summary, directory: PathBuf, take: Take, is_last: bool) -> Option<PathBuf> {
    let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let record = read(&directory);
    let slot = record.as_ref().ok().and_then(|r| r.as_ref()?.slot());
    match record.and_then(|record| recover_one(&directory, record, take)) {
        Ok(Found::Running(left)) => {
            log::info!("capsule {name}: runs on");
            summary.running.push(*left);
        }
        Ok(Found::Paused(left)) => {
            log::info!("capsule {name}: paused");
            summary.paused.push(*left);
        }
        Ok(Found::Cleared(why)) => {
            log::info!("capsule {name}: cleared away: {why}");
            summary.cleared += 1;
        }
        Err(e) if e.is_passing() && !is_last => {
            log::warn!("capsule {name}: {e}; it is looked at again in a moment");
            return Some(directory);
        }
        Err(e) => {
            log::error!(
                "capsule {name}: {e}; it is left as it is, and looked at again at the agent's next start"
            );
            summary.left.push((name, slot));
        }
    }
    None
}

/// A capsule as its journal has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surveyed {
    /// Its id.
    pub id: String,
    /// Whether it is paused, so that it outlasts a reboot.
    pub is_paused: bool,
}

/// Looks at every capsule that has a directory, and changes nothing. Blocks.
///
/// # Errors
/// The directory of capsules cannot be listed.
pub fn survey(layout: &Layout) -> Result<Vec<Surveyed>, RecoveryError> {
    let sandboxes = layout.sandboxes();
    let entries = fs::read_dir(&sandboxes).map_err(io_error("listing", &sandboxes))?;
    let names = entries.take(MAX_DIRECTORIES).flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    Ok(names
        .filter(|name| is_capsule_id(name))
        .map(|id| {
            let record = read(&sandboxes.join(&id)).ok().flatten();
            Surveyed { is_paused: record.is_some_and(|r| r.image.is_some() && !r.destroying), id }
        })
        .collect())
}

/// What a capsule owns by its journal; `None` when there is nothing but its directory.
fn read(directory: &Path) -> Result<Option<Record>, RecoveryError> {
    let failed = io_error("reading the journal of", directory);
    let history = journal::read(directory).and_then(|history| match history {
        Some(History { record, .. }) => Ok(Some(record)),
        None => {
            let path = directory.join(OLD_RECORD_NAME);
            let text = whole_file::read(&path, record::MAX_RECORD_BYTES, "record")?;
            text.map(|text| serde_json::from_slice(&text).map_err(io::Error::from)).transpose()
        }
    });
    let record = history.map_err(failed)?;
    // What it names is the other's: its machine, its network, its disk.
    match &record {
        Some(Record { capsule_id, .. }) if directory.file_name() != Some(OsStr::new(capsule_id)) => {
            Err(RecoveryError::OfAnother { path: directory.to_owned(), capsule_id: capsule_id.clone() })
        }
        _ => Ok(record),
    }
}

fn recover_one(directory: &Path, record: Option<Record>, take: Take) -> Result<Found, RecoveryError> {
    let record = match (record, take) {
        (Some(record), Take::Over) => record,
        (record, _) => {
            clear(directory, record.as_ref())?;
            let why = if take == Take::Away { "as all were to be" } else { "there was only its directory" };
            return Ok(Found::Cleared(why));
        }
    };
    let Record { ready, destroying, .. } = record;
    // Whether a machine runs is asked only where it matters: one that cannot be talked to must not keep a
    // capsule from being cleared away.
    let machine = match ready && !destroying && record.image.is_none() {
        true => running_machine(directory, &record)?,
        false => None,
    };
    let remains = Remains { ready, image: record.image.is_some(), destroying, machine: machine.is_some() };
    Ok(match (remains.fate(), machine) {
        (Fate::Adopted, Some(machine)) => Found::Running(Box::new(adopt(directory, record, machine)?)),
        (Fate::Kept, _) => Found::Paused(Box::new(settle(directory, record)?)),
        (Fate::Cleared(why), _) => {
            clear(directory, Some(&record))?;
            Found::Cleared(why)
        }
        (Fate::Adopted, None) => return Err(RecoveryError::Incomplete(directory.to_owned())),
    })
}

/// The machine that a record names, if it runs.
fn running_machine(directory: &Path, record: &Record) -> Result<Option<Machine>, RecoveryError> {
    let Some(machine) = record.machine else { return Ok(None) };
    match machine.open() {
        Ok(mut process) => match process.try_wait().map_err(io_error("looking at the VMM of", directory))? {
            Some(_) => Ok(None),
            None => {
                let adopted = Machine::adopt(directory, machine.pid, machine.start_ticks);
                adopted.map(Some).map_err(RecoveryError::Vmm)
            }
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error("opening the process of", directory)(e)),
    }
}

/// Takes over a machine that runs: its guest may stand still, its network may lack what was changed last.
fn adopt(directory: &Path, record: Record, mut machine: Machine) -> Result<LeftRunning, RecoveryError> {
    let slot = record.slot().ok_or_else(|| RecoveryError::Incomplete(directory.to_owned()))?;
    let disk = Backend::open(directory).map_err(RecoveryError::Disk)?;
    let disk = disk.ok_or_else(|| RecoveryError::Incomplete(directory.to_owned()))?;
    let network = CapsuleNetwork::adopt(slot).map_err(RecoveryError::Net)?;
    let policy = Policy::load(directory).map_err(io_error("reading the network policy of", directory))?;
    let policy = policy.unwrap_or_else(|| Policy::internet(record.kept.allow_internet));
    network.set_policy(&policy).map_err(RecoveryError::Net)?;
    machine.run_on().map_err(RecoveryError::Vmm)?;
    image::clean(directory, None, record.base);
    journal::take_over(directory, &record).map_err(io_error("writing the journal of", directory))?;
    Ok(LeftRunning { record, network, disk, machine, usage: keeping::load(directory) })
}

/// Makes sure that of a paused capsule nothing is there but what belongs to a paused one.
fn settle(directory: &Path, mut record: Record) -> Result<LeftPaused, RecoveryError> {
    end_machine(directory, Some(&record))?;
    let slot = record.slot().ok_or_else(|| RecoveryError::Incomplete(directory.to_owned()))?;
    let disk = Backend::open(directory).map_err(RecoveryError::Disk)?;
    let disk = disk.ok_or_else(|| RecoveryError::Incomplete(directory.to_owned()))?;
    record.machine = None;
    // A machine that has ended holds nothing of what it was restored from.
    record.base = None;
    // What the agent before this one may have left half written is no part of it.
    journal::take_over(directory, &record).map_err(io_error("writing the journal of", directory))?;
    image::clean(directory, record.image.as_ref(), record.base);
    Ok(LeftPaused { record, slot, disk, usage: keeping::load(directory) })
}

/// Removes one capsule's belongings in the order of its teardown. Without a record nothing but the
/// directory was made.
fn clear(directory: &Path, record: Option<&Record>) -> Result<(), RecoveryError> {
    end_machine(directory, record)?;
    disk::clear(directory).map_err(RecoveryError::Disk)?;
    record::remove(directory).map_err(io_error("removing", directory))
}

/// Ends the machine and removes the network that a record names.
fn end_machine(directory: &Path, record: Option<&Record>) -> Result<(), RecoveryError> {
    // A process that waits for a full disk cannot end. One that was saved waits for nothing.
    if record.is_none_or(|record| record.image.is_none()) {
        disk::release(directory).map_err(RecoveryError::Disk)?;
    }
    if let Some(machine) = record.and_then(|r| r.machine) {
        match machine.open() {
            Ok(process) => kill(process)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error("opening the process of", directory)(e)),
        }
    }
    if let Some(record) = record
        && let Some(group) = record.group.as_deref().filter(|g| cgroup::is_group_of(g, &record.capsule_id))
    {
        cgroup::remove(group).map_err(RecoveryError::Group)?;
    }
    if let Some(slot) = record.and_then(Record::slot) {
        // A VMM that was started just before the agent died is in no record, but it is in the namespace.
        for process in processes_in(&slot.namespace_name())? {
            kill(process)?;
        }
        destroy_remains(slot).map_err(RecoveryError::Net)?;
    }
    Ok(())
}

fn kill(mut process: Process) -> Result<(), RecoveryError> {
    let path = PathBuf::from(format!("/proc/{}", process.pid()));
    process.kill().map_err(io_error("killing", &path))?;
    match process.wait(KILL_TIMEOUT_MS).map_err(io_error("waiting for", &path))? {
        Some(_) => Ok(()),
        None => Err(RecoveryError::StillRuns { pid: process.pid() }),
    }
}

/// The processes in a named network namespace; none when there is no such namespace.
fn processes_in(namespace: &str) -> Result<Vec<Process>, RecoveryError> {
    let path = Path::new(netns::DIRECTORY).join(namespace);
    let wanted = match fs::metadata(&path) {
        Ok(m) => (m.dev(), m.ino()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error("looking at", &path)(e)),
    };
    let own = fs::metadata("/proc/self/ns/net").map(|m| (m.dev(), m.ino()));
    if own.is_ok_and(|own| own == wanted) {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir("/proc").map_err(io_error("listing", Path::new("/proc")))?;
    let mut found = Vec::new();
    for pid in entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()) {
        // A process that ends while it is looked at is one less to kill.
        let inside = fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| (m.dev(), m.ino()) == wanted);
        if inside && let Ok(process) = Process::child(pid) {
            found.push(process);
        }
    }
    Ok(found)
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecoveryError {
    let path = path.to_path_buf();
    move |source| RecoveryError::Io { step, path, source }
}

#[cfg(test)]
mod tests {
    use super::journal::{Phase, Step};
    use super::*;
    use crate::sys::boot::BootId;

    #[test]
    fn a_process_of_another_boot_is_not_the_capsules() {
        let root = std::env::temp_dir().join(format!("wrenn-boot-{}", std::process::id()));
        let layout = Layout::new(&root);
        layout.prepare().expect("prepared");
        let directory = layout.sandboxes().join("cl-1");
        let other = "00000000-0000-4000-8000-000000000000".to_string();
        let boots = [Some(BootId::try_from(other).expect("an id")), BootId::current().ok(), None];
        for (boot, is_capsules) in boots.into_iter().zip([false, true, true]) {
            let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("started");
            let process = Process::child(child.id()).expect("runs");
            let (pid, start_ticks) = (process.pid(), process.start_ticks());
            let machine = Some(record::ProcessRecord { pid, start_ticks, boot });
            let destroying = Record { machine, destroying: true, image: None, ..record::tests::record() };
            fs::create_dir(&directory).expect("made");
            journal::begin(&directory, Step::Destroy, Phase::Begin, &destroying).expect("written");
            // Whether it counts as a machine that runs, and whether it is ended with the capsule.
            let opened = destroying.machine.expect("one").open().map(drop).map_err(|e| e.kind());
            assert_eq!(opened, if is_capsules { Ok(()) } else { Err(io::ErrorKind::NotFound) }, "{boot:?}");
            let summary = recover(&layout, Take::Over).expect("recovered");
            // One that was ended was waited for as well.
            let runs = matches!(child.try_wait(), Ok(None));
            if runs {
                child.kill().and_then(|()| child.wait()).expect("ended");
            }
            assert_eq!((summary.cleared, runs), (1, !is_capsules), "{boot:?}");
        }
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn only_capsules_directories_are_cleared() {
        let root = std::env::temp_dir().join(format!("wrenn-recovery-{}", std::process::id()));
        let layout = Layout::new(&root);
        layout.prepare().expect("prepared");
        let sandboxes = layout.sandboxes();
        for directory in ["cl-empty", "cl-dead", "cl-odd", "Not-a-capsule"] {
            fs::create_dir(sandboxes.join(directory)).expect("made");
        }
        fs::write(sandboxes.join("file"), "x").expect("written");
        fs::write(sandboxes.join("cl-odd/record.json"), "{").expect("written");
        let record = Record {
            // Process 1 runs, but did not start then.
            machine: Some(record::ProcessRecord { pid: 1, start_ticks: u64::MAX, boot: None }),
            image: None,
            capsule_id: "cl-dead".into(),
            ..record::tests::record()
        };
        journal::begin(&sandboxes.join("cl-dead"), Step::Ready, Phase::Done, &record).expect("written");
        // A copy of a capsule that is there: its record names what is the other's.
        let mut other = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let process = Process::child(other.id()).expect("runs");
        let (pid, start_ticks) = (process.pid(), process.start_ticks());
        let machine = record::ProcessRecord { pid, start_ticks, boot: None };
        let copied = Record { machine: Some(machine), destroying: true, ..record.clone() };
        fs::create_dir(sandboxes.join("cl-copy")).expect("made");
        journal::begin(&sandboxes.join("cl-copy"), Step::Destroy, Phase::Begin, &copied).expect("written");
        let summary = recover(&layout, Take::Over).expect("recovered");
        let runs = other.try_wait().expect("looked").is_none();
        other.kill().and_then(|()| other.wait()).expect("ended");
        assert!(runs, "the other capsule's machine was ended");
        let mut left_alone = summary.left;
        left_alone.sort();
        assert_eq!(
            (summary.cleared, left_alone),
            (2, vec![("cl-copy".into(), None), ("cl-odd".into(), None)])
        );
        assert!(summary.paused.is_empty() && summary.running.is_empty());
        let left = fs::read_dir(&sandboxes).expect("listed").flatten().map(|e| e.file_name());
        let mut left: Vec<_> = left.collect();
        left.sort();
        assert_eq!(left, ["Not-a-capsule", "cl-copy", "cl-odd", "file"]);
        fs::remove_dir_all(&root).expect("removed");
    }
}
