//! Pausing a capsule and letting it go on.
//!
//! Pausing: the guest daemon writes its file system out, the guest is stood still, memory and devices go
//! to new files, and once those are on disk the record names them. That record is the moment at which the
//! capsule is paused; whatever happens before, it runs on, and whatever happens after, it is paused.
//!
//! Going on: a machine is started of the files and stands still. Then the record stops naming the files,
//! and the guest is let go. Whatever happens before that, the capsule is still paused.

use super::executor::{CapsuleReport, make_failed};
use super::failure::Failure;
use super::hibernation::unpack;
use super::journal::{self, Phase, Step};
use super::lifecycle::{Event, Part};
use super::machine::KILL_TIMEOUT_MS;
use super::record::{ProcessRecord, Record};
use super::{Capsule, CapsuleTimer, SnapshotOrder};
use crate::context::{Context, Host, TimerKey};
use crate::disk::{Disk, DiskError};
use crate::layout::Layout;
use crate::net::Tap;
use crate::snapshots::{self, Draft, Manifest, Snapshot, SnapshotError};
use crate::vmm::image::{Written, clean};
use crate::vmm::{Image, Machine, MachineSpec, VmmError};
use crate::zstd::ZstdError;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use wire::message::{GuestPrepareSnapshot, SnapshotInfo};

/// How long a guest daemon may take to write its file system out. One that does not answer is saved as it
/// is: its memory holds what its disk does not.
pub const PREPARE_TIMEOUT_MS: u64 = 10_000;

/// Whom the files of snapshots belong to: the agent reads them for those who use them.
const OWNER_OF_SNAPSHOTS: u32 = 0;

/// Why a capsule could not be saved or restored.
#[derive(Debug)]
pub enum SaveFailure {
    /// The record could not be written.
    Record(io::Error),
    /// The disk could not be written out.
    Disk(PathBuf, io::Error),
    /// The machine could not be saved or restored.
    Vmm(VmmError),
    /// The same, with what the VMM said in the end.
    Said(VmmError, String),
    /// Its memory could not be packed or unpacked.
    Zstd(ZstdError),
    /// There is nothing to restore.
    NoImage,
    /// There is no disk to copy.
    NoDisk,
    /// The disk could not be copied.
    Flatten(DiskError),
    /// The snapshot could not be made.
    Snapshot(SnapshotError),
}

impl fmt::Display for SaveFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SaveFailure::Record(e) => write!(f, "writing its record: {e}"),
            SaveFailure::Disk(path, e) => write!(f, "writing out {}: {e}", path.display()),
            SaveFailure::Vmm(e) => e.fmt(f),
            SaveFailure::Said(e, said) => write!(f, "{e}; it said: {said}"),
            SaveFailure::Zstd(e) => e.fmt(f),
            SaveFailure::NoImage => f.write_str("it has no image"),
            SaveFailure::NoDisk => f.write_str("it has no disk"),
            SaveFailure::Flatten(e) => e.fmt(f),
            SaveFailure::Snapshot(e) => e.fmt(f),
        }
    }
}

/// What came of saving.
#[derive(Debug)]
pub struct SaveReport {
    machine: Machine,
    record: Record,
    result: Result<Written, SaveFailure>,
    took_ms: u128,
}

/// What came of restoring.
#[derive(Debug)]
pub struct RestoreReport {
    record: Record,
    result: Result<Machine, SaveFailure>,
    /// What it shares with others.
    memory: Option<Arc<File>>,
}

/// What came of making a snapshot.
#[derive(Debug)]
pub struct SnapshotReport {
    machine: Machine,
    disk: Option<Box<dyn Disk>>,
    result: Result<SnapshotInfo, SaveFailure>,
    stood_ms: u128,
}

impl Capsule {
    /// Asks the guest daemon to get ready, or saves at once where there is none.
    pub(super) fn begin_save(&mut self, ctx: &mut Context) {
        let asked = self.welcome_guest().map(|g| g.link.session.open(&GuestPrepareSnapshot {}, true));
        match asked {
            Some(Ok(stream)) => {
                self.preparing = Some(stream);
                self.set_timer(ctx, CapsuleTimer::Prepare, PREPARE_TIMEOUT_MS);
            }
            _ => self.save(ctx),
        }
    }

