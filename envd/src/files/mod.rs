//! Files, on behalf of a user: each access is made with the user's file system ids, so what may be done is
//! what the kernel says.
//!
//! What takes one system call or few is done at once. What can take long is a [`Job`] that goes on in small
//! steps, as its stream has room and as others have had their turns.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`entry`] | metadata as it is told |
//! | [`list`] | a directory and what is beneath it |
//! | [`remove`] | an entry with all that is in it |
//! | [`read`] | content out |
//! | [`mod@write`] | content in, at once or not at all |
//! | [`watch`] | changes as they happen |

mod entry;
mod list;
mod read;
mod remove;
mod watch;
mod write;

use crate::connection::{Connections, StreamKey, Task};
use crate::process::request::{self, Defaults, errno_error};
use crate::process::supervisor::Shell;
use crate::sys::credentials::ActingAs;
use crate::sys::file::Sync;
use crate::sys::signal::Exit;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file};
use crate::token::Token;
use crate::users::User;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use entry::Names;
use list::Listing;
use read::Reading;
use remove::Removal;
use watch::Watch;
use wire::codec::Bytes;
use wire::message::{
    Code, Done, Error, FileEntry, FileList, FileMakeDirectory, FileMove, FileRead, FileRemove, FileStat,
    FileWatch, FileWrite,
};
use write::{Next, Writing};

/// Jobs that may run at once.
const MAX_JOBS: usize = 1024;
/// Watches that may be open at once: each is an inotify instance, of which the kernel gives a user 128.
const MAX_WATCHES: usize = 64;

/// Processes that bring written files to the disk, at once. For more, envd waits itself.
const MAX_HELPERS: usize = 16;

/// Who an access is made for.
pub(super) struct Actor {
    user: User,
    is_root: bool,
}

impl Actor {
    fn find(name: &str, defaults: &Defaults) -> Result<Actor, Error> {
        Ok(Actor { user: request::find_user(name, defaults)?, is_root: defaults.is_root })
    }

    /// Acts as the user until the guard goes.
    fn act(&self) -> Result<ActingAs, Error> {
        ActingAs::user(self.user.uid, self.user.gid, &self.user.groups, self.is_root)
            .map_err(|e| errno_error(&format!("cannot act as {}", self.user.name), e))
    }

    /// The absolute path for one of a request.
    fn path(&self, path: &Bytes) -> Result<CString, Error> {
        let mut whole = request::absolute(path, &self.user.home);
        while whole.len() > 1 && whole.ends_with(b"/") {
            whole.pop();
        }
        CString::new(whole).map_err(|_| Error::new(Code::InvalidRequest, "a path has a NUL byte"))
    }
}

/// `what` with a path, for an error.
fn about(what: &str, path: &CString) -> String {
    format!("{what} {}", path.to_string_lossy())
}

/// Something that goes on over several turns.
enum Job {
    List(Listing),
    Remove(Removal),
    Read(Reading),
    Write(Writing),
    Watch(Watch),
}

/// What a step of a job came to.
pub(super) enum Progress {
    /// There is more to do, as soon as others have had their turn.
    More,
    /// It goes on when the stream has room.
    Blocked,
    /// It is done, and its last message is sent.
    Done,
}

/// All jobs on files.
#[derive(Default)]
pub struct Files {
    jobs: BTreeMap<StreamKey, Box<Job>>,
    /// Which write a helper works for, by its process id.
    helpers: BTreeMap<u32, StreamKey>,
}

