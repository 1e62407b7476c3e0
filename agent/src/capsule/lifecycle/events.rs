//! What goes into the state machine and what comes out.

use super::parts::{Part, Work};
use crate::capsule::failure::Failure;

/// What can happen to a capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Start making it.
    Create,
    /// A part is there.
    Made(Part),
    /// A part could not be made, and nothing of it is left.
    MakeFailed(Part, Failure),
    /// A part is gone.
    Removed(Part),
    /// A part could not be removed.
    RemoveFailed(Part, Failure),
    /// The wait before a further try is over.
    RetryDue,
    /// The machine's process has ended and is reaped.
    MachineExited(Failure),
    /// The session to the guest daemon broke; the machine runs.
    GuestLost,
    /// The guest daemon refuses to work with this agent.
    GuestRefused(Failure),
    /// The time for creating is over.
    Deadline(Failure),
    /// Whoever asked for the capsule is gone or does not want it any more.
    Cancel,
    /// It shall be saved and its machine ended. Ignored where [`Lifecycle::check`](super::Lifecycle::check) says no.
    Pause,
    /// It shall go on. Ignored where [`Lifecycle::check`](super::Lifecycle::check) says no.
    Resume,
    /// A snapshot of it shall be made. Ignored where [`Lifecycle::check`](super::Lifecycle::check) says no.
    Snapshot,
    /// The image is on disk, and the guest stands still.
    Saved,
    /// There is no image; if its machine is there, the guest runs on.
    SaveFailed(Failure),
    /// The snapshot is made, and the guest runs on.
    SnapshotMade,
    /// There is no snapshot, and if its machine is there, the guest runs on.
    SnapshotFailed(Failure),
    /// It has been paused for so long that its memory shall be packed. Ignored where it is not paused.
    Hibernate,
    /// Its memory is packed.
    Packed,
    /// Its memory is not packed, and lies there as it was.
    NotPacked,
    /// It shall go.
    Destroy,
    /// The agent is shutting down.
    Shutdown,
}

/// What the executor has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make a part, then report `Made` or `MakeFailed`.
    Make(Part),
    /// Remove a part, then report `Removed` or `RemoveFailed` (`MachineExited` will do for the machine).
    Remove(Part),
    /// Report `RetryDue` after this many milliseconds.
    RetryAfter(u64),
    /// Tell whoever asked for it that the capsule runs.
    Created,
    /// Tell whoever asked for it that the capsule could not be made and is undone.
    CreateFailed(Failure),
    /// Tell whoever wanted it destroyed that it is gone.
    Destroyed,
    /// Tell whoever wanted it destroyed, or made, that remains are left.
    DestroyFailed(Failure),
    /// Tell a person that a paused capsule's machine or network is still there, and is tried to be removed.
    RemainsStay(Failure),
    /// The capsule has ended by itself; nothing of it is left but what is told of it.
    Ended,
    /// Forget the capsule.
    Forget,
    /// Write the image, then report `Saved` or `SaveFailed`.
    Save,
    /// Make the snapshot, then report `SnapshotMade` or `SnapshotFailed`.
    MakeSnapshot,
    /// Pack the image's memory, then report `Packed` or `NotPacked`.
    Pack,
    /// Stop that soon; its report still comes.
    StopPacking,
    /// Tell whoever asked for this that it is done.
    Finished(Work),
    /// Tell whoever asked for this that it failed. A failed pause or snapshot leaves the capsule running, a
    /// failed resume paused, unless the failure is the capsule's end.
    Failed(Work, Failure),
}
