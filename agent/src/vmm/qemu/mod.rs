//! Machines in QEMU: each in a process of its own, as a user of its own, in its capsule's network
//! namespace, behind seccomp, with the descriptors it needs and no way to open more.
//!
//! - [`Qemu`]: finds the program and starts machines
//! - `arguments`: the command line
//! - `sockets`: the connections to it; [`Monitor`]: its control socket
//! - `going_on`: letting a guest go on
//! - `saving`, `memory`: what is kept of a machine that pauses

mod arguments;
mod going_on;
mod memory;
mod monitor;
mod saving;
mod sockets;

pub(super) use going_on::go_on;
pub use monitor::Monitor;
pub(super) use saving::{run_on, save, wait_until_restored};
pub(super) use sockets::connect;

use super::machine::{Machine, system};
use super::probe::{self, KvmUnusable};
use super::{MachineSpec, VmmError, check, require_readable};
use crate::disk::DiskImage;
use crate::net::Tap;
use crate::sys::cgroup::Group;
use crate::sys::memfd::{self, Capture};
use crate::sys::pidfd::Process;
use crate::sys::spawn::{Confinement, Identity, spawn};
use arguments::{DiskFds, Inputs};
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

/// What the memory of a machine that has booted is called in `/proc/PID/maps`.
const MEMORY_NAME: &CStr = c"guest memory";
const PROGRAM: &str = "qemu-system-x86_64";
/// Where distributions put it.
const DIRECTORIES: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// The oldest major version whose options are the ones used here.
const OLDEST_MAJOR: u32 = 7;
/// How much of what QEMU says on its standard error is kept.
const DIAGNOSTICS_BYTES: u64 = 16 * 1024;
/// How much of a wrong program's output an error message quotes.
const QUOTED_CHARS: usize = 200;

/// What QEMU itself takes beside translated code: 50 MiB measured, of which 20 are shared with others of its
/// kind, and room for what guests can make it allocate (queues of requests, tables of the disk's format).
const OVERHEAD_MB: u32 = 128;
/// What runs the guests' instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    /// The processor, by KVM.
    Kvm {
        /// The group that may use /dev/kvm; `None` when everybody may.
        group: Option<u32>,
    },
    /// QEMU itself, translating: everywhere, and ten times slower.
    Tcg {
        /// Whether this QEMU comes with the small firmware.
        qboot: bool,
    },
}

/// The QEMU of this host.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    version: String,
    accelerator: Accelerator,
    why_not_kvm: Option<KvmUnusable>,
}

impl Qemu {
    /// Finds QEMU, `program` or where distributions put it, asks for its version, and tries KVM. Blocks
    /// for a fraction of a second, two seconds at most.
    pub fn find(program: Option<&Path>) -> Result<Qemu, VmmError> {
        let program = match program {
            Some(program) if program.is_file() => program.to_owned(),
            Some(program) => return Err(VmmError::NoQemu { searched: program.display().to_string() }),
            None => DIRECTORIES
                .iter()
                .map(|directory| Path::new(directory).join(PROGRAM))
                .find(|path| path.is_file())
                .ok_or_else(|| VmmError::NoQemu { searched: DIRECTORIES.join(", ") })?,
        };
        let says = ask(&program, &["--version"])?;
        let Some(version) = parse_version(&says) else {
            let says = says.chars().take(QUOTED_CHARS).collect();
            return Err(VmmError::WrongQemu { program, says });
        };
        let (accelerator, why_not_kvm) = match probe::kvm() {
            Ok(access) => (Accelerator::Kvm { group: access.group }, None),
            Err(reason) => (Accelerator::Tcg { qboot: has_qboot(&program)? }, Some(reason)),
        };
        Ok(Qemu { program, version, accelerator, why_not_kvm })
    }

    /// Program, version and accelerator, as `qemu 7.2.22, tcg`.
    pub fn describe(&self) -> String {
        let accelerator = if self.uses_kvm() { "kvm" } else { "tcg" };
        format!("qemu {}, {accelerator}", self.version)
    }

    /// Whether the processor runs the guests' instructions.
    pub fn uses_kvm(&self) -> bool {
        matches!(self.accelerator, Accelerator::Kvm { .. })
    }

    /// Why KVM is not used, where it is not.
    pub fn why_not_kvm(&self) -> Option<&KvmUnusable> {
        self.why_not_kvm.as_ref()
    }

    /// Host memory that a machine takes at most beside its guest's and the tables for that, in MiB.
    pub fn overhead_mb(&self) -> u32 {
        match self.accelerator {
            Accelerator::Kvm { .. } => OVERHEAD_MB,
            Accelerator::Tcg { .. } => OVERHEAD_MB + arguments::TRANSLATION_CACHE_MB,
        }
    }

