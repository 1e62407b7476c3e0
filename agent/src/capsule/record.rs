//! What a capsule owns on this host, as its [`journal`] has it. Before a step that makes
//! something, the record names it; what it names may therefore not exist.

use super::journal::{self, Phase, Step};
use super::spec::Spec;
use crate::net::slot::Slot;
use crate::sys::boot::BootId;
use crate::sys::pidfd::Process;
use crate::vmm::{Image, Machine};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use wire::base64;
use wire::codec::Bytes;

/// The version of the form below. Older ones are read, newer ones are not touched.
pub const VERSION: u32 = 3;
/// The longest record, in bytes: the environment in base64 is most of it.
pub const MAX_RECORD_BYTES: u64 = 262_144;

/// A process, told apart from a later one with the same number by its start time, and from one after a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// The run of the kernel that it started in. Agents before this one did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootId>,
}

impl ProcessRecord {
    /// Of a machine that runs.
    pub fn of(machine: &Machine) -> ProcessRecord {
        let boot = BootId::current().inspect_err(|e| log::warn!("asking which boot this is: {e}"));
        ProcessRecord { pid: machine.pid(), start_ticks: machine.start_ticks(), boot: boot.ok() }
    }

    /// The process, if it still is that one.
    ///
    /// # Errors
    /// `NotFound` when it has ended, as all have that were started before the host's last boot.
    pub fn open(&self) -> io::Result<Process> {
        match self.boot {
            Some(boot) if boot != BootId::current()? => Err(io::ErrorKind::NotFound.into()),
            _ => Process::adopt(self.pid, self.start_ticks),
        }
    }
}

/// One capsule's belongings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// The capsule's id, which is its directory's name too.
    pub capsule_id: String,
    /// Its template.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
    /// The user and group of its VMM.
    pub uid: u32,
    /// Its network slot, once it is to have one.
    pub slot: Option<u32>,
    /// Its VMM, once it runs.
    pub machine: Option<ProcessRecord>,
    /// Its saved machine. While there is one the capsule is paused, whatever else runs.
    #[serde(default)]
    pub image: Option<Image>,
    /// The generation of the memory that its machine was restored from.
    #[serde(default)]
    pub base: Option<u64>,
    /// The generation of the files of the last attempt to save it.
    #[serde(default)]
    pub generation: u64,
    /// Whether its guest daemon has answered, so that somebody relies on it. One that was never ready is
    /// cleared away by the next agent, as whoever asked for it was told nothing.
    #[serde(default)]
    pub ready: bool,
    /// Whether it is being destroyed, or has ended.
    #[serde(default)]
    pub destroying: bool,
    /// The control group of its processes.
    #[serde(default)]
    pub group: Option<PathBuf>,
    /// What an agent after this one needs to go on with it.
    #[serde(default)]
    pub kept: Kept,
}

/// What only the agent knows of a capsule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The secret that its guest daemon knows this host by, in base64.
    pub secret: String,
    /// Idle seconds until it is paused; 0 for never.
    pub timeout_sec: u32,
    /// Whether the guest may reach the internet.
    pub allow_internet: bool,
    /// Names and values of its default environment, in base64.
    pub environment: Vec<(String, String)>,
    /// Size of its disk, in MiB.
    pub disk_mb: u32,
    /// The version of its guest daemon.
    pub envd_version: String,
}

impl Kept {
    /// What is to be kept of a capsule that is being made.
    pub fn new(spec: &Spec, secret: &[u8]) -> Kept {
        let text = |bytes: &Bytes| base64::encode(&bytes.0);
        Kept {
            secret: base64::encode(secret),
            timeout_sec: spec.timeout_sec,
            allow_internet: spec.allow_internet,
            environment: spec.environment.iter().map(|(n, v)| (text(n), text(v))).collect(),
            disk_mb: 0,
            envd_version: String::new(),
        }
    }
}

impl Record {
    /// The slot, if there is one.
    pub fn slot(&self) -> Option<Slot> {
        self.slot.and_then(Slot::new)
    }

    /// What was asked for when the capsule was made, and the secret; `None` when the record does not have
    /// it, as one of an older agent.
    pub fn spec(&self, deadline_ms: u64) -> Option<(Spec, Vec<u8>)> {
        let bytes = |text: &String| base64::decode(text).map(Bytes);
        let pairs = self.kept.environment.iter().map(|(n, v)| Some((bytes(n)?, bytes(v)?)));
        let secret = base64::decode(&self.kept.secret).filter(|secret| !secret.is_empty())?;
        let spec = Spec {
            id: self.capsule_id.clone(),
            template: self.template.clone(),
            // Its disk is made.
            image: PathBuf::new(),
            snapshot: None,
            vcpus: self.vcpus,
            memory_mb: self.memory_mb,
            disk_bytes: None,
            allow_internet: self.kept.allow_internet,
            environment: pairs.collect::<Option<_>>()?,
            timeout_sec: self.kept.timeout_sec,
            deadline_ms,
        };
        Some((spec, secret))
    }

