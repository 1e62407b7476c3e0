//! A `.crate` archive: hashed against the lock, unpacked in memory, its paths held to the rules.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::codec::{gzip, sha256, tar};
use crate::failure::{Class, Finding, Report, Result};
use crate::files::{self, Kind};
use crate::lock::{CrateId, Lock};
use crate::toml;

/// The most that one archive may unpack to. The largest of a big tree are some tens of megabytes.
const MAX_UNPACKED_BYTES: usize = 256 << 20;
/// The file that `vendor/` has beside a crate's own files.
pub const CHECKSUM_FILE: &str = ".cargo-checksum.json";

/// An archive whose hash is the lock's.
#[derive(Clone, Debug)]
pub struct Archive {
    /// The crate.
    pub id: CrateId,
    /// Its SHA-256, as in the lock.
    pub checksum: String,
    unpacked: Vec<u8>,
    files: BTreeMap<String, Range<usize>>,
}

impl Archive {
    /// The files below the crate's directory, sorted by path.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(path, range)| (path.as_str(), &self.unpacked[range.clone()]))
    }

    /// The content of a file.
    pub fn file(&self, path: &str) -> Option<&[u8]> {
        self.files.get(path).map(|range| &self.unpacked[range.clone()])
    }

    /// A UTF-8 file.
    pub fn text(&self, path: &str) -> Option<&str> {
        std::str::from_utf8(self.file(path)?).ok()
    }

    /// The hash of the tree: SHA-256 over a line "SHA-256  path\n" for each file, in byte order of
    /// the paths. `find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum` gives the same in
    /// an unpacked archive (with its hidden files named too).
    pub fn tree_hash(&self) -> String {
        let mut lines = String::new();
        for (path, data) in self.files() {
            lines.push_str(&sha256(data));
            lines.push_str("  ");
            lines.push_str(path);
            lines.push('\n');
        }
        sha256(lines.as_bytes())
    }

    /// The `.cargo-checksum.json` that a true copy of the archive has.
    pub fn checksum_file(&self) -> Vec<u8> {
        let files: BTreeMap<&str, String> = self.files().map(|(path, data)| (path, sha256(data))).collect();
        serde_json::json!({ "files": files, "package": self.checksum }).to_string().into_bytes()
    }

    /// Unpacks the bytes of an archive.
    ///
    /// # Errors
    /// One finding for the first thing that is wrong.
    pub fn unpack(id: &CrateId, checksum: &str, bytes: &[u8]) -> Result<Self> {
        let subject = format!("{}.crate", id.directory());
        let actual = sha256(bytes);
        if actual != checksum {
            let reason = format!("its SHA-256 is {actual}, Cargo.lock says {checksum}: do not use it");
            return Err(Finding::new(Class::ArchiveHash, subject, reason));
        }
        let unpacked = gzip::decompress(bytes, MAX_UNPACKED_BYTES)
            .map_err(|error| Finding::new(Class::ArchiveMalformed, &subject, error.to_string()))?;
        let files = index(&subject, id, &unpacked)?;
        let archive = Self { id: id.clone(), checksum: checksum.to_owned(), unpacked, files };
        archive.check_identity(&subject)?;
        Ok(archive)
    }

    fn check_identity(&self, subject: &str) -> Result<()> {
        let manifest = self
            .text("Cargo.toml")
            .ok_or_else(|| Finding::new(Class::ArchiveIdentity, subject, "it has no readable Cargo.toml"))?;
        let table = toml::parse(manifest).map_err(|error| {
            Finding::new(Class::LockMalformed, format!("{subject}: Cargo.toml"), error.to_string())
        })?;
        let package = table.get("package").and_then(toml::Value::as_table);
        let field = |key: &str| package.and_then(|package| package.get(key)?.as_str()).unwrap_or("nothing");
        if field("name") == self.id.name && field("version") == self.id.version {
            return Ok(());
        }
        let reason = format!("its Cargo.toml says {} {}", field("name"), field("version"));
        Err(Finding::new(Class::ArchiveIdentity, subject, reason))
    }
}

/// Why a path of an archive cannot be let onto a disk.
fn refuse_path(path: &str, directory: &str) -> Option<(Class, &'static str)> {
    if path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Some((Class::EscapingPath, "it leads out of the crate"));
    }
    if path.contains('\\') || path.chars().any(char::is_control) {
        return Some((
            Class::EscapingPath,
            "it has a backslash or control character, which other systems read as a path",
        ));
    }
    match path.split_once('/') {
        Some((first, rest)) if first == directory => {
            if rest.split('/').any(|part| part.is_empty() || part == ".") {
                return Some((Class::EscapingPath, "it has an empty part or '.'"));
            }
            if rest == CHECKSUM_FILE {
                return Some((Class::HiddenPath, "an archive must not bring its own checksum file"));
            }
            None
        }
        _ => Some((Class::EscapingPath, "it is not below the crate's directory")),
    }
}

