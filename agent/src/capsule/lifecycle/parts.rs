//! What a capsule is made of, how far each part is, and what the capsule is on its way to.

/// What a capsule is made of, in the order of making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Its directory with the record of what it owns.
    Record,
    /// Its slot, namespace, links and firewall.
    Network,
    /// Its writable root disk.
    Disk,
    /// Its virtual machine monitor's process.
    Machine,
    /// An authenticated, healthy session to its guest daemon.
    Guest,
}

/// Every part.
pub const PARTS: [Part; 5] = [Part::Record, Part::Network, Part::Disk, Part::Machine, Part::Guest];

impl Part {
    /// What has to be present before this part is made.
    pub(super) fn needs(self) -> &'static [Part] {
        match self {
            Part::Record => &[],
            Part::Network | Part::Disk => &[Part::Record],
            Part::Machine => &[Part::Network, Part::Disk],
            Part::Guest => &[Part::Machine],
        }
    }

    /// What has to be absent before this part is removed: everything that stands on it.
    pub(super) fn carries(self) -> &'static [Part] {
        match self {
            Part::Record => &[Part::Network, Part::Disk, Part::Machine, Part::Guest],
            Part::Network | Part::Disk => &[Part::Machine, Part::Guest],
            Part::Machine => &[Part::Guest],
            Part::Guest => &[],
        }
    }

    /// The part's name for a person.
    pub fn name(self) -> &'static str {
        match self {
            Part::Record => "record",
            Part::Network => "network",
            Part::Disk => "disk",
            Part::Machine => "virtual machine",
            Part::Guest => "guest daemon",
        }
    }
}

/// How far a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// There is nothing of it.
    Absent,
    /// It is being made.
    Making,
    /// It is there.
    Present,
    /// It is being removed.
    Removing,
    /// Its removal failed and is tried again later.
    Stuck,
}

/// What the capsule is on its way to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// All parts present.
    Up,
    /// Saved on disk, with no machine, guest or network.
    Paused,
    /// All parts absent.
    Down,
}

/// What somebody has asked for and waits for, once the capsule was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Pausing it.
    Pause,
    /// Resuming it.
    Resume,
    /// Making a snapshot of it.
    Snapshot,
}

impl Work {
    /// What the capsule is when it is done, for a person.
    pub fn done(self) -> &'static str {
        match self {
            Work::Pause => "paused",
            Work::Resume => "resumed",
            Work::Snapshot => "made a snapshot of",
        }
    }
}

/// The parts that a paused capsule does not have, in the order of removing.
pub(super) const MOVING_PARTS: [Part; 3] = [Part::Guest, Part::Machine, Part::Network];
