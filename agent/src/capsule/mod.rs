//! Capsules: one microVM each, with everything that belongs to it.
//!
//! - [`lifecycle`]: the pure state machine; what happens next is decided there and nowhere else
//! - [`admission`]: whether the host has room for one more
//! - [`failure`]: why one could not be made, ended, or could not be removed
//! - [`spec`]: what was asked for, checked
//! - `executor`: does what the state machine says, through worker jobs
//! - `machine`: starting the virtual machine, watching it, and its end
//! - `saving`: pausing it and letting it go on
//! - `hibernation`: packing the memory of one that is paused
//! - `guest`: the way to the guest daemon
//! - `stall`: a guest that waits for room on the host
//! - `watch`: changing what it may reach, and what it uses
//! - [`limits`]: what its processes may use of the host
//! - [`metadata`]: the guest's metadata service
//! - [`record`]: what a capsule owns
//! - [`table`]: all capsules, by their numbers in this run of the agent
//! - [`journal`]: what was intended and done, on disk
//! - [`recovery`]: going on with what an agent before this one has left, and clearing away the rest

pub mod admission;
pub mod failure;
pub mod journal;
pub mod lifecycle;
pub mod limits;
pub mod metadata;
pub mod record;
pub mod recovery;
pub mod spec;
pub mod table;

mod executor;
mod guest;
mod hibernation;
mod machine;
mod saving;
mod stall;
mod timing;
mod watch;

pub use executor::CapsuleReport;
pub use guest::{Greeting, GuestLink, GuestSession};
pub use recovery::{LeftPaused, LeftRunning};
pub use spec::{Spec, SpecError};

use crate::context::{Context, PeerId, TimerKey};
use crate::disk::Disk;
use crate::metrics::{Probe, Usage};
use crate::net::{CapsuleNetwork, GUEST_ADDRESS, Policy, Slot, Tap};
use crate::vmm::Machine;
use lifecycle::{Action, Event, Lifecycle};
use metadata::MetadataService;
use mio::Token;
use record::{Kept, Record};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use wire::message::{CapsuleInfo, CapsuleState, SnapshotInfo};
use wire::session::StreamId;

/// A capsule's number in this run of the agent, never used twice.
pub type CapsuleKey = u64;

/// The user and group ids of VMMs: this plus the capsule's slot. The range is free on a Debian
/// system and with systemd (its "Users, Groups, UIDs and GIDs"), subordinate ids included.
pub const FIRST_UID: u32 = 2_000_000_000;
/// The most requests that may wait for the end of one capsule.
pub const MAX_WAITERS: usize = 64;
const MIB: u64 = 1024 * 1024;

/// What of a capsule a readiness event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The VMM's process has ended.
    Exit,
    /// The VMM's control socket.
    Monitor,
    /// The guest's console.
    Console,
    /// The metadata listener.
    Metadata,
    /// A connection to the metadata service.
    MetadataConnection,
    /// The connection to the guest daemon.
    Guest,
}

/// What of a capsule a timer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CapsuleTimer {
    /// Creating has taken too long.
    Deadline,
    /// The next attempt to connect to the guest daemon.
    Guest,
    /// The guest session has something to do.
    GuestSession,
    /// The VMM was killed and has not ended.
    Kill,
    /// Another try of a removal.
    Retry,
    /// A metadata connection is too slow.
    Metadata,
    /// The guest has had its time to get ready for being saved.
    Prepare,
    /// It may have been idle for its `timeout_sec`.
    Idle,
    /// It may have run for `WRENN_MAX_RUN_SEC`.
    RunTime,
    /// It has been paused for so long that its memory is packed.
    Hibernate,
}

/// Somebody who waits for an answer: a stream of a control plane's session.
pub type Waiter = (PeerId, StreamId);