fn index(subject: &str, id: &CrateId, unpacked: &[u8]) -> Result<BTreeMap<String, Range<usize>>> {
    let entries = tar::entries(unpacked).map_err(|error| {
        let class = match error {
            tar::TarError::Link(_) => Class::Symlink,
            tar::TarError::Special(..) => Class::SpecialFile,
            _ => Class::ArchiveMalformed,
        };
        Finding::new(class, subject, error.to_string())
    })?;
    let directory = id.directory();
    let mut files = BTreeMap::new();
    let mut folded: BTreeMap<String, String> = BTreeMap::new();
    let start = unpacked.as_ptr() as usize;
    for entry in entries {
        if let Some((class, reason)) = refuse_path(&entry.path, &directory) {
            return Err(Finding::new(class, format!("{subject}: {}", entry.path), reason));
        }
        let path = entry.path[directory.len() + 1..].to_owned();
        if let Some(other) = folded.insert(path.to_lowercase(), path.clone()) {
            let (class, reason) = if other == path {
                (Class::ArchiveMalformed, "it is there twice".to_owned())
            } else {
                (Class::CaseCollision, format!("it differs from {other} only in case"))
            };
            return Err(Finding::new(class, format!("{subject}: {path}"), reason));
        }
        let offset = entry.data.as_ptr() as usize - start;
        files.insert(path, offset..offset + entry.data.len());
    }
    // A path that is a file here and a directory there, or two directories that differ in case.
    for path in files.keys() {
        for (slash, _) in path.match_indices('/') {
            let parent = &path[..slash];
            if files.contains_key(parent) {
                let reason = "it is both a file and a directory";
                return Err(Finding::new(Class::ArchiveMalformed, format!("{subject}: {parent}"), reason));
            }
            match folded.insert(parent.to_lowercase(), parent.to_owned()) {
                Some(other) if other != parent => {
                    let reason = format!("it differs from {other} only in case");
                    return Err(Finding::new(Class::CaseCollision, format!("{subject}: {parent}"), reason));
                }
                _ => {}
            }
        }
    }
    Ok(files)
}

/// Loads every archive of the lock from `directory`: a bijection, or findings.
pub fn load_all(directory: &Path, lock: &Lock, report: &mut Report) -> BTreeMap<CrateId, Archive> {
    let Some(paths) = report.take(files::list(directory)) else { return BTreeMap::new() };
    let mut unnamed: BTreeMap<String, &Path> = paths
        .iter()
        .map(|path| (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), path.as_path()))
        .collect();
    let mut jobs = Vec::new();
    for (id, checksum) in lock.external() {
        let name = format!("{}.crate", id.directory());
        match unnamed.remove(&name) {
            Some(path) => jobs.push((id, checksum, path)),
            None => report.fail(
                Class::ArchiveMissing,
                name,
                "Cargo.lock names it, and it is not there: run make vendor",
            ),
        }
    }
    for name in unnamed.into_keys() {
        let class = if name.starts_with('.') { Class::HiddenPath } else { Class::ArchiveExtra };
        report.fail(class, name, "Cargo.lock does not name it");
    }
    let mut archives = BTreeMap::new();
    for result in in_parallel(&jobs, |(id, checksum, path)| load(id, checksum, path)) {
        if let Some(archive) = report.take(result) {
            archives.insert(archive.id.clone(), archive);
        }
    }
    archives
}

fn load(id: &CrateId, checksum: &str, path: &Path) -> Result<Archive> {
    let name = path.display().to_string();
    match files::kind(path)? {
        Kind::File(_) => Archive::unpack(id, checksum, &files::read(path)?),
        Kind::Link => {
            Err(Finding::new(Class::Symlink, name, "an archive must be a file of its own, not a link"))
        }
        _ => Err(Finding::new(Class::SpecialFile, name, "an archive must be a regular file")),
    }
}

/// The most threads that one step uses.
const MAX_THREADS: usize = 8;

/// Runs `work` over all jobs on as many threads as there are processors; results in job order.
pub fn in_parallel<J: Sync, R: Send>(jobs: &[J], work: impl Fn(&J) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let run = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Some(job) = jobs.get(index) else { return done };
                done.push((index, work(job)));
            }
        };
        let workers: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut all = run();
        for worker in workers {
            match worker.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(refuse_path("a-1/src/lib.rs", "a-1"), None);
        assert_eq!(refuse_path("a-1/.gitignore", "a-1"), None);
        for path in
            ["/etc/passwd", "a-1/../b", "../x", "b-1/x", "a-1", "a-1/./x", "a-1//x", "a-1/a\\b", "a-1/\u{1}"]
        {
            assert_eq!(refuse_path(path, "a-1").map(|(class, _)| class), Some(Class::EscapingPath), "{path}");
        }
        assert_eq!(
            refuse_path("a-1/.cargo-checksum.json", "a-1").map(|(class, _)| class),
            Some(Class::HiddenPath)
        );
    }
}
