//! What becomes of a capsule that an agent has left.

/// What an agent finds of a capsule that one before it has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Remains {
    /// Its guest daemon has answered once, so that somebody relies on it.
    pub ready: bool,
    /// There is an image that fits its disk.
    pub image: bool,
    /// It was being destroyed.
    pub destroying: bool,
    /// Its machine runs.
    pub machine: bool,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It runs on: [`Lifecycle::running`](super::Lifecycle::running).
    Adopted,
    /// It is paused, a machine that may be there is ended: [`Lifecycle::paused`](super::Lifecycle::paused).
    Kept,
    /// Everything of it is removed; why, for the log.
    Cleared(&'static str),
}

impl Remains {
    /// What becomes of the capsule. One that is paused is kept whatever runs, and one that somebody relies on
    /// is adopted as long as its machine runs.
    pub fn fate(self) -> Fate {
        match self {
            Remains { destroying: true, .. } => Fate::Cleared("it was being destroyed"),
            Remains { image: true, .. } => Fate::Kept,
            Remains { ready: false, .. } => {
                Fate::Cleared("it was being made, and nobody was told that it runs")
            }
            Remains { machine: true, .. } => Fate::Adopted,
            Remains { machine: false, .. } => Fate::Cleared("its machine has ended"),
        }
    }
}
