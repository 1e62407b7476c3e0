//! What is where under `WRENN_DIR`.
//!
//! ```text
//! kernels/vmlinux[-SEMVER], kernels/initramfs.img[-SEMVER]   the guest kernel, the highest version wins
//! images/NAME/rootfs.ext4                                    templates
//! sandboxes/ID/                                              one directory a capsule
//! snapshots/NAME/                                            saved capsules that others start from
//! host-token                                                 this host's credentials, mode 0600
//! agent.lock                                                 held by the one agent of this directory
//! ```

use crate::sys::pidfd::Process;
use std::cmp::Ordering;
use std::fmt;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// The longest template name, in bytes.
pub const MAX_TEMPLATE_NAME: usize = 64;
/// The longest capsule id, in bytes: it is the guest's host name, one DNS label.
pub const MAX_CAPSULE_ID: usize = 63;
/// The most templates that are listed.
pub const MAX_TEMPLATES: usize = 1024;

/// The lock of an agent that was killed while it started a program lives until that program's exec: a
/// second is more than enough.
const LOCK_RETRY: Duration = Duration::from_millis(20);
const LOCK_ATTEMPTS: u32 = 50;
/// Has the number and start time of the agent that holds it.
const LOCK_NAME: &str = "agent.lock";

/// Why the data directory cannot be used.
#[derive(Debug)]
pub enum LayoutError {
    /// A file system call failed.
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// Another agent holds the directory.
    InUse(PathBuf),
    /// There is no guest kernel.
    NoKernel(PathBuf),
    /// The kernel has no initramfs beside it.
    NoInitramfs {
        /// The kernel.
        kernel: PathBuf,
        /// Where its initramfs should be.
        initramfs: PathBuf,
    },
    /// A template's name is not one.
    BadTemplateName(String),
    /// There is no such template.
    NoTemplate {
        /// Its name.
        name: String,
    },
    /// A capsule's id is not one.
    BadCapsuleId(String),
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayoutError::Io { step, path, source } => write!(f, "cannot {step} {}: {source}", path.display()),
            LayoutError::InUse(path) => write!(
                f,
                "another wrenn-agent uses {}; stop it first, or give this one a WRENN_DIR of its own",
                path.display()
            ),
            LayoutError::NoKernel(path) => write!(
                f,
                "there is no guest kernel in {}; build one with `make rootfs` and put it there as vmlinux or \
                 vmlinux-VERSION",
                path.display()
            ),
            LayoutError::NoInitramfs { kernel, initramfs } => write!(
                f,
                "the guest kernel {} has no initramfs; build both with `make rootfs` and put it at {}",
                kernel.display(),
                initramfs.display()
            ),
            LayoutError::BadTemplateName(name) => write!(
                f,
                "{:?} is no template name: 1 to {MAX_TEMPLATE_NAME} of the characters a-z A-Z 0-9 . _ -, the \
                 first a letter or digit",
                name.chars().take(80).collect::<String>()
            ),
            // Goes to whoever asked for it: where the host keeps templates is not their business.
            LayoutError::NoTemplate { name } => write!(f, "this host has no template {name:?}"),
            LayoutError::BadCapsuleId(id) => write!(
                f,
                "{:?} is no capsule id: 1 to {MAX_CAPSULE_ID} of the characters a-z 0-9 -, a letter or digit \
                 at both ends",
                id.chars().take(80).collect::<String>()
            ),
        }
    }
}

impl std::error::Error for LayoutError {}

/// The kernel that guests boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The uncompressed kernel.
    pub image: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Its version, or `unversioned`.
    pub version: String,
}

/// The data directory.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

/// Held as long as this agent may use the data directory.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Who has the data directory.
#[derive(Debug)]
pub enum Holder {
    /// Nobody had it; now the caller has.
    Nobody(Lock),
    /// An agent that serves.
    Agent {
        /// Its number.
        pid: u32,
        /// When it started, in clock ticks since boot.
        start_ticks: u64,
    },
}

impl Layout {
    /// The layout under `root`, which must be absolute.
    pub fn new(root: impl Into<PathBuf>) -> Layout {
        Layout { root: root.into() }
    }

    /// Makes the directories that are missing. Blocks.
    pub fn prepare(&self) -> Result<(), LayoutError> {
        // The VMM of a capsule runs as a user of its own and gets everything as open files, so only the
        // operator's own accounts have a use for seeing the kernels and images.
        for (directory, mode) in [
            (self.root.clone(), 0o755),
            (self.kernels(), 0o755),
            (self.images(), 0o755),
            (self.sandboxes(), 0o700),
            (self.snapshots(), 0o700),
        ] {
            let made = DirBuilder::new().recursive(true).mode(mode).create(&directory);
            made.map_err(|source| LayoutError::Io { step: "make the directory", path: directory, source })?;
        }
        Ok(())
    }

