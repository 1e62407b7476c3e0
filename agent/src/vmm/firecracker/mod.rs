//! Machines in Firecracker: each in a process of its own, under Firecracker's jailer: in a root of its own,
//! as a user of its own, in its capsule's network namespace and control group, behind Firecracker's seccomp
//! filters. It is told by its API what to make.
//!
//! - [`Firecracker`]: finds the programs and starts machines
//! - [`Instance`]: one that runs
//! - [`Version`]: which versions are used
//! - `requests`: what is asked of its API, as data; `api`: asking
//! - `jail`: its root
//! - `metrics`: what went wrong in it
//! - `saving`: what is kept of a machine that pauses
//!
//! A process namespace of its own would add nothing: there is no /proc in its root, its user has no other
//! process, and its filters let it signal nobody. Without one the machine stays the agent's child, whose end
//! is told with its status.

mod api;
mod instance;
mod jail;
mod metrics;
mod requests;
mod saving;
mod version;

pub use instance::Instance;
pub use version::Version;

use super::console::Console;
use super::machine::{Control, Machine, system};
use super::probe::KvmAccess;
use super::{MachineSpec, Restore, VmmError, check, require_readable};
use crate::disk::Format;
use crate::net::Tap;
use crate::sys::cgroup::Group;
use crate::sys::memfd::Capture;
use crate::sys::node;
use crate::sys::pidfd::Process;
use crate::sys::spawn::{Confinement, Identity, spawn};
use api::{Api, SOCKET};
use jail::Jail;
use requests::{Boot, INITRAMFS, KERNEL, LOG, MEMORY, METRICS, STATE, disk_name};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PROGRAM: &str = "firecracker";
const JAILER: &str = "jailer";
/// Where programs are that a person has installed, and those of a distribution.
const DIRECTORIES: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// How much of what Firecracker says on its standard error, and of its log, is kept.
const DIAGNOSTICS_BYTES: u64 = 16 * 1024;
/// How much of a wrong program's output an error message quotes.
const QUOTED_CHARS: usize = 200;
/// How long jailer and Firecracker may take until the API answers.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How often it is asked whether it does.
const START_POLL: Duration = Duration::from_millis(2);
/// How long a machine that could not be made may take to end, in milliseconds.
const KILL_TIMEOUT_MS: i32 = 10_000;
/// What Firecracker itself takes: less than 5 MiB by its specification, and room for the queues of its devices
/// and for the files that it writes when it is saved.
const OVERHEAD_MB: u32 = 64;
/// The most virtual CPUs of a machine, as Firecracker's API has it.
const MAX_VCPUS: u32 = 32;
/// The guest's serial port, as a pipe in the capsule's directory.
const CONSOLE_NAME: &str = "serial.fifo";

/// Which programs to use.
#[derive(Debug, Clone, Default)]
pub struct Programs {
    /// Firecracker; `None` for where distributions put it.
    pub firecracker: Option<PathBuf>,
    /// The jailer; `None` for the one beside Firecracker, or where distributions put it.
    pub jailer: Option<PathBuf>,
    /// Whether machines may run without a jailer.
    pub without_jailer: bool,
}

/// The Firecracker of this host.
#[derive(Debug)]
pub struct Firecracker {
    program: PathBuf,
    jailer: Option<PathBuf>,
    version: Version,
    kvm: KvmAccess,
}

impl Firecracker {
    /// Finds Firecracker and its jailer and looks at their versions. Blocks for a fraction of a second.
    ///
    /// # Errors
    /// [`VmmError::NoFirecracker`] when there is none; everything else is for a person to mend.
    pub fn find(programs: &Programs) -> Result<Firecracker, VmmError> {
        let program = locate(programs.firecracker.as_deref(), PROGRAM, None)
            .map_err(|searched| VmmError::NoFirecracker { searched })?;
        let version = check_version(&program, "Firecracker")?;
        let jailer = if programs.without_jailer {
            None
        } else {
            let jailer = locate(programs.jailer.as_deref(), JAILER, program.parent())
                .map_err(|searched| VmmError::NoJailer { searched })?;
            if check_version(&jailer, "Jailer")? != version {
                let why = format!("it is not of the version of {}, {version}", program.display());
                return Err(VmmError::WrongFirecracker { program: jailer, why });
            }
            Some(jailer)
        };
        Ok(Firecracker { program, jailer, version, kvm: KvmAccess { group: None } })
    }

    /// With the access to KVM that machines without a jailer need.
    pub fn with_kvm(self, kvm: KvmAccess) -> Firecracker {
        Firecracker { kvm, ..self }
    }

    /// Program, version and accelerator, as `firecracker 1.16.1, kvm`.
    pub fn describe(&self) -> String {
        format!("firecracker {}, kvm", self.version)
    }

