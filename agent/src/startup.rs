//! From a configuration to a running agent, in the order in which things can go wrong: what only looks
//! first, then what takes the directory, then what changes the host.

use crate::agent::{Agent, Outcome, Parts};
use crate::capsule::recovery::{RecoveryError, Take, recover};
use crate::config::{Config, why_no_names};
use crate::context::{Context, Host};
use crate::cp_client::HostFacts;
use crate::disk::dm::guard::Guard;
use crate::disk::{Backend, DiskError};
use crate::ending::Ending;
use crate::layout::{Layout, LayoutError, Lock};
use crate::net::{NetError, Slot, SlotAllocator, existing_slots, host};
use crate::registration::{self, Credentials, CredentialsError, Registration};
use crate::snapshots::{self, SharedMemory};
use crate::sys::cgroup::Groups;
use crate::sys::resources;
use crate::vmm::{Vmm, VmmError};
use crate::worker::Workers;
use crate::zstd::{self, ZstdError};
use mio::net::TcpListener;
use mio::{Poll, Token, Waker};
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use wire::reactor::sys::resources::raise_open_files;
use wire::reactor::sys::signals::Signals;

/// How long creating a capsule may take where KVM runs the guest.
pub const CREATE_DEADLINE_KVM_MS: u64 = 15_000;
/// How long creating a capsule may take where QEMU translates the guest's code.
pub const CREATE_DEADLINE_TCG_MS: u64 = 60_000;
/// Open files below which only few capsules fit.
const FEW_OPEN_FILES: u64 = 4096;
const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;

/// Why the agent does not start, or ended.
#[derive(Debug)]
pub enum StartError {
    /// The data directory cannot be used.
    Layout(LayoutError),
    /// This host has no credentials.
    Credentials(CredentialsError),
    /// There is no VMM.
    Vmm(VmmError),
    /// Disks cannot be made.
    Disk(DiskError),
    /// The host's network cannot be set up.
    Net(NetError),
    /// What an earlier agent left cannot be looked at.
    Recovery(RecoveryError),
    /// Capsules cannot hibernate.
    Zstd(ZstdError),
    /// A system call failed.
    System {
        /// What was tried.
        step: String,
        /// The failure.
        source: io::Error,
    },
    /// `WRENN_CP_URL` is not set but needed.
    NoControlPlane,
    /// Registering failed; a text for a person.
    Register(String),
    /// No agent serves this directory.
    NotServing(PathBuf),
    /// An agent was told to end and has not.
    StillServes(u32),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Layout(e) => e.fmt(f),
            StartError::Credentials(e) => e.fmt(f),
            StartError::Vmm(e) => e.fmt(f),
            StartError::Disk(e) => e.fmt(f),
            StartError::Net(e) => e.fmt(f),
            StartError::Recovery(e) => e.fmt(f),
            StartError::Zstd(e) => write!(f, "WRENN_HIBERNATE_AFTER_SEC is set, but there is {e}"),
            StartError::System { step, source } => write!(f, "{step}: {source}"),
            StartError::NoControlPlane => f.write_str(
                "WRENN_CP_URL is not set; to register, set it to the control plane's address, such as \
                 http://10.0.0.1:8000",
            ),
            StartError::Register(text) => f.write_str(text),
            StartError::NotServing(directory) => write!(
                f,
                "no wrenn-agent serves {}; start it (or set WRENN_DIR to the directory of the one that is meant)",
                directory.display()
            ),
            StartError::StillServes(pid) => {
                write!(
                    f,
                    "the agent, process {pid}, was told to end and has not; its log says what it waits for"
                )
            }
        }
    }
}

impl std::error::Error for StartError {}

macro_rules! from {
    ($($error:ty => $variant:ident),*) => {
        $(impl From<$error> for StartError {
            fn from(e: $error) -> StartError {
                StartError::$variant(e)
            }
        })*
    };
}
from!(LayoutError => Layout, CredentialsError => Credentials, VmmError => Vmm, DiskError => Disk,
      NetError => Net, RecoveryError => Recovery, ZstdError => Zstd);

