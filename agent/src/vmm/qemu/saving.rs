//! Saving a machine in QEMU and taking one that was saved.
//!
//! The state of the devices is what QEMU's `xen-save-devices-state` writes: everything but memory, some
//! 160 KiB in 2 ms. Memory is taken by the agent, see [`memory`](super::memory).

use super::Monitor;
use super::memory::Mapping;
use crate::vmm::image::{COMMAND_TIMEOUT_MS, Image, Written, name};
use crate::vmm::machine::{Place, system};
use crate::vmm::{Kind, VmmError};
use serde_json::json;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long QEMU may take to read the state of its devices, in milliseconds.
const RESTORE_TIMEOUT_MS: u64 = 20_000;
/// How often it is asked whether it is done.
const RESTORE_POLL: Duration = Duration::from_millis(3);
/// The number that QEMU knows the state's file by.
const STATE_SET: u32 = 1_000;

/// Stands the guest still and writes its image. The devices are written beside the memory: each waits for the disk,
/// and QEMU changes no memory of a guest that stands still.
pub fn save(monitor: &mut Monitor, pid: u32, place: &Place<'_>) -> Result<(Image, Written), VmmError> {
    let Place { directory, generation, .. } = *place;
    monitor.call("stop", None, None, COMMAND_TIMEOUT_MS)?;
    let state = directory.join(name("state", generation));
    thread::scope(|scope| {
        let memory = thread::Builder::new().spawn_scoped(scope, || save_memory(pid, place));
        save_devices(monitor, &state)?;
        match memory {
            // A worker that panics is told of by whoever runs it.
            Ok(memory) => memory.join().unwrap_or_else(|panic| resume_unwind(panic)),
            // There can be no further thread.
            Err(_) => save_memory(pid, place),
        }
    })
}

fn save_memory(pid: u32, place: &Place<'_>) -> Result<(Image, Written), VmmError> {
    let Place { directory, generation, base, owner } = *place;
    let mapping = Mapping::find(pid)?;
    let image = |memory, delta| Image { memory, delta, state: generation, packed: false, vmm: Kind::Qemu };
    match base.map(|base| (base, directory.join(name("memory", base)))) {
        // The base is this capsule's own, so that it may be brought up to date.
        Some((base, file)) if mapping.is_of(&file) => {
            let memory_bytes = mapping.write_delta(pid, &directory.join(name("delta", generation)))?;
            Ok((image(base, Some(generation)), Written { memory_bytes, is_delta: true }))
        }
        _ => {
            let memory_bytes = mapping.write_all(pid, &directory.join(name("memory", generation)), owner)?;
            Ok((image(generation, None), Written { memory_bytes, is_delta: false }))
        }
    }
}

fn save_devices(monitor: &mut Monitor, path: &Path) -> Result<(), VmmError> {
    // QEMU wants exactly the access that it will ask for.
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let file = file.map_err(system("making", path))?;
    let set = json!({"fdset-id": STATE_SET});
    monitor.call("add-fd", Some(set.clone()), Some(file.as_fd()), COMMAND_TIMEOUT_MS)?;
    let arguments = json!({"filename": format!("/dev/fdset/{STATE_SET}"), "live": false});
    let saved = monitor.call("xen-save-devices-state", Some(arguments), None, COMMAND_TIMEOUT_MS);
    monitor.call("remove-fd", Some(set), None, COMMAND_TIMEOUT_MS)?;
    saved?;
    file.sync_all().map_err(system("writing out", path))
}

/// Sees to it that the guest of a machine runs which another agent may have left in the midst of saving or
/// restoring it.
pub fn run_on(monitor: &mut Monitor) -> Result<(), VmmError> {
    let status = monitor.call("query-status", None, None, COMMAND_TIMEOUT_MS)?;
    // A set that was left would be written to in place of the next one.
    match monitor.call("remove-fd", Some(json!({"fdset-id": STATE_SET})), None, COMMAND_TIMEOUT_MS) {
        // There is none, as a rule.
        Ok(_) | Err(VmmError::Refused { .. }) => {}
        Err(e) => return Err(e),
    }
    match status["status"].as_str() {
        Some("running") => Ok(()),
        _ => monitor.call("cont", None, None, COMMAND_TIMEOUT_MS).map(drop),
    }
}

/// Waits until QEMU has taken the state that it was started with; the guest then stands still.
pub fn wait_until_restored(monitor: &mut Monitor) -> Result<(), VmmError> {
    let end = Instant::now() + Duration::from_millis(RESTORE_TIMEOUT_MS);
    while Instant::now() < end {
        let status = monitor.call("query-status", None, None, COMMAND_TIMEOUT_MS)?;
        match status["status"].as_str() {
            Some("inmigrate") => std::thread::sleep(RESTORE_POLL),
            Some("paused" | "prelaunch") => return Ok(()),
            other => {
                let why = format!("the machine is {}", other.unwrap_or("in no state"));
                return Err(VmmError::Refused { command: "query-status", why });
            }
        }
    }
    Err(VmmError::NoAnswer { command: "query-status" })
}
