//! `vendor/` against the archives: made from them, and compared with them byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::archive::{Archive, CHECKSUM_FILE, in_parallel};
use crate::codec::sha256;
use crate::failure::{Class, Finding, Report, Result};
use crate::files::{self, Kind, io_error};
use crate::lock::CrateId;

/// Writes `vendor/` anew from the archives: beside the old one, which it then replaces.
///
/// # Errors
/// [`Class::Io`] with the path.
pub fn write(directory: &Path, archives: &BTreeMap<CrateId, Archive>) -> Result<()> {
    let fresh = directory.with_extension(format!("new-{}", std::process::id()));
    remove(&fresh)?;
    for (id, archive) in archives {
        let root = fresh.join(id.directory());
        let checksums = archive.checksum_file();
        for (path, data) in archive.files().chain([(CHECKSUM_FILE, &checksums[..])]) {
            let path = root.join(path);
            let parent = path.parent().unwrap_or(&root);
            fs::create_dir_all(parent).map_err(|error| io_error("make the directory", parent, &error))?;
            fs::write(&path, data).map_err(|error| io_error("write it", &path, &error))?;
        }
    }
    remove(directory)?;
    fs::rename(&fresh, directory).map_err(|error| io_error("put the new one in its place", directory, &error))
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io_error("remove the old one", directory, &error))
        }
        _ => Ok(()),
    }
}

/// Compares `vendor/` with the archives: the same crates, the same files, the same bytes.
pub fn compare(directory: &Path, archives: &BTreeMap<CrateId, Archive>, report: &mut Report) {
    let Some(paths) = report.take(files::list(directory)) else { return };
    let mut wanted: BTreeMap<String, &Archive> =
        archives.values().map(|archive| (archive.id.directory(), archive)).collect();
    let mut jobs = Vec::new();
    for path in &paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let subject = format!("vendor/{name}");
        let Some(kind) = report.take(files::kind(path)) else { continue };
        match (kind, wanted.remove(&name)) {
            (Kind::Directory, Some(archive)) => jobs.push((path.as_path(), archive)),
            (Kind::Link, _) => {
                report.fail(Class::Symlink, subject, "a link where a crate's directory should be")
            }
            (Kind::Special(what), _) => report.fail(Class::SpecialFile, subject, format!("it is a {what}")),
            (Kind::File(_), Some(_)) => {
                report.fail(Class::CrateMissing, subject, "it is a file, not a directory")
            }
            (_, None) if name.starts_with('.') => {
                report.fail(
                    Class::HiddenPath,
                    subject,
                    "Cargo passes over it, a reader would too: remove it",
                );
            }
            (_, None) => report.fail(Class::CrateExtra, subject, "Cargo.lock does not name it"),
        }
    }
    for name in wanted.into_keys() {
        report.fail(Class::CrateMissing, format!("vendor/{name}"), "Cargo.lock names it: run make vendor");
    }
    for findings in in_parallel(&jobs, |(path, archive)| compare_crate(path, archive)) {
        report.findings.extend(findings);
    }
}

fn hidden(path: &str) -> bool {
    path.split('/').any(|part| part.starts_with('.'))
}