impl StartError {
    pub(crate) fn system(step: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
        let step = step.into();
        move |source| StartError::System { step, source }
    }
}

fn system(step: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    StartError::system(step)
}

/// Registers this host and saves its credentials. Blocks.
///
/// # Errors
/// Everything that a person has to mend.
pub fn register(config: &Config, token: &str, address: SocketAddr) -> Result<(), StartError> {
    let url = config.control_plane.as_ref().ok_or(StartError::NoControlPlane)?;
    let layout = Layout::new(&config.directory);
    layout.prepare()?;
    let (disk, _) = resources::disk_space(layout.root())
        .map_err(system(format!("looking at the space in {}", layout.root().display())))?;
    let facts = HostFacts {
        arch: std::env::consts::ARCH.into(),
        cpu_cores: cpu_cores()?,
        memory_mb: memory_mb()?,
        disk_gb: disk / GIB,
    };
    let address = address.to_string();
    let credentials = registration::register(url, token, &address, &facts, &layout.host_token())
        .map_err(StartError::Register)?;
    log::info!("registered as {} with {url}", credentials.host_id);
    Ok(())
}

/// Runs the agent until a signal ends it.
///
/// # Errors
/// Everything that a person has to mend.
pub fn serve(config: Config) -> Result<Outcome, StartError> {
    // Before the first thread, so that none of them takes a signal.
    let signals = Signals::of(&Ending::SIGNALS).map_err(system("taking signals"))?;
    let layout = Layout::new(&config.directory);
    layout.prepare()?;
    let _lock: Lock = layout.lock()?;
    let credentials = Credentials::load(&layout.host_token())?;
    let verifier = credentials.verifier().ok_or_else(|| CredentialsError::Malformed(layout.host_token()))?;
    if config.control_plane.is_none() {
        log::warn!("WRENN_CP_URL is not set: no heartbeats, so a control plane will not use this host");
    }
    let kernel = layout.kernel()?;
    let disks = Backend::probe(&layout.images(), &layout.sandboxes())?;
    let vmm = Vmm::find(config.vmm, config.qemu.as_deref(), &config.firecracker, disks)?;
    if let Some(reason) = vmm.why_not_kvm() {
        log::warn!("KVM is not used: {reason}");
    }
    if config.hibernate_after_ms > 0 {
        zstd::find()?;
    }
    let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    if let Some(why) = why_no_names(config.guest_dns, &resolv_conf) {
        log::warn!("capsules with internet access will find no names: {why}");
    }
    let open_files = raise_open_files().map_err(system("raising the limit of open files"))?;
    if open_files < FEW_OPEN_FILES {
        log::warn!("only {open_files} open files are allowed: set LimitNOFILE= or `ulimit -n` higher");
    }
    let groups = groups();
    let found = recover(&layout, Take::Over)?;
    let _guard = match disks {
        Backend::DeviceMapper => {
            Some(Guard::start(&layout.sandboxes()).map_err(system("watching the disks"))?)
        }
        Backend::Reflink | Backend::Overlay => None,
    };
    host::install(true)?;
    snapshots::clear_drafts(&layout);
    let kept = found.paused.iter().map(|left| left.slot);
    let kept = kept.chain(found.running.iter().map(|left| left.network.slot()));
    let kept = kept.chain(found.left.iter().filter_map(|(_, slot)| *slot));
    let slots = free_slots(&config, kept)?;
    let listener = TcpListener::bind(config.listen_address).map_err(system(format!(
        "listening on {} (set WRENN_HOST_LISTEN_ADDR to another address)",
        config.listen_address
    )))?;
    let poll = Poll::new().map_err(system("making the event loop"))?;
    let registry = poll.registry().try_clone().map_err(system("making the event loop"))?;
    // The tokens of sources are counted up from 0.
    let waker = Waker::new(&registry, Token(usize::MAX)).map_err(system("making the waker"))?;
    let waker = Arc::new(waker);
    let workers = Workers::start(move || {
        if let Err(e) = waker.wake() {
            log::error!("waking the event loop: {e}");
        }
    })
    .map_err(system("starting worker threads"))?;
    let local_address = listener.local_addr().map_err(system("asking for the listener's address"))?;
    log::info!(
        "wrenn-agent {} serves {} on {local_address}: {}, {disks} disks, kernel {}, {} templates",
        env!("CARGO_PKG_VERSION"),
        credentials.host_id,
        vmm.describe(),
        kernel.version,
        layout.templates().len()
    );
    let create_deadline_ms = if vmm.uses_kvm() { CREATE_DEADLINE_KVM_MS } else { CREATE_DEADLINE_TCG_MS };
    let registration = Registration::new(config.control_plane.clone(), layout.host_token(), credentials);
    let host = Host {
        layout,
        config,
        kernel,
        vmm: Arc::new(vmm),
        groups,
        disks,
        cpu_cores: cpu_cores()?,
        memory_mb: memory_mb()?,
        shared_memory: SharedMemory::default(),
        create_deadline_ms,
    };
    let context = Context::new(host, registry, workers, slots);
    let parts = Parts { context, poll, listener, signals, registration, verifier };
    let mut agent = Agent::new(parts).map_err(system("watching the listener and signals"))?;
    agent.take_over(found.paused, found.running);
    let outcome = agent.run().map_err(system("the event loop"))?;
    if let Some(Err(e)) = agent.ctx.host.groups.as_ref().map(Groups::remove_if_unused) {
        log::warn!("the group of the capsules' control groups stays: {e}");
    }
    match host::remove_if_unused() {
        Ok(_) => {}
        Err(e) => log::warn!("the host's firewall table stays: {e}"),
    }
    log::info!("ended");
    Ok(outcome)
}

