//! Child processes: started with a log file, ended by pid, never by name.

use crate::{Context, Failure, Result};
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process gets to end by itself before it is killed: more than the 45 s that the agent takes at
/// most for destroying its capsules.
pub const GRACE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Waits until `ready` says so, at most `limit`.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + limit;
    while !ready() {
        if Instant::now() >= end {
            return Err(Failure(format!("{what}: not within {} s", limit.as_secs())));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// A process that was started here and is told apart from a later one with the same pid by its start
/// time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pid {
    /// Process id.
    pub pid: i32,
    /// Field 22 of `/proc/pid/stat` (proc(5)), clock ticks since boot.
    pub start_ticks: u64,
}

impl Pid {
    /// The process that has this id now. `None` when there is none or it is a zombie.
    pub fn of(pid: i32) -> Option<Pid> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, so fields are counted from its end.
        let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
        if *fields.first()? == "Z" {
            return None;
        }
        Some(Pid { pid, start_ticks: fields.get(19)?.parse().ok()? })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Pid::of(self.pid) == Some(*self)
    }

    /// Sends a signal, unless the process is gone.
    pub fn signal(&self, signal: i32) {
        if self.is_alive() {
            // SAFETY: kill(2) takes two numbers; the process was started by the stack.
            unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// Ends it: `signal`, then SIGKILL after [`GRACE`].
    pub fn end(&self, signal: i32) -> Result<()> {
        self.signal(signal);
        if wait_until("end of a process", GRACE, || !self.is_alive()).is_err() {
            self.signal(libc::SIGKILL);
            wait_until("end of a killed process", GRACE, || !self.is_alive())?;
            return Err(Failure(format!(
                "process {} did not end by signal {signal} and was killed",
                self.pid
            )));
        }
        Ok(())
    }

    /// Writes it to a file, for a later run.
    pub fn save(&self, path: &Path) -> Result<()> {
        fs::write(path, format!("{} {}\n", self.pid, self.start_ticks)).context(path.display())
    }

    /// Reads a file that [`Pid::save`] wrote.
    pub fn load(path: &Path) -> Option<Pid> {
        let text = fs::read_to_string(path).ok()?;
        let (pid, ticks) = text.trim().split_once(' ')?;
        Some(Pid { pid: pid.parse().ok()?, start_ticks: ticks.parse().ok()? })
    }
}

/// Who a child runs as.
#[derive(Debug, Clone, Copy)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Account {
    /// Looks a name up in `/etc/passwd`.
    pub fn named(name: &str) -> Result<Account> {
        let passwd = fs::read_to_string("/etc/passwd").context("/etc/passwd")?;
        passwd
            .lines()
            .map(|l| l.split(':').collect::<Vec<_>>())
            .find(|f| f.first() == Some(&name))
            .and_then(|f| Some(Account { uid: f.get(2)?.parse().ok()?, gid: f.get(3)?.parse().ok()? }))
            .ok_or_else(|| Failure(format!("there is no account {name:?}: install PostgreSQL first")))
    }
}

/// A child in the background.
#[derive(Debug)]
pub struct Background {
    child: Child,
    /// Its identity.
    pub pid: Pid,
    /// Where its output goes.
    pub log: PathBuf,
}

impl Background {
    /// Starts a command in a session of its own, with its output in `log`. `stdin` is what it reads.
    pub fn start(
        mut command: Command,
        account: Option<Account>,
        log: &Path,
        stdin: Option<&str>,
    ) -> Result<Background> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = OpenOptions::new().create(true).append(true).open(log).context(log.display())?;
        let errors = file.try_clone().context("copy a log handle")?;
        command.stdout(file).stderr(errors).stdin(if stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        if let Some(account) = account {
            command.gid(account.gid).uid(account.uid);
        }
        // SAFETY: setsid(2) is async-signal-safe and takes nothing.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        let mut child = command.spawn().context(format!("start {name}"))?;
        if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
            use std::io::Write;
            pipe.write_all(text.as_bytes()).context(format!("write to {name}"))?;
        }
        let id = i32::try_from(child.id()).context("process id")?;
        let Some(pid) = Pid::of(id) else {
            let _ = child.wait();
            return Err(Failure(format!("{name} ended at once; its output:\n{}", tail(log))));
        };
        Ok(Background { child, pid, log: log.to_path_buf() })
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it, see [`Pid::end`], and reaps it.
    pub fn end(&mut self, signal: i32) -> Result<()> {
        self.pid.signal(signal);
        let ended = wait_until("end of a process", GRACE, || self.has_ended());
        if ended.is_err() {
            self.pid.signal(libc::SIGKILL);
        }
        let _ = self.child.wait();
        ended.context(format!(
            "{} did not end by signal {signal}; its log ends:\n{}",
            self.log.display(),
            tail(&self.log)
        ))
    }
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// Runs a command to its end and gives its standard output.
pub fn run(command: &mut Command, stdin: Option<&str>) -> Result<String> {
    let name = format!("{:?}", command.get_program());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context(format!("start {name}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        use std::io::Write;
        // A command that does not read its input is no failure.
        let _ = pipe.write_all(stdin.unwrap_or_default().as_bytes());
    }
    let output = child.wait_with_output().context(format!("wait for {name}"))?;
    if !output.status.success() {
        return Err(Failure(format!(
            "{name}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Creates a file that only its owner may read.
pub fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .context(path.display())?;
    file.write_all(text.as_bytes()).context(path.display())
}

/// `n` random bytes in hex.
pub fn random_hex(n: usize) -> Result<String> {
    use std::io::Read;
    let mut bytes = vec![0; n];
    File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).context("/dev/urandom")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}