impl Files {
    fn begin(&mut self, key: StreamKey, job: Job, connections: &mut Connections) -> Result<(), Error> {
        if self.jobs.len() >= MAX_JOBS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("{MAX_JOBS} file operations are under way already: try again"),
            ));
        }
        self.jobs.insert(key, Box::new(job));
        connections.set_task(key, Task::File);
        Ok(())
    }

    /// Tells of one entry.
    pub fn stat(&self, message: &FileStat, defaults: &Defaults) -> Result<FileEntry, Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        let _acting = actor.act()?;
        entry::describe(&path, &mut Names::default())
            .map_err(|e| errno_error(&about("cannot stat", &path), e))
    }

    /// Makes a directory and its missing parents. One that is there already is as good.
    pub fn make_directory(
        &self,
        message: &FileMakeDirectory,
        defaults: &Defaults,
    ) -> Result<FileEntry, Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        let _acting = actor.act()?;
        make_directories(&path, message.mode & 0o7777)
            .and_then(|()| entry::describe(&path, &mut Names::default()))
            .map_err(|e| errno_error(&about("cannot make directory", &path), e))
    }

    /// Moves an entry, over what is there.
    pub fn rename(&self, message: &FileMove, defaults: &Defaults) -> Result<FileEntry, Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let (from, to) = (actor.path(&message.from)?, actor.path(&message.to)?);
        let _acting = actor.act()?;
        file::rename(file::CURRENT, &from, file::CURRENT, &to)
            .and_then(|()| entry::describe(&to, &mut Names::default()))
            .map_err(|e| {
                let hint = if e == Errno(libc::EXDEV) { "; copy it and remove the old one" } else { "" };
                let what = format!("cannot move {} to {}", from.to_string_lossy(), to.to_string_lossy());
                let mut error = errno_error(&what, e);
                error.text.push_str(hint);
                error
            })
    }

    /// Starts to list a directory.
    pub fn list(
        &mut self,
        key: StreamKey,
        message: &FileList,
        defaults: &Defaults,
        connections: &mut Connections,
    ) -> Result<(), Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        let listing = Listing::open(actor, path, message.depth)?;
        self.begin(key, Job::List(listing), connections)
    }

    /// Starts to remove an entry.
    pub fn remove(
        &mut self,
        key: StreamKey,
        message: &FileRemove,
        defaults: &Defaults,
        connections: &mut Connections,
    ) -> Result<(), Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        self.begin(key, Job::Remove(Removal::new(actor, path)), connections)
    }

    /// Starts to send a file's content.
    pub fn read(
        &mut self,
        key: StreamKey,
        message: &FileRead,
        defaults: &Defaults,
        connections: &mut Connections,
    ) -> Result<(), Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        let (reading, entry) = Reading::open(&actor, &path, message.offset, message.length)?;
        self.begin(key, Job::Read(reading), connections)?;
        connections.send(key, &entry);
        Ok(())
    }

    /// Starts to take a file's content.
    pub fn write(
        &mut self,
        key: StreamKey,
        message: &FileWrite,
        defaults: &Defaults,
        connections: &mut Connections,
    ) -> Result<(), Error> {
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        let writing = Writing::open(actor, path, message.mode & 0o7777)?;
        self.begin(key, Job::Write(writing), connections)
    }

    /// Starts to watch a directory.
    pub fn watch(
        &mut self,
        key: StreamKey,
        message: &FileWatch,
        defaults: &Defaults,
        shell: &mut Shell<'_>,
    ) -> Result<(), Error> {
        let watches = self.jobs.values().filter(|job| matches!(***job, Job::Watch(_))).count();
        if watches >= MAX_WATCHES {
            let text = format!("{MAX_WATCHES} directories are watched already: end some watches first");
            return Err(Error::new(Code::ResourceExhausted, text));
        }
        let actor = Actor::find(&message.user, defaults)?;
        let path = actor.path(&message.path)?;
        let watch = Watch::open(actor, path, message.recursive)?;
        // Edge-triggered: a watch whose stream is full must not keep the loop awake.
        shell
            .epoll
            .add(watch.fd(), libc::EPOLLIN | libc::EPOLLET, Token::Watch.pack())
            .map_err(|e| errno_error("cannot watch files", e))?;
        self.begin(key, Job::Watch(watch), shell.connections)
    }

    fn writing(&mut self, key: StreamKey) -> Option<&mut Writing> {
        match self.jobs.get_mut(&key).map(|j| &mut **j) {
            Some(Job::Write(writing)) => Some(writing),
            _ => None,
        }
    }

    /// Content came for a file, at this cost of the stream's credit.
    pub fn on_data(&mut self, key: StreamKey, bytes: Vec<u8>, cost: u32, connections: &mut Connections) {
        match self.writing(key) {
            Some(writing) => {
                writing.add(bytes, cost);
                self.go_on_writing(key, connections);
            }
            None => connections.release(key, cost),
        }
    }

    /// A stream's other half has ended: a written file is complete.
    pub fn on_finished(&mut self, key: StreamKey, connections: &mut Connections) {
        if let Some(writing) = self.writing(key) {
            writing.complete();
            self.go_on_writing(key, connections);
        }
    }

    /// A child has ended that is no process of the supervisor's: a helper, where it is known here.
    pub fn on_helper_ended(&mut self, pid: u32, exit: Exit, connections: &mut Connections) {
        let Some(key) = self.helpers.remove(&pid) else { return };
        match self.writing(key).map(|writing| writing.on_synced(exit)) {
            Some(Ok(true)) => self.end_writing(key, connections),
            Some(Ok(false)) => self.go_on_writing(key, connections),
            Some(Err(error)) => self.fail(key, &error, connections),
            // Its stream has gone meanwhile.
            None => {}
        }
    }

    fn go_on_writing(&mut self, key: StreamKey, connections: &mut Connections) {
        // A sync that had to be waited for here leaves more to be done; each round brings a piece to the
        // disk, of which a stream's window holds one at most.
        loop {
            let may_fork = self.helpers.len() < MAX_HELPERS;
            let Some(writing) = self.writing(key) else { return };
            let mut released = 0;
            let result = writing.go_on(&mut released).and_then(|next| match next {
                Next::Sync(sync) => Ok((next, writing.start_sync(sync, may_fork)?)),
                Next::More | Next::Commit => Ok((next, None)),
            });
            connections.release(key, released);
            match result {
                Ok((Next::Sync(_), Some(pid))) => {
                    self.helpers.insert(pid, key);
                    return;
                }
                Ok((Next::Sync(Sync::Content), None)) => {}
                Ok((Next::Sync(Sync::Whole) | Next::Commit, None)) => {
                    return self.end_writing(key, connections);
                }
                Ok(_) => return,
                Err(error) => return self.fail(key, &error, connections),
            }
        }
    }

    fn end_writing(&mut self, key: StreamKey, connections: &mut Connections) {
        if let Some(job) = self.jobs.remove(&key)
            && let Job::Write(writing) = *job
        {
            match writing.commit() {
                Ok(entry) => connections.send_last(key, &entry),
                Err(error) => connections.fail(key, &error),
            }
        }
    }

    fn fail(&mut self, key: StreamKey, error: &Error, connections: &mut Connections) {
        self.on_stream_gone(key, connections);
        connections.fail(key, error);
    }

    /// A stream can take more content.
    pub fn on_writable(&mut self, key: StreamKey) {
        if let Some(Job::Read(reading)) = self.jobs.get_mut(&key).map(|j| &mut **j) {
            reading.resume();
        }
    }

    /// A stream is gone, and with it what was half done.
    pub fn on_stream_gone(&mut self, key: StreamKey, connections: &mut Connections) {
        let unreleased = self.writing(key).map_or(0, |writing| writing.unreleased());
        connections.release(key, unreleased);
        self.jobs.remove(&key);
    }

    /// Whether there is anything to work at.
    pub fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Lets every job make a step. Whether one could go on at once.
    pub fn work(&mut self, connections: &mut Connections, scratch: &mut [u8]) -> bool {
        let mut more = false;
        let mut ended = Vec::new();
        for (key, job) in &mut self.jobs {
            let progress = match &mut **job {
                Job::List(listing) => listing.step(*key, connections),
                Job::Remove(removal) => removal.step().map(|progress| {
                    if matches!(progress, Progress::Done) {
                        connections.send_last(*key, &Done {});
                    }
                    progress
                }),
                Job::Read(reading) => reading.step(*key, connections, scratch),
                Job::Write(_) => Ok(Progress::Blocked),
                Job::Watch(watch) => watch.step(*key, connections, scratch),
            };
            match progress {
                Ok(Progress::More) => more = true,
                Ok(Progress::Blocked) => {}
                Ok(Progress::Done) => ended.push(*key),
                Err(error) => {
                    connections.fail(*key, &error);
                    ended.push(*key);
                }
            }
        }
        for key in ended {
            self.jobs.remove(&key);
        }
        more
    }
}

