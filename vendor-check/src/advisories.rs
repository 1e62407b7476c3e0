//! Advisories, from a snapshot on disk: of the RustSec database, in the format of README.md. No
//! snapshot, one that is too old, or one older than the last is a failure, never "clean".

use std::path::Path;

use serde_json::{Value, json};

use crate::date::Date;
use crate::failure::{Class, Finding, Report, Result};
use crate::files;
use crate::json::{self, Object};
use crate::lock::CrateId;
use crate::policy::Policy;
use crate::toml;
use crate::version::{Requirement, Version};

const FILE: &str = "advisories.json";
const CLASS: Class = Class::AdvisoriesMalformed;
/// More than the database will have in this format's life.
const MAX_ADVISORIES: usize = 100_000;

#[derive(Clone, Debug)]
struct Advisory {
    id: String,
    package: String,
    title: String,
    /// "unmaintained", "unsound" or "notice"; a vulnerability has none.
    informational: Option<String>,
    patched: Vec<Requirement>,
    unaffected: Vec<Requirement>,
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    date: Date,
    sequence: u64,
    advisories: Vec<Advisory>,
}

fn requirements(texts: &[String], id: &str) -> Result<Vec<Requirement>> {
    texts
        .iter()
        .map(|text| {
            Requirement::parse(text)
                .ok_or_else(|| Finding::new(CLASS, FILE, format!("{id}: {text:?} is no version range")))
        })
        .collect()
}

impl Snapshot {
    /// Reads a snapshot.
    ///
    /// # Errors
    /// [`Class::AdvisoriesMalformed`] with the place.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let value = json::parse(text, CLASS, FILE)?;
        let mut object = Object::new(&value, CLASS, FILE)?;
        if object.text("format")? != "advisory-snapshot 1" {
            return Err(Finding::new(CLASS, FILE, "its format is not \"advisory-snapshot 1\""));
        }
        object.text("source")?;
        let (date, sequence) = (object.date("date")?, object.number("sequence")?);
        let advisories = object
            .objects("advisories")?
            .into_iter()
            .map(|mut entry| {
                let id = entry.text("id")?;
                let advisory = Advisory {
                    package: entry.text("package")?,
                    title: entry.text("title")?,
                    informational: entry.optional_text("informational")?,
                    patched: requirements(&entry.texts("patched")?, &id)?,
                    unaffected: requirements(&entry.texts("unaffected")?, &id)?,
                    id,
                };
                entry.finish()?;
                Ok(advisory)
            })
            .collect::<Result<Vec<_>>>()?;
        object.finish()?;
        if advisories.is_empty() || advisories.len() > MAX_ADVISORIES {
            return Err(Finding::new(CLASS, FILE, "a snapshot of no advisories is no snapshot"));
        }
        Ok(Self { date, sequence, advisories })
    }

    /// Its day, its sequence number and how many advisories it has.
    pub fn summary(&self) -> (Date, u64, usize) {
        (self.date, self.sequence, self.advisories.len())
    }

    /// Compares the tree with the snapshot as of `today`.
    pub fn check<'a>(
        &self,
        crates: impl Iterator<Item = &'a CrateId>,
        policy: &Policy,
        today: Date,
        report: &mut Report,
    ) {
        let age = today.days_since(self.date);
        if age > policy.advisory_max_age_days as i64 {
            let reason = format!("it is {age} days old, policy.json allows {}", policy.advisory_max_age_days);
            report.fail(Class::AdvisoriesStale, FILE, reason);
        }
        if age < -1 {
            report.fail(Class::AdvisoriesStale, FILE, format!("its date {} is in the future", self.date));
        }
        if self.sequence < policy.advisory_min_sequence {
            let reason = format!(
                "its sequence {} is below {}: a roll-back",
                self.sequence, policy.advisory_min_sequence
            );
            report.fail(Class::AdvisoriesStale, FILE, reason);
        }
        for id in crates {
            let Some(version) = Version::parse(&id.version) else { continue };
            for advisory in self.advisories.iter().filter(|advisory| advisory.package == id.name) {
                let safe =
                    advisory.patched.iter().chain(&advisory.unaffected).any(|range| range.contains(&version));
                if safe {
                    continue;
                }
                let name = id.to_string();
                let text = format!("{}: {}", advisory.id, advisory.title);
                let accepted = policy
                    .accepted_advisories
                    .iter()
                    .any(|one| one.id == advisory.id && one.crate_id == name);
                match advisory.informational.as_deref() {
                    _ if accepted => report.notes.push(format!("{name}: accepted by policy.json: {text}")),
                    Some(kind @ ("unmaintained" | "notice")) => {
                        report.notes.push(format!("{name}: {kind}: {text}"))
                    }
                    _ => report.fail(Class::Vulnerable, name, text),
                }
            }
        }
    }
}