/// Where the control groups of capsules go. Without them capsules run all the same, which has to be said.
fn groups() -> Option<Groups> {
    match Groups::prepare() {
        Ok(groups) => {
            if !groups.missing().is_empty() {
                let missing = groups.missing().join(" and ");
                log::warn!("this kernel has no controller for {missing}: capsules have no limits there");
            }
            log::debug!("control groups in {}", groups.directory().display());
            Some(groups)
        }
        Err(e) => {
            log::error!(
                "CAPSULES RUN WITHOUT LIMITS of memory, processes and processor time on this host: {e}"
            );
            None
        }
    }
}

/// The slots of this agent but for those that something on the host has already.
fn free_slots(config: &Config, kept: impl Iterator<Item = Slot>) -> Result<SlotAllocator, StartError> {
    let (first, last) = config.slots;
    let mut slots = SlotAllocator::new(first, last);
    let taken = existing_slots().map_err(system("listing the host's links"))?;
    let ours: BTreeSet<Slot> = kept.collect();
    for slot in &ours {
        slots.reserve(*slot);
    }
    // Another agent's, or of a capsule that was left as it is.
    for slot in taken.into_iter().filter(|slot| !ours.contains(slot)) {
        slots.set_aside(slot);
    }
    Ok(slots)
}

fn cpu_cores() -> Result<u32, StartError> {
    let cores = std::thread::available_parallelism().map_err(system("counting CPU cores"))?;
    Ok(u32::try_from(cores.get()).unwrap_or(u32::MAX))
}

fn memory_mb() -> Result<u32, StartError> {
    let path = PathBuf::from("/proc/meminfo");
    let text = std::fs::read_to_string(&path).map_err(system("reading /proc/meminfo"))?;
    let bytes = resources::meminfo(&text, "MemTotal:");
    bytes.and_then(|bytes| u32::try_from(bytes / MIB).ok()).ok_or_else(|| StartError::System {
        step: "reading /proc/meminfo".into(),
        source: io::Error::new(io::ErrorKind::InvalidData, "it has no MemTotal line"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo() {
        assert!(memory_mb().expect("this machine") > 0);
    }
}
