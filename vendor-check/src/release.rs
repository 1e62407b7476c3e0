//! The release manifest: every file of a release with size and hash, the inputs, and an
//! HMAC-SHA-256 over all of it. The key is a file that only its owner can read.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::codec::{hex, sha256};
use crate::failure::{Class, Finding, Report, Result};
use crate::files::{self, Kind};
use crate::json::{self, Object};

/// The manifest in a release's directory.
pub const MANIFEST: &str = "release.json";
/// Its signature, in hexadecimal.
pub const SIGNATURE: &str = "release.json.hmac";
/// Separates this use of a key from any other.
const DOMAIN: &[u8] = b"wrenn release manifest v1\n";
/// A key is at least as long as the hash (RFC 2104, 3), and no file full of something else.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 32..=4096;
const BLOCK_BYTES: usize = 64;
const CLASS: Class = Class::ReleaseMalformed;

/// HMAC-SHA-256 (RFC 2104) over parts.
fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut block = [0u8; BLOCK_BYTES];
    if key.len() > BLOCK_BYTES {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let mut inner = Sha256::new();
    inner.update(block.map(|byte| byte ^ 0x36));
    for part in parts {
        inner.update(part);
    }
    let mut outer = Sha256::new();
    outer.update(block.map(|byte| byte ^ 0x5c));
    outer.update(inner.finalize());
    outer.finalize().into()
}

/// Compares without stopping at the first difference.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// Reads a key file: regular, mode 0600 or less, at least 32 bytes; white space at its end is no
/// part of the key.
///
/// # Errors
/// [`Class::KeyFile`].
pub fn read_key(path: &Path) -> Result<Vec<u8>> {
    let subject = path.display().to_string();
    let refuse = |reason: String| Finding::new(Class::KeyFile, &subject, reason);
    let metadata =
        path.symlink_metadata().map_err(|error| refuse(format!("cannot read the key: {error}")))?;
    if !metadata.is_file() {
        return Err(refuse("it is no regular file".into()));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(refuse(format!(
            "its mode is {:o}: others can reach it; chmod 600",
            metadata.mode() & 0o777
        )));
    }
    let bytes = files::read(path).map_err(|finding| refuse(finding.reason))?;
    let key = bytes.trim_ascii_end();
    if KEY_BYTES.contains(&key.len()) {
        Ok(key.to_vec())
    } else {
        Err(refuse("the key must have 32 to 4096 bytes".into()))
    }
}

fn signature(key: &[u8], manifest: &[u8]) -> String {
    hex(&hmac(key, &[DOMAIN, manifest]))
}

/// The files of a release, with size and hash.
fn contents(directory: &Path, report: &mut Report) -> BTreeMap<String, (u64, String)> {
    let mut files = BTreeMap::new();
    for entry in report.take(files::walk(directory, &|_| false)).unwrap_or_default() {
        if matches!(entry.path.as_str(), MANIFEST | SIGNATURE) {
            continue;
        }
        match entry.kind {
            Kind::Directory => {}
            Kind::File(length) => {
                if let Some(bytes) = report.take(files::read(&directory.join(&entry.path))) {
                    files.insert(entry.path, (length, sha256(&bytes)));
                }
            }
            Kind::Link => report.fail(Class::Symlink, entry.path, "a release has no links"),
            Kind::Special(what) => {
                report.fail(Class::SpecialFile, entry.path, format!("a release has no {what}"))
            }
        }
    }
    files
}

/// Writes and signs the manifest of a release's directory.
pub fn sign(directory: &Path, key: &[u8], version: &str, inputs: &[(String, String)], report: &mut Report) {
    let files = contents(directory, report);
    if !report.findings.is_empty() {
        return;
    }
    let files: Vec<Value> = files
        .iter()
        .map(|(path, (size, hash))| json!({ "path": path, "size_bytes": size, "sha256": hash }))
        .collect();
    let inputs: Vec<Value> =
        inputs.iter().map(|(name, hash)| json!({ "name": name, "sha256": hash })).collect();
    let manifest = json!({ "format": 1, "version": version, "files": files, "inputs": inputs });
    let mut text = serde_json::to_string_pretty(&manifest).unwrap_or_default();
    text.push('\n');
    report.take(files::write(&directory.join(MANIFEST), text.as_bytes()));
    let line = signature(key, text.as_bytes()) + "\n";
    report.take(files::write(&directory.join(SIGNATURE), line.as_bytes()));
    report.facts.insert("files".into(), json!(files.len()));
}

/// Verifies a release's directory: first the signature, then every file, then that there is no other.
pub fn verify(directory: &Path, key: &[u8], report: &mut Report) {
    let Some(text) = report.take(files::read(&directory.join(MANIFEST))) else { return };
    let Some(signed) = report.take(files::read(&directory.join(SIGNATURE))) else { return };
    if !same(signature(key, &text).as_bytes(), signed.trim_ascii()) {
        report.fail(Class::Signature, MANIFEST, "the signature does not fit: another key, or it was changed");
        return;
    }
    let Some(mut wanted) = report.take(parse(&text)) else { return };
    report.facts.insert("files".into(), json!(wanted.len()));
    for (path, (size, hash)) in contents(directory, report) {
        match wanted.remove(&path) {
            Some(entry) if entry == (size, hash.clone()) => {}
            Some((_, wanted)) => {
                report.fail(
                    Class::ReleaseFile,
                    path,
                    format!("its SHA-256 is {hash}, the manifest says {wanted}"),
                );
            }
            None => report.fail(Class::ReleaseExtra, path, "the manifest does not name it"),
        }
    }
    for path in wanted.into_keys() {
        report.fail(Class::ReleaseFile, path, "the manifest names it, and it is not there");
    }
}

fn parse(text: &[u8]) -> Result<BTreeMap<String, (u64, String)>> {
    let value = json::parse(text, CLASS, MANIFEST)?;
    let mut object = Object::new(&value, CLASS, MANIFEST)?;
    if object.number("format")? != 1 {
        return Err(Finding::new(CLASS, MANIFEST, "its format is not 1"));
    }
    object.text("version")?;
    let mut files = BTreeMap::new();
    for mut entry in object.objects("files")? {
        files.insert(entry.text("path")?, (entry.number("size_bytes")?, entry.sha256("sha256")?));
        entry.finish()?;
    }
    object.list("inputs")?;
    object.finish()?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hmac_of_rfc_4231() {
        // Test cases 1 and 6.
        assert_eq!(
            hex(&hmac(&[0x0b; 20], &[b"Hi ", b"There"])),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        );
        assert_eq!(
            hex(&hmac(&[0xaa; 131], &[b"Test Using Larger Than Block-Size Key - Hash Key First"])),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn comparison() {
        assert!(same(b"ab", b"ab"));
        assert!(!same(b"ab", b"ac"));
        assert!(!same(b"ab", b"abc"));
    }
}
