//! The list of crates inside a binary: the `.dep-v0` section of cargo-auditable (zlib over JSON),
//! written into a built binary and compared with the lock.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::codec::zlib;
use crate::elf;
use crate::failure::{Class, Finding, Result};
use crate::lock::{CrateId, Lock};
use crate::resolve::Graph;

/// The section's name (cargo-auditable, PARSING.md).
pub const SECTION: &str = ".dep-v0";
/// The largest list that is unpacked, as cargo-auditable's own reader has it.
const MAX_LIST_BYTES: usize = 8 << 20;

/// The list of a binary as JSON: packages sorted, dependencies by their place in the list.
pub fn list(graph: &Graph, lock: &Lock) -> Value {
    let crates = graph.crates();
    let places: BTreeMap<&CrateId, usize> =
        crates.keys().enumerate().map(|(place, id)| (*id, place)).collect();
    let packages: Vec<Value> = crates
        .iter()
        .map(|(id, build_only)| {
            let local = lock.packages.get(*id).is_none_or(|package| package.checksum.is_none());
            let mut package = json!({
                "name": id.name,
                "version": id.version,
                "source": if local { "local" } else { "crates.io" },
            });
            if *build_only {
                package["kind"] = json!("build");
            }
            let dependencies: BTreeSet<usize> =
                graph.dependencies(id).into_iter().filter_map(|id| places.get(id).copied()).collect();
            if !dependencies.is_empty() {
                package["dependencies"] = json!(dependencies);
            }
            if **id == graph.root {
                package["root"] = json!(true);
            }
            package
        })
        .collect();
    json!({ "packages": packages })
}

/// A binary with its list inside.
///
/// # Errors
/// [`Class::BinaryMalformed`].
pub fn embed(binary: &[u8], list: &Value, subject: &str) -> Result<Vec<u8>> {
    let data = zlib::compress_stored(list.to_string().as_bytes());
    elf::add_section(binary, SECTION, &data)
        .map_err(|error| Finding::new(Class::BinaryMalformed, subject, error.to_string()))
}

/// The list in a binary, whichever tool wrote it.
///
/// # Errors
/// [`Class::BinaryMalformed`] or [`Class::BinaryUnlisted`].
pub fn extract(binary: &[u8], subject: &str) -> Result<Value> {
    let malformed = |reason: String| Finding::new(Class::BinaryMalformed, subject, reason);
    let section = elf::section(binary, SECTION)
        .map_err(|error| malformed(error.to_string()))?
        .ok_or_else(|| Finding::new(Class::BinaryUnlisted, subject, "it has no dependency list (.dep-v0)"))?;
    let text = zlib::decompress(section, MAX_LIST_BYTES).map_err(|error| malformed(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
}

/// A package of a list: name, version, source and whether only the build runs it.
type Row = (String, String, String, bool);

fn rows(list: &Value, subject: &str) -> Result<BTreeSet<Row>> {
    let malformed =
        || Finding::new(Class::BinaryMalformed, subject, "its list is not of cargo-auditable's form");
    let packages = list.get("packages").and_then(Value::as_array).ok_or_else(malformed)?;
    packages
        .iter()
        .map(|package| {
            let text =
                |key: &str| package.get(key).and_then(Value::as_str).map(str::to_owned).ok_or_else(malformed);
            let build = package.get("kind").and_then(Value::as_str) == Some("build");
            Ok((text("name")?, text("version")?, text("source")?, build))
        })
        .collect()
}

/// What differs between a binary's list and the one that the lock gives.
///
/// # Errors
/// [`Class::BinaryMalformed`] for a list that cannot be read.
pub fn compare(found: &Value, expected: &Value, subject: &str) -> Result<Vec<Finding>> {
    let (found, expected) = (rows(found, subject)?, rows(expected, subject)?);
    let describe = |(name, version, source, build): &Row| {
        format!("{name} {version} ({source}{})", if *build { ", build" } else { "" })
    };
    let more = found
        .difference(&expected)
        .map(|row| format!("it lists {}, Cargo.lock does not give that", describe(row)));
    let less = expected.difference(&found).map(|row| format!("it does not list {}", describe(row)));
    Ok(more.chain(less).map(|reason| Finding::new(Class::BinaryMismatch, subject, reason)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_compared_as_sets() {
        let a = json!({"packages": [{"name": "a", "version": "1.0.0", "source": "local", "root": true},
                                    {"name": "b", "version": "1.0.0", "source": "crates.io", "kind": "build"}]});
        let mut b = a.clone();
        assert_eq!(compare(&a, &b, "x"), Ok(vec![]));
        b["packages"][1]["version"] = json!("1.0.1");
        assert_eq!(compare(&a, &b, "x").map(|findings| findings.len()), Ok(2));
        assert!(compare(&json!({}), &b, "x").is_err());
    }
}
