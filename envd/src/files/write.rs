//! A file's content, in from a stream: into a temporary file beside it, which takes its place when all is
//! there and on the disk.

use super::entry::{Names, describe};
use super::{Actor, about, make_directories, open_directory, split};
use crate::process::request::errno_error;
use crate::sys::file::Sync;
use crate::sys::signal::Exit;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, clock, file};
use alloc::collections::VecDeque;
use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;
use wire::message::{Code, Error, FileEntry};

/// Permission bits of directories that are made on the way.
const PARENT_MODE: u32 = 0o755;
/// Bytes that are written before they are brought to the disk, while as many more are taken in: so envd never
/// waits for the disk, neither at the end nor because the kernel makes who has written much wait.
const PIECE: u64 = 8 << 20;
/// Bytes whose way to the disk envd waits for itself: less work than a helper.
const MAX_AT_ONCE: u64 = 512 << 10;
/// Symbolic links followed from the path to the file that is replaced.
const MAX_LINKS: usize = 16;

/// A write that is under way. Dropped before its end, it leaves nothing behind.
pub struct Writing {
    actor: Actor,
    /// As it was asked for.
    path: CString,
    directory: Fd,
    name: CString,
    temporary: CString,
    fd: Fd,
    mode: u32,
    /// Owner and group to keep, where the user may set them.
    owner: Option<(u32, u32)>,
    /// Bytes since the last time that the content was being brought to the disk.
    unsynced: u64,
    /// A helper brings it to the disk.
    syncing: Option<Sync>,
    /// What came meanwhile, once there is too much that is not on the disk. Bounded by the stream's window.
    waiting: VecDeque<(Vec<u8>, u32)>,
    /// There is no more to come.
    complete: bool,
    done: bool,
}

/// What a write wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// More content, or the end of what a helper does.
    More,
    /// A helper that waits for this.
    Sync(Sync),
    /// [`Writing::commit`].
    Commit,
}

impl Writing {
    /// Makes the temporary file.
    pub fn open(actor: Actor, path: CString, mode: u32) -> Result<Writing, Error> {
        let opened = {
            let _acting = actor.act()?;
            prepare(&path, mode)
        };
        match opened {
            Ok(Prepared { directory, name, temporary, fd, mode, owner }) => {
                // Only root may give files away.
                let owner = owner.filter(|_| actor.user.uid == 0);
                Ok(Writing {
                    actor,
                    path,
                    directory,
                    name,
                    temporary,
                    fd,
                    mode,
                    owner,
                    unsynced: 0,
                    syncing: None,
                    waiting: VecDeque::new(),
                    complete: false,
                    done: false,
                })
            }
            Err(Errno(libc::ENOTSUP)) => {
                let text =
                    format!("{} is not a regular file: write to it with a command", path.to_string_lossy());
                Err(Error::new(Code::InvalidState, text))
            }
            Err(e) => Err(errno_error(&about("cannot write", &path), e)),
        }
    }

    fn failed(&self, e: Errno) -> Error {
        errno_error(&about("cannot write", &self.path), e)
    }

    /// Takes more content, with what it costs of the stream's credit.
    pub fn add(&mut self, bytes: Vec<u8>, cost: u32) {
        self.waiting.push_back((bytes, cost));
    }

    /// There is no more content.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// What is to be given back of the stream's credit when the write ends early.
    pub fn unreleased(&self) -> u32 {
        self.waiting.iter().map(|(_, cost)| cost).sum()
    }

    /// Writes what has come, unless too much is not on the disk yet; gives what is to be done next, and adds
    /// up the credit of what was dealt with.
    pub fn go_on(&mut self, released: &mut u32) -> Result<Next, Error> {
        while self.syncing.is_none() || self.unsynced < PIECE {
            let Some((bytes, cost)) = self.waiting.pop_front() else { break };
            *released += cost;
            self.fd.write_all(&bytes).map_err(|e| self.failed(e))?;
            self.unsynced += bytes.len() as u64;
        }
        Ok(if self.syncing.is_some() {
            Next::More
        } else if self.complete {
            self.prepare_end()?;
            if self.unsynced <= MAX_AT_ONCE {
                file::sync(&self.fd).map_err(|e| self.failed(e))?;
                Next::Commit
            } else {
                Next::Sync(Sync::Whole)
            }
        } else if self.unsynced >= PIECE {
            Next::Sync(Sync::Content)
        } else {
            Next::More
        })
    }

