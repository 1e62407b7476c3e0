//! A capsule's machine: started with its metadata service beside it, watched, and taken leave of.

use super::executor::{CapsuleReport, make_failed, remove_failed};
use super::failure::Failure;
use super::journal::{self, Phase, Step};
use super::lifecycle::{Event, Part};
use super::limits::limits;
use super::metadata::MetadataService;
use super::record::{ProcessRecord, Record};
use super::saving::{restore, start_from_snapshot};
use super::spec::command_line;
use super::{Capsule, CapsuleTimer, Source};
use crate::config::guest_name_server;
use crate::context::{Context, Source as LoopSource, TimerKey, random_bytes};
use crate::net::metadata::Endpoint;
use crate::sys::cgroup::{self, Group};
use crate::vmm::{self, Machine, MachineSpec, Pump, VmmError};
use mio::unix::SourceFd;
use serde_json::Value;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::path::Path;
use wire::auth::{ITERATIONS, Verifier};
use wire::message::CapsuleState;

/// How long a killed VMM may take to end: it may have to give back much memory.
pub(super) const KILL_TIMEOUT_MS: u64 = 10_000;
/// How much of the guest's console goes into a message, in bytes.
const CONSOLE_IN_MESSAGE: usize = 600;
/// How often a VMM that has ended is asked for what it and its guest said last.
const LAST_WORDS_TURNS: usize = 8;

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
    pub(super) fn make_machine(&mut self, ctx: &mut Context) -> Result<(), String> {
        let document = self.metadata_document();
        // The metadata service has to answer before the guest asks.
        let kind = self.record.image.map_or(ctx.host.vmm.kind(), |image| image.vmm);
        if !kind.serves_metadata() {
            self.open_metadata(ctx, document.clone())?;
        }
        let (Some(network), Some(tap), Some(disk)) = (&self.network, self.tap.take(), &self.disk) else {
            return Err("its network or its disk is not there".into());
        };
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
            disk_limits: ctx.host.config.disk_limits,
            guest_mac: network.slot().guest_mac(),
            metadata: document,
            uid: self.record.uid,
            gid: self.record.uid,
            directory: self.directory.clone(),
            restore: None,
            group: self.group(ctx),
        };
        let namespace = network
            .namespace()
            .try_clone_to_owned()
            .map_err(|e| format!("duplicating the namespace's descriptor: {e}"))?;
        let (host, directory) = (ctx.host.clone(), self.directory.clone());
        let mut record = self.record.clone();
        if self.lifecycle.has_image() {
            self.submit(ctx, move || restore(&host, spec, tap, namespace, record, &directory));
            return Ok(());
        }
        if let Some(snapshot) = self.spec.snapshot.clone() {
            self.submit(ctx, move || {
                start_from_snapshot(&host, &snapshot, spec, tap, namespace, record, &directory)
            });
            return Ok(());
        }
        self.submit(ctx, move || {
            let begun = journal::append(&directory, Step::Machine, Phase::Begin, None);
            let started = begun
                .map_err(MachineFailure::Record)
                .and_then(|()| host.vmm.start(&spec, tap, namespace.as_fd()).map_err(MachineFailure::Vmm));
            CapsuleReport::MachineMade(started.and_then(|machine| {
                record.machine = Some(ProcessRecord::of(&machine));
                record_or_kill(machine, &record, &directory).map(Box::new)
            }))
        });
        Ok(())
    }

    /// What the guest is told about itself.
    fn metadata_document(&self) -> Value {
        let verifier = Verifier::new(&self.secret, &random_bytes::<16>(), ITERATIONS);
        serde_json::json!({
            "instanceID": self.spec.id,
            "envID": self.spec.template,
            "accessTokenHash": verifier.to_text(),
        })
    }

    fn open_metadata(&mut self, ctx: &mut Context, document: Value) -> Result<(), String> {
        let Some(network) = &self.network else { return Err("its network is not there".into()) };
        let mut listener = network.metadata_listener().map_err(|e| e.to_string())?;
        let token = ctx
            .watch(&mut listener, LoopSource::Capsule(self.key, Source::Metadata))
            .map_err(|e| format!("watching the metadata listener: {e}"))?;
        self.metadata = Some(MetadataService::new(listener, token, Endpoint::new(document)));
        Ok(())
    }

    /// Takes over the machine that an agent before this one has started.
    ///
    /// # Errors
    /// There is no metadata service; the guest daemon asks it only when it starts or goes on.
    pub fn adopt_machine(&mut self, ctx: &mut Context) -> Result<(), String> {
        let Some(machine) = self.machine.take() else { return Ok(()) };
        let serves_metadata = machine.serves_metadata();
        self.watch_new_machine(ctx, machine);
        if serves_metadata {
            return Ok(());
        }
        let document = self.metadata_document();
        self.open_metadata(ctx, document)
    }

    /// Its control group, with the limits that it is to have.
    pub(super) fn group(&self, ctx: &Context) -> Option<Group> {
        let limits = limits(self.spec.vcpus, self.spec.memory_mb, ctx.host.vmm.overhead_mb());
        ctx.host.groups.as_ref().map(|groups| groups.of(&self.spec.id, limits))
    }

    pub(super) fn on_machine_made(
        &mut self,
        ctx: &mut Context,
        result: Result<Machine, MachineFailure>,
    ) -> Event {
        let machine = match result {
            Ok(machine) => machine,
            Err(e) => {
                self.close_metadata(ctx);
                return make_failed(Part::Machine, e);
            }
        };
        self.watch_new_machine(ctx, machine);
        Event::Made(Part::Machine)
    }

    /// Watches a machine that has just been started.
    pub(super) fn watch_new_machine(&mut self, ctx: &mut Context, machine: Machine) {
        self.record.machine = Some(ProcessRecord::of(&machine));
        self.shutdown_reason = None;
        self.stalled = false;
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
        if let Some(group) = &self.record.group
            && cgroup::ran_out_of_memory(group)
        {
            text.push_str(", because it took more memory of the host than the capsule may");
        }
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
        let (console, trouble) = machine.pump_console();
        if let Some(e) = trouble {
            log::warn!("capsule {}: the log of its console: {e}", self.spec.id);
        }
        let monitor = machine.pump_monitor().unwrap_or_else(|e| {
            log::warn!("capsule {}: its VMM's monitor: {e}", self.spec.id);
            // One that breaks the protocol may have been taken over by its guest, and would go on doing so.
            if let VmmError::Monitor(_) = e
                && let Err(e) = machine.kill()
            {
                log::error!("capsule {}: killing the VMM: {e}", self.spec.id);
            }
            Pump::Closed
        });
        // Bounded by what one turn of the monitor reads.
        while let Some(event) = self.machine.as_mut().and_then(Machine::poll_event) {
            log::trace!("capsule {}: {event:?}", self.spec.id);
            self.note_standing(&event);
            match event {
                vmm::Event::GuestShutdown { reason } => self.shutdown_reason = Some(reason),
                vmm::Event::Fault { what, count } => {
                    log::warn!("capsule {}: its VMM counts {count} {what}", self.spec.id);
                }
                _ => {}
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
}

/// A machine that no record names would outlive a crash of the agent unseen, so it may not run.
fn record_or_kill(
    mut machine: Machine,
    record: &Record,
    directory: &Path,
) -> Result<Machine, MachineFailure> {
    match record.note(directory, Step::Machine, Phase::Done) {
        Ok(()) => Ok(machine),
        Err(e) => {
            if let Err(e) = machine.kill().and_then(|()| machine.wait(KILL_TIMEOUT_MS as i32).map(|_| ())) {
                log::error!("killing the VMM {}: {e}", machine.pid());
            }
            Err(MachineFailure::Record(e))
        }
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
