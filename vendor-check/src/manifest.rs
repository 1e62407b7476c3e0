//! `Cargo.toml`: of the workspace and its members, and of crates as their archives have it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::failure::{Class, Finding, Report, Result};
use crate::files;
use crate::lock::CrateId;
use crate::toml::{self, Table, Value};
use crate::version::Requirement;

/// When a dependency is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DependencyKind {
    /// By the crate itself.
    Normal,
    /// By its build script.
    Build,
    /// By its tests.
    Development,
}

/// A dependency as a manifest states it.
#[derive(Clone, Debug)]
pub struct Dependency {
    /// The name by which features call it.
    pub key: String,
    /// The package's name.
    pub package: String,
    /// Which versions fit; `None` for a path.
    pub requirement: Option<Requirement>,
    /// The path below the workspace; `None` for a crate of the registry, and empty for one that
    /// leads out.
    pub path: Option<String>,
    /// Whether a feature turns it on.
    pub optional: bool,
    /// Whether its default features are asked for.
    pub default_features: bool,
    /// The features asked for.
    pub features: BTreeSet<String>,
    /// Its kind.
    pub kind: DependencyKind,
    /// The `cfg(...)` or target triple that it is for.
    pub target: Option<String>,
}

/// What this program needs of a manifest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Name and version.
    pub id: CrateId,
    /// The declared features.
    pub features: BTreeMap<String, Vec<String>>,
    /// The dependencies of all kinds and targets.
    pub dependencies: Vec<Dependency>,
    /// Whether the library is a procedural macro.
    pub proc_macro: bool,
    /// The build script: a path that is stated, or whether Cargo looks for `build.rs`.
    pub build: BuildScript,
    /// The native library that it says it links.
    pub links: Option<String>,
    /// The SPDX expression of its licence.
    pub license: Option<String>,
    /// The file with its licence.
    pub license_file: Option<String>,
    /// The path of the library, if stated.
    pub library: Option<String>,
}

/// The `build` key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildScript {
    /// `build.rs` if there is one.
    Automatic,
    /// None, whatever files there are.
    Off,
    /// This file.
    Stated(String),
}

/// What members inherit from the workspace.
struct Inherited<'a> {
    package: Option<&'a Table>,
    dependencies: Option<&'a Table>,
}

fn table_of<'t>(table: &'t Table, key: &str) -> Option<&'t Table> {
    table.get(key).and_then(Value::as_table)
}

fn texts(value: Option<&Value>) -> Vec<String> {
    value
        .and_then(Value::as_array)
        .unwrap_or_default()
        .iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

/// Reads the manifest of an archive.
///
/// # Errors
/// A finding about `subject`.
pub fn of_archive(text: &str, subject: &str) -> Result<Manifest> {
    let table = parse(text, subject)?;
    read(&table, subject, &Inherited { package: None, dependencies: None }, None)
}

fn parse(text: &str, subject: &str) -> Result<Table> {
    toml::parse(text).map_err(|error| Finding::new(Class::LockMalformed, subject, error.to_string()))
}

/// The workspace: its members' manifests by package name, and their directories.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Manifests by package name.
    pub members: BTreeMap<String, Manifest>,
    /// The directory of each member below the workspace.
    pub directories: BTreeMap<String, String>,
}

