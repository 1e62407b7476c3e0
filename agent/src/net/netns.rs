//! Named network namespaces, as `ip netns` keeps them: a file in /run/netns on which the namespace is
//! bind-mounted. Whatever has to happen inside one happens on a short-lived helper thread, so that no
//! thread of the agent ever changes its own.

use super::error::NetError;
use crate::sys::namespace;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// Where `ip netns` keeps names.
pub const DIRECTORY: &str = "/run/netns";

/// Enough for a few system calls and a message's buffer.
const HELPER_STACK_BYTES: usize = 256 * 1024;
/// `ip netns` holds the directory's lock for milliseconds.
const LOCK_RETRY: Duration = Duration::from_millis(5);
const LOCK_ATTEMPTS: u32 = 400;

/// A named network namespace, held open: it stays alive while this value, its name or anything in it does.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Makes a new, empty namespace called `name`. The caller's namespace does not change. Nothing is left
    /// behind on failure.
    pub fn create(name: &str) -> Result<Namespace, NetError> {
        let path = path_of(name);
        let _lock = prepare_directory().map_err(NetError::system("preparing", DIRECTORY))?;
        // As iproute2: mode 0, never overwriting a name that is there.
        match OpenOptions::new().write(true).create_new(true).mode(0o000).open(&path) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(NetError::NameTaken { name: name.to_owned() });
            }
            Err(e) => return Err(NetError::system("creating", path.display())(e)),
        }
        let made = on_helper_thread(|| {
            namespace::unshare_network()?;
            namespace::bind_mount(Path::new(namespace::OWN_NETWORK), &path, false)
        })
        .and_then(|result| result)
        .and_then(|()| File::open(&path));
        match made {
            Ok(file) => Ok(Namespace { name: name.to_owned(), file }),
            Err(source) => {
                // What of it exists goes again; the first error is the one to tell.
                let _ = remove_files(&path);
                Err(NetError::system("creating network namespace", name)(source))
            }
        }
    }

    /// The existing namespace called `name`.
    pub fn open(name: &str) -> Result<Namespace, NetError> {
        let path = path_of(name);
        let file = File::open(&path).map_err(NetError::system("opening", path.display()))?;
        Ok(Namespace { name: name.to_owned(), file })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor that setns(2) takes.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Runs `work` on a helper thread inside the namespace and waits for it. Descriptors that it opens stay
    /// in the namespace and can be used from everywhere.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        on_helper_thread(|| namespace::enter_network(self.as_fd()).map(|()| work()))
            .and_then(|result| result)
            .map_err(NetError::system("entering network namespace", &self.name))
    }
}

/// Removes the name `name`; false when there was none. The namespace itself goes with its last user.
pub fn remove(name: &str) -> Result<bool, NetError> {
    let path = path_of(name);
    if fs::symlink_metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Ok(false);
    }
    let _lock = prepare_directory().map_err(NetError::system("preparing", DIRECTORY))?;
    remove_files(&path).map_err(NetError::system("removing", path.display()))?;
    Ok(true)
}

/// Whether there is something of this name.
pub fn is_there(name: &str) -> bool {
    fs::symlink_metadata(path_of(name)).is_ok()
}

fn remove_files(path: &Path) -> io::Result<()> {
    match namespace::unmount(path) {
        // EINVAL: nothing is mounted there, as when its maker died half-way.
        Err(e) if !matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => return Err(e),
        _ => {}
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Makes the directory and makes it a shared mount, as iproute2 does: else a mount that another program puts
/// over it would keep our names busy. Returns the directory's lock, which `ip netns` takes as well.
fn prepare_directory() -> io::Result<File> {
    let directory = Path::new(DIRECTORY);
    match DirBuilder::new().mode(0o755).create(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let lock = lock(directory)?;
    if let Err(e) = namespace::make_shared(directory) {
        if e.raw_os_error() != Some(libc::EINVAL) {
            return Err(e);
        }
        namespace::bind_mount(directory, directory, true)?;
        namespace::make_shared(directory)?;
    }
    Ok(lock)
}

fn lock(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    for _ in 0..LOCK_ATTEMPTS {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
            Err(TryLockError::Error(e)) => return Err(e),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "another program holds its lock"))
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn on_helper_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let helper = thread::Builder::new()
            .name("netns".into())
            .stack_size(HELPER_STACK_BYTES)
            .spawn_scoped(scope, work)?;
        helper.join().map_err(|_| io::Error::other("the helper thread panicked"))
    })
}
