//! Virtual machine monitors: what a machine is to be like, and how it is started, watched and ended.
//!
//! - [`MachineSpec`]: what a machine is to be like
//! - [`Vmm`]: the monitor that this host starts machines with
//! - [`qemu`]: starts one in QEMU
//! - [`Machine`]: one that runs, whoever started it
//! - [`qmp`]: QEMU's protocol; [`console`]: the guest's serial port
//! - [`image`]: a machine that is saved: its memory and the state of its devices, as files
//! - [`probe`]: whether KVM works here

pub mod console;
mod error;
pub mod image;
mod machine;
pub mod probe;
pub mod qemu;
pub mod qmp;

pub use console::Pump;
pub use error::VmmError;
pub use image::Image;
pub use machine::{Event, Machine};

use crate::disk::DiskImage;
use crate::net::{MacAddress, Tap};
use crate::sys::cgroup::Group;
use probe::KvmUnusable;
use qemu::Qemu;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// The virtual machine monitor that this host starts machines with.
#[derive(Debug)]
pub enum Vmm {
    /// QEMU.
    Qemu(Qemu),
}

impl Vmm {
    /// Program, version and accelerator, as `qemu 7.2.22, tcg`.
    pub fn describe(&self) -> String {
        match self {
            Vmm::Qemu(qemu) => qemu.describe(),
        }
    }

    /// The memory that the VMM takes beside its guest's, in MiB, apart from what depends on the guest.
    pub fn overhead_mb(&self) -> u32 {
        match self {
            Vmm::Qemu(qemu) => qemu.overhead_mb(),
        }
    }

    /// Whether the processor runs the guests' instructions.
    pub fn uses_kvm(&self) -> bool {
        match self {
            Vmm::Qemu(qemu) => qemu.uses_kvm(),
        }
    }

    /// Why KVM is not used, where it is not.
    pub fn why_not_kvm(&self) -> Option<&KvmUnusable> {
        match self {
            Vmm::Qemu(qemu) => qemu.why_not_kvm(),
        }
    }

    /// Starts a machine whose network cable is `tap`, in the network namespace `namespace`. What becomes of
    /// it is seen at the machine's descriptors. On failure nothing runs. Blocks.
    pub fn start(
        &self,
        spec: &MachineSpec,
        tap: Tap,
        namespace: BorrowedFd<'_>,
    ) -> Result<Machine, VmmError> {
        match self {
            Vmm::Qemu(qemu) => qemu.start(spec, tap, namespace),
        }
    }
}

/// The files that a machine goes on from.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Its memory, of the machine's size. The machine's user may open it for writing; nothing is written.
    pub memory: Arc<File>,
    /// The state of its devices.
    pub state: Arc<File>,
}

/// What a machine is to be like. Nothing in it is secret: all of it can be read in the list of processes.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// What the machine is called in the list of processes: the capsule's id. Letters, digits, `-`, `_`
    /// and `.` only.
    pub name: String,
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u32,
    /// Guest memory in MiB, 64 to 1,048,576.
    pub memory_mb: u32,
    /// The uncompressed kernel, readable for all.
    pub kernel: PathBuf,
    /// The initial RAM filesystem, readable for all.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, at most 1,900 bytes. The VMM's driver adds what suits the machine that it
    /// makes.
    pub command_line: String,
    /// Its disks; the first is the guest's /dev/vda.
    pub disks: Vec<DiskImage>,
    /// The guest's Ethernet address.
    pub guest_mac: MacAddress,
    /// The user that the VMM runs as, this capsule's alone.
    pub uid: u32,
    /// The group that the VMM runs as, this capsule's alone.
    pub gid: u32,
    /// The capsule's directory, which exists and which only the agent may enter. Sockets and logs go here.
    pub directory: PathBuf,
    /// What it goes on from instead of booting. It then stands still until it is told to go on.
    pub restore: Option<Restore>,
    /// The control group that the VMM and its helpers run in; none where the host has no limits.
    pub group: Option<Group>,
}