    /// Starts a machine whose network cable is `tap`, in the network namespace `namespace`. Returns as
    /// soon as QEMU's process is there: what becomes of it is seen at the machine's descriptors. On
    /// failure nothing runs. Blocks for milliseconds.
    pub fn start(
        &self,
        spec: &MachineSpec,
        tap: Tap,
        namespace: BorrowedFd<'_>,
    ) -> Result<Machine, VmmError> {
        check(spec)?;
        let kernel = open_for_all(&spec.kernel)?;
        let initramfs = spec.initramfs.as_deref().map(open_for_all).transpose()?;
        let memory = match &spec.restore {
            Some(restore) => Arc::clone(&restore.memory),
            None => {
                let bytes = u64::from(spec.memory_mb) << 20;
                let memory = memfd::private(MEMORY_NAME, bytes, spec.uid, spec.gid)
                    .map_err(system("making the memory of", Path::new(&spec.name)))?;
                Arc::new(File::from(memory))
            }
        };
        let state = spec.restore.as_ref().map(|restore| restore.state.as_fd());
        let disks: Vec<OpenDisk> = spec.disks.iter().map(OpenDisk::open).collect::<Result<_, _>>()?;
        let group = spec.group.as_ref().map(Group::make).transpose().map_err(VmmError::Group)?;
        let (listeners, (control, console)) = sockets::create(&spec.directory)?;
        let errors = Capture::new(c"qemu output", DIAGNOSTICS_BYTES)
            .map_err(system("making the output of", &self.program))?;

        let disk_fds: Vec<DiskFds> = disks.iter().map(OpenDisk::fds).collect();
        let arguments = arguments::arguments(&Inputs {
            accelerator: self.accelerator,
            name: &spec.name,
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            command_line: &spec.command_line,
            guest_mac: spec.guest_mac,
            kernel: kernel.as_raw_fd(),
            initramfs: initramfs.as_ref().map(AsRawFd::as_raw_fd),
            memory: memory.as_raw_fd(),
            state: state.as_ref().map(AsRawFd::as_raw_fd),
            tap: tap.as_fd().as_raw_fd(),
            monitor: listeners.monitor.as_raw_fd(),
            console: listeners.console.as_raw_fd(),
            disks: &disk_fds,
            disk_limits: spec.disk_limits,
        });
        let mut inherit = vec![kernel.as_fd(), memory.as_fd(), tap.as_fd()];
        inherit.extend(state);
        inherit.extend([listeners.monitor.as_fd(), listeners.console.as_fd()]);
        inherit.extend(initramfs.iter().map(AsFd::as_fd));
        inherit.extend(disks.iter().flat_map(OpenDisk::borrow));

        let output =
            || errors.writer().map(Stdio::from).map_err(system("making the output of", &self.program));
        let mut command = Command::new(&self.program);
        command.args(arguments).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(output()?).stderr(output()?);
        let confinement = self.confinement(spec, namespace, group.as_ref(), &inherit);
        let mut child = spawn(&mut command, &confinement).map_err(system("starting", &self.program))?;
        match Process::child(child.id()) {
            Ok(process) => Ok(Machine::started(process, control, console, Some(errors))),
            Err(e) => {
                // Without a descriptor there is no watching it: it goes, and the first error is the one
                // to tell.
                let _ = child.kill().and_then(|()| child.wait());
                Err(system("opening the process of", &self.program)(e))
            }
        }
    }

    fn confinement<'a>(
        &'a self,
        spec: &MachineSpec,
        namespace: BorrowedFd<'a>,
        group: Option<&'a File>,
        inherit: &'a [BorrowedFd<'a>],
    ) -> Confinement<'a> {
        let groups: &[u32] = match &self.accelerator {
            Accelerator::Kvm { group } => group.as_slice(),
            Accelerator::Tcg { .. } => &[],
        };
        let identity = Some(Identity { uid: spec.uid, gid: spec.gid });
        let group = group.map(AsFd::as_fd);
        // QEMU asks for huge pages for translated code, of which each machine then has some for nothing; that
        // they take long to clear is more than they make up for. With KVM they are for the guest's memory.
        let small_pages = !self.uses_kvm();
        Confinement {
            namespace: Some(namespace),
            group,
            identity,
            groups,
            inherit,
            small_pages,
            ..Confinement::default()
        }
    }
}

/// What the program prints.
fn ask(program: &Path, arguments: &[&str]) -> Result<String, VmmError> {
    let mut command = Command::new(program);
    let output = command.args(arguments).env_clear().stdin(Stdio::null()).output();
    Ok(String::from_utf8_lossy(&output.map_err(system("running", program))?.stdout).into_owned())
}

/// Whether the small firmware is in one of the directories in which QEMU looks for its own files.
fn has_qboot(program: &Path) -> Result<bool, VmmError> {
    let directories = ask(program, &["-L", "help"])?;
    Ok(directories.lines().any(|directory| Path::new(directory).join(arguments::SMALL_FIRMWARE).is_file()))
}

/// `7.2.22` of `QEMU emulator version 7.2.22 (Debian ...)`, when that is new enough.
fn parse_version(says: &str) -> Option<String> {
    let version = says.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    let major: u32 = version.split('.').next()?.parse().ok()?;
    (major >= OLDEST_MAJOR).then(|| version.to_owned())
}

/// Opens a file that QEMU opens once more by its descriptor, for which it needs the right to.
fn open_for_all(path: &Path) -> Result<File, VmmError> {
    require_readable(path)?;
    File::open(path).map_err(system("opening", path))
}

struct OpenDisk<'a> {
    image: &'a DiskImage,
    file: File,
    backing: Option<File>,
}

impl OpenDisk<'_> {
    fn open(image: &DiskImage) -> Result<OpenDisk<'_>, VmmError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&image.path)
            .map_err(system("opening", &image.path))?;
        let backing = match &image.backing {
            Some(path) => Some(File::open(path).map_err(system("opening", path))?),
            None => None,
        };
        Ok(OpenDisk { image, file, backing })
    }

    fn fds(&self) -> DiskFds {
        let backing = self.backing.as_ref().map(AsRawFd::as_raw_fd);
        DiskFds { format: self.image.format, file: self.file.as_raw_fd(), backing }
    }

    fn borrow(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.file.as_fd()).chain(self.backing.iter().map(AsFd::as_fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_old_ones_refused() {
        let says = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c)";
        assert_eq!(parse_version(says).as_deref(), Some("7.2.22"));
        assert_eq!(parse_version("QEMU emulator version 10.0.2\n").as_deref(), Some("10.0.2"));
        assert_eq!(parse_version("QEMU emulator version 6.2.0\n"), None);
        assert_eq!(parse_version("bash, version 5"), None);
        assert_eq!(parse_version(""), None);
    }
}
