//! Where a new capsule goes. Pure: the caller brings the hosts and what is promised on them.
//!
//! - The host decides, by the room that it really has, and another is asked when it declines. What is counted here
//!   only leaves out hosts that cannot but decline.
//! - Memory is never promised twice: what capsules were given, with the least overhead that one can have, stays
//!   below what the host has without its own reserve.
//! - A core is promised [`VCPUS_PER_CORE`] times at the most; a host may be set to less.
//! - A host that a team brought takes that team's capsules only, and gets them first.
//! - A host that said it is full is asked last: it may have room by now, and says so when it has not.
//! - Among the rest, a host that is known to have the template comes first, then the one with most
//!   memory left: capsules spread, so that a lost host takes few along.

use std::cmp::Reverse;
use std::fmt;

/// How many virtual CPUs are promised for each core, where a host's `WRENN_VCPU_OVERCOMMIT` is as high as it can be.
pub const VCPUS_PER_CORE: u64 = 64;
/// The least memory of its own that a VMM takes for each capsule, in MiB.
pub const CAPSULE_OVERHEAD_MB: u64 = 32;
/// The least memory that is left to the host itself, in MiB.
pub const MIN_RESERVE_MB: u64 = 256;
/// And the least part of its memory.
pub const RESERVE_DIVISOR: u64 = 20;

/// A registered host that the team may use, and what is promised on it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Candidate {
    /// `host-…`
    pub id: String,
    /// Where its agent listens, `IP:PORT`.
    pub address: String,
    /// Whether the team brought it.
    pub is_own: bool,
    /// Whether it was heard of lately.
    pub is_live: bool,
    /// Memory in MiB.
    pub memory_mb: u64,
    /// CPU cores.
    pub cpu_cores: u64,
    /// Memory promised to capsules, in MiB.
    pub memory_used_mb: u64,
    /// Virtual CPUs promised to capsules.
    pub vcpus_used: u64,
    /// Capsules on it.
    pub capsules: u64,
    /// Base templates that it said it has; a fresh one may not be listed yet.
    pub templates: Vec<String>,
    /// Memory and disk space that it said it has left for a further capsule, in MiB, if it did. That was a
    /// while ago, and counts only for the order.
    pub told_left_mb: Option<(u64, u64)>,
}

impl Candidate {
    /// Whether, by its own word, it would decline the capsule.
    fn seems_full(&self, wanted: &Wanted) -> bool {
        self.told_left_mb.is_some_and(|(memory_mb, disk_mb)| memory_mb < wanted.memory_mb || disk_mb == 0)
    }

    /// Memory that capsules may have in all, in MiB, their overhead included.
    pub fn usable_memory_mb(&self) -> u64 {
        self.memory_mb.saturating_sub(MIN_RESERVE_MB.max(self.memory_mb / RESERVE_DIVISOR))
    }

    /// Memory that is left, in MiB.
    pub fn free_memory_mb(&self) -> u64 {
        let overhead = self.capsules.saturating_mul(CAPSULE_OVERHEAD_MB);
        self.usable_memory_mb().saturating_sub(self.memory_used_mb.saturating_add(overhead))
    }

    fn could_hold(&self, wanted: &Wanted) -> bool {
        wanted.memory_mb.saturating_add(CAPSULE_OVERHEAD_MB) <= self.usable_memory_mb()
            && wanted.vcpus <= self.cpu_cores.saturating_mul(VCPUS_PER_CORE)
    }

    /// Whether a capsule fits beside those that it has.
    pub fn fits(&self, wanted: &Wanted) -> bool {
        self.is_live
            && wanted.memory_mb.saturating_add(CAPSULE_OVERHEAD_MB) <= self.free_memory_mb()
            && self.vcpus_used.saturating_add(wanted.vcpus) <= self.cpu_cores.saturating_mul(VCPUS_PER_CORE)
    }
}

/// What a capsule asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Memory in MiB.
    pub memory_mb: u64,
    /// Virtual CPUs.
    pub vcpus: u64,
    /// The template.
    pub template: String,
}

/// Why a capsule goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// No host was ever registered for the team.
    NoHosts,
    /// None of the hosts was heard of lately.
    NoneLive,
    /// It is larger than any host could hold, even an empty one.
    TooLarge {
        /// The most memory that a capsule may ask for, in MiB.
        max_memory_mb: u64,
        /// The most virtual CPUs.
        max_vcpus: u64,
    },
    /// Every host that could hold it is full.
    Full,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NoHosts => {
                f.write_str("no host is registered; create one (POST /v1/hosts) and register its agent")
            }
            Refusal::NoneLive => f.write_str(
                "no host has been heard of in the last 90 seconds; see that wrenn-agent runs on one and \
                 reaches the control plane",
            ),
            Refusal::TooLarge { max_memory_mb, max_vcpus } => write!(
                f,
                "no host is large enough: a capsule here may have memory_mb up to {max_memory_mb} and vcpus \
                 up to {max_vcpus}"
            ),
            Refusal::Full => f.write_str(
                "all hosts are full; destroy capsules that are not needed, ask for less memory_mb or vcpus, \
                 or try again later",
            ),
        }
    }
}