fn compare_crate(root: &Path, archive: &Archive) -> Vec<Finding> {
    let mut report = Report::default();
    let crate_name = format!("vendor/{}", archive.id.directory());
    let Some(entries) = report.take(files::walk(root, &|_| false)) else { return report.findings };
    let mut missing: BTreeSet<&str> = archive.files().map(|(path, _)| path).collect();
    let directories: BTreeSet<&str> = archive
        .files()
        .flat_map(|(path, _)| path.match_indices('/').map(move |(slash, _)| &path[..slash]))
        .collect();
    let folded: BTreeMap<String, &str> =
        missing.iter().chain(&directories).map(|path| (path.to_lowercase(), *path)).collect();
    for entry in &entries {
        let path = entry.path.as_str();
        let subject = format!("{crate_name}/{path}");
        let listed = archive.file(path).is_some() || directories.contains(path);
        if let Some(other) = folded.get(&path.to_lowercase()).filter(|_| !listed) {
            report.fail(Class::CaseCollision, subject, format!("it differs from {other} only in case"));
            continue;
        }
        match entry.kind {
            Kind::Directory if directories.contains(path) => {}
            Kind::Directory if hidden(path) => {
                report.fail(Class::HiddenPath, subject, "a hidden directory that the archive does not have");
            }
            Kind::Directory => {
                report.fail(Class::FileExtra, subject, "a directory that the archive does not have")
            }
            Kind::Link => {
                missing.remove(path);
                let target = fs::read_link(root.join(path));
                let reason = match &target {
                    Ok(target) => format!("it is a symbolic link to {}", target.display()),
                    Err(_) => "it is a hard link: the file can be changed by another name".to_owned(),
                };
                let class = if target.is_ok_and(|target| escapes(path, &target)) {
                    Class::EscapingPath
                } else {
                    Class::Symlink
                };
                report.fail(class, subject, reason);
            }
            Kind::Special(what) => {
                missing.remove(path);
                report.fail(Class::SpecialFile, subject, format!("it is a {what}"));
            }
            Kind::File(_) if path == CHECKSUM_FILE => {
                report.findings.extend(check_checksum_file(&root.join(path), &subject, archive));
            }
            Kind::File(length) => {
                missing.remove(path);
                match archive.file(path) {
                    Some(data) => {
                        let same = data.len() as u64 == length
                            && report.take(files::read(&root.join(path))).is_none_or(|found| found == data);
                        if !same {
                            let reason =
                                format!("it differs from the archive (SHA-256 there {})", sha256(data));
                            report.fail(Class::FileModified, subject, reason);
                        }
                    }
                    None if hidden(path) => {
                        report.fail(
                            Class::HiddenPath,
                            subject,
                            "a hidden file that the archive does not have",
                        );
                    }
                    None => report.fail(Class::FileExtra, subject, extra_reason(path)),
                }
            }
        }
    }
    if !entries.iter().any(|entry| entry.path == CHECKSUM_FILE) {
        report.fail(Class::ChecksumEmpty, format!("{crate_name}/{CHECKSUM_FILE}"), "it is missing");
    }
    for path in missing {
        report.fail(
            Class::FileMissing,
            format!("{crate_name}/{path}"),
            "the archive has it: run make vendor",
        );
    }
    report.findings
}

/// Whether a link at `path` (below its crate) leads out of the crate.
fn escapes(path: &str, target: &Path) -> bool {
    let mut depth = path.matches('/').count() as i64;
    for part in target.components() {
        match part {
            std::path::Component::Normal(_) => depth += 1,
            std::path::Component::ParentDir => depth -= 1,
            std::path::Component::CurDir => {}
            _ => return true,
        }
        if depth < 0 {
            return true;
        }
    }
    false
}

fn extra_reason(path: &str) -> &'static str {
    if path == "build.rs" {
        "the archive does not have it, and Cargo would compile and run it"
    } else {
        "the archive does not have it"
    }
}

fn check_checksum_file(path: &Path, subject: &str, archive: &Archive) -> Vec<Finding> {
    let finding = |class, reason: String| vec![Finding::new(class, subject, reason)];
    let bytes = match files::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return vec![error],
    };
    let Ok(Value::Object(declared)) = serde_json::from_slice::<Value>(&bytes) else {
        return finding(Class::ChecksumFiles, "it is no JSON object".into());
    };
    if let Some(key) = declared.keys().find(|key| !matches!(key.as_str(), "files" | "package")) {
        return finding(Class::ChecksumFiles, format!("the key {key} is not understood"));
    }
    match declared.get("package").and_then(Value::as_str) {
        Some(package) if package == archive.checksum => {}
        other => {
            let reason =
                format!("it declares package {}, Cargo.lock {}", other.unwrap_or("null"), archive.checksum);
            return finding(Class::ChecksumPackage, reason);
        }
    }
    let files = match declared.get("files").and_then(Value::as_object) {
        Some(files) if !files.is_empty() => files,
        _ => {
            return finding(Class::ChecksumEmpty, "its files map is empty: Cargo would check no file".into());
        }
    };
    let mut findings = Vec::new();
    for (path, data) in archive.files() {
        match files.get(path).and_then(Value::as_str) {
            Some(declared) if declared == sha256(data) => {}
            Some(_) => {
                findings.extend(finding(Class::ChecksumFiles, format!("it gives {path} another hash")))
            }
            None => findings.extend(finding(Class::ChecksumFiles, format!("it does not list {path}"))),
        }
    }
    for path in files.keys().filter(|path| archive.file(path).is_none()) {
        findings.extend(finding(
            Class::ChecksumFiles,
            format!("it lists {path}, which the archive does not have"),
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_escape() {
        assert!(escapes("a", Path::new("/etc/passwd")));
        assert!(escapes("src/a", Path::new("../../x")));
        assert!(!escapes("src/a", Path::new("../b")));
        assert!(!escapes("a", Path::new("b")));
    }
}
