//! Does what the state machine says: makes and removes each part, mostly by a job on the worker pool
//! whose report comes back as an event.

use super::failure::Failure;
use super::hibernation::PackReport;
use super::journal::{self, Phase, Step};
use super::lifecycle::{Event, Goal, Part};
use super::machine::{KILL_TIMEOUT_MS, MachineFailure};
use super::record::{self, Record};
use super::saving::{RestoreReport, SaveReport, SnapshotReport};
use super::{Capsule, CapsuleTimer, FIRST_UID, GuestLink, MIB, Source};
use crate::context::{Context, Report, Source as LoopSource, TimerKey};
use crate::disk::{self, Disk, DiskError, DiskSpec};
use crate::net::{CapsuleNetwork, NetError, Tap, destroy_remains, taken_name};
use crate::snapshots::link_disk;
use crate::sys::cgroup::{self, CgroupError};
use crate::vmm::Machine;
use std::fmt;
use std::io;
use std::path::Path;
use wire::message::CapsuleState;

/// Other slots that are tried when one turns out to be somebody else's.
const MAX_NETWORK_ATTEMPTS: u32 = 256;

/// What a job of a capsule reports.
#[derive(Debug)]
pub enum CapsuleReport {
    /// The directory and its record are there.
    RecordMade(io::Result<()>),
    /// The network is there.
    NetworkMade(Result<(CapsuleNetwork, Tap), NetworkFailure>),
    /// The disk is there.
    DiskMade(Result<Box<dyn Disk>, DiskError>),
    /// The machine runs and its record is written.
    MachineMade(Result<Box<Machine>, MachineFailure>),
    /// The network is gone, and the control group with it.
    NetworkRemoved(Result<(), RemoveFailure>),
    /// The disk is gone.
    DiskRemoved(Result<(), DiskError>),
    /// The directory is gone.
    RecordRemoved(io::Result<()>),
    /// The machine is saved, or its guest runs on.
    Saved(Box<SaveReport>),
    /// Its memory is packed, or lies there as it was.
    Packed(Box<PackReport>),
    /// There was no machine to save any more.
    NotSaved,
    /// A snapshot is made, or there is none; the guest runs on either way.
    SnapshotMade(Box<SnapshotReport>),
    /// The machine goes on from its image, or the capsule is still paused.
    Restored(Box<RestoreReport>),
    /// It is in the journal that the guest daemon has answered.
    ReadyNoted(io::Result<()>),
    /// It is in the journal that the capsule is to go.
    EndNoted(io::Result<()>),
}

/// Why there is no network.
#[derive(Debug)]
pub enum NetworkFailure {
    /// The record could not be written.
    Record(io::Error),
    /// The network could not be made.
    Net(NetError),
}

/// Why a network stays, or the control group of the processes that were in it.
#[derive(Debug)]
pub enum RemoveFailure {
    /// The control group could not be removed.
    Group(CgroupError),
    /// The network could not be removed.
    Net(NetError),
}

impl fmt::Display for RemoveFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RemoveFailure::Group(e) => e.fmt(f),
            RemoveFailure::Net(e) => e.fmt(f),
        }
    }
}

impl fmt::Display for NetworkFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetworkFailure::Record(e) => write!(f, "writing its record: {e}"),
            NetworkFailure::Net(e) => e.fmt(f),
        }
    }
}

