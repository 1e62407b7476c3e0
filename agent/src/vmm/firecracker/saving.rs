//! Saving a machine in Firecracker. It writes its memory and devices into its own root; from there they come
//! to the capsule's other files.
//!
//! Only a machine that goes on from a memory of its capsule's own, and that is still spoken to by the agent
//! that started it, knows what has changed since: anything else is written whole.

use super::Instance;
use super::requests::{self, NEW_MEMORY, NEW_STATE};
use crate::sys::{reflink, sparse};
use crate::vmm::image::{self, CHUNK, COMMAND_TIMEOUT_MS, Image, Written, name};
use crate::vmm::machine::{Place, system};
use crate::vmm::{Kind, VmmError};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// How long writing a memory may take, in milliseconds: a large one to a slow disk.
const SAVE_TIMEOUT_MS: u64 = 600_000;
/// Whom files belong to that no machine may change any more.
const ROOT: u32 = 0;

impl Instance {
    /// Stands the guest still and writes its image.
    pub(in crate::vmm) fn save(&mut self, place: &Place<'_>) -> Result<(Image, Written), VmmError> {
        let Place { directory, generation, base, owner } = *place;
        let base = base.filter(|_| self.knows_changes && owner != ROOT);
        // Whatever comes of it, what was changed before is not told a second time.
        self.knows_changes = false;
        self.api.call(&requests::set_running(false), COMMAND_TIMEOUT_MS)?;
        self.clear_saved()?;
        let image =
            |memory| Image { memory, delta: None, state: generation, packed: false, vmm: Kind::Firecracker };
        let saved = self.api.call(&requests::save(base.is_some()), SAVE_TIMEOUT_MS).and_then(|()| {
            self.put(NEW_STATE, &directory.join(name("state", generation)), owner)?;
            match base {
                Some(memory) => {
                    let changes = self.jail.open_written(NEW_MEMORY)?;
                    let memory_bytes = write_delta(&changes, &directory.join(name("delta", generation)))?;
                    let image = Image { delta: Some(generation), ..image(memory) };
                    Ok((image, Written { memory_bytes, is_delta: true }))
                }
                None => {
                    let to = directory.join(name("memory", generation));
                    let memory_bytes = self.put(NEW_MEMORY, &to, owner)?;
                    dig_holes(&to, owner)?;
                    Ok((image(generation), Written { memory_bytes, is_delta: false }))
                }
            }
        });
        self.clear_saved()?;
        saved
    }

    fn clear_saved(&self) -> Result<(), VmmError> {
        self.jail.remove(NEW_STATE)?;
        self.jail.remove(NEW_MEMORY)
    }

    /// Puts what Firecracker has written to its place. What others will go on from as well is copied: the
    /// machine may still hold what it has written, and could change it. Returns its bytes.
    fn put(&self, from: &str, to: &Path, owner: u32) -> Result<u64, VmmError> {
        if owner != ROOT {
            let file = self.jail.take(from, to)?;
            return Ok(file.metadata().map_err(system("examining", to))?.len());
        }
        let from = self.jail.open_written(from)?;
        // Read by the users of all capsules that go on from it, whose machines get links to it.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o444).open(to);
        let file = file.map_err(system("making", to))?;
        let made = copy(&from, &file).and_then(|length| {
            // As the mode was asked for, whatever the umask.
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
            file.sync_all().map(|()| length)
        });
        made.map_err(system("writing", to))
    }
}

/// Firecracker writes all of a memory. What the guest has never used needs no space.
fn dig_holes(path: &Path, owner: u32) -> Result<(), VmmError> {
    if owner == ROOT {
        return Ok(());
    }
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(system("opening", path))?;
    sparse::dig_holes(&file).map_err(system("making holes in", path))
}

fn copy(from: &File, to: &File) -> io::Result<u64> {
    let length = from.metadata()?.len();
    match reflink::clone(from, to) {
        Err(e) if !reflink::unsupported(&e) => return Err(e),
        Err(_) => {
            to.set_len(length)?;
            sparse::copy_used(from, to)?;
        }
        Ok(()) => {}
    }
    Ok(length)
}

/// Writes what is not a hole in `changes` down as what has changed. Returns its bytes.
fn write_delta(changes: &File, path: &Path) -> Result<u64, VmmError> {
    image::write_delta(path, |put| {
        let mut buffer = vec![0; CHUNK];
        let (mut at, mut total) = (0, 0);
        while let Some((begin, end)) = sparse::next_data(changes, at).map_err(system("reading", path))? {
            at = begin;
            while at < end {
                let count = (end - at).min(CHUNK as u64);
                let bytes = &mut buffer[..count as usize];
                changes.read_exact_at(bytes, at).map_err(system("reading", path))?;
                put(at, bytes)?;
                at += count;
                total += count;
            }
        }
        Ok(total)
    })
}