/// Makes a snapshot of a checkout of the RustSec database (its `crates/NAME/*.md` files, TOML in
/// front of the text). Withdrawn advisories are left out.
///
/// # Errors
/// A finding with the file that was not understood.
pub fn import(directory: &Path, source: &str, date: Date, sequence: u64) -> Result<String> {
    let mut advisories = Vec::new();
    for entry in files::walk(&directory.join("crates"), &|_| false)? {
        if !entry.path.ends_with(".md") {
            continue;
        }
        let text = files::read_text(&directory.join("crates").join(&entry.path))?;
        if let Some(advisory) =
            import_one(&text).map_err(|reason| Finding::new(CLASS, &entry.path, reason))?
        {
            advisories.push(advisory);
        }
    }
    advisories.sort_by_key(|advisory| advisory["id"].as_str().unwrap_or_default().to_owned());
    let snapshot = json!({
        "format": "advisory-snapshot 1",
        "source": source,
        "date": date.to_string(),
        "sequence": sequence,
        "advisories": advisories,
    });
    // One advisory a line: a new snapshot is then a diff that a person can read.
    let text = snapshot.to_string().replace("},{\"id\"", "},\n{\"id\"").replace("[{\"id\"", "[\n{\"id\"");
    Snapshot::parse(text.as_bytes())?;
    Ok(text + "\n")
}

fn import_one(text: &str) -> std::result::Result<Option<Value>, String> {
    let (front, body) = text
        .strip_prefix("```toml\n")
        .and_then(|rest| rest.split_once("\n```"))
        .ok_or("it does not begin with a block of TOML")?;
    // Dates are no part of the subset; RustSec quotes them.
    let table = toml::parse(front).map_err(|error| error.to_string())?;
    let section = |key: &str| table.get(key).and_then(toml::Value::as_table);
    let advisory = section("advisory").ok_or("it has no [advisory]")?;
    if advisory.contains_key("withdrawn") {
        return Ok(None);
    }
    let field = |key: &str| advisory.get(key).and_then(toml::Value::as_str);
    let title = body.lines().find_map(|line| line.strip_prefix("# ")).ok_or("it has no title")?;
    let ranges = |key: &str| -> Vec<&str> {
        let list = section("versions").and_then(|versions| versions.get(key)).and_then(toml::Value::as_array);
        list.unwrap_or_default().iter().filter_map(toml::Value::as_str).collect()
    };
    let mut value = json!({
        "id": field("id").ok_or("it has no id")?,
        "package": field("package").ok_or("it has no package")?,
        "title": title.trim(),
        "patched": ranges("patched"),
        "unaffected": ranges("unaffected"),
    });
    if let Some(kind) = field("informational") {
        value["informational"] = json!(kind);
    }
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn import_of_a_rustsec_file() {
        let text = "```toml\n[advisory]\nid = \"RUSTSEC-2024-0001\"\npackage = \"a\"\ndate = \"2024-01-01\"\n\n\
                    [versions]\npatched = [\">= 1.2.3\", \"^0.9.9\"]\n```\n\n# A title\n\ntext\n";
        let value = import_one(text).expect("understood").expect("not withdrawn");
        assert_eq!(value["patched"][1], "^0.9.9");
        assert_eq!(value["title"], "A title");
        let withdrawn = text.replace("date =", "withdrawn = \"2024-02-02\"\ndate =");
        assert_eq!(import_one(&withdrawn), Ok(None));
        assert!(import_one("# no front").is_err());
    }
}