    /// Host memory that a machine takes at most beside its guest's and the tables for that, in MiB.
    pub fn overhead_mb(&self) -> u32 {
        OVERHEAD_MB
    }

    /// Whether machines run under the jailer.
    pub fn is_jailed(&self) -> bool {
        self.jailer.is_some()
    }

    /// Starts a machine whose network cable is `tap`, in the network namespace `namespace`. One that boots
    /// runs when this returns, one that was saved stands still. On failure nothing runs. Blocks, for half a
    /// minute at most.
    pub fn start(
        &self,
        spec: &MachineSpec,
        tap: Tap,
        namespace: BorrowedFd<'_>,
    ) -> Result<Machine, VmmError> {
        check(spec)?;
        if spec.vcpus > MAX_VCPUS {
            let reason =
                format!("{} virtual CPUs: Firecracker's machines have at most {MAX_VCPUS}", spec.vcpus);
            return Err(VmmError::Invalid { reason });
        }
        let jail = Jail::make(&spec.directory, &self.program, &spec.name, spec.uid)?;
        furnish(&jail, spec)?;
        let pipes = (jail.make_pipe(LOG)?, jail.make_pipe(METRICS)?);
        tap.leave_to(spec.uid).map_err(system("giving away", Path::new("tap0")))?;
        let errors = Capture::new(c"firecracker output", DIAGNOSTICS_BYTES)
            .map_err(system("making the output of", &self.program))?;
        let console_path = spec.directory.join(CONSOLE_NAME);
        remove_if_there(&console_path)?;
        node::make_fifo(&console_path).map_err(system("making", &console_path))?;
        let console = open_console(&spec.directory)?;

        let group = spec.group.as_ref().map(Group::make).transpose().map_err(VmmError::Group)?;
        let mut command = self.command(spec, &jail, namespace);
        command.stdin(Stdio::null()).stdout(open_pipe(&console_path)?);
        command.stderr(errors.writer().map_err(system("making the output of", &self.program))?);
        let mut child = spawn(&mut command, &self.confinement(spec, namespace, group.as_ref()))
            .map_err(system("starting", command.get_program().as_ref()))?;
        let process = match Process::child(child.id()) {
            Ok(process) => process,
            Err(e) => {
                // Without a descriptor there is no watching it: it goes, and the first error is the one
                // to tell.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(system("opening the process of", &self.program)(e));
            }
        };
        let api = Api::new(jail.open()?, process.pid());
        let knows_changes = spec.restore.as_ref().is_some_and(|restore| restore.is_own);
        let instance = Instance::new(api, jail, pipes, knows_changes);
        let mut machine =
            Machine::started(process, Control::Firecracker(Box::new(instance)), console, Some(errors));
        match configure(&mut machine, spec) {
            Ok(()) => Ok(machine),
            Err(e) => Err(end(machine, e)),
        }
    }

    fn command(&self, spec: &MachineSpec, jail: &Jail, namespace: BorrowedFd<'_>) -> Command {
        let mut command = Command::new(self.jailer.as_ref().unwrap_or(&self.program));
        command.env_clear();
        if self.jailer.is_some() {
            let identity = [("--uid", spec.uid), ("--gid", spec.gid)];
            command.arg("--id").arg(&spec.name).arg("--exec-file").arg(&self.program);
            for (option, id) in identity {
                command.arg(option).arg(id.to_string());
            }
            command.arg("--chroot-base-dir").arg(Jail::base(&spec.directory));
            // The jailer closes what it inherits, but may look at what its parent has open.
            let namespace = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
            command.arg("--netns").arg(namespace).arg("--").current_dir("/");
        } else {
            command.arg("--id").arg(&spec.name).current_dir(jail.root());
        }
        // Guests have no drivers for devices that are not on PCI before their root is there.
        command.args(["--api-sock", SOCKET, "--enable-pci"]);
        command
    }

    /// The jailer needs root, and puts what it starts into its place itself.
    fn confinement<'a>(
        &'a self,
        spec: &MachineSpec,
        namespace: BorrowedFd<'a>,
        group: Option<&'a File>,
    ) -> Confinement<'a> {
        let group = group.map(AsFd::as_fd);
        if self.jailer.is_some() {
            return Confinement { group, ..Confinement::default() };
        }
        let identity = Some(Identity { uid: spec.uid, gid: spec.gid });
        let groups = self.kvm.group.as_slice();
        Confinement { namespace: Some(namespace), identity, groups, group, ..Confinement::default() }
    }
}