impl Capsule {
    /// Begins to make a part. An event is returned where the outcome is known at once.
    pub(super) fn make(&mut self, ctx: &mut Context, part: Part) -> Option<Event> {
        match part {
            Part::Record => {
                let (record, directory) = (self.record.clone(), self.directory.clone());
                self.submit(ctx, move || CapsuleReport::RecordMade(record.create(&directory)));
                None
            }
            Part::Network => {
                self.make_network(ctx);
                None
            }
            Part::Disk => {
                let (backend, directory) = (ctx.host.disks, self.directory.clone());
                let (base, size_bytes) = (self.spec.image.clone(), self.spec.disk_bytes);
                let of_snapshot = self.spec.snapshot.is_some();
                self.submit(ctx, move || {
                    let create =
                        |base: &Path| backend.create(&DiskSpec { base, directory: &directory, size_bytes });
                    let failed = |step, path: &Path| {
                        let path = path.to_owned();
                        move |source| DiskError::System { step, path, source }
                    };
                    let note = |phase| {
                        let noted = journal::append(&directory, Step::Disk, phase, None);
                        noted.map_err(failed("noting a disk in the journal of", &directory))
                    };
                    let base = note(Phase::Begin).and_then(|()| match of_snapshot {
                        true => link_disk(&base, &directory).map_err(failed("linking", &base)),
                        false => Ok(base.clone()),
                    });
                    let made = base.and_then(|base| create(&base));
                    CapsuleReport::DiskMade(made.and_then(|disk| note(Phase::Done).map(|()| disk)))
                });
                None
            }
            Part::Machine => self.make_machine(ctx).err().map(|reason| make_failed(part, reason)),
            Part::Guest => {
                self.guest_attempts = 0;
                if self.lifecycle.state() == CapsuleState::Running {
                    // The session was lost; the first attempt waits as any further one does.
                    self.retry_guest(ctx, "the session was lost".into());
                } else {
                    self.connect_guest(ctx);
                }
                None
            }
        }
    }

    fn make_network(&mut self, ctx: &mut Context) {
        let Some(slot) = self.slot else { return };
        self.network_attempts += 1;
        self.record.slot = Some(slot.index());
        // Named before the machine that will be in it.
        self.record.group = self.group(ctx).map(|group| group.path().to_owned());
        let (record, directory) = (self.record.clone(), self.directory.clone());
        let wanted = self.policy.clone();
        self.submit(ctx, move || {
            if let Some(name) = taken_name(slot) {
                let taken = NetworkFailure::Net(NetError::NameTaken { name });
                return CapsuleReport::NetworkMade(Err(taken));
            }
            let begun = record
                .note(&directory, Step::Network, Phase::Begin)
                // A capsule that was there before has what was last asked for.
                .and_then(|()| wanted.load_or_save(&directory))
                .map_err(NetworkFailure::Record);
            let made =
                begun.and_then(|policy| CapsuleNetwork::create(slot, &policy).map_err(NetworkFailure::Net));
            CapsuleReport::NetworkMade(made.and_then(|made| {
                match journal::append(&directory, Step::Network, Phase::Done, None) {
                    Ok(()) => Ok(made),
                    Err(e) => {
                        if let Err(e) = made.0.destroy() {
                            log::error!("capsule {}: removing its network: {e}", record.capsule_id);
                        }
                        Err(NetworkFailure::Record(e))
                    }
                }
            }))
        });
    }

