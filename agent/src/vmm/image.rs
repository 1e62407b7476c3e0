//! A machine that is saved: its memory and the state of its devices, as files in its capsule's directory.
//!
//! Each writing has a generation, which is in the names of its files: `memory-G`, `delta-G`, `state-G`. A
//! file that no record names is of no use. A machine that was restored writes only what it has changed, a
//! delta, which is then put into the memory that it was restored from. That is done as often as is needed:
//! doing it twice gives the same memory, so a crash in the middle is no harm.

use super::machine::system;
use super::{Kind, Restore, VmmError};
use crate::sys::sparse::WriteBehind;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How long a VMM may take for one command while a machine is saved or restored, in milliseconds. Stopping
/// a guest writes its disk out.
pub const COMMAND_TIMEOUT_MS: u64 = 20_000;

pub(super) const PAGE: u64 = 4_096;
/// How much is copied at a time.
pub(super) const CHUNK: usize = 1 << 20;
/// The most runs of pages that a delta may have: one a page of the largest memory.
const MAX_RUNS: u64 = (1 << 40) / PAGE;
const DELTA_MAGIC: &[u8; 8] = b"WRNDLTA1";

/// What a saved machine consists of: the generations of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Of the memory.
    pub memory: u64,
    /// Of what has to be put into the memory still.
    pub delta: Option<u64>,
    /// Of the state of its devices.
    pub state: u64,
    /// Whether the memory is packed, under a name of its own, and has to be unpacked first.
    #[serde(default)]
    pub packed: bool,
    /// Who has written it, and alone can read it.
    #[serde(default)]
    pub vmm: Kind,
}

/// How much was written, for the log and for figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whether these are only those that have changed.
    pub is_delta: bool,
}

impl Image {
    /// The files of an image in a capsule's directory, all of which it needs.
    fn names(&self) -> Vec<String> {
        let memory = if self.packed { "packed" } else { "memory" };
        let mut names = vec![name(memory, self.memory), name("state", self.state)];
        names.extend(self.delta.map(|delta| name("delta", delta)));
        names
    }

    /// Puts what has changed into the memory's file, where that has not been done. The image is then
    /// another, which has to be recorded before [`clean`] removes the delta. Blocks.
    pub fn merge(&self, directory: &Path) -> Result<Image, VmmError> {
        let Some(delta) = self.delta else { return Ok(*self) };
        apply_delta(&directory.join(name("delta", delta)), &directory.join(name("memory", self.memory)))?;
        Ok(Image { delta: None, ..*self })
    }

    /// Where its memory is, or goes to when it is unpacked.
    pub fn memory_path(&self, directory: &Path) -> PathBuf {
        directory.join(name("memory", self.memory))
    }

    /// Where its memory is once it is packed.
    pub fn packed_path(&self, directory: &Path) -> PathBuf {
        directory.join(name("packed", self.memory))
    }

    /// Opens the files for a machine. The image must be merged, and its memory not packed. Blocks.
    pub fn open(&self, directory: &Path) -> Result<Restore, VmmError> {
        let memory = directory.join(name("memory", self.memory));
        if self.delta.is_some() {
            return Err(VmmError::BadImage { path: memory, what: "it lacks what has changed last" });
        }
        let file = OpenOptions::new().read(true).write(true).open(&memory);
        let file = file.map_err(system("opening", &memory))?;
        let state_path = directory.join(name("state", self.state));
        let state = File::open(&state_path).map_err(system("opening", &state_path))?;
        Ok(Restore {
            memory: Arc::new(file),
            state: Arc::new(state),
            memory_path: memory,
            state_path,
            is_own: true,
        })
    }

    /// Space that it takes on the host, in bytes. Blocks.
    pub fn allocated_bytes(&self, directory: &Path) -> u64 {
        // st_blocks counts 512 bytes whatever the filesystem's block is, stat(2).
        let sizes = self.names().into_iter().filter_map(|n| fs::metadata(directory.join(n)).ok());
        sizes.map(|m| m.blocks() * 512).sum()
    }
}

/// What a file of an image is called.
pub(super) fn name(what: &str, generation: u64) -> String {
    format!("{what}-{generation}")
}

/// Removes the files of images that are in none of the generations to keep. Blocks. What cannot be removed
/// is in the way of nothing but space, so that is logged.
pub fn clean(directory: &Path, image: Option<&Image>, base: Option<u64>) {
    let mut keep: Vec<String> = image.map(Image::names).unwrap_or_default();
    keep.extend(base.map(|base| name("memory", base)));
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let is_ours =
            ["memory-", "delta-", "state-", "packed-"].iter().any(|prefix| file.starts_with(prefix));
        if is_ours
            && !keep.contains(&file)
            && let Err(e) = fs::remove_file(entry.path())
        {
            log::warn!("removing {}: {e}", entry.path().display());
        }
    }
}

