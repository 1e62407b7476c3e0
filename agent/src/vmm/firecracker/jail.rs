//! A machine's own root: the directory that Firecracker sees as `/`, with what it may open and nothing else.
//!
//! It is where the jailer expects it, `jail/PROGRAM/ID/root` in the capsule's directory. Kernel, initial RAM
//! filesystem and saved machine are hard links in it, a disk is a hard link or a device file of its own.
//! Firecracker owns the root and may have been taken over by its guest, so what is taken out of it again is
//! looked at before it is believed.

use crate::sys::node;
use crate::vmm::VmmError;
use crate::vmm::machine::system;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown, fchown};
use std::path::{Path, PathBuf};

/// Of all roots, in the capsule's directory.
const JAIL: &str = "jail";
const ROOT: &str = "root";

/// One machine's root.
#[derive(Debug)]
pub struct Jail {
    root: PathBuf,
    uid: u32,
}

impl Jail {
    /// Makes an empty one for the program `program` and the machine `id`, which belongs to `uid`. One that is
    /// there is removed: nobody is in it any more. Blocks.
    pub fn make(directory: &Path, program: &Path, id: &str, uid: u32) -> Result<Jail, VmmError> {
        remove_all(directory)?;
        let name = program.file_name().unwrap_or(program.as_os_str());
        let root = directory.join(JAIL).join(name).join(id).join(ROOT);
        let made = DirBuilder::new().mode(0o700).recursive(true).create(&root);
        made.and_then(|()| chown(&root, Some(uid), Some(uid))).map_err(system("making", &root))?;
        Ok(Jail { root, uid })
    }

    /// The one that an earlier agent has made; `None` when there is none, and so no Firecracker. Blocks.
    pub fn find(directory: &Path) -> Result<Option<Jail>, VmmError> {
        let mut root = directory.join(JAIL);
        if !root.exists() {
            return Ok(None);
        }
        for _ in ["program", "id"] {
            let mut entries = fs::read_dir(&root).map_err(system("listing", &root))?.flatten();
            let Some(entry) = entries.next() else { return Ok(None) };
            root = entry.path();
        }
        root.push(ROOT);
        let uid = fs::symlink_metadata(&root).map_err(system("examining", &root))?.uid();
        Ok(Some(Jail { root, uid }))
    }

    /// The directory under which the jailer makes and finds it.
    pub fn base(directory: &Path) -> PathBuf {
        directory.join(JAIL)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its descriptor.
    pub fn open(&self) -> Result<File, VmmError> {
        File::open(&self.root).map_err(system("opening", &self.root))
    }

    /// Puts a file into it that Firecracker has the right to read already. Blocks.
    pub fn link(&self, file: &Path, name: &str) -> Result<(), VmmError> {
        let link = self.root.join(name);
        match fs::hard_link(file, &link) {
            // Another file system.
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                fs::copy(file, &link).map(drop).map_err(system("copying", file))?;
                self.give(&link)
            }
            other => other.map_err(system("linking", file)),
        }
    }

    /// Puts a disk into it, which becomes Firecracker's. Blocks.
    pub fn link_disk(&self, file: &Path, name: &str) -> Result<(), VmmError> {
        let metadata = fs::metadata(file).map_err(system("examining", file))?;
        let link = self.root.join(name);
        if metadata.rdev() != 0 {
            node::make_block(&link, metadata.rdev()).map_err(system("making", &link))?;
        } else {
            fs::hard_link(file, &link).map_err(system("linking", file))?;
        }
        self.give(&link)
    }

    /// Puts an empty pipe into it and opens the end that the agent reads. Blocks.
    pub fn make_pipe(&self, name: &str) -> Result<File, VmmError> {
        let path = self.root.join(name);
        node::make_fifo(&path).map_err(system("making", &path))?;
        self.give(&path)?;
        self.open_pipe(name)
    }

    /// Opens the agent's end of a pipe. Reading it never blocks.
    pub fn open_pipe(&self, name: &str) -> Result<File, VmmError> {
        let path = self.root.join(name);
        // With write access as well: so there always is a writer, and no end.
        let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
        let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
        opened.map_err(system("opening", &path))
    }