/// One capsule.
pub struct Capsule {
    /// Its number in this run of the agent.
    pub key: CapsuleKey,
    /// What was asked for.
    pub spec: Spec,
    /// Where it is in its life.
    pub lifecycle: Lifecycle,
    /// The connection to its guest daemon.
    pub guest: GuestLink,
    /// Who waits for it to run.
    pub creator: Option<Waiter>,
    /// Who waits for it to be paused, resumed or made a snapshot of.
    pub caller: Option<Waiter>,
    /// Who waits for it to be gone.
    pub destroyers: Vec<Waiter>,
    /// Streams of the guest session that belong to a control plane's stream.
    pub forwards: BTreeMap<StreamId, Waiter>,
    /// When it was asked for, in the agent's milliseconds.
    pub begun_ms: u64,
    /// When somebody last had to do with it, in the agent's milliseconds.
    pub active_ms: u64,
    /// Before this it is not paused for having run too long; in milliseconds on the agent's clock.
    pub runs_until_ms: u64,
    /// What its guest may reach at first. What holds later is in its directory.
    pub policy: Policy,
    /// What it used.
    pub usage: Usage,
    probe: Option<Probe>,
    disk_bytes: Option<u64>,
    directory: PathBuf,
    record: Record,
    secret: Vec<u8>,
    slot: Option<Slot>,
    network: Option<CapsuleNetwork>,
    network_attempts: u32,
    tap: Option<Tap>,
    disk: Option<Box<dyn Disk>>,
    disk_mb: u32,
    machine: Option<Machine>,
    machine_tokens: Vec<Token>,
    shutdown_reason: Option<String>,
    /// The VMM has stopped its guest.
    stalled: bool,
    metadata: Option<MetadataService>,
    guest_attempts: u32,
    last_guest_error: String,
    envd_version: String,
    preparing: Option<StreamId>,
    snapshot_order: Option<SnapshotOrder>,
    /// What was made of the last order.
    pub made_snapshot: Option<SnapshotInfo>,
    /// Held while its machine may map it.
    shared_memory: Option<Arc<File>>,
    /// Whether somebody wants it while its memory is being packed.
    stop_packing: Arc<AtomicBool>,
}

/// A snapshot that was asked for.
#[derive(Debug, Clone)]
pub struct SnapshotOrder {
    /// Its name.
    pub name: String,
    /// Whether it takes another's place.
    pub overwrite: bool,
}

impl Capsule {
    /// A capsule of which nothing exists yet, in `slot`.
    pub fn new(key: CapsuleKey, spec: Spec, directory: PathBuf, slot: Slot, now_ms: u64) -> Capsule {
        let secret = crate::context::random_bytes::<32>().to_vec();
        let record = Record {
            version: record::VERSION,
            capsule_id: spec.id.clone(),
            template: spec.template.clone(),
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            uid: FIRST_UID + slot.index(),
            slot: None,
            machine: None,
            image: None,
            base: None,
            generation: 0,
            ready: false,
            destroying: false,
            group: None,
            kept: Kept::new(&spec, &secret),
        };
        // What it was promised, until its disk is made and tells.
        let disk_bytes = spec.disk_bytes.or_else(|| spec.image.metadata().ok().map(|m| m.len()));
        let disk_mb = disk_bytes.unwrap_or(0).div_ceil(MIB);
        let mut capsule = Capsule::with(key, spec, directory, slot, now_ms, record, secret);
        capsule.disk_mb = u32::try_from(disk_mb).unwrap_or(u32::MAX);
        capsule
    }

    /// A capsule that an earlier agent has left paused.
    pub fn left_paused(
        key: CapsuleKey,
        (spec, secret): (Spec, Vec<u8>),
        directory: PathBuf,
        left: LeftPaused,
        now_ms: u64,
    ) -> Capsule {
        let LeftPaused { record, slot, disk, usage } = left;
        let mut capsule = Capsule::with(key, spec, directory, slot, now_ms, record, secret);
        capsule.lifecycle = Lifecycle::paused(capsule.record.image.is_some_and(|image| image.packed));
        capsule.take_disk(disk);
        capsule.usage = usage;
        capsule
    }

    /// A capsule that an earlier agent has left running. [`Capsule::adopt_machine`] follows.
    pub fn left_running(
        key: CapsuleKey,
        (spec, secret): (Spec, Vec<u8>),
        directory: PathBuf,
        left: LeftRunning,
        now_ms: u64,
    ) -> Capsule {
        let LeftRunning { record, network, disk, machine, usage } = left;
        let mut capsule = Capsule::with(key, spec, directory, network.slot(), now_ms, record, secret);
        capsule.lifecycle = Lifecycle::running();
        capsule.take_disk(disk);
        capsule.network = Some(network);
        capsule.machine = Some(machine);
        capsule.usage = usage;
        capsule
    }

    fn take_disk(&mut self, disk: Box<dyn Disk>) {
        self.disk_mb = u32::try_from(disk.virtual_bytes().div_ceil(MIB)).unwrap_or(u32::MAX);
        self.record.kept.disk_mb = self.disk_mb;
        self.disk_bytes = disk.allocated_bytes().ok();
        self.disk = Some(disk);
        self.envd_version.clone_from(&self.record.kept.envd_version);
    }

