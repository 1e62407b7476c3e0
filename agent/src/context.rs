//! What every part of the running agent shares: the event loop's registry, timers, worker pool, clock and
//! what the host offers.

use crate::capsule::{CapsuleKey, CapsuleReport, CapsuleTimer, Source as CapsuleSource};
use crate::config::Config;
use crate::disk::Backend;
use crate::layout::{Kernel, Layout};
use crate::metrics::keeping::Outcomes;
use crate::net::{NetError, SlotAllocator};
use crate::registration::Report as RegistrationReport;
use crate::snapshots::{SharedMemory, SnapshotError};
use crate::sys::cgroup::Groups;
use crate::vmm::{Kind, Vmm, VmmError, Wanted};
use crate::worker::Workers;
use mio::event::Source as MioSource;
use mio::{Interest, Registry, Token};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;
use wire::auth::NONCE_LEN;
use wire::message::SnapshotInfo;
use wire::reactor::Timers;
use wire::reactor::sys::random;
use wire::session::StreamId;

/// The number of a control plane's connection, never used twice.
pub type PeerId = u64;

/// What a readiness event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The listener for control planes.
    Listener,
    /// A signal has come.
    Signals,
    /// A control plane's connection.
    Peer(PeerId),
    /// Something of a capsule.
    Capsule(CapsuleKey, CapsuleSource),
}

/// What a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimerKey {
    /// A control plane's session has something to do.
    Peer(PeerId),
    /// Something of a capsule.
    Capsule(CapsuleKey, CapsuleTimer),
    /// The next call to the control plane.
    Registration,
    /// What capsules use is looked at again.
    Sample,
    /// The host's firewall table is looked at again.
    Mend,
    /// Shutting down has taken too long.
    Shutdown,
}

/// What a worker's job reports.
#[derive(Debug)]
pub enum Report {
    /// Of a capsule.
    Capsule(CapsuleKey, CapsuleReport),
    /// Of a call to the control plane.
    Registration(RegistrationReport),
    /// Of a change of what a capsule may reach. The capsule may be gone by now.
    NetworkChanged {
        /// Who waits for it.
        waiter: (PeerId, StreamId),
        /// Which capsule.
        capsule_id: String,
        /// How it ended.
        result: Result<(), NetError>,
    },
    /// Of a look at the host's firewall table: whether it was gone.
    Mended(Result<bool, NetError>),
    /// Of keeping what capsules used.
    UsageKept(Outcomes),
    /// Of what a stream asked about snapshots.
    Snapshots((PeerId, StreamId), SnapshotsReport),
}

/// What came of a request about snapshots.
#[derive(Debug)]
pub enum SnapshotsReport {
    /// All of them.
    Listed(Vec<SnapshotInfo>),
    /// It is deleted, or not.
    Deleted(Result<(), SnapshotError>),
}

/// What the host offers to capsules.
#[derive(Debug)]
pub struct Host {
    /// The data directory.
    pub layout: Layout,
    /// The configuration.
    pub config: Config,
    /// The kernel that guests boot.
    pub kernel: Kernel,
    /// The virtual machine monitor.
    pub vmm: Arc<Vmm>,
    /// Where the control groups of capsules are; none where there are none.
    pub groups: Option<Groups>,
    /// How disks are made.
    pub disks: Backend,
    /// CPU cores.
    pub cpu_cores: u32,
    /// Memory, in MiB.
    pub memory_mb: u32,
    /// The memory that capsules of one snapshot share.
    pub shared_memory: SharedMemory,
    /// When a create without a deadline of its own is given up, in milliseconds.
    pub create_deadline_ms: u64,
}

impl Host {
    /// The VMM of this kind: the host's own, or for what another has saved, that one, where it is here.
    /// Blocks for that.
    ///
    /// # Errors
    /// There is none, or it cannot be used here.
    pub fn vmm_of(&self, kind: Kind) -> Result<Arc<Vmm>, VmmError> {
        if self.vmm.kind() == kind {
            return Ok(Arc::clone(&self.vmm));
        }
        let wanted = match kind {
            Kind::Qemu => Wanted::Qemu,
            Kind::Firecracker => Wanted::Firecracker,
        };
        Vmm::find(wanted, self.config.qemu.as_deref(), &self.config.firecracker, self.disks).map(Arc::new)
    }
}

/// What the running agent shares.
pub struct Context {
    /// The host.
    pub host: Arc<Host>,
    /// The event loop's registry.
    pub registry: Registry,
    /// The blocking jobs.
    pub workers: Workers<Report>,
    /// Everything that waits for a time.
    pub timers: Timers<TimerKey>,
    /// The network slots.
    pub slots: SlotAllocator,
    sources: HashMap<Token, Source>,
    next_token: usize,
    started: Instant,
    now_ms: u64,
}

impl Context {
    /// A context whose clock starts now.
    pub fn new(host: Host, registry: Registry, workers: Workers<Report>, slots: SlotAllocator) -> Context {
        Context {
            host: Arc::new(host),
            registry,
            workers,
            timers: Timers::default(),
            slots,
            sources: HashMap::new(),
            next_token: 0,
            started: Instant::now(),
            now_ms: 0,
        }
    }

    /// The time of this turn of the loop, in milliseconds since the agent started.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Reads the clock; once a turn, so that a turn sees one time.
    pub fn update_clock(&mut self) {
        self.now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
    }

    /// When the agent started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// A token that leads to `source`. Never used twice, so a late event of something closed finds nothing.
    pub fn token(&mut self, source: Source) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.sources.insert(token, source);
        token
    }

    /// Registers something for reading and writing under a new token.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn watch(&mut self, io: &mut impl MioSource, source: Source) -> io::Result<Token> {
        let token = self.token(source);
        let registered = self.registry.register(io, token, Interest::READABLE | Interest::WRITABLE);
        if registered.is_err() {
            self.forget(token);
        }
        registered.map(|()| token)
    }

    /// What a token leads to.
    pub fn source(&self, token: Token) -> Option<Source> {
        self.sources.get(&token).copied()
    }

    /// A token leads nowhere any more.
    pub fn forget(&mut self, token: Token) {
        self.sources.remove(&token);
    }
}

/// A fresh nonce.
///
/// # Panics
/// When the kernel gives no random numbers: nothing could go on safely.
pub fn nonce() -> [u8; NONCE_LEN] {
    random_bytes()
}

/// Fresh random bytes.
///
/// # Panics
/// As [`nonce`].
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(e) = random::fill(&mut bytes) {
        panic!("the kernel gives no random numbers: {e}");
    }
    bytes
}