/// Writes runs of pages to a new file: each as its offset and length, big-endian, and the bytes; in the end a
/// run of no length. `fill` is given what takes a run of at most [`CHUNK`] bytes. On disk when this returns.
pub(super) fn write_delta(
    path: &Path,
    fill: impl FnOnce(&mut dyn FnMut(u64, &[u8]) -> Result<(), VmmError>) -> Result<u64, VmmError>,
) -> Result<u64, VmmError> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let file = file.map_err(system("making", path))?;
    let mut out = BufWriter::with_capacity(CHUNK, &file);
    let (mut behind, mut length) = (WriteBehind::new(&file), 0);
    let mut put = |bytes: &[u8]| {
        out.write_all(bytes).map_err(system("writing", path))?;
        length += bytes.len() as u64;
        behind.written_to(length);
        Ok(())
    };
    put(DELTA_MAGIC)?;
    let bytes = fill(&mut |offset, run| {
        put(&offset.to_be_bytes())?;
        put(&(run.len() as u64).to_be_bytes())?;
        put(run)
    })?;
    put(&[0; 16])?;
    out.flush().map_err(system("writing", path))?;
    drop(out);
    file.sync_all().map_err(system("writing out", path))?;
    Ok(bytes)
}

/// Puts a delta's pages into a memory file, on disk when this returns.
fn apply_delta(delta: &Path, memory: &Path) -> Result<(), VmmError> {
    let bad = |what| VmmError::BadImage { path: delta.to_owned(), what };
    let from = File::open(delta).map_err(system("opening", delta))?;
    let mut from = BufReader::with_capacity(CHUNK, from);
    let to = OpenOptions::new().write(true).open(memory).map_err(system("opening", memory))?;
    let length = to.metadata().map_err(system("examining", memory))?.len();
    let mut magic = [0; 8];
    from.read_exact(&mut magic).map_err(system("reading", delta))?;
    if &magic != DELTA_MAGIC {
        return Err(bad("it is not what changed in a memory"));
    }
    let mut buffer = vec![0; CHUNK];
    for _ in 0..MAX_RUNS {
        let mut head = [0; 16];
        from.read_exact(&mut head).map_err(system("reading", delta))?;
        let field = |at: usize| head[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (offset, count) = (field(0), field(8));
        if count == 0 {
            return to.sync_all().map_err(system("writing out", memory));
        }
        if count > CHUNK as u64 || offset.checked_add(count).is_none_or(|end| end > length) {
            return Err(bad("it has pages outside the memory"));
        }
        let bytes = &mut buffer[..count as usize];
        from.read_exact(bytes).map_err(system("reading", delta))?;
        to.write_all_at(bytes, offset).map_err(system("writing", memory))?;
    }
    Err(bad("it does not end"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("wrenn-image-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("made");
        path
    }

    #[test]
    fn a_delta_is_put_into_the_memory_as_often_as_one_likes() {
        let directory = directory("delta");
        let mut delta = DELTA_MAGIC.to_vec();
        for (offset, byte) in [(4_096u64, 7u8), (12_288, 8)] {
            delta.extend(offset.to_be_bytes());
            delta.extend(4_096u64.to_be_bytes());
            delta.extend([byte; 4_096]);
        }
        let unfinished = delta.clone();
        delta.extend([0; 16]);
        fs::write(directory.join("memory-1"), [1; 16_384]).expect("written");
        fs::write(directory.join("delta-2"), &delta).expect("written");
        fs::write(directory.join("state-2"), b"state").expect("written");
        let image = Image { memory: 1, delta: Some(2), state: 2, packed: false, vmm: Kind::Qemu };
        assert!(matches!(image.open(&directory), Err(VmmError::BadImage { .. })));
        for _ in 0..2 {
            assert_eq!(image.merge(&directory).expect("merged"), Image { delta: None, ..image });
            let memory = fs::read(directory.join("memory-1")).expect("read");
            let expected = [[1; 4_096], [7; 4_096], [1; 4_096], [8; 4_096]].concat();
            assert!(memory == expected);
        }
        let merged = Image { delta: None, ..image };
        clean(&directory, Some(&merged), None);
        assert!(!directory.join("delta-2").exists() && merged.open(&directory).is_ok());
        for bad in [&unfinished[..], &delta[1..], b"", &[&DELTA_MAGIC[..], &[255; 16]].concat()] {
            fs::write(directory.join("delta-2"), bad).expect("written");
            assert!(image.merge(&directory).is_err());
        }
        clean(&directory, None, None);
        assert_eq!(fs::read_dir(&directory).expect("listed").count(), 0);
        fs::remove_dir_all(&directory).expect("removed");
    }
}
