//! Messages between control plane and host agent: capsules and the host itself. A wire client of the
//! control plane's public port uses the same messages, restricted to its team.

use super::messages;
use crate::codec::{Bytes, DecodeError, Field, Reader};
use alloc::string::String;
use alloc::vec::Vec;

/// Where a capsule is in its life, as the public API names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum CapsuleState {
    /// Asked for, nothing done yet.
    #[default]
    Pending = 0,
    /// Being built and booted.
    Starting = 1,
    /// Its guest daemon answers.
    Running = 2,
    /// Being saved.
    Pausing = 3,
    /// Saved on disk, nothing runs.
    Paused = 4,
    /// Being restored.
    Resuming = 5,
    /// A template is being made of it.
    Snapshotting = 6,
    /// Saved, the fast copy freed.
    Hibernated = 7,
    /// Being destroyed.
    Stopping = 8,
    /// Destroyed.
    Stopped = 9,
    /// The host does not know it any more.
    Missing = 10,
    /// It failed.
    Error = 11,
}

/// Every state with its name in the public API.
pub const CAPSULE_STATES: [(CapsuleState, &str); 12] = [
    (CapsuleState::Pending, "pending"),
    (CapsuleState::Starting, "starting"),
    (CapsuleState::Running, "running"),
    (CapsuleState::Pausing, "pausing"),
    (CapsuleState::Paused, "paused"),
    (CapsuleState::Resuming, "resuming"),
    (CapsuleState::Snapshotting, "snapshotting"),
    (CapsuleState::Hibernated, "hibernated"),
    (CapsuleState::Stopping, "stopping"),
    (CapsuleState::Stopped, "stopped"),
    (CapsuleState::Missing, "missing"),
    (CapsuleState::Error, "error"),
];

impl CapsuleState {
    /// The state's name in the public API.
    pub fn name(self) -> &'static str {
        CAPSULE_STATES.iter().find(|s| s.0 == self).map_or("error", |s| s.1)
    }

    /// The state with this name.
    pub fn from_name(name: &str) -> Option<CapsuleState> {
        CAPSULE_STATES.iter().find(|s| s.1 == name).map(|s| s.0)
    }
}

impl Field for CapsuleState {
    const TYPE: &'static str = "state";
    const MIN_SIZE: usize = 1;
    fn encode(&self, out: &mut Vec<u8>) {
        (*self as u8).encode(out);
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let number = u8::decode(r)?;
        CAPSULE_STATES
            .iter()
            .map(|s| s.0)
            .find(|s| *s as u8 == number)
            .ok_or(DecodeError::BadValue("capsule state"))
    }
}

messages! {
    /// Makes and boots a capsule. Answered by `CapsuleInfo` once its guest daemon answers, or `Error`
    /// with everything undone.
    CapsuleCreate = 0x0100 {
        /// The capsule's id, made by the control plane; empty from a wire client.
        capsule_id: String,
        /// The template's name.
        template: String,
        /// Virtual CPUs, 1 to 64.
        vcpus: u32,
        /// Guest memory in MiB, 128 to 1,048,576.
        memory_mb: u32,
        /// Size of the root disk in MiB; 0 for the template's own.
        disk_size_mb: u32,
        /// Idle seconds until it is paused; 0 for never.
        timeout_sec: u32,
        /// How long it may take to answer, in milliseconds; 0 for the host's default.
        deadline_ms: u32,
        /// Whether the guest may reach the internet.
        allow_internet: bool,
        /// Default environment of its processes.
        environment: Vec<(Bytes, Bytes)>,
    }

    /// What a host knows of a capsule.
    CapsuleInfo = 0x0101 {
        /// The capsule's id.
        capsule_id: String,
        /// Where it is in its life.
        state: CapsuleState,
        /// The template's name.
        template: String,
        /// Virtual CPUs.
        vcpus: u32,
        /// Guest memory in MiB.
        memory_mb: u32,
        /// Size of the root disk in MiB.
        disk_size_mb: u32,
        /// Space that the capsule's own blocks take on the host, in MiB.
        disk_used_mb: u32,
        /// The guest's address inside its network namespace.
        guest_ip: String,
        /// The address by which this host reaches the guest.
        host_ip: String,
        /// Versions and other facts: agent, envd, kernel, VMM.
        metadata: Vec<(String, String)>,
    }

    /// Destroys a capsule without a trace. Answered by `Done`; an unknown capsule is `not_found`.
    CapsuleDestroy = 0x0102 {
        /// The capsule's id.
        capsule_id: String,
    }

    /// Asks for one capsule. Answered by `CapsuleInfo`.
    CapsuleGet = 0x0103 {
        /// The capsule's id.
        capsule_id: String,
    }

    /// Asks for all capsules. Answered by one `CapsuleInfo` each and then `Done`.
    CapsuleList = 0x0104 {
    }

    /// The first message of a stream that goes on into a capsule: what follows is between the opener
    /// and the capsule's guest daemon.
    Forward = 0x0110 {
        /// The capsule's id.
        capsule_id: String,
    }

    /// Asks a host for its capacity and use. Answered by `HostStatusReply`.
    HostStatus = 0x0120 {
    }

    /// A host's capacity and use.
    HostStatusReply = 0x0121 {
        /// The agent's version.
        version: String,
        /// CPU architecture, as `uname -m` has it.
        arch: String,
        /// CPU cores.
        cpu_cores: u32,
        /// Memory in MiB.
        memory_mb: u32,
        /// Memory that no further capsule can have, in MiB: what is used by anybody, promised to capsules or
        /// kept for the host.
        memory_reserved_mb: u32,
        /// Virtual CPUs promised to capsules.
        vcpus_reserved: u32,
        /// Space in the data directory's file system, in MiB.
        disk_mb: u64,
        /// Space in it that a further capsule can have, in MiB: less than is free, where capsules were promised
        /// some of that.
        disk_free_mb: u64,
        /// The VMM, its version and its accelerator, for a person.
        vmm: String,
        /// The templates that the host has.
        templates: Vec<String>,
    }
}