/// Reads the manifests of a workspace; what is wrong goes to the report.
///
/// # Errors
/// A finding where there is nothing to go on with.
pub fn of_workspace(root: &Path, report: &mut Report) -> Result<Workspace> {
    let text = files::read_text(&root.join("Cargo.toml"))?;
    let table = parse(&text, "Cargo.toml")?;
    refuse_patches(&table, "Cargo.toml", report);
    let mut workspace = Workspace::default();
    let section = table_of(&table, "workspace");
    let inherited = Inherited {
        package: section.and_then(|section| table_of(section, "package")),
        dependencies: section.and_then(|section| table_of(section, "dependencies")),
    };
    let mut directories = texts(section.and_then(|section| section.get("members")));
    if table.contains_key("package") {
        directories.insert(0, String::new());
    }
    for directory in directories {
        if directory.contains(['*', '?', '[']) || directory.starts_with('/') || directory.contains("..") {
            let reason = format!("the member {directory:?} must be a plain directory below the workspace");
            return Err(Finding::new(Class::LockMalformed, "Cargo.toml", reason));
        }
        let subject =
            if directory.is_empty() { "Cargo.toml".into() } else { format!("{directory}/Cargo.toml") };
        let table = parse(&files::read_text(&root.join(&subject))?, &subject)?;
        refuse_patches(&table, &subject, report);
        let manifest = read(&table, &subject, &inherited, Some(&directory))?;
        let name = manifest.id.name.clone();
        workspace.directories.insert(name.clone(), directory);
        workspace.members.insert(name, manifest);
    }
    for manifest in workspace.members.values() {
        for dependency in &manifest.dependencies {
            let Some(path) = &dependency.path else { continue };
            // The name alone would let another directory of the same name in.
            if workspace.directories.get(&dependency.package) != Some(path) {
                let reason =
                    format!("{} comes from a path that is no member of the workspace", dependency.package);
                report.fail(Class::LockSource, manifest.id.to_string(), reason);
            }
        }
    }
    Ok(workspace)
}

/// A relative path below the workspace, seen from `directory`; `None` where it leads out.
fn join(directory: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = directory.split('/').filter(|part| !part.is_empty()).collect();
    if path.starts_with('/') {
        return None;
    }
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn refuse_patches(table: &Table, subject: &str, report: &mut Report) {
    for key in ["patch", "replace"] {
        if table.contains_key(key) {
            report.fail(Class::Patch, subject, format!("[{key}] puts other code in the place of a crate"));
        }
    }
}

fn read(
    table: &Table,
    subject: &str,
    inherited: &Inherited<'_>,
    directory: Option<&str>,
) -> Result<Manifest> {
    let malformed = |reason: String| Finding::new(Class::LockMalformed, subject, reason);
    let package = table_of(table, "package").ok_or_else(|| malformed("it has no [package]".into()))?;
    let field = |key: &str| -> Option<String> {
        match package.get(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Table(reference) if reference.get("workspace").and_then(Value::as_bool) == Some(true) => {
                Some(inherited.package?.get(key)?.as_str()?.to_owned())
            }
            _ => None,
        }
    };
    let name = field("name").ok_or_else(|| malformed("it has no name".into()))?;
    let version = field("version").unwrap_or_else(|| "0.0.0".into());
    let library = table_of(table, "lib");
    let lib_flag =
        |key: &str| library.and_then(|library| library.get(key)).and_then(Value::as_bool).unwrap_or(false);
    let build = match package.get("build") {
        None => BuildScript::Automatic,
        Some(Value::Boolean(false)) => BuildScript::Off,
        Some(Value::Boolean(true)) => BuildScript::Stated("build.rs".into()),
        Some(Value::String(path)) => BuildScript::Stated(path.clone()),
        Some(_) => return Err(malformed("its build key is not understood".into())),
    };
    let mut dependencies = Vec::new();
    read_dependencies(table, None, subject, inherited, directory, &mut dependencies)?;
    for (target, section) in table_of(table, "target").into_iter().flatten() {
        let section = section.as_table().ok_or_else(|| malformed(format!("target {target} is no table")))?;
        read_dependencies(section, Some(target), subject, inherited, directory, &mut dependencies)?;
    }
    let features = table_of(table, "features")
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.clone(), texts(Some(value))))
        .collect();
    Ok(Manifest {
        id: CrateId { name, version },
        features,
        dependencies,
        proc_macro: lib_flag("proc-macro") || lib_flag("proc_macro"),
        build,
        links: field("links"),
        license: field("license"),
        license_file: field("license-file"),
        library: library.and_then(|library| library.get("path")).and_then(Value::as_str).map(str::to_owned),
    })
}

