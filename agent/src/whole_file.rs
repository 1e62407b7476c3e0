//! Small files that are read whole and replaced whole: after a crash there is the old one or the new one.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Puts a file with these permissions and this content in place of what is at `path`, if anything. Blocks
/// until it is on disk.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    place(path, content, mode, File::sync_all)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// As [`replace`], but nothing waits for the disk: what is killed leaves the old one or the new one, a power cut
/// may leave neither whole.
pub fn replace_unsynced(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    place(path, content, mode, |_| Ok(()))
}

fn place(
    path: &Path,
    content: &[u8],
    mode: u32,
    sync: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    let new = beside(path);
    // A leftover could have another mode.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    let placed = file.write_all(content).and_then(|()| sync(&file)).and_then(|()| fs::rename(&new, path));
    if placed.is_err() {
        // On a full disk even that is needed. The first error is the one to tell.
        let _ = fs::remove_file(&new);
    }
    placed
}

/// The content of the file at `path`; `None` when there is none. Blocks.
///
/// # Errors
/// `InvalidData` when it is longer than `max_bytes`: `what` it is goes into the message.
pub fn read(path: &Path, max_bytes: u64, what: &str) -> io::Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Ok(m) if m.len() > max_bytes => {
            Err(io::Error::new(io::ErrorKind::InvalidData, format!("the {what} is too long")))
        }
        Ok(_) => fs::read(path).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Where the new file of `path` is written: `NAME.new`, which a crash may leave.
pub fn beside(path: &Path) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_and_leftovers_do_not_matter() {
        let directory = std::env::temp_dir().join(format!("wrenn-whole-file-{}", std::process::id()));
        fs::create_dir(&directory).expect("a directory");
        let path = directory.join("some.json");
        assert_eq!(read(&path, 9, "file").expect("nothing"), None);
        fs::write(beside(&path), "a leftover that is longer").expect("a leftover");
        fs::set_permissions(beside(&path), fs::Permissions::from_mode(0o666)).expect("its mode");
        replace(&path, b"first", 0o600).expect("written");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        replace_unsynced(&path, b"other", 0o640).expect("replaced");
        assert_eq!(read(&path, 5, "file").expect("read").as_deref(), Some(&b"other"[..]));
        replace(&path, b"second", 0o600).expect("replaced");
        assert_eq!(read(&path, 6, "file").expect("read").as_deref(), Some(&b"second"[..]));
        let error = read(&path, 5, "file").expect_err("too long");
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (io::ErrorKind::InvalidData, "the file is too long")
        );
        let left = fs::read_dir(&directory).expect("list").count();
        fs::remove_dir_all(&directory).expect("removed");
        assert_eq!(left, 1);
    }
}
