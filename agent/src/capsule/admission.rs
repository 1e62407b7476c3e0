//! Whether the host has room for one capsule more, by what it really has left. Pure: the caller brings the
//! figures.
//!
//! - Virtual CPUs may be promised several times over: capsules are idle most of the time.
//! - Memory is never promised twice. What is left is what the kernel could give to a program now, without
//!   what capsules were promised and have not touched yet, and without the host's own reserve.
//! - Space for disks and saved memory may be promised several times over: few capsules fill what they have.
//!   What is left is what the file system has free, without the part of that promise that is kept room for.

use std::fmt;

/// Memory that capsules never get, in MiB: the host's own programs live in it.
pub const HOST_RESERVE_MB: u64 = 512;
/// Space that stays free in the data directory's file system, in MiB: those that run need room to write.
pub const MIN_DISK_FREE_MB: u64 = 512;

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// CPU cores.
    pub cpu_cores: u64,
    /// Memory, in MiB.
    pub memory_mb: u64,
    /// Memory that the kernel could give to a program now (`MemAvailable`), in MiB.
    pub memory_available_mb: u64,
    /// Size of the data directory's file system, in MiB.
    pub disk_mb: u64,
    /// Space left in it, in MiB.
    pub disk_free_mb: u64,
    /// How many virtual CPUs are promised for each core.
    pub vcpu_overcommit: u64,
    /// How many times over space is promised.
    pub disk_overcommit: u64,
}

/// What capsules were promised and do not have yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Promised {
    /// Virtual CPUs of those that run.
    pub vcpus: u64,
    /// Memory that those that run have not touched, in MiB.
    pub memory_mb: u64,
    /// How much disks may grow and memory that may be saved, in MiB.
    pub disk_mb: u64,
}

/// What one capsule more needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Memory with all that goes with it, in MiB.
    pub memory_mb: u64,
    /// How much its files may grow, in MiB.
    pub disk_mb: u64,
}

/// What a host can be short of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Virtual CPUs.
    Vcpus,
    /// MiB of memory.
    Memory,
    /// MiB of disk space.
    Disk,
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Of what.
    pub resource: Resource,
    /// How much is needed.
    pub needed: u64,
    /// How much is left.
    pub left: u64,
    /// How much an empty host of this size has. With less than is needed, waiting is of no use.
    pub has: u64,
}

impl Shortage {
    /// Whether the host could never take it, however empty it is.
    pub fn is_for_ever(&self) -> bool {
        self.needed > self.has
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortage { resource, needed, left, has } = self;
        let (what, less) = match resource {
            Resource::Vcpus => ("virtual CPUs", "ask for fewer vcpus"),
            Resource::Memory => ("MiB of memory, the VMM's own included", "ask for less memory_mb"),
            Resource::Disk => ("MiB of disk space", "ask for less disk_size_mb, delete snapshots"),
        };
        if self.is_for_ever() {
            return write!(
                f,
                "{needed} {what} are needed, but this host has only {has} for capsules; {less}"
            );
        }
        write!(
            f,
            "{needed} {what} are needed, but this host has only {left} left; destroy or pause a capsule, {less}, or \
             try another host"
        )
    }
}

/// What is left for one capsule more, in the units of [`Need`].
pub fn left(capacity: &Capacity, promised: &Promised) -> Need {
    let kept_mb = promised.disk_mb.div_ceil(capacity.disk_overcommit.max(1));
    Need {
        vcpus: (capacity.cpu_cores * capacity.vcpu_overcommit).saturating_sub(promised.vcpus),
        memory_mb: capacity.memory_available_mb.saturating_sub(promised.memory_mb + HOST_RESERVE_MB),
        disk_mb: capacity.disk_free_mb.saturating_sub(kept_mb + MIN_DISK_FREE_MB),
    }
}

