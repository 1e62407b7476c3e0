//! Listing a directory, and those beneath it down to a depth.

use super::entry::{Names, describe_at};
use super::{Actor, Progress, about, open_directory};
use crate::connection::{Connections, StreamKey};
use crate::process::request::{self, errno_error};
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file};
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use wire::message::{Code, Done, Error, FileEntry};

/// How deep a listing goes at most.
const MAX_DEPTH: u32 = 32;
/// Names of one directory that are held at most.
const MAX_NAMES: usize = 100_000;
/// Entries told in one turn.
const STEP: usize = 128;

/// A directory that is being told.
struct Level {
    directory: Fd,
    path: Vec<u8>,
    /// What is left, the next one last.
    names: Vec<CString>,
}

/// A listing that is under way.
pub struct Listing {
    actor: Actor,
    levels: Vec<Level>,
    depth: usize,
    names: Names,
    /// An entry that the stream had no room for.
    waiting: Option<FileEntry>,
}

fn open_level(at: i32, name: &CString, path: Vec<u8>, flags: i32) -> Result<Level, Errno> {
    let directory = open_directory(at, name, flags)?;
    let mut names: Vec<CString> = Vec::new();
    file::read_directory(&directory, |name| {
        names.push(name.into());
        names.len() <= MAX_NAMES
    })?;
    if names.len() > MAX_NAMES {
        return Err(Errno(libc::EFBIG));
    }
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(Level { directory, path, names })
}

impl Listing {
    /// Opens the directory.
    pub fn open(actor: Actor, path: CString, depth: u32) -> Result<Listing, Error> {
        let level = {
            let _acting = actor.act()?;
            open_level(file::CURRENT, &path, path.as_bytes().to_vec(), 0).map_err(|e| match e {
                Errno(libc::EFBIG) => Error::new(
                    Code::ResourceExhausted,
                    format!(
                        "{} has more than {MAX_NAMES} entries: list it with a command",
                        path.to_string_lossy()
                    ),
                ),
                e => errno_error(&about("cannot list", &path), e),
            })?
        };
        let depth = depth.clamp(1, MAX_DEPTH) as usize;
        Ok(Listing { actor, levels: alloc::vec![level], depth, names: Names::default(), waiting: None })
    }

    /// Tells some entries.
    pub fn step(&mut self, key: StreamKey, connections: &mut Connections) -> Result<Progress, Error> {
        let _acting = self.actor.act()?;
        for _ in 0..STEP {
            if let Some(entry) = self.waiting.take()
                && !connections.try_send(key, &entry)
            {
                self.waiting = Some(entry);
                return Ok(Progress::Blocked);
            }
            let Some(level) = self.levels.last_mut() else {
                connections.send_last(key, &Done {});
                return Ok(Progress::Done);
            };
            let Some(name) = level.names.pop() else {
                self.levels.pop();
                continue;
            };
            let mut path = level.path.clone();
            if path != b"/" {
                path.push(b'/');
            }
            path.extend_from_slice(name.as_bytes());
            let failed =
                |path: &[u8], e| errno_error(&format!("cannot list {}", String::from_utf8_lossy(path)), e);
            let entry = match describe_at(level.directory.raw(), &name, &path, &mut self.names) {
                Ok(entry) => entry,
                Err(e) if request::is_shortage(e) => return Err(failed(&path, e)),
                // It has gone meanwhile, or may not be seen.
                Err(_) => continue,
            };
            let is_directory = entry.mode & libc::S_IFMT == libc::S_IFDIR;
            if is_directory && self.levels.len() < self.depth {
                let at = self.levels.last().map_or(file::CURRENT, |l| l.directory.raw());
                match open_level(at, &name, path, libc::O_NOFOLLOW) {
                    Ok(inner) => self.levels.push(inner),
                    Err(e) if request::is_shortage(e) => return Err(failed(&entry.path, e)),
                    // One that may not be read, or is too large, is told without what is in it.
                    Err(_) => {}
                }
            }
            self.waiting = Some(entry);
        }
        Ok(Progress::More)
    }
}