    /// The guest daemon has answered, its time is over, or it is gone.
    pub fn on_prepared(&mut self, ctx: &mut Context) {
        if self.preparing.take().is_some() {
            ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::Prepare));
            self.save(ctx);
        }
    }

    fn save(&mut self, ctx: &mut Context) {
        // What is told of it meanwhile waits in its descriptors until it is back.
        let Some(machine) = self.machine.take() else {
            // It ended while the guest got ready. Told by way of the loop, like any other outcome.
            self.submit(ctx, || CapsuleReport::NotSaved);
            return;
        };
        if let Some(order) = self.snapshot_order.take() {
            self.make_snapshot(ctx, machine, order);
            return;
        }
        self.record.generation += 1;
        self.record.kept.envd_version.clone_from(&self.envd_version);
        let (record, directory) = (self.record.clone(), self.directory.clone());
        let disk = self.disk.as_ref().map(|disk| disk.image().path);
        self.submit(ctx, move || CapsuleReport::Saved(Box::new(save(machine, record, &directory, disk))));
    }

    fn make_snapshot(&mut self, ctx: &mut Context, machine: Machine, order: SnapshotOrder) {
        let (host, disk, directory) = (ctx.host.clone(), self.disk.take(), self.directory.clone());
        let vmm = host.vmm.describe();
        let manifest = snapshots::manifest(self.spec.vcpus, self.spec.memory_mb, self.disk_mb, vmm);
        self.submit(ctx, move || {
            note(&directory, Step::Snapshot, Phase::Begin);
            let report = make_snapshot(machine, disk, &host.layout, &manifest, &order);
            note(&directory, Step::Snapshot, if report.result.is_ok() { Phase::Done } else { Phase::Failed });
            CapsuleReport::SnapshotMade(Box::new(report))
        });
    }

    pub(super) fn on_snapshot_made(&mut self, ctx: &mut Context, report: SnapshotReport) -> Vec<Event> {
        let SnapshotReport { machine, disk, result, stood_ms } = report;
        self.machine = Some(machine);
        self.disk = disk;
        let event = match result {
            Ok(info) => {
                log::info!("capsule {}: snapshot {}, stood still for {stood_ms} ms", self.spec.id, info.name);
                self.made_snapshot = Some(info);
                Event::SnapshotMade
            }
            Err(e) => Event::SnapshotFailed(Failure::Save(e.to_string())),
        };
        self.set_clock_again();
        self.look_at_machine(ctx, event)
    }

    pub(super) fn on_saved(&mut self, ctx: &mut Context, report: SaveReport) -> Vec<Event> {
        let SaveReport { machine, record, result, took_ms } = report;
        self.machine = Some(machine);
        self.record = record;
        let event = match result {
            Ok(written) => {
                let what = if written.is_delta { "that had changed" } else { "in all" };
                let kib = written.memory_bytes / 1024;
                log::info!("capsule {}: saved in {took_ms} ms, {kib} KiB of memory {what}", self.spec.id);
                Event::Saved
            }
            Err(e) => {
                self.set_clock_again();
                Event::SaveFailed(Failure::Save(e.to_string()))
            }
        };
        self.look_at_machine(ctx, event)
    }

    /// The machine is back: its end may have come while nobody looked, and goes before what was done with it.
    fn look_at_machine(&mut self, ctx: &mut Context, event: Event) -> Vec<Event> {
        self.pump_machine();
        self.reap(ctx).into_iter().chain([event]).collect()
    }

    /// The guest stood still, and its clock with it.
    fn set_clock_again(&mut self) {
        if self.welcome_guest().is_some() {
            self.greet_guest();
        }
    }

    pub(super) fn on_restored(&mut self, ctx: &mut Context, report: RestoreReport) -> Event {
        self.record = report.record;
        self.shared_memory = report.memory;
        match report.result {
            Ok(machine) => {
                self.watch_new_machine(ctx, machine);
                Event::Made(Part::Machine)
            }
            Err(e) => {
                self.close_metadata(ctx);
                make_failed(Part::Machine, e)
            }
        }
    }
}

/// Writes a running machine and its disk down under a name; its guest stands still meanwhile. Blocks.
fn make_snapshot(
    mut machine: Machine,
    disk: Option<Box<dyn Disk>>,
    layout: &Layout,
    manifest: &Manifest,
    order: &SnapshotOrder,
) -> SnapshotReport {
    let began = Instant::now();
    let drafted = Draft::new(layout).map_err(SaveFailure::Snapshot).and_then(|draft| {
        machine
            .save(draft.directory(), snapshots::GENERATION, None, OWNER_OF_SNAPSHOTS)
            .map_err(SaveFailure::Vmm)?;
        let disk = disk.as_ref().ok_or(SaveFailure::NoDisk)?;
        disk.flatten(&draft.disk()).map_err(SaveFailure::Flatten)?;
        Ok(draft)
    });
    // The machine may not have been stopped; going on then is nothing.
    if let Err(e) = machine.go_on() {
        log::error!("snapshot {}: the guest does not go on: {e}", order.name);
        if let Err(e) = machine.kill() {
            log::error!("snapshot {}: killing the VMM: {e}", order.name);
        }
    }
    let stood_ms = began.elapsed().as_millis();
    let result = drafted.and_then(|draft| {
        let made = draft.publish(layout, &order.name, manifest, order.overwrite);
        made.map(|snapshot| snapshot.info(&order.name)).map_err(SaveFailure::Snapshot)
    });
    SnapshotReport { machine, disk, result, stood_ms }
}