/// The candidates that may take the capsule now, the best first, as indices.
///
/// # Errors
/// Why there is none.
pub fn rank(candidates: &[Candidate], wanted: &Wanted) -> Result<Vec<usize>, Refusal> {
    if candidates.is_empty() {
        return Err(Refusal::NoHosts);
    }
    if !candidates.iter().any(|c| c.is_live) {
        return Err(Refusal::NoneLive);
    }
    let live = || candidates.iter().filter(|c| c.is_live);
    if !live().any(|c| c.could_hold(wanted)) {
        let memory = live().map(|c| c.usable_memory_mb().saturating_sub(CAPSULE_OVERHEAD_MB)).max();
        return Err(Refusal::TooLarge {
            max_memory_mb: memory.unwrap_or(0),
            max_vcpus: live().map(|c| c.cpu_cores.saturating_mul(VCPUS_PER_CORE)).max().unwrap_or(0),
        });
    }
    let mut fitting: Vec<usize> = (0..candidates.len()).filter(|i| candidates[*i].fits(wanted)).collect();
    if fitting.is_empty() {
        return Err(Refusal::Full);
    }
    fitting.sort_by_key(|index| {
        let c = &candidates[*index];
        let has_template = c.templates.contains(&wanted.template);
        let left = Reverse(c.free_memory_mb());
        (c.seems_full(wanted), Reverse(c.is_own), Reverse(has_template), left, *index)
    });
    Ok(fitting)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(id: &str, memory_mb: u64) -> Candidate {
        Candidate {
            id: id.into(),
            is_live: true,
            memory_mb,
            cpu_cores: 2,
            templates: vec!["minimal".into()],
            ..Candidate::default()
        }
    }

    fn wanted(memory_mb: u64, vcpus: u64) -> Wanted {
        Wanted { memory_mb, vcpus, template: "minimal".into() }
    }

    #[test]
    fn the_emptiest_host_is_first() {
        let mut hosts = [host("a", 4096), host("b", 4096), host("c", 4096)];
        hosts[0].memory_used_mb = 1024;
        hosts[0].capsules = 1;
        hosts[2].memory_used_mb = 512;
        hosts[2].capsules = 1;
        assert_eq!(rank(&hosts, &wanted(512, 1)), Ok(vec![1, 2, 0]));
    }

    #[test]
    fn own_hosts_and_those_with_the_template_come_before_empty_ones() {
        let mut hosts = [host("a", 65_536), host("b", 32_768), host("c", 4096)];
        hosts[0].templates.clear();
        hosts[2].is_own = true;
        assert_eq!(rank(&hosts, &wanted(512, 1)), Ok(vec![2, 1, 0]));
    }

    #[test]
    fn a_host_that_said_it_is_full_is_last() {
        let mut hosts = [host("a", 65_536), host("b", 65_536), host("c", 4096), host("d", 2048)];
        hosts[0].told_left_mb = Some((511, 1_000));
        hosts[1].told_left_mb = Some((60_000, 0));
        hosts[2].told_left_mb = Some((512, 1));
        assert_eq!(rank(&hosts, &wanted(512, 1)), Ok(vec![2, 3, 0, 1]));
    }

    #[test]
    fn memory_is_never_promised_twice() {
        let mut hosts = [host("a", 2048)];
        // 2048 - 256 of reserve, and 32 of overhead for each capsule.
        assert_eq!(rank(&hosts, &wanted(1760, 1)), Ok(vec![0]));
        assert_eq!(
            rank(&hosts, &wanted(1761, 1)),
            Err(Refusal::TooLarge { max_memory_mb: 1760, max_vcpus: 128 })
        );
        hosts[0].memory_used_mb = 512;
        hosts[0].capsules = 1;
        assert_eq!(rank(&hosts, &wanted(1216, 1)), Ok(vec![0]));
        assert_eq!(rank(&hosts, &wanted(1217, 1)), Err(Refusal::Full));
    }

    #[test]
    fn cores_are_promised_as_often_as_a_host_may_be_set_to() {
        let mut hosts = [host("a", 65_536)];
        hosts[0].vcpus_used = 126;
        assert_eq!(rank(&hosts, &wanted(512, 2)), Ok(vec![0]));
        assert_eq!(rank(&hosts, &wanted(512, 3)), Err(Refusal::Full));
        assert!(matches!(rank(&hosts, &wanted(512, 129)), Err(Refusal::TooLarge { max_vcpus: 128, .. })));
    }

    #[test]
    fn silent_hosts_get_nothing_and_do_not_count() {
        let mut hosts = [host("a", 65_536), host("b", 1024)];
        hosts[0].is_live = false;
        assert_eq!(rank(&hosts, &wanted(256, 1)), Ok(vec![1]));
        assert!(matches!(rank(&hosts, &wanted(8192, 1)), Err(Refusal::TooLarge { max_memory_mb: 736, .. })));
        hosts[1].is_live = false;
        assert_eq!(rank(&hosts, &wanted(256, 1)), Err(Refusal::NoneLive));
        assert_eq!(rank(&[], &wanted(256, 1)), Err(Refusal::NoHosts));
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let mut hosts = [host("a", u64::MAX)];
        hosts[0].memory_used_mb = u64::MAX;
        hosts[0].capsules = u64::MAX;
        hosts[0].vcpus_used = u64::MAX;
        assert_eq!(rank(&hosts, &wanted(1, 1)), Err(Refusal::Full));
        assert!(rank(&hosts, &wanted(u64::MAX, u64::MAX)).is_err());
    }
}