    /// Begins to remove a part. An event is returned where the outcome is known at once.
    pub(super) fn remove(&mut self, ctx: &mut Context, part: Part) -> Option<Event> {
        match part {
            Part::Guest => {
                self.drop_guest(ctx);
                Some(Event::Removed(part))
            }
            Part::Machine => {
                self.close_metadata(ctx);
                if self.machine.is_none() {
                    return Some(Event::Removed(part));
                }
                if self.lifecycle.goal() == Goal::Down && !self.record.destroying {
                    // An agent after this one must not take over what is being destroyed.
                    self.record.destroying = true;
                    let (record, directory) = (self.record.clone(), self.directory.clone());
                    self.submit(ctx, move || {
                        CapsuleReport::EndNoted(record.note(&directory, Step::Destroy, Phase::Begin))
                    });
                    return None;
                }
                self.kill_machine(ctx)
            }
            Part::Network => {
                self.tap = None;
                self.close_metadata(ctx);
                let directory = self.directory.clone();
                let (network, slot, group) = (self.network.take(), self.slot, self.record.group.clone());
                if network.is_none() && slot.is_none() {
                    return Some(Event::Removed(part));
                }
                // A slot that is given back may be another capsule's before this one's directory is gone: an agent
                // after this one must not take away what is there then. What that agent would keep needs its slot.
                let Record { ready, destroying, .. } = self.record;
                let is_going = self.lifecycle.goal() == Goal::Down && (destroying || !ready);
                let without = Record { slot: None, machine: None, group: None, ..self.record.clone() };
                let without = is_going.then_some(without);
                self.submit(ctx, move || {
                    // Its processes are the machine's, which is gone: now it goes.
                    let group = group.as_deref().map_or(Ok(()), cgroup::remove);
                    let remove = || match (network, slot) {
                        (Some(network), _) => network.destroy(),
                        // An earlier try took it and did not get through.
                        (None, Some(slot)) => destroy_remains(slot).map(|_| ()),
                        (None, None) => Ok(()),
                    };
                    let without = without.as_ref().filter(|_| group.is_ok());
                    let removed = remove_noted(&directory, without, remove);
                    CapsuleReport::NetworkRemoved(
                        group.map_err(RemoveFailure::Group).and(removed.map_err(RemoveFailure::Net)),
                    )
                });
                None
            }
            Part::Disk => {
                let directory = self.directory.clone();
                // A paused capsule has no machine whose end would have been noted.
                let was_noted = std::mem::replace(&mut self.record.destroying, true);
                let (record, disk) = (self.record.clone(), self.disk.take());
                self.submit(ctx, move || {
                    // One that nobody was told of is cleared away all the same.
                    if !was_noted
                        && record.ready
                        && let Err(e) = record.note(&directory, Step::Destroy, Phase::Begin)
                    {
                        log_unnoted(&record.capsule_id, &e);
                    }
                    if let Err(e) = journal::append(&directory, Step::RemoveDisk, Phase::Begin, None) {
                        log_unnoted(&record.capsule_id, &e);
                    }
                    // Where an earlier try did not get through, the files go with the directory.
                    CapsuleReport::DiskRemoved(match disk {
                        Some(disk) => disk.remove(),
                        None => disk::clear(&directory),
                    })
                });
                None
            }
            Part::Record => {
                let directory = self.directory.clone();
                self.submit(ctx, move || CapsuleReport::RecordRemoved(record::remove(&directory)));
                None
            }
        }
    }

    fn kill_machine(&mut self, ctx: &mut Context) -> Option<Event> {
        let part = Part::Machine;
        let Some(machine) = &mut self.machine else { return Some(Event::Removed(part)) };
        if let Err(e) = machine.kill() {
            return Some(remove_failed(part, e));
        }
        // A process that waits for a full disk cannot end. One that was saved waits for nothing, and its disk
        // is needed.
        if self.record.image.is_none()
            && let Err(e) = disk::release(&self.directory)
        {
            log::warn!("capsule {}: releasing its disk: {e}", self.spec.id);
        }
        self.set_timer(ctx, CapsuleTimer::Kill, KILL_TIMEOUT_MS);
        // It may have ended already, and its event may have been seen.
        self.reap(ctx)
    }

    /// Takes a job's report. The events are in their order.
    pub fn on_report(&mut self, ctx: &mut Context, report: CapsuleReport) -> Vec<Event> {
        if let CapsuleReport::Saved(report) = report {
            return self.on_saved(ctx, *report);
        }
        if let CapsuleReport::SnapshotMade(report) = report {
            return self.on_snapshot_made(ctx, *report);
        }
        self.on_other_report(ctx, report).into_iter().collect()
    }

