//! Does what the state machine says: makes and removes each part, mostly by a job on the worker pool
//! whose report comes back as an event.

use super::failure::Failure;
use super::lifecycle::{Event, Part};
use super::metadata::MetadataService;
use super::record::{self, ProcessRecord, Record};
use super::spec::command_line;
use super::{Capsule, CapsuleTimer, GuestLink, MIB, Source};
use crate::config::guest_name_server;
use crate::context::{Context, Report, Source as LoopSource, TimerKey, random_bytes};
use crate::disk::{Disk, DiskError, DiskSpec};
use crate::net::metadata::Endpoint;
use crate::net::{CapsuleNetwork, NetError, Policy, Tap, destroy_remains};
use crate::vmm::{self, Machine, MachineSpec, Pump, VmmError};
use mio::unix::SourceFd;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use wire::auth::{ITERATIONS, Verifier};
use wire::message::CapsuleState;

/// Other slots that are tried when one turns out to be somebody else's.
const MAX_NETWORK_ATTEMPTS: u32 = 16;
/// How long a killed VMM may take to end: it may have to give back much memory.
const KILL_TIMEOUT_MS: u64 = 10_000;
/// How much of the guest's console goes into a message, in bytes.
const CONSOLE_IN_MESSAGE: usize = 600;
/// How often a VMM that has ended is asked for what it and its guest said last.
const LAST_WORDS_TURNS: usize = 8;

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
    MachineMade(Result<Machine, MachineFailure>),
    /// The network is gone.
    NetworkRemoved(Result<(), NetError>),
    /// The disk is gone.
    DiskRemoved(Result<(), DiskError>),
    /// The directory is gone.
    RecordRemoved(io::Result<()>),
}

/// Why there is no network.
#[derive(Debug)]
pub enum NetworkFailure {
    /// The record could not be written.
    Record(io::Error),
    /// The network could not be made.
    Net(NetError),
}

impl fmt::Display for NetworkFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetworkFailure::Record(e) => write!(f, "writing its record: {e}"),
            NetworkFailure::Net(e) => e.fmt(f),
        }
    }
}

/// Why there is no machine.
#[derive(Debug)]
pub enum MachineFailure {
    /// The record could not be written.
    Record(io::Error),
    /// The machine could not be started.
    Vmm(VmmError),
}

