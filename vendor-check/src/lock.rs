//! `Cargo.lock`, strictly: every package from the one registry with a checksum, or a workspace member.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::codec::is_sha256;
use crate::failure::{Class, Finding, Report};
use crate::toml::{self, Table, Value};
use crate::version::Version;

/// The lock formats that this reader knows.
const FORMATS: std::ops::RangeInclusive<i64> = 3..=4;
/// Far more packages than any tree that a person can audit.
const MAX_PACKAGES: usize = 5000;

/// What names a crate: its name and its exact version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CrateId {
    /// The name.
    pub name: String,
    /// The version as written.
    pub version: String,
}

impl fmt::Display for CrateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

impl CrateId {
    /// The directory in `vendor/` and the stem of the archive's name.
    pub fn directory(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }
}

/// A package of the lock.
#[derive(Clone, Debug)]
pub struct Package {
    /// Its name and version.
    pub id: CrateId,
    /// The SHA-256 of its archive; `None` for a workspace member.
    pub checksum: Option<String>,
    /// What it depends on, over all targets and kinds.
    pub dependencies: Vec<CrateId>,
}

/// The lock: packages by name and version.
#[derive(Clone, Debug, Default)]
pub struct Lock {
    /// All packages, members among them.
    pub packages: BTreeMap<CrateId, Package>,
}

impl Lock {
    /// Those that come from the registry.
    pub fn external(&self) -> impl Iterator<Item = (&CrateId, &str)> {
        self.packages.iter().filter_map(|(id, package)| Some((id, package.checksum.as_deref()?)))
    }
}

/// A name that is safe as a part of a path.
fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
}

fn text_of<'t>(table: &'t Table, key: &str) -> Option<&'t str> {
    table.get(key).and_then(Value::as_str)
}

fn malformed(reason: impl Into<String>) -> Finding {
    Finding::new(Class::LockMalformed, "Cargo.lock", reason)
}

fn top_level(table: &Table, report: &mut Report) {
    for (key, value) in table {
        match key.as_str() {
            "version" if value.as_integer().is_some_and(|version| FORMATS.contains(&version)) => {}
            "version" => report.findings.push(malformed("its format version is not 3 or 4")),
            "package" => {}
            "patch" => report.fail(Class::Patch, "Cargo.lock", "it carries a [patch] table"),
            "replace" => report.fail(Class::Patch, "Cargo.lock", "it carries a [replace] table"),
            _ => report.findings.push(malformed(format!("the key {key} is not understood"))),
        }
    }
    if !table.contains_key("version") {
        report.findings.push(malformed("it has no format version"));
    }
}

/// Reads a lock. `registry` is the one source allowed, `members` the workspace's own packages.
/// What is wrong goes to the report; packages that are wrong are left out.
pub fn read(text: &str, registry: &str, members: &BTreeSet<String>, report: &mut Report) -> Lock {
    let table = match toml::parse(text) {
        Ok(table) => table,
        Err(error) => {
            report.findings.push(malformed(error.to_string()));
            return Lock::default();
        }
    };
    top_level(&table, report);
    let entries = table.get("package").and_then(Value::as_array).unwrap_or_default();
    if entries.len() > MAX_PACKAGES {
        report.findings.push(malformed(format!("it has more than {MAX_PACKAGES} packages")));
        return Lock::default();
    }
    let mut lock = Lock::default();
    let mut wanted: Vec<(CrateId, Vec<String>)> = Vec::new();
    for entry in entries {
        let Some(entry) = entry.as_table() else {
            report.findings.push(malformed("a package is no table"));
            continue;
        };
        let Some((package, dependencies)) = package(entry, registry, members, report) else { continue };
        wanted.push((package.id.clone(), dependencies));
        let id = package.id.clone();
        if lock.packages.insert(id.clone(), package).is_some() {
            report.findings.push(malformed(format!("{id} is there twice")));
        }
    }
    // A package that was refused is missing here too, which is nothing new.
    let refused = !report.findings.is_empty();
    for (id, dependencies) in wanted {
        for dependency in dependencies {
            match resolve(&lock, &dependency) {
                Some(found) => {
                    if let Some(package) = lock.packages.get_mut(&id) {
                        package.dependencies.push(found);
                    }
                }
                None if refused => {}
                None => report
                    .findings
                    .push(malformed(format!("{id} depends on {dependency}, which is not there"))),
            }
        }
    }
    lock
}