/// Notes a step that nothing depends on: without it the next agent finds the same.
fn note(directory: &Path, step: Step, phase: Phase) {
    if let Err(e) = journal::append(directory, step, phase, None) {
        log::warn!("{}: noting {step:?} {phase:?} in the journal: {e}", directory.display());
    }
}

/// Starts a machine of a snapshot and lets its guest go on. Blocks.
pub(super) fn start_from_snapshot(
    host: &Host,
    snapshot: &Snapshot,
    mut spec: MachineSpec,
    tap: Tap,
    namespace: OwnedFd,
    mut record: Record,
    directory: &Path,
) -> CapsuleReport {
    let opened = match host.vmm.shares_files() {
        true => snapshot.open(),
        false => host.shared_memory.open(snapshot),
    };
    let started = opened.map_err(SaveFailure::Vmm).and_then(|restore| {
        spec.restore = Some(restore.clone());
        note(directory, Step::Machine, Phase::Begin);
        let mut machine = host.vmm.start(&spec, tap, namespace.as_fd()).map_err(SaveFailure::Vmm)?;
        record.machine = Some(ProcessRecord::of(&machine));
        let gone_on = record
            .note(directory, Step::Machine, Phase::Done)
            .map_err(SaveFailure::Record)
            .and_then(|()| machine.wait_until_restored().map_err(SaveFailure::Vmm))
            // Now it has all of its files.
            .and_then(|()| snapshot.check_whole(directory).map_err(SaveFailure::Snapshot))
            .and_then(|()| machine.go_on().map_err(SaveFailure::Vmm));
        match gone_on {
            Ok(()) => Ok((machine, restore.memory)),
            Err(e) => Err(end(machine, e)),
        }
    });
    let (result, memory) = match started {
        Ok((machine, memory)) => (Ok(machine), Some(memory)),
        Err(e) => {
            record.machine = None;
            (Err(e), None)
        }
    };
    CapsuleReport::Restored(Box::new(RestoreReport { record, result, memory }))
}

/// Ends a machine that could not go on; why, with what it said itself.
fn end(mut machine: Machine, why: SaveFailure) -> SaveFailure {
    if let Err(e) = machine.kill().and_then(|()| machine.wait(KILL_TIMEOUT_MS as i32).map(drop)) {
        log::error!("killing the VMM {}: {e}", machine.pid());
    }
    let said = machine.diagnostics();
    match why {
        SaveFailure::Vmm(e) if !said.trim().is_empty() => SaveFailure::Said(e, said.trim().into()),
        other => other,
    }
}

/// Saves a machine and records that. Blocks.
fn save(mut machine: Machine, mut record: Record, directory: &Path, disk: Option<PathBuf>) -> SaveReport {
    let began = Instant::now();
    let before = record.clone();
    let saved = record
        .note(directory, Step::Save, Phase::Begin)
        .map_err(SaveFailure::Record)
        .and_then(|()| {
            machine.save(directory, record.generation, record.base, record.uid).map_err(SaveFailure::Vmm)
        })
        .and_then(|(image, written)| {
            if let Some(disk) = disk {
                let out = File::open(&disk).and_then(|file| file.sync_all());
                out.map_err(|e| SaveFailure::Disk(disk, e))?;
            }
            if image.delta.is_some() {
                // It may have been unpacked when the machine was started, which nobody waited for.
                let memory = image.memory_path(directory);
                let out = File::open(&memory).and_then(|file| file.sync_all());
                out.map_err(|e| SaveFailure::Disk(memory, e))?;
            }
            record.image = Some(image);
            record.note(directory, Step::Save, Phase::Done).map_err(SaveFailure::Record)?;
            Ok((image, written))
        });
    let result = match saved {
        Ok((image, written)) => {
            bring_up_to_date(image, &mut record, directory);
            Ok(written)
        }
        Err(e) => {
            record = before;
            run_on(&mut machine, &record, directory);
            Err(e)
        }
    };
    SaveReport { machine, record, result, took_ms: began.elapsed().as_millis() }
}

