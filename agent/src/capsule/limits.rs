//! What a capsule's processes may use of the host together: its VMM, whatever that starts, and its guest's
//! memory. More than the guest was promised is the VMM's own need, so a guest never notices its limits.

use crate::sys::cgroup::Limits;

/// One part of a guest's memory in so many is for the page tables of the VMM and of the hypervisor, each an
/// eight-byte entry for a page of 4 KiB, and for what the kernel keeps beside them.
const MEMORY_PER_TABLES: u64 = 64;
/// Threads of a VMM beside those of the virtual CPUs: QEMU starts up to 64 for its disks and as many for its
/// block layer, and some of its own.
const HELPER_THREADS: u64 = 160;
/// Processor time for the threads that serve disks and network, in thousandths of a processor.
const HELPER_CPU_THOUSANDTHS: u64 = 500;
const MIB: u64 = 1024 * 1024;

/// The memory that a capsule may come to take on the host, in MiB: its guest's, and what the VMM takes
/// beside that, of which `overhead_mb` does not depend on the guest.
pub fn host_memory_mb(memory_mb: u32, overhead_mb: u32) -> u64 {
    let memory_mb = u64::from(memory_mb);
    memory_mb + memory_mb.div_ceil(MEMORY_PER_TABLES) + u64::from(overhead_mb)
}

/// The limits of a capsule's processes.
pub fn limits(vcpus: u32, memory_mb: u32, overhead_mb: u32) -> Limits {
    Limits {
        memory_bytes: host_memory_mb(memory_mb, overhead_mb) * MIB,
        pids: u64::from(vcpus) + HELPER_THREADS,
        cpu_thousandths: u64::from(vcpus) * 1000 + HELPER_CPU_THOUSANDTHS,
        weight: Limits::weight_of(vcpus),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_leave_room_for_the_vmm() {
        for (vcpus, memory_mb, overhead_mb, memory, pids, cpu, weight) in [
            (1, 128, 64, 194, 161, 1_500, 100),
            (2, 512, 64, 584, 162, 2_500, 200),
            (64, 1_048_576, 320, 1_065_280, 224, 64_500, 6_400),
        ] {
            let limits = limits(vcpus, memory_mb, overhead_mb);
            let found = (limits.memory_bytes / MIB, limits.pids, limits.cpu_thousandths, limits.weight);
            assert_eq!(found, (memory, pids, cpu, weight), "{vcpus} {memory_mb}");
        }
    }
}