    fn on_other_report(&mut self, ctx: &mut Context, report: CapsuleReport) -> Option<Event> {
        let elapsed = ctx.now_ms() - self.begun_ms;
        log::debug!("capsule {}: {} after {elapsed} ms", self.spec.id, report.name());
        match report {
            CapsuleReport::RecordMade(result) => Some(self.on_record_made(ctx, result)),
            CapsuleReport::NetworkMade(result) => self.on_network_made(ctx, result),
            CapsuleReport::DiskMade(result) => Some(match result {
                Ok(disk) => {
                    self.disk_mb = u32::try_from(disk.virtual_bytes().div_ceil(MIB)).unwrap_or(u32::MAX);
                    self.record.kept.disk_mb = self.disk_mb;
                    self.disk = Some(disk);
                    Event::Made(Part::Disk)
                }
                Err(e) if e.is_storage_full() => {
                    Event::MakeFailed(Part::Disk, Failure::NoRoom(e.to_string()))
                }
                Err(e) => make_failed(Part::Disk, e),
            }),
            CapsuleReport::MachineMade(result) => {
                Some(self.on_machine_made(ctx, result.map(|machine| *machine)))
            }
            CapsuleReport::NetworkRemoved(result) => Some(match result {
                Ok(()) => {
                    // A paused capsule keeps its addresses.
                    if self.lifecycle.goal() == Goal::Down {
                        self.free_slot(ctx);
                        (self.record.slot, self.record.group) = (None, None);
                    }
                    Event::Removed(Part::Network)
                }
                Err(e) => remove_failed(Part::Network, e),
            }),
            CapsuleReport::DiskRemoved(result) => Some(removed(Part::Disk, result)),
            CapsuleReport::RecordRemoved(result) => Some(removed(Part::Record, result)),
            CapsuleReport::Saved(_) | CapsuleReport::SnapshotMade(_) | CapsuleReport::NotSaved => {
                let failure = Failure::Save("the virtual machine has ended".into());
                // Which of the two was asked for.
                Some(match self.snapshot_order.take() {
                    Some(_) => Event::SnapshotFailed(failure),
                    None => Event::SaveFailed(failure),
                })
            }
            CapsuleReport::Restored(report) => Some(self.on_restored(ctx, *report)),
            CapsuleReport::ReadyNoted(Ok(())) => {
                self.record.ready = true;
                Some(Event::Made(Part::Guest))
            }
            CapsuleReport::ReadyNoted(Err(e)) => Some(Event::GuestRefused(Failure::Make {
                part: Part::Record,
                reason: format!("noting in its journal that it runs: {e}"),
            })),
            CapsuleReport::EndNoted(result) => {
                if let Err(e) = result {
                    log_unnoted(&self.spec.id, &e);
                }
                self.kill_machine(ctx)
            }
            CapsuleReport::Packed(report) => Some(self.on_packed(*report)),
        }
    }

    /// The guest daemon is well. Whoever asked for the capsule is told only when the next agent would know
    /// as well that it runs.
    pub fn on_welcome(&mut self, ctx: &mut Context) -> Option<Event> {
        if self.record.ready {
            return Some(Event::Made(Part::Guest));
        }
        self.record.kept.envd_version.clone_from(&self.envd_version);
        let (mut record, directory) = (self.record.clone(), self.directory.clone());
        record.ready = true;
        self.submit(ctx, move || {
            CapsuleReport::ReadyNoted(record.note(&directory, Step::Ready, Phase::Done))
        });
        None
    }

    fn on_record_made(&mut self, ctx: &mut Context, result: io::Result<()>) -> Event {
        match result {
            Ok(()) => Event::Made(Part::Record),
            Err(e) => {
                self.free_slot(ctx);
                make_failed(Part::Record, format!("{}: {e}", self.directory.display()))
            }
        }
    }

    fn on_network_made(
        &mut self,
        ctx: &mut Context,
        result: Result<(CapsuleNetwork, Tap), NetworkFailure>,
    ) -> Option<Event> {
        match result {
            Ok((network, tap)) => {
                self.network = Some(network);
                self.tap = Some(tap);
                Some(Event::Made(Part::Network))
            }
            Err(NetworkFailure::Net(NetError::NameTaken { name }))
                if self.network_attempts < MAX_NETWORK_ATTEMPTS && !self.lifecycle.has_image() =>
            {
                // Whoever has it is not ours to disturb.
                log::warn!("capsule {}: {name} is somebody else's, trying another slot", self.spec.id);
                if let Some(slot) = self.slot.take() {
                    ctx.slots.set_aside(slot);
                }
                self.slot = ctx.slots.allocate();
                match self.slot {
                    Some(slot) => {
                        // The other's VMM may run as the user of that slot.
                        self.record.uid = FIRST_UID + slot.index();
                        self.make_network(ctx);
                        None
                    }
                    None => Some(make_failed(Part::Network, "all network slots are in use")),
                }
            }
            Err(e) => {
                // A paused capsule's guest knows the addresses that go with its slot.
                if !self.lifecycle.has_image() {
                    self.free_slot(ctx);
                }
                Some(make_failed(Part::Network, e))
            }
        }
    }

