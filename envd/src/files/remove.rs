//! Removing an entry with all that is in it. Symbolic links are removed, never followed.

use super::{Actor, Progress, about, open_directory, split};
use crate::process::request::errno_error;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file};
use alloc::ffi::CString;
use alloc::vec::Vec;
use wire::message::Error;

/// How deep a tree may be.
const MAX_DEPTH: usize = 256;
/// Entries removed in one turn.
const STEP: usize = 64;
/// Names read from a directory at a time.
const MAX_NAMES: usize = 256;

/// A directory that is being emptied.
struct Level {
    directory: Fd,
    /// Its name in the level above.
    name: CString,
    /// What was read and is not removed yet.
    names: Vec<CString>,
}

/// A removal that is under way.
pub struct Removal {
    actor: Actor,
    path: CString,
    parent: Option<Fd>,
    levels: Vec<Level>,
}

impl Removal {
    /// Nothing is touched before the first step.
    pub fn new(actor: Actor, path: CString) -> Removal {
        Removal { actor, path, parent: None, levels: Vec::new() }
    }

    /// Removes some entries.
    pub fn step(&mut self) -> Result<Progress, Error> {
        let _acting = self.actor.act()?;
        self.go_on().map_err(|e| errno_error(&about("cannot remove", &self.path), e))
    }

    fn go_on(&mut self) -> Result<Progress, Errno> {
        if self.parent.is_none() {
            let (directory, name) = split(&self.path)?;
            let parent = open_directory(file::CURRENT, &directory, 0)?;
            if !self.unlink_or_enter(parent.raw(), name)? {
                return Ok(Progress::Done);
            }
            self.parent = Some(parent);
        }
        for _ in 0..STEP {
            let Some(level) = self.levels.last_mut() else { return Ok(Progress::Done) };
            let at = level.directory.raw();
            if level.names.is_empty() {
                // Read anew each time: what was removed does not come again.
                level.directory = open_directory(at, c".", 0)?;
                let names = &mut level.names;
                file::read_directory(&level.directory, |name| {
                    names.push(name.into());
                    names.len() < MAX_NAMES
                })?;
            }
            match level.names.pop() {
                Some(name) => {
                    let at = level.directory.raw();
                    self.unlink_or_enter(at, name)?;
                }
                None => {
                    let Some(empty) = self.levels.pop() else { return Ok(Progress::Done) };
                    let above = self.levels.last().map(|l| &l.directory).or(self.parent.as_ref());
                    let above = above.map_or(file::CURRENT, Fd::raw);
                    file::unlink(above, &empty.name, libc::AT_REMOVEDIR)?;
                }
            }
        }
        Ok(Progress::More)
    }

    /// Removes what is not a directory; one that is becomes the next level. Whether that is so.
    fn unlink_or_enter(&mut self, at: i32, name: CString) -> Result<bool, Errno> {
        match file::unlink(at, &name, 0) {
            Ok(()) => return Ok(false),
            // Gone meanwhile, unless it is what was asked for.
            Err(Errno(libc::ENOENT)) if !self.levels.is_empty() => return Ok(false),
            Err(Errno(libc::EISDIR | libc::EPERM)) => {}
            Err(e) => return Err(e),
        }
        match file::unlink(at, &name, libc::AT_REMOVEDIR) {
            Ok(()) => return Ok(false),
            Err(Errno(libc::ENOTEMPTY | libc::EEXIST)) => {}
            Err(Errno(libc::ENOTDIR)) => return Err(Errno(libc::EPERM)),
            Err(e) => return Err(e),
        }
        if self.levels.len() >= MAX_DEPTH {
            return Err(Errno(libc::ELOOP));
        }
        let directory = open_directory(at, &name, libc::O_NOFOLLOW)?;
        self.levels.push(Level { directory, name, names: Vec::new() });
        Ok(true)
    }
}