/// Checks whether there is room.
///
/// # Errors
/// The first thing that is short.
pub fn check(capacity: &Capacity, promised: &Promised, need: &Need) -> Result<(), Shortage> {
    let left = left(capacity, promised);
    let disk_needed = need.disk_mb.div_ceil(capacity.disk_overcommit.max(1));
    let rows = [
        (Resource::Vcpus, need.vcpus, left.vcpus, capacity.cpu_cores * capacity.vcpu_overcommit),
        (
            Resource::Memory,
            need.memory_mb,
            left.memory_mb,
            capacity.memory_mb.saturating_sub(HOST_RESERVE_MB),
        ),
        (Resource::Disk, disk_needed, left.disk_mb, capacity.disk_mb.saturating_sub(MIN_DISK_FREE_MB)),
    ];
    match rows.into_iter().find(|(_, needed, left, _)| needed > left) {
        Some((resource, needed, left, has)) => Err(Shortage { resource, needed, left, has }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Capacity = Capacity {
        cpu_cores: 2,
        memory_mb: 8_000,
        memory_available_mb: 4_000,
        disk_mb: 100_000,
        disk_free_mb: 10_000,
        vcpu_overcommit: 4,
        disk_overcommit: 8,
    };
    const NONE: Promised = Promised { vcpus: 0, memory_mb: 0, disk_mb: 0 };
    const ONE: Need = Need { vcpus: 1, memory_mb: 300, disk_mb: 5_000 };

    #[test]
    fn each_resource_has_its_own_limit() {
        let short = |resource, needed, left, has| Err(Shortage { resource, needed, left, has });
        for (promised, need, expected) in [
            (NONE, ONE, Ok(())),
            // To the last of each.
            (NONE, Need { vcpus: 8, ..ONE }, Ok(())),
            (NONE, Need { memory_mb: 3_488, ..ONE }, Ok(())),
            (NONE, Need { disk_mb: 8 * 9_488, ..ONE }, Ok(())),
            // And one more.
            (NONE, Need { vcpus: 9, ..ONE }, short(Resource::Vcpus, 9, 8, 8)),
            (NONE, Need { memory_mb: 3_489, ..ONE }, short(Resource::Memory, 3_489, 3_488, 7_488)),
            (NONE, Need { disk_mb: 8 * 9_488 + 1, ..ONE }, short(Resource::Disk, 9_489, 9_488, 99_488)),
            // What others were promised is not there.
            (Promised { vcpus: 7, ..NONE }, ONE, Ok(())),
            (Promised { vcpus: 8, ..NONE }, ONE, short(Resource::Vcpus, 1, 0, 8)),
            (Promised { memory_mb: 3_189, ..NONE }, ONE, short(Resource::Memory, 300, 299, 7_488)),
            (Promised { disk_mb: 8 * 8_864, ..NONE }, ONE, short(Resource::Disk, 625, 624, 99_488)),
            // More than there is was promised: nothing is left, and nothing underflows.
            (
                Promised { vcpus: 99, memory_mb: 1 << 40, disk_mb: 1 << 40 },
                ONE,
                short(Resource::Vcpus, 1, 0, 8),
            ),
        ] {
            assert_eq!(check(&HOST, &promised, &need), expected, "{promised:?} {need:?}");
        }
        let full = Capacity { disk_free_mb: 511, ..HOST };
        let needs_none = Need { disk_mb: 0, ..ONE };
        assert!(check(&full, &NONE, &needs_none).is_ok(), "what needs no space may go on");
        assert!(check(&full, &NONE, &ONE).is_err());
    }

    #[test]
    fn a_shortage_says_what_to_do() {
        let now = check(&HOST, &Promised { memory_mb: 3_400, ..NONE }, &ONE).expect_err("full");
        assert!(!now.is_for_ever());
        assert_eq!(
            now.to_string(),
            "300 MiB of memory, the VMM's own included are needed, but this host has only 88 left; destroy or pause \
             a capsule, ask for less memory_mb, or try another host"
        );
        let never = check(&HOST, &NONE, &Need { vcpus: 9, ..ONE }).expect_err("too large");
        assert!(never.is_for_ever() && never.to_string().contains("has only 8 for capsules"), "{never}");
    }
}