    /// The metadata listener or one of its connections is ready.
    pub fn on_metadata_ready(&mut self, ctx: &mut Context, token: mio::Token, source: Source) {
        let now_ms = ctx.now_ms();
        let Some(metadata) = &mut self.metadata else { return };
        if source == Source::Metadata {
            let Ok(registry) = ctx.registry.try_clone() else { return };
            let key = self.key;
            let source = LoopSource::Capsule(key, Source::MetadataConnection);
            for refused in metadata.accept(&registry, now_ms, || ctx.token(source)) {
                ctx.forget(refused);
            }
        } else if metadata.serve(token, now_ms) {
            ctx.forget(token);
        }
        if let Some(at) = metadata.next_timeout_ms() {
            ctx.timers.set(TimerKey::Capsule(self.key, CapsuleTimer::Metadata), at);
        }
        if metadata.take_fetched() {
            self.on_metadata_fetched(ctx);
        }
    }

    /// Metadata connections may have been open for too long.
    pub fn on_metadata_timer(&mut self, ctx: &mut Context) {
        let Some(metadata) = &mut self.metadata else { return };
        for token in metadata.expire(ctx.now_ms()) {
            ctx.forget(token);
        }
        if let Some(at) = metadata.next_timeout_ms() {
            ctx.timers.set(TimerKey::Capsule(self.key, CapsuleTimer::Metadata), at);
        }
    }

    pub(super) fn close_metadata(&mut self, ctx: &mut Context) {
        ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::Metadata));
        if let Some(metadata) = self.metadata.take() {
            for token in metadata.tokens() {
                ctx.forget(token);
            }
        }
    }

    pub(super) fn free_slot(&mut self, ctx: &mut Context) {
        if let Some(slot) = self.slot.take() {
            ctx.slots.release(slot);
        }
    }

    pub(super) fn submit(&self, ctx: &Context, job: impl FnOnce() -> CapsuleReport + Send + 'static) {
        let key = self.key;
        ctx.workers.submit(move || Report::Capsule(key, job()));
    }

    /// Whether an attempt to reach the guest daemon is under way or planned.
    pub fn is_connecting(&self) -> bool {
        !matches!(self.guest, GuestLink::Down)
    }
}

/// A full disk must not keep a capsule from being destroyed.
fn log_unnoted(id: &str, error: &io::Error) {
    log::warn!("capsule {id}: its end is not in its journal: {error}");
}

/// Takes a network away, with a note before and after; from there on the capsule owns what is in `without`.
fn remove_noted(
    directory: &Path,
    without: Option<&Record>,
    remove: impl FnOnce() -> Result<(), NetError>,
) -> Result<(), NetError> {
    let note = |phase, record| {
        if let Err(e) = journal::append(directory, Step::RemoveNetwork, phase, record) {
            log::warn!("{}: noting the removal of its network: {e}", directory.display());
        }
    };
    note(Phase::Begin, None);
    remove()?;
    note(Phase::Done, without);
    Ok(())
}

pub(super) fn make_failed(part: Part, reason: impl ToString) -> Event {
    Event::MakeFailed(part, Failure::Make { part, reason: reason.to_string() })
}

pub(super) fn remove_failed(part: Part, reason: impl ToString) -> Event {
    Event::RemoveFailed(part, Failure::Remove { part, reason: reason.to_string() })
}

fn removed<E: ToString>(part: Part, result: Result<(), E>) -> Event {
    match result {
        Ok(()) => Event::Removed(part),
        Err(e) => remove_failed(part, e.to_string()),
    }
}

impl CapsuleReport {
    fn name(&self) -> &'static str {
        match self {
            CapsuleReport::RecordMade(_) => "record made",
            CapsuleReport::NetworkMade(_) => "network made",
            CapsuleReport::DiskMade(_) => "disk made",
            CapsuleReport::MachineMade(_) => "machine started",
            CapsuleReport::NetworkRemoved(_) => "network removed",
            CapsuleReport::DiskRemoved(_) => "disk removed",
            CapsuleReport::RecordRemoved(_) => "record removed",
            CapsuleReport::Saved(_) => "saved",
            CapsuleReport::SnapshotMade(_) => "snapshot made",
            CapsuleReport::NotSaved => "not saved",
            CapsuleReport::Restored(_) => "restored",
            CapsuleReport::ReadyNoted(_) => "ready noted",
            CapsuleReport::EndNoted(_) => "end noted",
            CapsuleReport::Packed(_) => "packed",
        }
    }
}
