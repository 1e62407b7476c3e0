//! What is in a release besides Rust: kernel, initramfs, root file system, virtual machine monitor,
//! toolchain. `inputs.json` has each with version, hash and known-bad list.

use std::path::Path;

use crate::codec::sha256;
use crate::failure::{Class, Finding, Report, Result};
use crate::files;
use crate::json::{self, Object};

const FILE: &str = "inputs.json";
const CLASS: Class = Class::InputsMalformed;

/// A version or hash that must not be used.
#[derive(Clone, Debug)]
struct KnownBad {
    version: Option<String>,
    sha256: Option<String>,
    reason: String,
}

/// An input.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its name, the only one of that name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Where it is, below the release's directory.
    pub path: String,
    /// Its pinned SHA-256; `None` for what the operator brings, whose hash the release manifest has.
    pub sha256: Option<String>,
    /// Whether a release without it is incomplete.
    pub required: bool,
    known_bad: Vec<KnownBad>,
}

/// Reads the file.
///
/// # Errors
/// [`Class::InputsMalformed`] with the place.
pub fn parse(text: &[u8]) -> Result<Vec<Input>> {
    let value = json::parse(text, CLASS, FILE)?;
    let mut object = Object::new(&value, CLASS, FILE)?;
    if object.number("format")? != 1 {
        return Err(Finding::new(CLASS, FILE, "its format is not 1"));
    }
    let mut inputs: Vec<Input> = Vec::new();
    for mut entry in object.objects("inputs")? {
        let known_bad = entry
            .objects("known_bad")?
            .into_iter()
            .map(|mut bad| {
                let sha256 =
                    if bad.optional("sha256").is_some() { Some(bad.sha256("sha256")?) } else { None };
                let known =
                    KnownBad { version: bad.optional_text("version")?, sha256, reason: bad.text("reason")? };
                bad.finish()?;
                if known.version.is_none() && known.sha256.is_none() {
                    return Err(Finding::new(CLASS, FILE, "a known-bad entry needs a version or a hash"));
                }
                Ok(known)
            })
            .collect::<Result<_>>()?;
        let sha256 = if entry.optional("sha256").is_some() { Some(entry.sha256("sha256")?) } else { None };
        let input = Input {
            name: entry.text("name")?,
            version: entry.text("version")?,
            path: entry.text("path")?,
            sha256,
            required: entry.boolean("required")?,
            known_bad,
        };
        entry.text("source")?;
        entry.finish()?;
        if input.path.starts_with('/') || input.path.split('/').any(|part| part == "..") {
            return Err(Finding::new(
                CLASS,
                FILE,
                format!("{}: its path leads out of the release", input.name),
            ));
        }
        if inputs.iter().any(|other| other.name == input.name) {
            return Err(Finding::new(CLASS, FILE, format!("{} is there twice", input.name)));
        }
        inputs.push(input);
    }
    object.finish()?;
    Ok(inputs)
}

/// Checks the inputs below `directory`; gives "name version" and hash of those that are there.
pub fn check(inputs: &[Input], directory: &Path, report: &mut Report) -> Vec<(String, String)> {
    let mut present = Vec::new();
    for input in inputs {
        let subject = format!("{} ({})", input.name, input.path);
        let path = directory.join(&input.path);
        let found = if path.symlink_metadata().is_ok() { report.take(files::read(&path)) } else { None };
        let hash = found.map(|bytes| sha256(&bytes));
        let bad = input.known_bad.iter().find(|bad| {
            let of_hash = bad.sha256.is_some() && bad.sha256 == hash;
            of_hash || bad.version.as_deref() == Some(input.version.as_str())
        });
        if let Some(bad) = bad {
            report.fail(
                Class::InputKnownBad,
                &subject,
                format!("{} is known to be bad: {}", input.version, bad.reason),
            );
        }
        match (&hash, &input.sha256) {
            (None, _) if input.required => report.fail(Class::InputMissing, subject, "it is not there"),
            (None, _) => report.notes.push(format!("{subject}: not in this release; the operator brings it")),
            (Some(found), Some(pinned)) if found != pinned => {
                report.fail(Class::InputHash, subject, format!("its SHA-256 is {found}, pinned {pinned}"));
            }
            (Some(found), _) => present.push((format!("{} {}", input.name, input.version), found.clone())),
        }
    }
    present
}