    fn with(
        key: CapsuleKey,
        spec: Spec,
        directory: PathBuf,
        slot: Slot,
        now_ms: u64,
        record: Record,
        secret: Vec<u8>,
    ) -> Capsule {
        Capsule {
            key,
            policy: Policy::internet(spec.allow_internet),
            usage: Usage::default(),
            probe: None,
            disk_bytes: None,
            spec,
            lifecycle: Lifecycle::new(),
            guest: GuestLink::Down,
            creator: None,
            caller: None,
            destroyers: Vec::new(),
            forwards: BTreeMap::new(),
            begun_ms: now_ms,
            active_ms: now_ms,
            runs_until_ms: 0,
            directory,
            record,
            secret,
            slot: Some(slot),
            network: None,
            network_attempts: 0,
            tap: None,
            disk: None,
            disk_mb: 0,
            machine: None,
            machine_tokens: Vec::new(),
            shutdown_reason: None,
            stalled: false,
            metadata: None,
            guest_attempts: 0,
            last_guest_error: String::new(),
            envd_version: String::new(),
            preparing: None,
            snapshot_order: None,
            made_snapshot: None,
            shared_memory: None,
            stop_packing: Arc::default(),
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> CapsuleState {
        self.lifecycle.state()
    }

    /// Whether it holds memory and CPUs of the host.
    pub fn holds_resources(&self) -> bool {
        self.lifecycle.holds_machine()
    }

    /// Feeds the state machine and does what it says as far as the capsule can by itself. The actions
    /// that are for others are returned in order.
    pub fn handle(&mut self, ctx: &mut Context, event: Event) -> Vec<Action> {
        let mut for_others = Vec::new();
        let mut events = std::collections::VecDeque::from([event]);
        // Ends: every event either moves a part towards the goal or waits for a worker or timer.
        while let Some(event) = events.pop_front() {
            log::trace!("capsule {}: {event:?}", self.spec.id);
            for action in self.lifecycle.handle(event) {
                match action {
                    Action::Make(part) => events.extend(self.make(ctx, part)),
                    Action::Remove(part) => events.extend(self.remove(ctx, part)),
                    Action::Save | Action::MakeSnapshot => self.begin_save(ctx),
                    Action::Pack => self.begin_packing(ctx),
                    Action::StopPacking => self.stop_packing(),
                    Action::RetryAfter(wait_ms) => self.set_timer(ctx, CapsuleTimer::Retry, wait_ms),
                    other => {
                        if matches!(
                            other,
                            Action::Created
                                | Action::Forget
                                | Action::Ended
                                | Action::Finished(_)
                                | Action::Failed(..)
                        ) {
                            ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::Deadline));
                        }
                        if matches!(other, Action::Forget | Action::Ended) {
                            // It had a slot from the start, perhaps never a network.
                            self.free_slot(ctx);
                        }
                        for_others.push(other);
                    }
                }
            }
        }
        for_others
    }

    /// What the next snapshot of it is to be.
    pub fn order_snapshot(&mut self, order: SnapshotOrder) {
        self.snapshot_order = Some(order);
    }

    /// What is told of it.
    pub fn info(&self, ctx: &Context) -> CapsuleInfo {
        let disk = self.disk.as_ref().and_then(|d| d.allocated_bytes().ok()).unwrap_or(0);
        let image = self.record.image.map_or(0, |image| image.allocated_bytes(&self.directory));
        let used = disk + image;
        let mut metadata = Vec::new();
        if self.state() == CapsuleState::Running {
            metadata = vec![
                ("agent_version".into(), env!("CARGO_PKG_VERSION").into()),
                ("envd_version".into(), self.envd_version.clone()),
                ("kernel_version".into(), ctx.host.kernel.version.clone()),
                ("vmm_version".into(), ctx.host.vmm.describe()),
            ];
        }
        CapsuleInfo {
            capsule_id: self.spec.id.clone(),
            state: self.state(),
            template: self.spec.template.clone(),
            vcpus: self.spec.vcpus,
            memory_mb: self.spec.memory_mb,
            disk_size_mb: self.disk_mb,
            disk_used_mb: u32::try_from(used.div_ceil(MIB)).unwrap_or(u32::MAX),
            guest_ip: GUEST_ADDRESS.to_string(),
            host_ip: self.slot.map(|s| s.host_ip().to_string()).unwrap_or_default(),
            metadata,
        }
    }

    /// The session to its guest daemon, if streams may be opened on it.
    pub fn welcome_guest(&mut self) -> Option<&mut GuestSession> {
        match &mut self.guest {
            GuestLink::Up(guest) if guest.is_welcome() => Some(guest),
            _ => None,
        }
    }

    /// The session to its guest daemon, whatever its state.
    pub fn session(&mut self) -> Option<&mut GuestSession> {
        match &mut self.guest {
            GuestLink::Up(guest) => Some(guest),
            _ => None,
        }
    }

    fn set_timer(&self, ctx: &mut Context, timer: CapsuleTimer, wait_ms: u64) {
        let at = ctx.now_ms() + wait_ms;
        ctx.timers.set(TimerKey::Capsule(self.key, timer), at);
    }
}