    /// Takes the directory for this agent, until the lock is dropped or the process ends. Blocks.
    pub fn lock(&self) -> Result<Lock, LayoutError> {
        let path = self.root.join(LOCK_NAME);
        let io = |step, source| LayoutError::Io { step, path: path.clone(), source };
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| io("open the lock file", e))?;
        file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(|e| io("protect", e))?;
        for _ in 0..LOCK_ATTEMPTS {
            match file.try_lock() {
                Ok(()) => {
                    let holder =
                        Process::child(std::process::id()).map_err(|e| io("look at the agent of", e))?;
                    let text = format!("{} {}\n", holder.pid(), holder.start_ticks());
                    // In place: on a full disk a file that was emptied stays empty.
                    let length = text.len() as u64;
                    let written = file.write_all_at(text.as_bytes(), 0).and_then(|()| file.set_len(length));
                    return written.map(|()| Lock { _file: file }).map_err(|e| io("write", e));
                }
                Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
                Err(TryLockError::Error(e)) => return Err(io("lock", e)),
            }
        }
        Err(LayoutError::InUse(self.root.clone()))
    }

    /// Who has the directory. Blocks.
    pub fn holder(&self) -> Result<Holder, LayoutError> {
        match self.lock() {
            Ok(lock) => return Ok(Holder::Nobody(lock)),
            Err(LayoutError::InUse(_)) => {}
            Err(e) => return Err(e),
        }
        let path = self.root.join(LOCK_NAME);
        let text = fs::read_to_string(&path).map_err(|source| LayoutError::Io {
            step: "read",
            path: path.clone(),
            source,
        })?;
        let (pid, ticks) = text.trim().split_once(' ').unwrap_or_default();
        match (pid.parse(), ticks.parse()) {
            (Ok(pid), Ok(start_ticks)) => Ok(Holder::Agent { pid, start_ticks }),
            _ => Err(LayoutError::InUse(self.root.clone())),
        }
    }

    /// The data directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where guest kernels are.
    pub fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// Where templates are.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Where capsules are.
    pub fn sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// Where saved capsules are.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// A snapshot's directory.
    pub fn snapshot(&self, name: &str) -> Result<PathBuf, LayoutError> {
        if !is_template_name(name) {
            return Err(LayoutError::BadTemplateName(name.to_string()));
        }
        Ok(self.snapshots().join(name))
    }

    /// This host's credentials.
    pub fn host_token(&self) -> PathBuf {
        self.root.join("host-token")
    }

    /// A capsule's directory.
    pub fn capsule(&self, id: &str) -> Result<PathBuf, LayoutError> {
        if !is_capsule_id(id) {
            return Err(LayoutError::BadCapsuleId(id.to_string()));
        }
        Ok(self.sandboxes().join(id))
    }

    /// A template's image, which is there. Blocks for one `stat`.
    pub fn template(&self, name: &str) -> Result<PathBuf, LayoutError> {
        if !is_template_name(name) {
            return Err(LayoutError::BadTemplateName(name.to_string()));
        }
        let image = self.images().join(name).join("rootfs.ext4");
        match fs::metadata(&image) {
            Ok(m) if m.is_file() && m.size() > 0 => Ok(image),
            Ok(_) => Err(LayoutError::NoTemplate { name: name.to_string() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(LayoutError::NoTemplate { name: name.to_string() })
            }
            Err(source) => Err(LayoutError::Io { step: "look at the template", path: image, source }),
        }
    }

    /// The names of all templates, in order. Blocks for a directory listing.
    pub fn templates(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.images()) else { return Vec::new() };
        let names = entries.take(MAX_TEMPLATES).flatten().filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|n| self.template(n).is_ok()).collect();
        names.sort_unstable();
        names
    }

    /// The kernel that new capsules boot: the highest `vmlinux-{semver}`, else `vmlinux`. Blocks for a
    /// directory listing.
    pub fn kernel(&self) -> Result<Kernel, LayoutError> {
        let directory = self.kernels();
        let entries = fs::read_dir(&directory).map_err(|source| LayoutError::Io {
            step: "list",
            path: directory.clone(),
            source,
        })?;
        let names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        let best = highest_kernel(names.iter().map(String::as_str));
        let name = best.ok_or_else(|| LayoutError::NoKernel(directory.clone()))?;
        let suffix = name.strip_prefix("vmlinux").unwrap_or_default();
        let image = directory.join(name);
        let initramfs = directory.join(format!("initramfs.img{suffix}"));
        if !initramfs.is_file() {
            return Err(LayoutError::NoInitramfs { kernel: image, initramfs });
        }
        let version = suffix.strip_prefix('-').unwrap_or("unversioned").to_string();
        Ok(Kernel { image, initramfs, version })
    }
}

fn is_template_name(name: &str) -> bool {
    (1..=MAX_TEMPLATE_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Whether `id` may be a directory, a host name and an argument: it goes into all three.
pub fn is_capsule_id(id: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=MAX_CAPSULE_ID).contains(&id.len())
        && id.bytes().all(|b| inner(b) || b == b'-')
        && id.bytes().next().is_some_and(inner)
        && id.bytes().next_back().is_some_and(inner)
}

fn highest_kernel<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let version = |name: &str| name.strip_prefix("vmlinux-").and_then(Version::parse);
    names
        .filter(|name| *name == "vmlinux" || version(name).is_some())
        // `None` is less than any version, so a plain `vmlinux` wins only alone.
        .max_by(|a, b| version(a).cmp(&version(b)))
}