fn read_dependencies(
    table: &Table,
    target: Option<&String>,
    subject: &str,
    inherited: &Inherited<'_>,
    directory: Option<&str>,
    into: &mut Vec<Dependency>,
) -> Result<()> {
    const SECTIONS: [(&str, DependencyKind); 5] = [
        ("dependencies", DependencyKind::Normal),
        ("build-dependencies", DependencyKind::Build),
        ("build_dependencies", DependencyKind::Build),
        ("dev-dependencies", DependencyKind::Development),
        ("dev_dependencies", DependencyKind::Development),
    ];
    for (section, kind) in SECTIONS {
        for (key, value) in table_of(table, section).into_iter().flatten() {
            let mut dependency = read_dependency(key, value, kind, subject, inherited, directory)?;
            dependency.target = target.cloned();
            into.push(dependency);
        }
    }
    Ok(())
}

fn read_dependency(
    key: &str,
    value: &Value,
    kind: DependencyKind,
    subject: &str,
    inherited: &Inherited<'_>,
    directory: Option<&str>,
) -> Result<Dependency> {
    let malformed =
        |reason: &str| Finding::new(Class::LockMalformed, subject, format!("dependency {key}: {reason}"));
    let empty = Table::new();
    let (version, table) = match value {
        Value::String(version) => (Some(version.as_str()), &empty),
        Value::Table(table) => (table.get("version").and_then(Value::as_str), table),
        _ => return Err(malformed("it is neither text nor table")),
    };
    if table.get("workspace").and_then(Value::as_bool) == Some(true) {
        let base =
            inherited.dependencies.and_then(|all| all.get(key)).ok_or_else(|| malformed("not inherited"))?;
        let nothing = Inherited { package: None, dependencies: None };
        let mut dependency = read_dependency(key, base, kind, subject, &nothing, directory.map(|_| ""))?;
        dependency.features.extend(texts(table.get("features")));
        dependency.optional = table.get("optional").and_then(Value::as_bool).unwrap_or(false);
        if table.get("default-features").and_then(Value::as_bool) == Some(true) {
            dependency.default_features = true;
        }
        return Ok(dependency);
    }
    const OTHER_SOURCES: [&str; 6] = ["git", "branch", "tag", "rev", "registry", "registry-index"];
    if let Some(source) = OTHER_SOURCES.iter().find(|source| table.contains_key(**source)) {
        let reason = format!("dependency {key} names another source ({source})");
        return Err(Finding::new(Class::LockSource, subject, reason));
    }
    const KEYS: [&str; 9] = [
        "version",
        "path",
        "package",
        "features",
        "default-features",
        "default_features",
        "optional",
        "public",
        "base",
    ];
    if let Some(other) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(malformed(&format!("the key {other} is not understood")));
    }
    let path = match (table.get("path"), directory) {
        (None, _) => None,
        (Some(path), Some(directory)) => {
            let path = path.as_str().ok_or_else(|| malformed("its path is no text"))?;
            Some(join(directory, path).unwrap_or_default())
        }
        (Some(_), None) => {
            let reason = format!("dependency {key} of an archive comes from a path");
            return Err(Finding::new(Class::LockSource, subject, reason));
        }
    };
    let requirement = match version {
        _ if path.is_some() => None,
        Some(version) => {
            Some(Requirement::parse(version).ok_or_else(|| malformed("its version is not understood"))?)
        }
        None => return Err(malformed("it has no version")),
    };
    let default_features = table.get("default-features").or_else(|| table.get("default_features"));
    Ok(Dependency {
        key: key.to_owned(),
        package: table.get("package").and_then(Value::as_str).unwrap_or(key).to_owned(),
        requirement,
        path,
        optional: table.get("optional").and_then(Value::as_bool).unwrap_or(false),
        default_features: default_features.and_then(Value::as_bool).unwrap_or(true),
        features: texts(table.get("features")).into_iter().collect(),
        kind,
        target: None,
    })
}
