//! Metadata as it is told.

use crate::sys::syscall::Errno;
use crate::sys::{file, file::Metadata};
use crate::users;
use alloc::collections::BTreeMap;
use alloc::ffi::CString;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;
use wire::codec::Bytes;
use wire::message::FileEntry;

/// Ids whose names are remembered during one operation.
const MAX_REMEMBERED: usize = 256;

/// The names of owners and groups, each file read at most once an operation.
#[derive(Default)]
pub struct Names {
    files: [Option<Vec<u8>>; 2],
    known: BTreeMap<(usize, u32), String>,
}

const SOURCES: [&CStr; 2] = [c"/etc/passwd", c"/etc/group"];

impl Names {
    fn get(&mut self, source: usize, id: u32) -> Result<String, Errno> {
        if let Some(name) = self.known.get(&(source, id)) {
            return Ok(name.clone());
        }
        // Without the file, ids are told as numbers.
        let content = match self.files[source].take() {
            Some(content) => content,
            None => file::read_if_any(SOURCES[source], users::MAX_FILE)?,
        };
        let name = users::name_of(&content, id);
        self.files[source] = Some(content);
        if self.known.len() < MAX_REMEMBERED {
            self.known.insert((source, id), name.clone());
        }
        Ok(name)
    }

    /// An account's name.
    pub fn owner(&mut self, uid: u32) -> Result<String, Errno> {
        self.get(0, uid)
    }

    /// A group's name.
    pub fn group(&mut self, gid: u32) -> Result<String, Errno> {
        self.get(1, gid)
    }
}

/// The entry at a path; a symbolic link is told as such.
pub fn describe(path: &CString, names: &mut Names) -> Result<FileEntry, Errno> {
    describe_at(file::CURRENT, path, path.as_bytes(), names)
}

/// The entry with a name in an open directory, to be told with this path.
pub fn describe_at(directory: i32, name: &CStr, path: &[u8], names: &mut Names) -> Result<FileEntry, Errno> {
    let metadata = file::metadata_at(directory, name, libc::AT_SYMLINK_NOFOLLOW)?;
    let target = if metadata.is_symlink() { file::read_link(directory, name)? } else { Vec::new() };
    from_metadata(&metadata, path, target, names)
}

/// The entry for metadata that is there already.
pub fn from_metadata(
    metadata: &Metadata,
    path: &[u8],
    target: Vec<u8>,
    names: &mut Names,
) -> Result<FileEntry, Errno> {
    Ok(FileEntry {
        path: Bytes(path.to_vec()),
        mode: metadata.mode,
        size: metadata.size,
        owner: names.owner(metadata.uid)?,
        group: names.group(metadata.gid)?,
        modified_sec: metadata.modified_sec,
        symlink_target: Bytes(target),
    })
}