/// Puts what has changed into the memory's file. Where that fails it is done when the capsule goes on.
fn bring_up_to_date(image: Image, record: &mut Record, directory: &Path) {
    let merged = image.merge(directory).map_err(SaveFailure::Vmm).and_then(|merged| {
        let updated = Record { image: Some(merged), base: None, ..record.clone() };
        updated.note(directory, Step::Merge, Phase::Done).map_err(SaveFailure::Record)?;
        Ok(updated)
    });
    match merged {
        Ok(updated) => *record = updated,
        Err(e) => log::warn!("capsule {}: bringing its memory up to date: {e}", record.capsule_id),
    }
    clean(directory, record.image.as_ref(), record.base);
}

/// After a failure: the record is as before, and the guest goes on. A machine that cannot has to end, so
/// that its capsule does not look as if it ran.
fn run_on(machine: &mut Machine, record: &Record, directory: &Path) {
    let noted = record.note(directory, Step::Save, Phase::Failed).or_else(|e| {
        // The step is not over in the journal, as after a crash in its midst. Only where the journal has an image
        // may the guest not run.
        match journal::read(directory) {
            Ok(Some(history)) if history.record.image.is_none() => {
                log::warn!("capsule {}: that it runs on is not in its journal: {e}", record.capsule_id);
                Ok(())
            }
            _ => Err(e),
        }
    });
    let gone_on = noted.map_err(SaveFailure::Record).and_then(|()| {
        clean(directory, None, record.base);
        machine.go_on().map_err(SaveFailure::Vmm)
    });
    if let Err(e) = gone_on {
        log::error!("capsule {}: its guest does not go on: {e}", record.capsule_id);
        if let Err(e) = machine.kill() {
            log::error!("capsule {}: killing the VMM: {e}", record.capsule_id);
        }
    }
}

/// Starts a machine of an image and lets its guest go on. Blocks.
pub(super) fn restore(
    host: &Host,
    mut spec: MachineSpec,
    tap: Tap,
    namespace: OwnedFd,
    mut record: Record,
    directory: &Path,
) -> CapsuleReport {
    let result = start_restored(host, &mut spec, tap, namespace, &mut record, directory);
    if result.is_err() {
        // What was unpacked for it.
        clean(directory, record.image.as_ref(), record.base);
    }
    CapsuleReport::Restored(Box::new(RestoreReport { record, result, memory: None }))
}

fn start_restored(
    host: &Host,
    spec: &mut MachineSpec,
    tap: Tap,
    namespace: OwnedFd,
    record: &mut Record,
    directory: &Path,
) -> Result<Machine, SaveFailure> {
    let image = record.image.ok_or(SaveFailure::NoImage)?;
    unpack(&image, record, directory)?;
    let merged = image.merge(directory).map_err(SaveFailure::Vmm)?;
    spec.restore = Some(merged.open(directory).map_err(SaveFailure::Vmm)?);
    note(directory, Step::Machine, Phase::Begin);
    let vmm = host.vmm_of(merged.vmm).map_err(SaveFailure::Vmm)?;
    let mut machine = vmm.start(spec, tap, namespace.as_fd()).map_err(SaveFailure::Vmm)?;
    let process = ProcessRecord::of(&machine);
    // Named while the capsule is still paused: an agent after this one ends it.
    let still_paused = Record { image: Some(merged), base: None, machine: Some(process), ..record.clone() };
    let runs = Record { image: None, base: Some(merged.memory), ..still_paused.clone() };
    let gone_on = still_paused
        .note(directory, Step::Machine, Phase::Done)
        .map_err(SaveFailure::Record)
        .and_then(|()| machine.wait_until_restored().map_err(SaveFailure::Vmm))
        .and_then(|()| runs.note(directory, Step::GoOn, Phase::Begin).map_err(SaveFailure::Record))
        .and_then(|()| machine.go_on().map_err(SaveFailure::Vmm));
    match gone_on {
        Ok(()) => {
            *record = runs;
            note(directory, Step::GoOn, Phase::Done);
            clean(directory, None, record.base);
            Ok(machine)
        }
        Err(e) => {
            let e = end(machine, e);
            // The guest has not run: the disk is as it was.
            *record = Record { machine: None, ..still_paused };
            if let Err(e) = record.note(directory, Step::Machine, Phase::Failed) {
                log::error!("capsule {}: its record may say that it runs: {e}", record.capsule_id);
            }
            Err(e)
        }
    }
}
