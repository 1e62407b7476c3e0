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
mod jail;
mod metrics;
mod requests;
mod saving;
mod version;

pub use version::Version;

use super::console::{Console, Pump};
use super::image::COMMAND_TIMEOUT_MS;
use super::machine::{Control, Event, Machine, system};
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
use metrics::{Finding, Lines};
use requests::{Boot, INITRAMFS, KERNEL, LOG, MEMORY, METRICS, Request, STATE, disk_name};
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
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
/// How much of what it counts is read before others get their turn.
const METRICS_PUMP_BYTES: usize = 64 * 1024;
const METRICS_CHUNK_BYTES: usize = 8 * 1024;
/// What went wrong and waits to be told, at most. The owner takes it after each read.
const MAX_FINDINGS: usize = 64;
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

/// A Firecracker that runs.
#[derive(Debug)]
pub struct Instance {
    api: Api,
    jail: Jail,
    log: File,
    metrics: File,
    lines: Lines,
    /// What went wrong and was not told yet.
    findings: VecDeque<Finding>,
    /// Whether it can tell what has changed since the memory that it goes on from.
    knows_changes: bool,
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
        let instance = Instance { knows_changes, ..Instance::new(api, jail, pipes) };
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

impl Instance {
    fn new(api: Api, jail: Jail, (log, metrics): (File, File)) -> Instance {
        let (lines, findings) = (Lines::default(), VecDeque::new());
        Instance { api, jail, log, metrics, lines, findings, knows_changes: false }
    }

    /// The Firecracker `pid` that an earlier agent has started in a capsule's directory, and its console;
    /// `None` when there is another VMM in it.
    pub(super) fn find(directory: &Path, pid: u32) -> Result<Option<(Control, Console)>, VmmError> {
        let Some(jail) = Jail::find(directory)? else { return Ok(None) };
        let pipes = (jail.open_pipe(LOG)?, jail.open_pipe(METRICS)?);
        let instance = Instance::new(Api::new(jail.open()?, pid), jail, pipes);
        Ok(Some((Control::Firecracker(Box::new(instance)), open_console(directory)?)))
    }

    /// Stands the guest still, or lets it go on.
    pub(super) fn set_running(&self, runs: bool) -> Result<(), VmmError> {
        self.call(&requests::set_running(runs))
    }

    /// The beginning of what it has logged and nobody has asked for yet, as text.
    pub(super) fn logged(&self) -> String {
        let mut bytes = Vec::new();
        // Ends when the pipe is empty, with an error that is none.
        let _ = (&self.log).take(DIAGNOSTICS_BYTES).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).trim_end().to_owned()
    }

    /// The descriptor on which what it counts comes.
    pub(super) fn metrics_fd(&self) -> RawFd {
        self.metrics.as_raw_fd()
    }

    /// Reads what it has counted, up to a bound.
    pub(super) fn pump_metrics(&mut self) -> Pump {
        let mut chunk = [0; METRICS_CHUNK_BYTES];
        for _ in 0..METRICS_PUMP_BYTES / METRICS_CHUNK_BYTES {
            match (&self.metrics).read(&mut chunk) {
                Ok(count) if count > 0 => {
                    let findings = self.lines.receive(&chunk[..count]);
                    let room = MAX_FINDINGS.saturating_sub(self.findings.len());
                    self.findings.extend(findings.into_iter().take(room));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // There always is a writer, so nothing is no end.
                _ => return Pump::Drained,
            }
        }
        Pump::More
    }

    /// The next thing that went wrong.
    pub(super) fn next_fault(&mut self) -> Option<Event> {
        self.findings.pop_front().map(|Finding { what, count }| Event::Fault { what, count })
    }

    /// It has ended: removes its root. Blocks for milliseconds.
    pub(super) fn clear(&self) -> Result<(), VmmError> {
        self.jail.clear()
    }

    fn call(&self, request: &Request) -> Result<(), VmmError> {
        self.api.call(request, COMMAND_TIMEOUT_MS)
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
        Some(_) => requests::load(&spec.metadata, instance.knows_changes),
        None => requests::boot(&Boot {
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            command_line: &spec.command_line,
            has_initramfs: spec.initramfs.is_some(),
            disks: spec.disks.len(),
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