    /// Makes the capsule's directory with a journal that begins with this record. Blocks.
    ///
    /// # Errors
    /// `AlreadyExists` when there is such a directory; it is then left alone.
    pub fn create(&self, directory: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(directory)?;
        // The directory's name last: with its content on disk that costs nothing more.
        journal::begin(directory, Step::Create, Phase::Done, self)
            .and_then(|()| sync_parent(directory))
            .inspect_err(|_| {
                // The failure to write is the one to tell; an empty directory is cleared at the next start.
                let _ = fs::remove_dir_all(directory);
            })
    }

    /// Notes in the journal where a step is, and that from there on this is what the capsule owns. Blocks.
    pub fn note(&self, directory: &Path, step: Step, phase: Phase) -> io::Result<()> {
        journal::append(directory, step, phase, Some(self))
    }

    /// Whether this agent knows the form of it.
    pub(super) fn check_version(&self) -> io::Result<()> {
        if (1..=VERSION).contains(&self.version) {
            return Ok(());
        }
        let text = format!("the record has version {}, this agent knows 1 to {VERSION}", self.version);
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    }
}

/// How often a directory is emptied: a worker that is about to keep the capsule's figures makes a file and gives it
/// its name.
const REMOVE_TRIES: u32 = 3;

/// Removes a capsule's directory with all in it; one that is gone is no error. Blocks.
pub fn remove(directory: &Path) -> io::Result<()> {
    let mut tries = 1;
    loop {
        match fs::remove_dir_all(directory) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && tries < REMOVE_TRIES => tries += 1,
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => return sync_parent(directory),
        }
    }
}

/// Puts a directory's name, or that it is gone, on disk.
fn sync_parent(directory: &Path) -> io::Result<()> {
    File::open(directory.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::vmm::Kind;

    pub fn record() -> Record {
        Record {
            version: VERSION,
            capsule_id: "cl-1".into(),
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 256,
            uid: 7,
            slot: None,
            machine: None,
            image: Some(Image { memory: 1, delta: Some(2), state: 2, packed: false, vmm: Kind::Firecracker }),
            base: None,
            generation: 2,
            ready: true,
            destroying: false,
            group: Some("/sys/fs/cgroup/wrenn/cl-1".into()),
            kept: Kept {
                secret: "AQID".into(),
                environment: vec![("QQ==".into(), "/w==".into())],
                disk_mb: 300,
                ..Kept::default()
            },
        }
    }

    #[test]
    fn a_record_has_what_the_next_agent_needs() {
        let (spec, secret) = record().spec(9).expect("complete");
        assert_eq!((spec.id.as_str(), spec.memory_mb, spec.deadline_ms), ("cl-1", 256, 9));
        assert_eq!(secret, [1, 2, 3]);
        assert_eq!(spec.environment, [(Bytes(b"A".to_vec()), Bytes(vec![0xff]))]);
        let old = r#"{"version":1,"capsule_id":"cl-1","template":"t","vcpus":1,"memory_mb":256,"uid":7,"slot":null,"machine":null}"#;
        let old: Record = serde_json::from_str(old).expect("an older agent's");
        assert!(old.spec(9).is_none() && old.image.is_none() && !old.ready);
        // Of an agent that did not note the boot.
        let old = r#"{"pid":7,"start_ticks":8}"#;
        let process: ProcessRecord = serde_json::from_str(old).expect("an older agent's");
        assert_eq!(process, ProcessRecord { pid: 7, start_ticks: 8, boot: None });
        assert_eq!(serde_json::to_string(&process).expect("written"), old);
    }

    #[test]
    fn a_directory_is_made_noted_in_and_removed() {
        let directory = std::env::temp_dir().join(format!("wrenn-record-{}", std::process::id()));
        assert!(journal::read(&directory).expect("no directory").is_none());
        let mut record = record();
        record.create(&directory).expect("created");
        assert_eq!(record.create(&directory).map_err(|e| e.kind()), Err(io::ErrorKind::AlreadyExists));
        record.slot = Some(7);
        record.machine = Some(ProcessRecord { pid: 1, start_ticks: 2, boot: BootId::current().ok() });
        record.note(&directory, Step::Machine, Phase::Done).expect("noted");
        let read = journal::read(&directory).expect("read").expect("there");
        assert_eq!((&read.record, read.last), (&record, (Step::Machine, Phase::Done)));
        assert_eq!(read.record.slot().map(Slot::index), Some(7));
        remove(&directory).expect("removed");
        remove(&directory).expect("removed again");
        assert!(!directory.exists());
    }
}
