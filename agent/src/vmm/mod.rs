//! Virtual machine monitors: what a machine is to be like, and how it is started, watched and ended.
//!
//! - [`MachineSpec`]: what a machine is to be like
//! - [`Vmm`]: the monitor that this host starts machines with
//! - [`qemu`]: starts one in QEMU
//! - [`firecracker`]: starts one in Firecracker
//! - [`Machine`]: one that runs, whoever started it
//! - [`qmp`]: QEMU's protocol; [`console`]: the guest's serial port
//! - [`image`]: a machine that is saved: its memory and the state of its devices, as files
//! - [`probe`]: whether KVM works here

pub mod console;
mod error;
pub mod firecracker;
pub mod image;
mod machine;
pub mod probe;
pub mod qemu;
pub mod qmp;

pub use console::Pump;
pub use error::VmmError;
pub use image::Image;
pub use machine::{Event, Machine};

use crate::disk::{Backend, DiskImage};
use crate::net::{MacAddress, Tap};
use crate::sys::cgroup::Group;
use firecracker::{Firecracker, Programs};
use probe::KvmUnusable;
use qemu::Qemu;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAX_VCPUS: u32 = 64;
const MIN_MEMORY_MB: u32 = 64;
const MAX_MEMORY_MB: u32 = 1 << 20;
/// The longest kernel command line: COMMAND_LINE_SIZE on x86 is 2,048, of which the terminator and what
/// `arguments` adds take some.
const MAX_COMMAND_LINE_BYTES: usize = 1_900;
const MAX_NAME_BYTES: usize = 64;
const READABLE_FOR_ALL: u32 = 0o004;

/// The kinds of monitors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// QEMU.
    #[default]
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl Kind {
    /// Of what [`Vmm::describe`] says.
    pub fn of(description: &str) -> Kind {
        if description.starts_with("firecracker ") { Kind::Firecracker } else { Kind::Qemu }
    }

    /// Whether it answers the guest at the metadata service's address itself.
    pub fn serves_metadata(self) -> bool {
        self == Kind::Firecracker
    }
}

/// The virtual machine monitor that this host starts machines with.
#[derive(Debug)]
pub enum Vmm {
    /// QEMU.
    Qemu(Qemu),
    /// Firecracker.
    Firecracker(Firecracker),
}

/// Which VMM a person wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Firecracker where it can be used, else QEMU.
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl Vmm {
    /// Finds what is wanted: the program, its version, KVM. Firecracker needs KVM, and disks that are no
    /// qcow2. Blocks for a fraction of a second, four seconds at most.
    ///
    /// # Errors
    /// What is wanted cannot be used; the error says what to do.
    pub fn find(
        wanted: Wanted,
        qemu: Option<&Path>,
        programs: &Programs,
        disks: Backend,
    ) -> Result<Vmm, VmmError> {
        if wanted != Wanted::Qemu {
            match find_firecracker(programs, disks) {
                Ok(firecracker) => return Ok(Vmm::Firecracker(firecracker)),
                Err(e) if wanted == Wanted::Firecracker => return Err(e),
                // Nobody has installed one, and nobody has asked for one.
                Err(e @ VmmError::NoFirecracker { .. }) if programs.firecracker.is_none() => {
                    log::debug!("Firecracker is not used: {e}");
                }
                Err(e) => log::warn!("Firecracker is not used: {e}"),
            }
        }
        Qemu::find(qemu).map(Vmm::Qemu)
    }

    /// Program, version and accelerator, as `qemu 7.2.22, tcg`.
    pub fn describe(&self) -> String {
        match self {
            Vmm::Qemu(qemu) => qemu.describe(),
            Vmm::Firecracker(firecracker) => firecracker.describe(),
        }
    }

    /// The memory that the VMM takes beside its guest's, in MiB, apart from what depends on the guest.
    pub fn overhead_mb(&self) -> u32 {
        match self {
            Vmm::Qemu(qemu) => qemu.overhead_mb(),
            Vmm::Firecracker(firecracker) => firecracker.overhead_mb(),
        }
    }

    /// Whether the processor runs the guests' instructions.
    pub fn uses_kvm(&self) -> bool {
        match self {
            Vmm::Qemu(qemu) => qemu.uses_kvm(),
            Vmm::Firecracker(_) => true,
        }
    }

    /// Why KVM is not used, where it is not.
    pub fn why_not_kvm(&self) -> Option<&KvmUnusable> {
        match self {
            Vmm::Qemu(qemu) => qemu.why_not_kvm(),
            Vmm::Firecracker(_) => None,
        }
    }

    /// Which it is.
    pub fn kind(&self) -> Kind {
        match self {
            Vmm::Qemu(_) => Kind::Qemu,
            Vmm::Firecracker(_) => Kind::Firecracker,
        }
    }

    /// Whether machines that go on from one memory share its file as it lies on disk.
    pub fn shares_files(&self) -> bool {
        matches!(self, Vmm::Firecracker(_))
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
            Vmm::Firecracker(firecracker) => firecracker.start(spec, tap, namespace),
        }
    }
}