fn package(
    entry: &Table,
    registry: &str,
    members: &BTreeSet<String>,
    report: &mut Report,
) -> Option<(Package, Vec<String>)> {
    const KEYS: [&str; 6] = ["name", "version", "source", "checksum", "dependencies", "replace"];
    let (Some(name), Some(version)) = (text_of(entry, "name"), text_of(entry, "version")) else {
        report.findings.push(malformed("a package has no name or version"));
        return None;
    };
    if !valid_name(name) || Version::parse(version).is_none() {
        report.findings.push(malformed(format!("{name:?} {version:?} is no name and version")));
        return None;
    }
    let id = CrateId { name: name.to_owned(), version: version.to_owned() };
    if let Some(key) = entry.keys().find(|key| !KEYS.contains(&key.as_str())) {
        report.findings.push(malformed(format!("{id}: the key {key} is not understood")));
    }
    if entry.contains_key("replace") {
        report.fail(
            Class::Patch,
            id.to_string(),
            "Cargo.lock says that [replace] puts another package in its place",
        );
    }
    let checksum = text_of(entry, "checksum");
    let checksum = match text_of(entry, "source") {
        None if members.contains(name) && !entry.contains_key("checksum") => None,
        None => {
            let reason = "Cargo.lock has it without a source (a path), and it is no member of the workspace";
            report.fail(Class::LockSource, id.to_string(), reason);
            return None;
        }
        Some(source) if source != registry => {
            report.fail(Class::LockSource, id.to_string(), format!("its source is {source}, not {registry}"));
            return None;
        }
        Some(_) => match checksum {
            Some(checksum) if is_sha256(checksum) => Some(checksum.to_owned()),
            Some(_) => {
                report.fail(Class::LockChecksum, id.to_string(), "its checksum in Cargo.lock is no SHA-256");
                return None;
            }
            None => {
                report.fail(Class::LockChecksum, id.to_string(), "it has no checksum in Cargo.lock");
                return None;
            }
        },
    };
    let mut dependencies = Vec::new();
    for dependency in entry.get("dependencies").and_then(Value::as_array).unwrap_or_default() {
        match dependency.as_str() {
            Some(dependency) => dependencies.push(dependency.to_owned()),
            None => report.findings.push(malformed(format!("{id}: a dependency is no text"))),
        }
    }
    Some((Package { id, checksum, dependencies: Vec::new() }, dependencies))
}

/// "name", "name version" or "name version (source)": the shortest form that is unambiguous.
fn resolve(lock: &Lock, dependency: &str) -> Option<CrateId> {
    let mut words = dependency.split(' ');
    let name = words.next()?;
    let version = words.next();
    let mut candidates = lock
        .packages
        .keys()
        .filter(|id| id.name == name && version.is_none_or(|version| version == id.version));
    let found = candidates.next()?;
    if candidates.next().is_none() { Some(found.clone()) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTRY: &str = "registry+test";

    fn run(packages: &str) -> (Lock, Vec<Class>) {
        let mut report = Report::default();
        let members = BTreeSet::from(["member".to_owned()]);
        let lock = read(&format!("version = 4\n{packages}"), REGISTRY, &members, &mut report);
        (lock, report.findings.iter().map(|finding| finding.class).collect())
    }

    fn crate_entry(name: &str, rest: &str) -> String {
        format!("[[package]]\nname = \"{name}\"\nversion = \"1.0.0\"\n{rest}\n")
    }

    #[test]
    fn members_and_crates() {
        let sum = "a".repeat(64);
        let text = crate_entry("member", "dependencies = [\"a\"]")
            + &crate_entry("a", &format!("source = \"{REGISTRY}\"\nchecksum = \"{sum}\""));
        let (lock, classes) = run(&text);
        assert_eq!(classes, []);
        assert_eq!(lock.external().count(), 1);
        let member = lock.packages.values().find(|package| package.checksum.is_none()).expect("member");
        assert_eq!(member.dependencies[0].to_string(), "a 1.0.0");
    }

    #[test]
    fn refusals() {
        let sum = "a".repeat(64);
        for (entry, class) in [
            (crate_entry("a", "source = \"git+x\""), Class::LockSource),
            (crate_entry("a", ""), Class::LockSource),
            (crate_entry("a", &format!("source = \"{REGISTRY}\"")), Class::LockChecksum),
            (crate_entry("a", &format!("source = \"{REGISTRY}\"\nchecksum = \"null\"")), Class::LockChecksum),
            (crate_entry("member", "replace = \"x\""), Class::Patch),
            (crate_entry("member", "dependencies = [\"nowhere\"]"), Class::LockMalformed),
            (
                crate_entry("../a", &format!("source = \"{REGISTRY}\"\nchecksum = \"{sum}\"")),
                Class::LockMalformed,
            ),
            (crate_entry("member", "extra = 1"), Class::LockMalformed),
            ("[[patch.unused]]\nname = \"x\"\n".to_owned(), Class::Patch),
            ("[metadata]\n\"checksum a\" = \"<none>\"\n".to_owned(), Class::LockMalformed),
            (crate_entry("member", "") + &crate_entry("member", ""), Class::LockMalformed),
        ] {
            assert_eq!(run(&entry).1, [class], "{entry}");
        }
    }
}
