//! Compressing large files by the `zstd` program: as a user that may do nothing, on descriptors that it is
//! given, within a time, and stopped when somebody wants the file.

use crate::sys::memfd::Capture;
use crate::sys::spawn::{Confinement, Identity, spawn};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = "zstd";
/// Where distributions put it.
const DIRECTORIES: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// How long compressing may take: a terabyte at a gigabyte a second is a quarter of an hour, and it has the
/// lowest priority.
const COMPRESS_TIMEOUT: Duration = Duration::from_secs(3_600);
/// How long decompressing may take, while somebody waits.
const DECOMPRESS_TIMEOUT: Duration = Duration::from_secs(300);
/// How often it is looked whether it is done or shall stop.
const POLL: Duration = Duration::from_millis(5);
/// How much of what the program says is kept, in bytes.
const SAID_BYTES: u64 = 4_096;

/// Why a file could not be compressed or decompressed.
#[derive(Debug)]
pub enum ZstdError {
    /// There is no such program.
    NotThere,
    /// A call failed.
    System {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// The program has failed.
    Failed {
        /// The file that it read.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        said: String,
    },
    /// It took too long.
    TooSlow {
        /// The file that it read.
        path: PathBuf,
        /// How long, in seconds.
        after_sec: u64,
    },
    /// Somebody wanted it stopped.
    Stopped,
}

impl fmt::Display for ZstdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ZstdError::NotThere => {
                write!(f, "no {PROGRAM} in {}: install zstd", DIRECTORIES.join(", "))
            }
            ZstdError::System { step, path, source } => write!(f, "{step} {}: {source}", path.display()),
            ZstdError::Failed { path, status, said } => {
                write!(f, "{PROGRAM} on {}: {status}; it said: {said}", path.display())
            }
            ZstdError::TooSlow { path, after_sec } => {
                write!(f, "{PROGRAM} on {} was not done after {after_sec} s", path.display())
            }
            ZstdError::Stopped => f.write_str("it was stopped"),
        }
    }
}

impl std::error::Error for ZstdError {}

fn system(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ZstdError {
    let path = path.to_owned();
    move |source| ZstdError::System { step, path, source }
}

/// Finds the program.
pub fn find() -> Result<PathBuf, ZstdError> {
    let places = DIRECTORIES.iter().map(|directory| Path::new(directory).join(PROGRAM));
    places.into_iter().find(|path| path.is_file()).ok_or(ZstdError::NotThere)
}

/// Compresses `from` to the new file `to`, on disk when this returns, at the lowest priority and as the user
/// `owner`. When `stop` becomes true it gives up. After a failure there is no `to`. Blocks.
pub fn compress(from: &Path, to: &Path, owner: u32, stop: &AtomicBool) -> Result<(), ZstdError> {
    let task = Task { arguments: &["-q", "-c", "-3"], from, to, owner, timeout: COMPRESS_TIMEOUT, stop };
    task.run(true).inspect_err(|_| discard(to))
}

/// Decompresses `from` to the new file `to`, with holes, which belongs to `owner`. It is not waited for the
/// disk. After a failure there is no `to`. Blocks.
pub fn decompress(from: &Path, to: &Path, owner: u32) -> Result<(), ZstdError> {
    let (arguments, timeout) = (&["-q", "-c", "-d", "--sparse"], DECOMPRESS_TIMEOUT);
    let task = Task { arguments, from, to, owner, timeout, stop: &AtomicBool::new(false) };
    task.run(false).inspect_err(|_| discard(to))
}

/// What is half written takes space and nothing else.
fn discard(path: &Path) {
    if let Err(e) = fs::remove_file(path)
        && e.kind() != io::ErrorKind::NotFound
    {
        log::warn!("removing {}: {e}", path.display());
    }
}

struct Task<'a> {
    arguments: &'a [&'a str],
    from: &'a Path,
    to: &'a Path,
    owner: u32,
    timeout: Duration,
    stop: &'a AtomicBool,
}

impl Task<'_> {
    fn run(&self, in_background: bool) -> Result<(), ZstdError> {
        let Task { from, to, owner, .. } = *self;
        let program = find()?;
        let input = File::open(from).map_err(system("opening", from))?;
        let output = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to);
        let output = output.map_err(system("making", to))?;
        fchown(&output, Some(owner), Some(owner)).map_err(system("giving away", to))?;
        let said =
            Capture::new(c"zstd output", SAID_BYTES).map_err(system("making the output of", &program))?;
        let errors = said.writer().map_err(system("making the output of", &program))?;
        let written = output.try_clone().map_err(system("opening", to))?;
        let mut command = Command::new(&program);
        command.args(self.arguments).env_clear().current_dir("/");
        command.stdin(input).stdout(written).stderr(Stdio::from(errors));
        let identity = Some(Identity { uid: owner, gid: owner });
        let confinement =
            Confinement { identity, ends_with_us: true, in_background, ..Confinement::default() };
        let mut child = spawn(&mut command, &confinement).map_err(system("starting", &program))?;
        let end = Instant::now() + self.timeout;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(system("waiting for", &program))? {
                break status;
            }
            let stopped = self.stop.load(Ordering::Relaxed);
            if stopped || Instant::now() > end {
                child.kill().and_then(|()| child.wait()).map_err(system("ending", &program))?;
                return Err(match stopped {
                    true => ZstdError::Stopped,
                    false => ZstdError::TooSlow { path: from.into(), after_sec: self.timeout.as_secs() },
                });
            }
            thread::sleep(POLL);
        };
        if !status.success() {
            return Err(ZstdError::Failed { path: from.into(), status, said: said.text() });
        }
        if in_background {
            output.sync_all().map_err(system("writing out", to))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_file_comes_back_as_it_was_with_its_holes() {
        if find().is_err() || fs::metadata("/proc/self").is_ok_and(|m| m.uid() != 0) {
            eprintln!("SKIPPED: this needs zstd and root");
            return;
        }
        let directory = std::env::temp_dir().join(format!("wrenn-zstd-{}", std::process::id()));
        fs::create_dir(&directory).expect("made");
        let [from, packed, to] = ["from", "packed", "to"].map(|name| directory.join(name));
        let file = File::create(&from).expect("made");
        file.set_len(64 << 20).expect("sized");
        file.write_all_at(b"some bytes", 9_000_000).expect("written");
        let stop = AtomicBool::new(false);
        compress(&from, &packed, 61_234, &stop).expect("compressed");
        assert!(fs::metadata(&packed).expect("there").len() < 100_000);
        decompress(&packed, &to, 61_234).expect("decompressed");
        assert!(fs::read(&from).expect("read") == fs::read(&to).expect("read"), "it is another");
        let made = fs::metadata(&to).expect("there");
        assert!(made.blocks() < 1_000 && made.uid() == 61_234, "{made:?}");

        fs::write(&packed, b"not what zstd writes").expect("written");
        let error = decompress(&packed, &to, 61_234).expect_err("refused").to_string();
        assert!(error.contains("packed") && error.contains("it said: "), "{error}");
        assert!(!to.exists(), "half of it is of no use");
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(compress(&from, &packed, 61_234, &stop), Err(ZstdError::Stopped)));
        assert!(!packed.exists());
        let nothing = decompress(&directory.join("nothing"), &to, 61_234);
        assert!(matches!(nothing, Err(ZstdError::System { step: "opening", .. })));
        fs::remove_dir_all(&directory).expect("removed");
    }
}