    fn give(&self, path: &Path) -> Result<(), VmmError> {
        chown(path, Some(self.uid), Some(self.uid)).map_err(system("giving away", path))
    }

    /// Removes something from it; what is not there is no error.
    pub fn remove(&self, name: &str) -> Result<(), VmmError> {
        let path = self.root.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(system("removing", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Removes it with all in it. No process may be in it. Blocks.
    pub fn clear(&self) -> Result<(), VmmError> {
        match self.root.ancestors().find(|path| path.ends_with(JAIL)).and_then(Path::parent) {
            Some(directory) => remove_all(directory),
            None => Ok(()),
        }
    }

    /// Opens a file that Firecracker has written. It has to be one: a link would lead to somebody else's.
    pub fn open_written(&self, name: &str) -> Result<File, VmmError> {
        let path = self.root.join(name);
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&path);
        let file = file.map_err(system("opening", &path))?;
        let metadata = file.metadata().map_err(system("examining", &path))?;
        if !metadata.is_file() || metadata.nlink() != 1 || metadata.uid() != self.uid {
            return Err(VmmError::BadImage { path, what: "it is not a file that the machine has written" });
        }
        Ok(file)
    }

    /// Moves a file that Firecracker has written out of it, on disk when this returns.
    pub fn take(&self, name: &str, to: &Path) -> Result<File, VmmError> {
        let file = self.open_written(name)?;
        file.sync_all().map_err(system("writing out", &self.root.join(name)))?;
        fs::rename(self.root.join(name), to).map_err(system("moving a saved machine to", to))?;
        // What has been moved could be another file than the one that was looked at.
        let (looked_at, moved) = (file.metadata(), fs::symlink_metadata(to));
        let same = looked_at.is_ok_and(|a| moved.is_ok_and(|b| (a.dev(), a.ino()) == (b.dev(), b.ino())));
        if !same {
            fs::remove_file(to).map_err(system("removing", to))?;
            return Err(VmmError::BadImage { path: to.to_owned(), what: "it was exchanged meanwhile" });
        }
        fchown(&file, Some(self.uid), Some(self.uid)).map_err(system("giving away", to))?;
        Ok(file)
    }
}

/// Removes the roots in a capsule's directory. No process may be in one. Blocks.
pub fn remove_all(directory: &Path) -> Result<(), VmmError> {
    let path = directory.join(JAIL);
    match fs::remove_dir_all(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(system("removing", &path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_taken_out_is_what_the_machine_has_written() {
        let directory = std::env::temp_dir().join(format!("wrenn-jail-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("made");
        let own = fs::metadata(&directory).expect("there").uid();
        assert!(Jail::find(&directory).expect("looked").is_none());
        let jail = Jail::make(&directory, Path::new("/usr/bin/firecracker"), "cl-1", own).expect("made");
        assert!(jail.root().ends_with("jail/firecracker/cl-1/root"));
        assert_eq!(Jail::find(&directory).expect("looked").expect("found").root(), jail.root());
        let secret = directory.join("secret");
        fs::write(&secret, "of somebody else").expect("written");
        jail.link(&secret, "hard").expect("linked");
        symlink(&secret, jail.root().join("soft")).expect("linked");
        for name in ["hard", "soft"] {
            assert!(jail.take(name, &directory.join("taken")).is_err(), "{name}");
            assert!(!directory.join("taken").exists());
        }
        let _pipe = jail.make_pipe("pipe").expect("made");
        assert!(matches!(jail.open_written("pipe"), Err(VmmError::BadImage { .. })));
        fs::write(jail.root().join("file"), "saved").expect("written");
        let file = jail.take("file", &directory.join("taken")).expect("taken");
        assert_eq!(file.metadata().expect("there").len(), 5);
        assert_eq!(fs::read(directory.join("taken")).expect("read"), b"saved");
        jail.clear().expect("removed");
        remove_all(&directory).expect("removed again");
        fs::remove_dir_all(&directory).expect("removed");
    }
}