/// A semantic version (semver.org 2.0.0) without its build metadata, which has no order.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    numbers: [u64; 3],
    pre_release: Vec<String>,
}

impl Version {
    fn parse(text: &str) -> Option<Version> {
        let text = text.split_once('+').map_or(text, |(before, _)| before);
        let (core, pre) = text.split_once('-').map_or((text, None), |(core, pre)| (core, Some(pre)));
        let mut numbers = [0; 3];
        let mut parts = core.split('.');
        for number in &mut numbers {
            let part = parts.next()?;
            if !part.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            *number = part.parse().ok()?;
        }
        if parts.next().is_some() {
            return None;
        }
        let pre_release: Vec<String> =
            pre.map_or_else(Vec::new, |p| p.split('.').map(str::to_string).collect());
        let good = |p: &String| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        pre_release.iter().all(good).then_some(Version { numbers, pre_release })
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Version) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    /// semver.org section 11.
    fn cmp(&self, other: &Version) -> Ordering {
        let pre = match (self.pre_release.is_empty(), other.pre_release.is_empty()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            (false, false) => {
                let key = |p: &String| match p.parse::<u64>() {
                    Ok(number) => (false, number, String::new()),
                    Err(_) => (true, 0, p.clone()),
                };
                self.pre_release.iter().map(key).cmp(other.pre_release.iter().map(key))
            }
        };
        self.numbers.cmp(&other.numbers).then(pre)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_wins() {
        for (names, best) in [
            (vec!["vmlinux", "README"], Some("vmlinux")),
            (vec!["vmlinux", "vmlinux-6.1.0", "vmlinux-5.10.200"], Some("vmlinux-6.1.0")),
            (vec!["vmlinux-6.9.0", "vmlinux-6.10.0"], Some("vmlinux-6.10.0")),
            (vec!["vmlinux-6.1.0-rc.2", "vmlinux-6.1.0-rc.10"], Some("vmlinux-6.1.0-rc.10")),
            (vec!["vmlinux-6.1.0-rc.2", "vmlinux-6.1.0"], Some("vmlinux-6.1.0")),
            (vec!["vmlinux-6.1.0-alpha", "vmlinux-6.1.0-1"], Some("vmlinux-6.1.0-alpha")),
            (vec!["vmlinux-6.1", "vmlinux-x", "vmlinux-6.1.0.old", "vmlinux-6.1.0.1"], None),
            (vec!["initramfs.img-9.0.0"], None),
        ] {
            assert_eq!(highest_kernel(names.iter().copied()), best, "{names:?}");
        }
    }

    #[test]
    fn names_cannot_leave_their_directory() {
        let layout = Layout::new("/nowhere");
        for bad in ["", ".", "..", "../etc", "a/b", "/etc", ".hidden", "a\0b", "ä", &"a".repeat(65)] {
            assert!(matches!(layout.template(bad), Err(LayoutError::BadTemplateName(_))), "{bad:?}");
        }
        for bad in ["", ".", "..", "a/b", "A", "-a", "a-", "a.b", "a_b", "a b", &"a".repeat(64)] {
            assert!(matches!(layout.capsule(bad), Err(LayoutError::BadCapsuleId(_))), "{bad:?}");
        }
        assert_eq!(layout.capsule("cl-0a").expect("good"), Path::new("/nowhere/sandboxes/cl-0a"));
        assert!(matches!(layout.template("minimal-1.0_x"), Err(LayoutError::NoTemplate { .. })));
    }

    #[test]
    fn a_data_directory_is_prepared_and_locked_once() {
        let root = std::env::temp_dir().join(format!("wrenn-layout-{}", std::process::id()));
        let layout = Layout::new(&root);
        layout.prepare().expect("prepared");
        layout.prepare().expect("prepared again");
        let lock = layout.lock().expect("locked");
        assert!(matches!(layout.lock(), Err(LayoutError::InUse(_))));
        drop(lock);
        layout.lock().expect("locked again");
        assert!(matches!(layout.kernel(), Err(LayoutError::NoKernel(_))));
        fs::write(layout.kernels().join("vmlinux-6.1.0"), "k").expect("written");
        assert!(matches!(layout.kernel(), Err(LayoutError::NoInitramfs { .. })));
        fs::write(layout.kernels().join("initramfs.img-6.1.0"), "i").expect("written");
        assert_eq!(layout.kernel().expect("found").version, "6.1.0");
        assert_eq!(layout.templates(), Vec::<String>::new());
        fs::create_dir(layout.images().join("minimal")).expect("made");
        fs::write(layout.images().join("minimal/rootfs.ext4"), "fs").expect("written");
        assert_eq!(layout.templates(), ["minimal"]);
        fs::remove_dir_all(&root).expect("removed");
    }
}
