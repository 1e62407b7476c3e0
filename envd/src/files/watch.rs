//! Watching a directory, with what is beneath it where that is wanted.

use super::{Actor, Progress, about, open_directory};
use crate::connection::{Connections, StreamKey};
use crate::process::request::{errno_error, is_shortage};
use crate::sys::inotify::{self, Event};
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;
use wire::codec::Bytes;
use wire::message::{
    CHANGE_ATTRIBUTES, CHANGE_MADE, CHANGE_MOVED, CHANGE_REMOVED, CHANGE_WRITTEN, CHANGES_LOST, Code, Done,
    Error, FileChange,
};

/// Directories that one stream may watch.
const MAX_DIRECTORIES: usize = 8192;
/// How deep they may nest.
const MAX_DEPTH: usize = 64;
/// Changes that wait for the stream at most; more are told as lost.
const MAX_WAITING: usize = 4096;

/// The first half of a move, until the second has come.
#[derive(Debug)]
struct MovedFrom {
    cookie: u32,
    path: Vec<u8>,
    is_directory: bool,
}

/// What is watched, and what was seen.
pub struct Watch {
    actor: Actor,
    fd: Fd,
    root: Vec<u8>,
    recursive: bool,
    directories: BTreeMap<i32, Vec<u8>>,
    moved: Option<MovedFrom>,
    waiting: VecDeque<FileChange>,
    told: bool,
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if path != b"/" {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Whether a path is a directory's own or lies beneath it.
fn is_within(path: &[u8], directory: &[u8]) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

impl Watch {
    /// Starts to watch.
    pub fn open(actor: Actor, path: CString, recursive: bool) -> Result<Watch, Error> {
        let fd = inotify::new().map_err(|e| errno_error("cannot watch files", e))?;
        let root = path.as_bytes().to_vec();
        let mut watch = Watch {
            actor,
            fd,
            root: root.clone(),
            recursive,
            directories: BTreeMap::new(),
            moved: None,
            waiting: VecDeque::new(),
            told: false,
        };
        let added = {
            let _acting = watch.actor.act()?;
            watch.add_tree(&root, 0, false)
        };
        match added {
            Ok(()) => Ok(watch),
            Err(Errno(libc::ENOSPC)) => Err(Error::new(
                Code::ResourceExhausted,
                format!(
                    "{} has more directories than can be watched ({MAX_DIRECTORIES}, or less by the kernel's \
                     fs.inotify.max_user_watches): watch a smaller part",
                    path.to_string_lossy()
                ),
            )),
            Err(e) => Err(errno_error(&about("cannot watch", &path), e)),
        }
    }

    /// The descriptor that is readable when there are changes.
    pub fn fd(&self) -> &Fd {
        &self.fd
    }

    /// Watches a directory and, when that is wanted, those beneath it. With `tell`, what is found there is
    /// told as made: it came before the watch did.
    fn add_tree(&mut self, path: &[u8], depth: usize, tell: bool) -> Result<(), Errno> {
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(Errno(libc::ENOSPC));
        }
        let name = CString::new(path).map_err(|_| Errno(libc::EINVAL))?;
        let number = inotify::add(&self.fd, &name)?;
        self.directories.insert(number, path.to_vec());
        if !self.recursive || depth >= MAX_DEPTH {
            return Ok(());
        }
        let directory = open_directory(file::CURRENT, &name, libc::O_NOFOLLOW)?;
        // Only directories are held, of which no more can be watched: there may be any number of files.
        let mut inner: Vec<Vec<u8>> = Vec::new();
        let mut failed = None;
        file::read_entries(&directory, |name, kind| {
            let is_directory = match kind {
                libc::DT_UNKNOWN => {
                    match file::metadata_at(directory.raw(), name, libc::AT_SYMLINK_NOFOLLOW) {
                        Ok(entry) => entry.is_directory(),
                        Err(e) => {
                            failed = Some(e).filter(|e| is_shortage(*e));
                            return failed.is_none();
                        }
                    }
                }
                kind => kind == libc::DT_DIR,
            };
            let path = join(path, name.to_bytes());
            if tell {
                self.tell(CHANGE_MADE, path.clone(), Vec::new(), is_directory);
            }
            if is_directory {
                inner.push(path);
            }
            inner.len() < MAX_DIRECTORIES
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        for path in inner {
            match self.add_tree(&path, depth + 1, tell) {
                // One that may not be read, or is gone already, is not watched.
                Ok(()) | Err(Errno(libc::EACCES | libc::ENOENT | libc::ENOTDIR)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Directories may have come, gone and moved unseen. What is still there keeps its watch.
    fn watch_again(&mut self) {
        if !self.recursive {
            return;
        }
        let before = core::mem::take(&mut self.directories);
        let root = self.root.clone();
        // As far as it goes: that changes were lost is told in any case.
        let _ = self.add_tree(&root, 0, false);
        for number in before.into_keys().filter(|number| !self.directories.contains_key(number)) {
            inotify::remove(&self.fd, number);
        }
    }

    fn tell(&mut self, change: u8, path: Vec<u8>, from: Vec<u8>, is_directory: bool) {
        if self.waiting.len() >= MAX_WAITING {
            if self.waiting.back().is_none_or(|last| last.change != CHANGES_LOST) {
                self.tell_lost();
            }
            return;
        }
        // A file that is written bit by bit is one change for as long as nobody was told of it.
        let change = FileChange { change, path: Bytes(path), from: Bytes(from), is_directory };
        if self.waiting.back() != Some(&change) {
            self.waiting.push_back(change);
        }
    }

    fn tell_lost(&mut self) {
        let path = Bytes(self.root.clone());
        self.waiting.push_back(FileChange {
            change: CHANGES_LOST,
            path,
            from: Bytes::default(),
            is_directory: true,
        });
    }

    /// The first half of a move that has no second one: it went out of what is watched.
    fn settle_move(&mut self) {
        if let Some(moved) = self.moved.take() {
            if moved.is_directory {
                let gone: Vec<i32> = self
                    .directories
                    .iter()
                    .filter(|(_, path)| is_within(path, &moved.path))
                    .map(|(number, _)| *number)
                    .collect();
                for number in gone {
                    inotify::remove(&self.fd, number);
                    self.directories.remove(&number);
                }
            }
            self.tell(CHANGE_REMOVED, moved.path, Vec::new(), moved.is_directory);
        }
    }

    fn on_event(&mut self, event: Event<'_>) {
        if event.mask & libc::IN_Q_OVERFLOW != 0 {
            self.settle_move();
            self.watch_again();
            self.tell_lost();
            return;
        }
        if event.mask & libc::IN_IGNORED != 0 {
            self.directories.remove(&event.watch);
            return;
        }
        let Some(directory) = self.directories.get(&event.watch) else { return };
        if event.name.is_empty() {
            return;
        }
        let path = join(directory, event.name);
        let is_directory = event.mask & libc::IN_ISDIR != 0;
        if event.mask & libc::IN_MOVED_TO != 0 {
            match self.moved.take() {
                Some(moved) if moved.cookie == event.cookie => self.on_moved(moved, path),
                other => {
                    self.moved = other;
                    self.settle_move();
                    self.on_made(path, is_directory);
                }
            }
            return;
        }
        self.settle_move();
        if event.mask & libc::IN_MOVED_FROM != 0 {
            self.moved = Some(MovedFrom { cookie: event.cookie, path, is_directory });
        } else if event.mask & libc::IN_CREATE != 0 {
            self.on_made(path, is_directory);
        } else if event.mask & libc::IN_DELETE != 0 {
            self.tell(CHANGE_REMOVED, path, Vec::new(), is_directory);
        } else if event.mask & libc::IN_MODIFY != 0 {
            self.tell(CHANGE_WRITTEN, path, Vec::new(), is_directory);
        } else if event.mask & libc::IN_ATTRIB != 0 {
            self.tell(CHANGE_ATTRIBUTES, path, Vec::new(), is_directory);
        }
    }

    fn on_made(&mut self, path: Vec<u8>, is_directory: bool) {
        self.tell(CHANGE_MADE, path.clone(), Vec::new(), is_directory);
        if is_directory && self.recursive {
            match self.add_tree(&path, 1, true) {
                Ok(()) | Err(Errno(libc::EACCES | libc::ENOENT | libc::ENOTDIR)) => {}
                // Not everything is watched any more.
                Err(_) => self.tell_lost(),
            }
        }
    }

    fn on_moved(&mut self, moved: MovedFrom, path: Vec<u8>) {
        for directory in self.directories.values_mut() {
            if is_within(directory, &moved.path) {
                let mut whole = path.clone();
                whole.extend_from_slice(&directory[moved.path.len()..]);
                *directory = whole;
            }
        }
        self.tell(CHANGE_MOVED, path, moved.path, moved.is_directory);
    }

    /// Tells what was seen.
    pub fn step(
        &mut self,
        key: StreamKey,
        connections: &mut Connections,
        scratch: &mut [u8],
    ) -> Result<Progress, Error> {
        if !self.told {
            connections.send(key, &Done {});
            self.told = true;
        }
        loop {
            while let Some(change) = self.waiting.pop_front() {
                if !connections.try_send(key, &change) {
                    // The kernel's queue takes what comes meanwhile, and says so when it is full.
                    self.waiting.push_front(change);
                    return Ok(Progress::Blocked);
                }
            }
            match self.fd.read(scratch) {
                Ok(n) => {
                    let _acting = self.actor.act()?;
                    for event in inotify::events(&scratch[..n]) {
                        self.on_event(event);
                    }
                }
                Err(Errno(libc::EAGAIN)) => {
                    self.settle_move();
                    if self.waiting.is_empty() {
                        return Ok(Progress::Blocked);
                    }
                }
                Err(e) => return Err(errno_error("cannot go on watching files", e)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_within_whole_names_only() {
        assert!(is_within(b"/a", b"/a") && is_within(b"/a/b", b"/a"));
        assert!(!is_within(b"/ab", b"/a") && !is_within(b"/", b"/a"));
        assert_eq!((join(b"/", b"x"), join(b"/a", b"x")), (b"/x".to_vec(), b"/a/x".to_vec()));
    }
}
