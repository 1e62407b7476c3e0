//! Reading directories without following anything: every entry is named with its kind, in a fixed
//! order, within bounds. The tree must be at rest while it is read.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::failure::{Class, Finding, Result};

/// How deep a directory tree may be.
const MAX_DEPTH: usize = 64;
/// How many entries a walk may see.
const MAX_ENTRIES: usize = 500_000;
/// The largest file that is read into memory: far over the largest source file or binary.
pub const MAX_FILE_BYTES: u64 = 512 << 20;

/// What a directory entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of that many bytes.
    File(u64),
    /// A directory (listed before what is in it).
    Directory,
    /// A symbolic link, or a file with more than one name.
    Link,
    /// A device, pipe or socket.
    Special(&'static str),
}

/// An entry of a walked tree.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The path below the start, '/'-separated. Names that are not UTF-8 come out with U+FFFD.
    pub path: String,
    /// The kind.
    pub kind: Kind,
}

/// An I/O failure as a finding, with the step and the error of the system.
pub fn io_error(step: &str, path: &Path, error: &std::io::Error) -> Finding {
    Finding::new(Class::Io, path.display().to_string(), format!("cannot {step}: {error}"))
}

/// Reads a regular file of bounded size.
///
/// # Errors
/// [`Class::Io`] with the path.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(|error| io_error("read it", path, &error))?;
    if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
        let reason = format!("it is no regular file of at most {MAX_FILE_BYTES} bytes");
        return Err(Finding::new(Class::Io, path.display().to_string(), reason));
    }
    fs::read(path).map_err(|error| io_error("read it", path, &error))
}

/// Reads a text file.
///
/// # Errors
/// [`Class::Io`] with the path, also for text that is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?)
        .map_err(|_| Finding::new(Class::Io, path.display().to_string(), "it is not UTF-8 text"))
}

/// Writes a file by way of a new one beside it, so that no reader sees half of it.
///
/// # Errors
/// [`Class::Io`] with the path.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    fs::write(&temporary, bytes).map_err(|error| io_error("write it", &temporary, &error))?;
    fs::rename(&temporary, path).map_err(|error| io_error("put the new file in its place", path, &error))
}

/// The entries of one directory, sorted by name.
///
/// # Errors
/// [`Class::Io`] with the path.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| io_error("list it", directory, &error);
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
        if paths.len() > MAX_ENTRIES {
            return Err(Finding::new(Class::Io, directory.display().to_string(), "too many entries"));
        }
    }
    paths.sort();
    Ok(paths)
}

/// What `path` is, without following it.
///
/// # Errors
/// [`Class::Io`] with the path.
pub fn kind(path: &Path) -> Result<Kind> {
    let metadata = fs::symlink_metadata(path).map_err(|error| io_error("look at it", path, &error))?;
    let kind = metadata.file_type();
    Ok(if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() || (kind.is_file() && metadata.nlink() > 1) {
        Kind::Link
    } else if kind.is_file() {
        Kind::File(metadata.len())
    } else if kind.is_fifo() {
        Kind::Special("named pipe")
    } else if kind.is_socket() {
        Kind::Special("socket")
    } else {
        Kind::Special("device")
    })
}

/// Everything below `start`, parents first, sorted. `skip` is asked with the path of each directory
/// below `start`.
///
/// # Errors
/// [`Class::Io`], also for a tree that is too deep or too large.
pub fn walk(start: &Path, skip: &dyn Fn(&str) -> bool) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut pending = vec![(start.to_owned(), String::new(), 0)];
    while let Some((directory, prefix, depth)) = pending.pop() {
        if depth > MAX_DEPTH || entries.len() > MAX_ENTRIES {
            return Err(Finding::new(
                Class::Io,
                directory.display().to_string(),
                "the tree is too deep or too large",
            ));
        }
        for path in list(&directory)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let below = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            let kind = kind(&path)?;
            if kind == Kind::Directory {
                if skip(&below) {
                    continue;
                }
                pending.push((path, below.clone(), depth + 1));
            }
            entries.push(Entry { path: below, kind });
        }
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}