/// Makes a directory and its missing parents.
fn make_directories(path: &CString, mode: u32) -> Result<(), Errno> {
    match file::make_directory(file::CURRENT, path, mode) {
        Err(Errno(libc::ENOENT)) => {}
        Err(Errno(libc::EEXIST)) => {
            let is_directory = file::metadata_at(file::CURRENT, path, 0).is_ok_and(|m| m.is_directory());
            return if is_directory { Ok(()) } else { Err(Errno(libc::EEXIST)) };
        }
        other => return other,
    }
    // From the root down: every prefix that ends before a slash.
    let bytes = path.as_bytes();
    let ends = bytes.iter().enumerate().skip(1).filter(|(_, b)| **b == b'/').map(|(i, _)| i);
    for end in ends.chain(core::iter::once(bytes.len())) {
        let prefix = CString::new(&bytes[..end]).map_err(|_| Errno(libc::EINVAL))?;
        match file::make_directory(file::CURRENT, &prefix, mode) {
            // A directory above is there, or may not be written to and need not be.
            Ok(()) | Err(Errno(libc::EEXIST)) => {}
            Err(e) if file::metadata_at(file::CURRENT, &prefix, 0).is_err() => return Err(e),
            Err(_) => {}
        }
    }
    if file::metadata_at(file::CURRENT, path, 0)?.is_directory() { Ok(()) } else { Err(Errno(libc::ENOTDIR)) }
}

/// The directory part and the name of an absolute path.
fn split(path: &CString) -> Result<(CString, CString), Errno> {
    let bytes = path.as_bytes();
    let slash = bytes.iter().rposition(|b| *b == b'/').ok_or(Errno(libc::EINVAL))?;
    let directory = if slash == 0 { &b"/"[..] } else { &bytes[..slash] };
    let name = &bytes[slash + 1..];
    if name.is_empty() || name == b"." || name == b".." {
        return Err(Errno(libc::EISDIR));
    }
    let string = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno(libc::EINVAL));
    Ok((string(directory)?, string(name)?))
}

/// Opens a directory to work in.
fn open_directory(at: i32, path: &core::ffi::CStr, flags: i32) -> Result<Fd, Errno> {
    file::open(at, path, libc::O_RDONLY | libc::O_DIRECTORY | flags, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_at_their_last_name() {
        let of = |path: &str| split(&CString::new(path).expect("no NUL"));
        assert_eq!(of("/a/b"), Ok((c"/a".into(), c"b".into())));
        assert_eq!(of("/a"), Ok((c"/".into(), c"a".into())));
        for bad in ["/", "/a/..", "/."] {
            assert_eq!(of(bad), Err(Errno(libc::EISDIR)), "{bad}");
        }
    }
}
