//! A Firecracker that runs.

use super::api::Api;
use super::jail::Jail;
use super::metrics::{Finding, Lines};
use super::requests::{self, LOG, METRICS, Request};
use super::{DIAGNOSTICS_BYTES, open_console};
use crate::vmm::VmmError;
use crate::vmm::console::{Console, Pump};
use crate::vmm::image::COMMAND_TIMEOUT_MS;
use crate::vmm::machine::{Control, Event};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

/// How much of what it counts is read before others get their turn.
const METRICS_PUMP_BYTES: usize = 64 * 1024;
const METRICS_CHUNK_BYTES: usize = 8 * 1024;
/// What went wrong and waits to be told, at most. The owner takes it after each read.
const MAX_FINDINGS: usize = 64;

/// A Firecracker that runs.
#[derive(Debug)]
pub struct Instance {
    pub(super) api: Api,
    pub(super) jail: Jail,
    log: File,
    metrics: File,
    lines: Lines,
    /// What went wrong and was not told yet.
    findings: VecDeque<Finding>,
    /// Whether it can tell what has changed since the memory that it goes on from.
    pub(super) knows_changes: bool,
}

impl Instance {
    /// The one that is spoken to by `api`, in `jail`, with what it writes to its pipes for log and metrics.
    pub(super) fn new(api: Api, jail: Jail, (log, metrics): (File, File), knows_changes: bool) -> Instance {
        let (lines, findings) = (Lines::default(), VecDeque::new());
        Instance { api, jail, log, metrics, lines, findings, knows_changes }
    }

    /// The Firecracker `pid` that an earlier agent has started in a capsule's directory, and its console;
    /// `None` when there is another VMM in it.
    pub(in crate::vmm) fn find(directory: &Path, pid: u32) -> Result<Option<(Control, Console)>, VmmError> {
        let Some(jail) = Jail::find(directory)? else { return Ok(None) };
        let pipes = (jail.open_pipe(LOG)?, jail.open_pipe(METRICS)?);
        let instance = Instance::new(Api::new(jail.open()?, pid), jail, pipes, false);
        Ok(Some((Control::Firecracker(Box::new(instance)), open_console(directory)?)))
    }

    /// Stands the guest still, or lets it go on.
    pub(in crate::vmm) fn set_running(&self, runs: bool) -> Result<(), VmmError> {
        self.call(&requests::set_running(runs))
    }

    /// The beginning of what it has logged and nobody has asked for yet, as text.
    pub(in crate::vmm) fn logged(&self) -> String {
        let mut bytes = Vec::new();
        // Ends when the pipe is empty, with an error that is none.
        let _ = (&self.log).take(DIAGNOSTICS_BYTES).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).trim_end().to_owned()
    }

    /// The descriptor on which what it counts comes.
    pub(in crate::vmm) fn metrics_fd(&self) -> RawFd {
        self.metrics.as_raw_fd()
    }

    /// Reads what it has counted, up to a bound.
    pub(in crate::vmm) fn pump_metrics(&mut self) -> Pump {
        let mut chunk = [0; METRICS_CHUNK_BYTES];
        for _ in 0..METRICS_PUMP_BYTES / METRICS_CHUNK_BYTES {
            match (&self.metrics).read(&mut chunk) {
                Ok(count) if count > 0 => {
                    let findings = self.lines.receive(&chunk[..count]);
                    let room = MAX_FINDINGS.saturating_sub(self.findings.len());
                    self.findings.extend(findings.into_iter().take(room));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // There always is a writer, so nothing is no end.
                _ => return Pump::Drained,
            }
        }
        Pump::More
    }

    /// The next thing that went wrong.
    pub(in crate::vmm) fn next_fault(&mut self) -> Option<Event> {
        self.findings.pop_front().map(|Finding { what, count }| Event::Fault { what, count })
    }

    /// It has ended: removes its root. Blocks for milliseconds.
    pub(in crate::vmm) fn clear(&self) -> Result<(), VmmError> {
        self.jail.clear()
    }

    /// Asks it for something. Blocks.
    pub(super) fn call(&self, request: &Request) -> Result<(), VmmError> {
        self.api.call(request, COMMAND_TIMEOUT_MS)
    }
}