/// Puts what a machine needs into its root.
fn furnish(jail: &Jail, spec: &MachineSpec) -> Result<(), VmmError> {
    match &spec.restore {
        Some(Restore { memory_path, state_path, .. }) => {
            jail.link(memory_path, MEMORY)?;
            jail.link(state_path, STATE)?;
        }
        None => {
            require_readable(&spec.kernel)?;
            jail.link(&spec.kernel, KERNEL)?;
            if let Some(initramfs) = &spec.initramfs {
                require_readable(initramfs)?;
                jail.link(initramfs, INITRAMFS)?;
            }
        }
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        if disk.format == Format::Qcow2 {
            let reason = "Firecracker has no qcow2 disks: use device-mapper or a file system with reflinks";
            return Err(VmmError::Invalid { reason: reason.into() });
        }
        jail.link_disk(&disk.path, &disk_name(index))?;
    }
    Ok(())
}

/// Waits for the API and makes the machine by it.
fn configure(machine: &mut Machine, spec: &MachineSpec) -> Result<(), VmmError> {
    let began = Instant::now();
    while !machine.instance().is_some_and(|instance| instance.api.is_up()) {
        if machine.try_wait().map_err(system("waiting for", Path::new(PROGRAM)))?.is_some() {
            return Err(VmmError::MonitorClosed);
        }
        if began.elapsed() > START_TIMEOUT {
            return Err(VmmError::NoAnswer { command: "its start" });
        }
        sleep(START_POLL);
    }
    let Some(instance) = machine.instance() else { return Err(VmmError::MonitorClosed) };
    instance.call(&requests::log())?;
    instance.call(&requests::metrics())?;
    let requests = match &spec.restore {
        Some(_) => requests::load(&spec.metadata, instance.knows_changes, spec.disks.len(), spec.disk_limits),
        None => requests::boot(&Boot {
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            command_line: &spec.command_line,
            has_initramfs: spec.initramfs.is_some(),
            disks: spec.disks.len(),
            disk_limits: spec.disk_limits,
            guest_mac: spec.guest_mac,
            metadata: &spec.metadata,
        }),
    };
    for request in &requests {
        instance.call(request)?;
    }
    // It has them open. Links would hold the space of files that are replaced.
    for name in [MEMORY, STATE, KERNEL, INITRAMFS] {
        instance.jail.remove(name)?;
    }
    Ok(())
}

/// Ends a machine that could not be made; why, with what it said itself.
fn end(mut machine: Machine, why: VmmError) -> VmmError {
    if let Err(e) = machine.kill().and_then(|()| machine.wait(KILL_TIMEOUT_MS).map(drop)) {
        log::error!("killing the VMM {}: {e}", machine.pid());
    }
    let _ = machine.pump_console();
    let said = machine.diagnostics();
    let said = if said.trim().is_empty() { machine.console_tail() } else { said };
    if said.trim().is_empty() { why } else { VmmError::Said(Box::new(why), said.trim().to_owned()) }
}

/// The agent's end of the serial port.
fn open_console(directory: &Path) -> Result<Console, VmmError> {
    let path = directory.join(CONSOLE_NAME);
    Console::new(open_pipe(&path)?.into(), directory).map_err(system("opening the serial log in", directory))
}

/// With both kinds of access: so there always are a reader and a writer, and no end.
fn open_pipe(path: &Path) -> Result<File, VmmError> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    opened.map_err(system("opening", path))
}

fn remove_if_there(path: &Path) -> Result<(), VmmError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(system("removing", path)(e)),
        _ => Ok(()),
    }
}

/// Removes the roots of machines that have ended in a capsule's directory. Blocks.
pub(super) fn clear(directory: &Path) -> Result<(), VmmError> {
    jail::remove_all(directory)
}

/// The program that is asked for, or the first of this name; where it was looked for when there is none.
fn locate(wanted: Option<&Path>, name: &str, beside: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(program) = wanted {
        return if program.is_file() { Ok(program.to_owned()) } else { Err(program.display().to_string()) };
    }
    let directories: Vec<&Path> = beside.into_iter().chain(DIRECTORIES.iter().map(Path::new)).collect();
    let found = directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| {
        let names: Vec<String> = directories.iter().map(|d| d.display().to_string()).collect();
        names.join(", ")
    })
}

/// The version of a program that calls itself `name`, when it is one that is used.
fn check_version(program: &Path, name: &str) -> Result<Version, VmmError> {
    let output = Command::new(program).arg("--version").env_clear().stdin(Stdio::null()).output();
    let says = String::from_utf8_lossy(&output.map_err(system("running", program))?.stdout).into_owned();
    let wrong = |why| VmmError::WrongFirecracker { program: program.to_owned(), why };
    let Some(version) = Version::parse(&says, name) else {
        let says: String = says.chars().take(QUOTED_CHARS).collect();
        return Err(wrong(format!("it does not say that it is {name}, but {says:?}")));
    };
    version.refusal().map_or(Ok(version), |why| Err(wrong(why)))
}