    /// Starts a helper, whose process id this is. Without one it is waited for here.
    pub fn start_sync(&mut self, sync: Sync, may_fork: bool) -> Result<Option<u32>, Error> {
        self.unsynced = 0;
        let helper = if may_fork { file::sync_apart(&self.fd, sync).ok() } else { None };
        match helper {
            Some(_) => self.syncing = Some(sync),
            None => file::sync(&self.fd).map_err(|e| self.failed(e))?,
        }
        Ok(helper)
    }

    /// The helper has ended. Whether the file is whole on the disk.
    pub fn on_synced(&mut self, exit: Exit) -> Result<bool, Error> {
        let sync = self.syncing.take();
        match exit {
            Exit { code: 0, signal: 0 } => Ok(sync == Some(Sync::Whole)),
            Exit { code, signal: 0 } => Err(self.failed(Errno(code as i32))),
            // Something in the guest has killed it.
            _ => {
                file::sync(&self.fd).map_err(|e| self.failed(e))?;
                Ok(sync == Some(Sync::Whole))
            }
        }
    }

    /// Owner and permissions, before the last sync.
    fn prepare_end(&self) -> Result<(), Error> {
        let _acting = self.actor.act()?;
        self.owner
            .map_or(Ok(()), |(uid, gid)| file::set_owner(&self.fd, uid, gid))
            .and_then(|()| file::set_mode(&self.fd, self.mode))
            .map_err(|e| self.failed(e))
    }

    /// Puts the file, which is on the disk, in its place.
    pub fn commit(mut self) -> Result<FileEntry, Error> {
        let _acting = self.actor.act()?;
        let at = self.directory.raw();
        file::rename(at, &self.temporary, at, &self.name).map_err(|e| self.failed(e))?;
        self.done = true;
        describe(&self.path, &mut Names::default()).map_err(|e| self.failed(e))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.done {
            // As root: it is envd's own file, and nobody is left to hear of a failure.
            let _ = file::unlink(self.directory.raw(), &self.temporary, 0);
        }
    }
}

struct Prepared {
    directory: Fd,
    name: CString,
    temporary: CString,
    fd: Fd,
    mode: u32,
    owner: Option<(u32, u32)>,
}

/// `ENOTSUP` stands for something that is neither a file nor a directory.
fn prepare(path: &CString, mode: u32) -> Result<Prepared, Errno> {
    let (directory, name) = find_place(path)?;
    let (mode, owner) = match file::metadata_at(directory.raw(), &name, libc::AT_SYMLINK_NOFOLLOW) {
        Ok(old) if old.is_directory() => return Err(Errno(libc::EISDIR)),
        Ok(old) if !old.is_file() => return Err(Errno(libc::ENOTSUP)),
        // Who may write into a directory may replace what is in it; but a file that says that it must not
        // be written to is left alone.
        Ok(old) => {
            drop(file::open(directory.raw(), &name, libc::O_WRONLY | libc::O_NOFOLLOW, 0)?);
            (old.mode & 0o7777, Some((old.uid, old.gid)))
        }
        Err(Errno(libc::ENOENT)) => (mode, None),
        Err(e) => return Err(e),
    };
    let mut number = [0; 8];
    clock::random(&mut number)?;
    let temporary = CString::new(format!(".wrenn-upload-{:016x}", u64::from_ne_bytes(number)))
        .map_err(|_| Errno(libc::EINVAL))?;
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
    let fd = file::open(directory.raw(), &temporary, flags, 0o600)?;
    Ok(Prepared { directory, name, temporary, fd, mode, owner })
}

/// The directory and name of the file to replace: where symbolic links lead, with missing parents made.
fn find_place(path: &CString) -> Result<(Fd, CString), Errno> {
    let mut path = path.clone();
    for _ in 0..MAX_LINKS {
        let (parent, name) = split(&path)?;
        let directory = match open_directory(file::CURRENT, &parent, 0) {
            Err(Errno(libc::ENOENT)) => {
                make_directories(&parent, PARENT_MODE)?;
                open_directory(file::CURRENT, &parent, 0)?
            }
            other => other?,
        };
        let Ok(target) = file::read_link(directory.raw(), &name) else { return Ok((directory, name)) };
        let mut whole: Vec<u8> = Vec::new();
        if !target.starts_with(b"/") {
            whole.extend_from_slice(parent.as_bytes());
            whole.push(b'/');
        }
        whole.extend_from_slice(&target);
        path = CString::new(whole).map_err(|_| Errno(libc::EINVAL))?;
    }
    Err(Errno(libc::ELOOP))
}