fn find_firecracker(programs: &Programs, disks: Backend) -> Result<Firecracker, VmmError> {
    // A missing program before missing KVM: without the program nobody wants to know of KVM.
    let found = Firecracker::find(programs)?;
    let kvm = probe::kvm().map_err(|e| VmmError::NotHere { why: format!("Firecracker needs KVM: {e}") })?;
    if disks == Backend::Overlay {
        let why = "Firecracker has no qcow2 disks, and device-mapper and reflinks do not work here";
        return Err(VmmError::NotHere { why: why.into() });
    }
    if !found.is_jailed() {
        log::warn!("Firecracker runs without its jailer: a guest that takes it over sees more of this host");
    }
    Ok(found.with_kvm(kvm))
}

/// The files that a machine goes on from.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Its memory, of the machine's size. The machine's user may open it for writing; nothing is written.
    pub memory: Arc<File>,
    /// The state of its devices.
    pub state: Arc<File>,
    /// The memory's file, for a VMM that opens it itself.
    pub memory_path: PathBuf,
    /// The state's file, for a VMM that opens it itself.
    pub state_path: PathBuf,
    /// Whether the memory is this capsule's own, to be brought up to date when it is saved again.
    pub is_own: bool,
}

/// How much a machine may read from and write to all its disks; 0 for as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Bytes a second.
    pub bytes_per_sec: u64,
    /// Requests a second.
    pub ops_per_sec: u64,
}

/// What a machine is to be like. Nothing in it but the metadata is secret: all of it can be read in the list
/// of processes.
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
    /// How fast it may use them.
    pub disk_limits: DiskLimits,
    /// The guest's Ethernet address.
    pub guest_mac: MacAddress,
    /// What the metadata service tells the guest, where the VMM [serves](Kind::serves_metadata) it.
    pub metadata: Value,
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

fn check(spec: &MachineSpec) -> Result<(), VmmError> {
    let invalid = |reason: String| Err(VmmError::Invalid { reason });
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if spec.name.is_empty() || spec.name.len() > MAX_NAME_BYTES || !spec.name.chars().all(plain) {
        return invalid(format!("{:?} cannot be a machine's name", spec.name));
    }
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return invalid(format!("{} virtual CPUs: 1 to {MAX_VCPUS} are possible", spec.vcpus));
    }
    if !(MIN_MEMORY_MB..=MAX_MEMORY_MB).contains(&spec.memory_mb) {
        return invalid(format!(
            "{} MiB of memory: {MIN_MEMORY_MB} to {MAX_MEMORY_MB} are possible",
            spec.memory_mb
        ));
    }
    if spec.command_line.len() > MAX_COMMAND_LINE_BYTES || spec.command_line.contains('\0') {
        return invalid(format!(
            "a kernel command line of {} bytes: {MAX_COMMAND_LINE_BYTES} are possible",
            spec.command_line.len()
        ));
    }
    if spec.uid == 0 || spec.gid == 0 {
        return invalid("a machine never runs as root".into());
    }
    Ok(())
}

/// Checks that a file can be read by all: VMMs run as users of their own.
fn require_readable(path: &Path) -> Result<(), VmmError> {
    let mode = fs::metadata(path).map_err(machine::system("examining", path))?.permissions().mode();
    if mode & READABLE_FOR_ALL == 0 {
        return Err(VmmError::NotReadable { path: path.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_cannot_be_is_refused_before_anything_is_made() {
        let good = MachineSpec {
            name: "cap-1".into(),
            vcpus: 1,
            memory_mb: 256,
            kernel: "/k".into(),
            initramfs: None,
            command_line: String::new(),
            disks: Vec::new(),
            disk_limits: DiskLimits::default(),
            guest_mac: MacAddress([2, 0, 0, 0, 0, 1]),
            uid: 100_001,
            gid: 100_001,
            directory: "/d".into(),
            metadata: Value::Null,
            restore: None,
            group: None,
        };
        assert!(check(&good).is_ok());
        let bad = [
            MachineSpec { name: "a,b".into(), ..good.clone() },
            MachineSpec { name: String::new(), ..good.clone() },
            MachineSpec { vcpus: 0, ..good.clone() },
            MachineSpec { vcpus: 65, ..good.clone() },
            MachineSpec { memory_mb: 63, ..good.clone() },
            MachineSpec { memory_mb: MAX_MEMORY_MB + 1, ..good.clone() },
            MachineSpec { command_line: "x".repeat(2_048), ..good.clone() },
            MachineSpec { uid: 0, ..good.clone() },
            MachineSpec { gid: 0, ..good.clone() },
        ];
        for spec in bad {
            assert!(matches!(check(&spec), Err(VmmError::Invalid { .. })), "{spec:?}");
        }
    }
}
