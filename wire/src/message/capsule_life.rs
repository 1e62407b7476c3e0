//! Messages between control plane and host agent: what becomes of a capsule that is there. Pausing and
//! resuming, and snapshots, from which others start.

use super::messages;
use alloc::string::String;

messages! {
    /// Saves a running capsule and ends its virtual machine. Answered by `CapsuleInfo` once it is safe on
    /// disk, or `Error`, and then it runs on. A capsule that does not run is `invalid_state`.
    CapsulePause = 0x0130 {
        /// The capsule's id.
        capsule_id: String,
    }

    /// Lets a paused capsule go on. Answered by `CapsuleInfo` once its guest daemon answers, or `Error`,
    /// and then it is still paused. A capsule that is not paused is `invalid_state`.
    CapsuleResume = 0x0131 {
        /// The capsule's id.
        capsule_id: String,
        /// How long it may take to answer, in milliseconds; 0 for the host's default.
        deadline_ms: u32,
    }

    /// A running capsule is still needed: its idle time starts anew. Answered by `Done`.
    CapsulePing = 0x0132 {
        /// The capsule's id.
        capsule_id: String,
    }

    /// Makes a snapshot of a running capsule, which then runs on. `CapsuleCreate` with the snapshot's name
    /// as its template makes capsules that go on from there. Answered by `SnapshotInfo`; where there is a
    /// snapshot or template of this name it is `already_exists`, unless it is to be replaced.
    CapsuleSnapshot = 0x0133 {
        /// The capsule's id.
        capsule_id: String,
        /// The snapshot's name, as a template's.
        name: String,
        /// Whether it takes the place of a snapshot of the same name.
        overwrite: bool,
    }

    /// What a host knows of a snapshot.
    SnapshotInfo = 0x0134 {
        /// Its name.
        name: String,
        /// Virtual CPUs of every capsule that is made of it.
        vcpus: u32,
        /// Guest memory of every capsule that is made of it, in MiB.
        memory_mb: u32,
        /// Size of the root disk of every capsule that is made of it, in MiB.
        disk_size_mb: u32,
        /// Space that it takes on the host, in bytes.
        size_bytes: u64,
        /// When it was made, in microseconds since the epoch.
        created_us: u64,
    }

    /// Asks for all snapshots. Answered by one `SnapshotInfo` each and then `Done`.
    SnapshotList = 0x0135 {
    }

    /// Deletes a snapshot. Capsules that were made of it stay. Answered by `Done`.
    SnapshotDelete = 0x0136 {
        /// Its name.
        name: String,
    }
}