impl fmt::Display for MachineFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MachineFailure::Record(e) => write!(f, "writing its record: {e}"),
            MachineFailure::Vmm(e) => e.fmt(f),
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
                self.submit(ctx, move || {
                    let spec = DiskSpec { base: &base, directory: &directory, size_bytes };
                    CapsuleReport::DiskMade(backend.create(&spec))
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
        let (record, directory) = (self.record.clone(), self.directory.clone());
        let policy = Policy { allow_internet: self.spec.allow_internet };
        self.submit(ctx, move || {
            CapsuleReport::NetworkMade(
                record
                    .write(&directory)
                    .map_err(NetworkFailure::Record)
                    .and_then(|()| CapsuleNetwork::create(slot, policy).map_err(NetworkFailure::Net)),
            )
        });
    }

    fn make_machine(&mut self, ctx: &mut Context) -> Result<(), String> {
        let (Some(network), Some(tap), Some(disk)) = (&self.network, self.tap.take(), &self.disk) else {
            return Err("its network or its disk is not there".into());
        };
        // The metadata service has to answer before the guest asks.
        let mut listener = network.metadata_listener().map_err(|e| e.to_string())?;
        let token = ctx
            .watch(&mut listener, LoopSource::Capsule(self.key, Source::Metadata))
            .map_err(|e| format!("watching the metadata listener: {e}"))?;
        let verifier = Verifier::new(&self.secret, &random_bytes::<16>(), ITERATIONS);
        let document = serde_json::json!({
            "instanceID": self.spec.id,
            "envID": self.spec.template,
            "accessTokenHash": verifier.to_text(),
        });
        self.metadata = Some(MetadataService::new(listener, token, Endpoint::new(document)));

        let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let dns = guest_name_server(ctx.host.config.guest_dns, &resolv_conf);
        let spec = MachineSpec {
            name: self.spec.id.clone(),
            vcpus: self.spec.vcpus,
            memory_mb: self.spec.memory_mb,
            kernel: ctx.host.kernel.image.clone(),
            initramfs: Some(ctx.host.kernel.initramfs.clone()),
            command_line: command_line(&self.spec, dns),
            disks: vec![disk.image()],
            guest_mac: network.slot().guest_mac(),
            uid: self.record.uid,
            gid: self.record.uid,
            directory: self.directory.clone(),
        };
        let namespace = network
            .namespace()
            .try_clone_to_owned()
            .map_err(|e| format!("duplicating the namespace's descriptor: {e}"))?;
        let (qemu, directory) = (ctx.host.qemu.clone(), self.directory.clone());
        let mut record = self.record.clone();
        self.submit(ctx, move || {
            use std::os::fd::AsFd;
            let started = qemu.start(&spec, tap, namespace.as_fd()).map_err(MachineFailure::Vmm);
            CapsuleReport::MachineMade(started.and_then(|machine| {
                let (pid, start_ticks) = (machine.pid(), machine.start_ticks());
                record.machine = Some(ProcessRecord { pid, start_ticks });
                record_or_kill(machine, &record, &directory)
            }))
        });
        Ok(())
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
                let Some(machine) = &mut self.machine else { return Some(Event::Removed(part)) };
                if let Err(e) = machine.kill() {
                    return Some(remove_failed(part, e));
                }
                self.set_timer(ctx, CapsuleTimer::Kill, KILL_TIMEOUT_MS);
                // It may have ended already, and its event may have been seen.
                self.reap(ctx)
            }
            Part::Network => {
                self.tap = None;
                self.close_metadata(ctx);
                match (self.network.take(), self.slot) {
                    (Some(network), _) => {
                        self.submit(ctx, move || CapsuleReport::NetworkRemoved(network.destroy()));
                    }
                    // An earlier try took it and did not get through.
                    (None, Some(slot)) => self.submit(ctx, move || {
                        CapsuleReport::NetworkRemoved(destroy_remains(slot).map(|_| ()))
                    }),
                    (None, None) => return Some(Event::Removed(part)),
                }
                None
            }
            Part::Disk => {
                // Where an earlier try did not get through, the files go with the directory.
                let Some(disk) = self.disk.take() else { return Some(Event::Removed(part)) };
                self.submit(ctx, move || CapsuleReport::DiskRemoved(disk.remove()));
                None
            }
            Part::Record => {
                let directory = self.directory.clone();
                self.submit(ctx, move || CapsuleReport::RecordRemoved(record::remove(&directory)));
                None
            }
        }
    }

    /// Takes a job's report.
    pub fn on_report(&mut self, ctx: &mut Context, report: CapsuleReport) -> Option<Event> {
        let elapsed = ctx.now_ms() - self.begun_ms;
        log::debug!("capsule {}: {} after {elapsed} ms", self.spec.id, report.name());
        match report {
            CapsuleReport::RecordMade(result) => Some(self.on_record_made(ctx, result)),
            CapsuleReport::NetworkMade(result) => self.on_network_made(ctx, result),
            CapsuleReport::DiskMade(result) => Some(match result {
                Ok(disk) => {
                    self.disk_mb = u32::try_from(disk.virtual_bytes().div_ceil(MIB)).unwrap_or(u32::MAX);
                    self.disk = Some(disk);
                    Event::Made(Part::Disk)
                }
                Err(e) => make_failed(Part::Disk, e),
            }),
            CapsuleReport::MachineMade(result) => Some(self.on_machine_made(ctx, result)),
            CapsuleReport::NetworkRemoved(result) => Some(match result {
                Ok(()) => {
                    self.free_slot(ctx);
                    Event::Removed(Part::Network)
                }
                Err(e) => remove_failed(Part::Network, e),
            }),
            CapsuleReport::DiskRemoved(result) => Some(removed(Part::Disk, result)),
            CapsuleReport::RecordRemoved(result) => Some(removed(Part::Record, result)),
        }
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
                if self.network_attempts < MAX_NETWORK_ATTEMPTS =>
            {
                // The slot stays allocated: whoever has it is not ours to disturb.
                log::warn!("capsule {}: {name} is somebody else's, trying another slot", self.spec.id);
                self.slot = ctx.slots.allocate();
                match self.slot {
                    Some(_) => {
                        self.make_network(ctx);
                        None
                    }
                    None => Some(make_failed(Part::Network, "all network slots are in use")),
                }
            }
            Err(e) => {
                self.free_slot(ctx);
                Some(make_failed(Part::Network, e))
            }
        }
    }

    fn on_machine_made(&mut self, ctx: &mut Context, result: Result<Machine, MachineFailure>) -> Event {
        let machine = match result {
            Ok(machine) => machine,
            Err(e) => {
                self.close_metadata(ctx);
                return make_failed(Part::Machine, e);
            }
        };
        self.record.machine = Some(ProcessRecord { pid: machine.pid(), start_ticks: machine.start_ticks() });
        let fds = [
            (machine.exit_fd(), Source::Exit),
            (machine.monitor_fd(), Source::Monitor),
            (machine.console_fd(), Source::Console),
        ];
        self.machine = Some(machine);
        for (fd, source) in fds {
            if let Err(e) = self.watch_machine(ctx, fd, source) {
                // Without the exit's descriptor its end would never be seen: it has to go.
                log::error!("capsule {}: watching {source:?}: {e}", self.spec.id);
                if let Some(Err(e)) = self.machine.as_ref().map(Machine::kill) {
                    log::error!("capsule {}: killing the VMM: {e}", self.spec.id);
                }
            }
        }
        // Its greeting may have come before anybody watched.
        self.pump_machine();
        Event::Made(Part::Machine)
    }

    fn watch_machine(&mut self, ctx: &mut Context, fd: RawFd, source: Source) -> io::Result<()> {
        let token = ctx.watch(&mut SourceFd(&fd), LoopSource::Capsule(self.key, source))?;
        self.machine_tokens.push(token);
        Ok(())
    }

    /// The VMM's process may have ended: takes its exit status.
    pub fn reap(&mut self, ctx: &mut Context) -> Option<Event> {
        let machine = self.machine.as_mut()?;
        let exit = match machine.try_wait() {
            Ok(exit) => exit?,
            Err(e) => {
                log::error!("capsule {}: waiting for the VMM: {e}", self.spec.id);
                return None;
            }
        };
        // What the guest and the VMM last said is still in the pipes.
        for _ in 0..LAST_WORDS_TURNS {
            if !self.pump_machine() {
                break;
            }
        }
        let failure = self.exit_failure(&exit.to_string());
        ctx.timers.clear(TimerKey::Capsule(self.key, CapsuleTimer::Kill));
        for token in std::mem::take(&mut self.machine_tokens) {
            ctx.forget(token);
        }
        self.machine = None;
        self.record.machine = None;
        Some(Event::MachineExited(failure))
    }

    fn exit_failure(&self, exit: &str) -> Failure {
        let reason = self.shutdown_reason.as_deref();
        let was_running = self.lifecycle.state() == CapsuleState::Running;
        if let (true, Some("guest-shutdown")) = (was_running, reason) {
            return Failure::ShutDownByGuest("it powered off".into());
        }
        let machine = self.machine.as_ref();
        let diagnostics = machine.map(Machine::diagnostics).unwrap_or_default();
        let mut text = match reason {
            Some("guest-reset") => "the guest rebooted or its kernel panicked".to_string(),
            Some(reason) => format!("the VMM shut down ({reason})"),
            None => format!("the VMM {exit}"),
        };
        if !diagnostics.trim().is_empty() {
            text.push_str(&format!("; it said: {}", tail(diagnostics.trim())));
        }
        let console = machine.map(Machine::console_tail).unwrap_or_default();
        if !console.trim().is_empty() {
            text.push_str(&format!("; the guest's console ends with: {}", tail(console.trim())));
        }
        Failure::MachineEnded(text)
    }

    /// Takes what the VMM and the guest's console have to say; true when there may be more.
    pub fn pump_machine(&mut self) -> bool {
        let Some(machine) = &mut self.machine else { return false };
        let console = machine.pump_console().unwrap_or_else(|e| {
            log::warn!("capsule {}: the log of its console: {e}", self.spec.id);
            Pump::Drained
        });
        let monitor = machine.pump_monitor().unwrap_or_else(|e| {
            log::warn!("capsule {}: its VMM's monitor: {e}", self.spec.id);
            Pump::Closed
        });
        // Bounded by what one turn of the monitor reads.
        while let Some(event) = machine.poll_event() {
            log::trace!("capsule {}: {event:?}", self.spec.id);
            if let vmm::Event::GuestShutdown { reason } = event {
                self.shutdown_reason = Some(reason);
            }
        }
        console == Pump::More || monitor == Pump::More
    }

    /// The time for creating is over.
    pub fn deadline_failure(&self) -> Failure {
        let part = self.lifecycle.waiting_for();
        let machine = self.machine.as_ref();
        let console = machine.map(Machine::console_tail).unwrap_or_default();
        let mut detail = match part {
            Some(Part::Guest) => format!(
                "{} attempts to reach it, last: {}",
                self.guest_attempts,
                if self.last_guest_error.is_empty() { "no answer" } else { &self.last_guest_error }
            ),
            _ => "the host is slow or busy".to_string(),
        };
        if !console.trim().is_empty() {
            detail.push_str(&format!("; the guest's console ends with: {}", tail(console.trim())));
        }
        Failure::Deadline {
            waiting_for: part.map_or("worker", Part::name),
            after_ms: self.spec.deadline_ms,
            detail,
        }
    }

    /// A VMM that was killed has not ended.
    pub fn kill_timed_out(&self) -> Event {
        let wait = KILL_TIMEOUT_MS / 1000;
        remove_failed(Part::Machine, format!("the VMM did not end {wait} s after it was killed"))
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

    fn close_metadata(&mut self, ctx: &mut Context) {
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

    fn submit(&self, ctx: &Context, job: impl FnOnce() -> CapsuleReport + Send + 'static) {
        let key = self.key;
        ctx.workers.submit(move || Report::Capsule(key, job()));
    }

    /// Whether an attempt to reach the guest daemon is under way or planned.
    pub fn is_connecting(&self) -> bool {
        !matches!(self.guest, GuestLink::Down)
    }
}

/// A machine that no record names would outlive a crash of the agent unseen, so it may not run.
fn record_or_kill(
    mut machine: Machine,
    record: &Record,
    directory: &std::path::Path,
) -> Result<Machine, MachineFailure> {
    match record.write(directory) {
        Ok(()) => Ok(machine),
        Err(e) => {
            if let Err(e) = machine.kill().and_then(|()| machine.wait(KILL_TIMEOUT_MS as i32).map(|_| ())) {
                log::error!("killing the VMM {}: {e}", machine.pid());
            }
            Err(MachineFailure::Record(e))
        }
    }
}

fn make_failed(part: Part, reason: impl ToString) -> Event {
    Event::MakeFailed(part, Failure::Make { part, reason: reason.to_string() })
}

fn remove_failed(part: Part, reason: impl ToString) -> Event {
    Event::RemoveFailed(part, Failure::Remove { part, reason: reason.to_string() })
}

fn removed<E: ToString>(part: Part, result: Result<(), E>) -> Event {
    match result {
        Ok(()) => Event::Removed(part),
        Err(e) => remove_failed(part, e.to_string()),
    }
}

/// The end of a text, for a message.
fn tail(text: &str) -> String {
    let mut start = text.len().saturating_sub(CONSOLE_IN_MESSAGE);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let cleaned = text[start..].chars().map(|c| if c.is_control() { ' ' } else { c });
    cleaned.collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ")
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
        }
    }
}
