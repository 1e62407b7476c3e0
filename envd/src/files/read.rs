//! A file's content, out to a stream.

use super::entry::{Names, from_metadata};
use super::{Actor, Progress, about};
use crate::connection::{Connections, StreamKey};
use crate::process::request::errno_error;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file};
use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;
use wire::message::{CHANNEL_FILE, Code, Done, Error, FileEntry};

/// Offsets are signed in the kernel, at the end of a read too. Beyond this there is nothing to read.
const MAX_OFFSET: u64 = i64::MAX as u64 - 1024 * 1024;

/// A read that is under way.
pub struct Reading {
    fd: Fd,
    path: CString,
    at: u64,
    end: u64,
    /// The stream has said that it takes no more for now.
    blocked: bool,
}

impl Reading {
    /// Opens a regular file. A symbolic link is followed.
    pub fn open(
        actor: &Actor,
        path: &CString,
        offset: u64,
        length: u64,
    ) -> Result<(Reading, FileEntry), Error> {
        let failed = |e| errno_error(&about("cannot read", path), e);
        let (fd, metadata) = {
            let _acting = actor.act()?;
            // Without O_NONBLOCK, a pipe without a writer would hold up everything.
            let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
            let fd = file::open(file::CURRENT, path, flags, 0).map_err(failed)?;
            let metadata = file::metadata(&fd).map_err(failed)?;
            (fd, metadata)
        };
        if metadata.is_directory() {
            return Err(failed(Errno(libc::EISDIR)));
        }
        if !metadata.is_file() {
            let text = format!("{} is not a regular file: read it with a command", path.to_string_lossy());
            return Err(Error::new(Code::InvalidState, text));
        }
        let end = if length == 0 { u64::MAX } else { offset.saturating_add(length) };
        let entry =
            from_metadata(&metadata, path.as_bytes(), Vec::new(), &mut Names::default()).map_err(failed)?;
        Ok((Reading { fd, path: path.clone(), at: offset.min(MAX_OFFSET), end, blocked: false }, entry))
    }

    /// The stream takes content again.
    pub fn resume(&mut self) {
        self.blocked = false;
    }

    /// Sends as much as the stream takes.
    pub fn step(
        &mut self,
        key: StreamKey,
        connections: &mut Connections,
        scratch: &mut [u8],
    ) -> Result<Progress, Error> {
        if self.blocked {
            return Ok(Progress::Blocked);
        }
        // As much as a session takes at once, then others have their turn.
        for _ in 0..wire::session::OUTPUT_SOFT_LIMIT.div_ceil(scratch.len()) {
            let want = (self.end - self.at).min(scratch.len() as u64) as usize;
            let n = match want {
                0 => 0,
                want => self
                    .fd
                    .read_at(&mut scratch[..want], self.at)
                    .map_err(|e| errno_error(&about("cannot read", &self.path), e))?,
            };
            if n == 0 {
                connections.send_last(key, &Done {});
                return Ok(Progress::Done);
            }
            match connections.send_data(key, CHANNEL_FILE, &scratch[..n]) {
                Some(taken) => {
                    self.at += taken as u64;
                    if taken < n {
                        self.blocked = true;
                        return Ok(Progress::Blocked);
                    }
                }
                // The stream is gone; nobody is there to be told.
                None => return Ok(Progress::Done),
            }
        }
        Ok(Progress::More)
    }
}
