//! What is compiled into a binary: Cargo's second feature resolver, over the lock and the manifests.
//!
//! Build scripts and procedural macros run on the build machine, so features that they need of a
//! crate do not reach the same crate in the program, and the other way round.

use std::collections::{BTreeMap, BTreeSet};

use crate::failure::{Class, Finding, Result};
use crate::lock::{CrateId, Lock};
use crate::manifest::{BuildScript, Dependency, DependencyKind, Manifest};
use crate::target::Target;
use crate::version::Version;

/// Rounds after which the fixed point must be reached: each adds a feature or a crate.
const MAX_ROUNDS: usize = 10_000;

/// Where a crate runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// In the program.
    Program,
    /// On the machine that builds it.
    Build,
}

/// A compiled crate and its edges.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// The features that are on.
    pub features: BTreeSet<String>,
    /// What it depends on.
    pub dependencies: BTreeSet<(CrateId, Side)>,
}

/// The crates of one binary.
#[derive(Clone, Debug)]
pub struct Graph {
    /// The package that makes the binary.
    pub root: CrateId,
    /// Every crate that is compiled for it, the root included.
    pub nodes: BTreeMap<(CrateId, Side), Node>,
}

impl Graph {
    /// The crates of the graph, once each; true for those that only the build runs.
    pub fn crates(&self) -> BTreeMap<&CrateId, bool> {
        let mut crates = BTreeMap::new();
        for (id, side) in self.nodes.keys() {
            let build_only = crates.entry(id).or_insert(true);
            *build_only &= *side == Side::Build;
        }
        crates
    }

    /// The crates that a crate depends on, on either side.
    pub fn dependencies(&self, id: &CrateId) -> BTreeSet<&CrateId> {
        [Side::Program, Side::Build]
            .iter()
            .filter_map(|side| self.nodes.get(&(id.clone(), *side)))
            .flat_map(|node| node.dependencies.iter().map(|(id, _)| id))
            .collect()
    }
}

/// What the resolver reads.
pub struct Inputs<'a> {
    /// The lock.
    pub lock: &'a Lock,
    /// The manifest of every package of the lock.
    pub manifests: &'a BTreeMap<CrateId, Manifest>,
    /// Crates whose archive has a `build.rs`.
    pub with_build_rs: &'a BTreeSet<CrateId>,
}

/// Resolves what is compiled for `root` with its default and these features on `target`. Without a target, every platform's crates.
///
/// # Errors
/// A finding where lock and manifests do not fit.
pub fn resolve(
    root: &CrateId,
    features: &BTreeSet<String>,
    target: Option<&Target>,
    inputs: &Inputs<'_>,
) -> Result<Graph> {
    let mut graph = Graph { root: root.clone(), nodes: BTreeMap::new() };
    let mut features = features.clone();
    features.insert("default".to_owned());
    graph.nodes.insert((root.clone(), Side::Program), Node { features, ..Node::default() });
    for _ in 0..MAX_ROUNDS {
        let before: usize =
            graph.nodes.values().map(|node| 1 + node.features.len() + node.dependencies.len()).sum();
        for (id, side) in graph.nodes.keys().cloned().collect::<Vec<_>>() {
            expand(&mut graph, &id, side, target, inputs)?;
        }
        let after: usize =
            graph.nodes.values().map(|node| 1 + node.features.len() + node.dependencies.len()).sum();
        if before == after {
            for ((id, _), node) in &mut graph.nodes {
                if let Some(manifest) = inputs.manifests.get(id) {
                    node.features.retain(|name| manifest.features.contains_key(name));
                }
            }
            return Ok(graph);
        }
    }
    Err(Finding::new(Class::LockMalformed, root.to_string(), "the features do not settle"))
}

fn expand(
    graph: &mut Graph,
    id: &CrateId,
    side: Side,
    target: Option<&Target>,
    inputs: &Inputs<'_>,
) -> Result<()> {
    let manifest = inputs
        .manifests
        .get(id)
        .ok_or_else(|| Finding::new(Class::LockMalformed, id.to_string(), "it has no manifest"))?;
    let node = graph.nodes.entry((id.clone(), side)).or_default();
    let on = activate(manifest, &mut node.features);
    for dependency in &manifest.dependencies {
        let used = match dependency.kind {
            DependencyKind::Normal => true,
            DependencyKind::Build => has_build_script(id, manifest, inputs),
            DependencyKind::Development => false,
        };
        let wanted = !dependency.optional || on.dependencies.contains(dependency.key.as_str());
        let fits = match (&dependency.target, target) {
            (Some(condition), Some(target)) => target.matches(condition).ok_or_else(|| {
                Finding::new(
                    Class::LockMalformed,
                    id.to_string(),
                    format!("cannot read the condition {condition}"),
                )
            })?,
            _ => true,
        };
        if !(used && wanted && fits) {
            continue;
        }
        let found = locate(id, dependency, inputs)?;
        let macro_crate = inputs.manifests.get(&found).is_some_and(|manifest| manifest.proc_macro);
        let other = if dependency.kind == DependencyKind::Build || macro_crate { Side::Build } else { side };
        let key = (found, other);
        if let Some(node) = graph.nodes.get_mut(&(id.clone(), side)) {
            node.dependencies.insert(key.clone());
        }
        let features = &mut graph.nodes.entry(key).or_default().features;
        features.extend(dependency.features.iter().cloned());
        if dependency.default_features {
            features.insert("default".to_owned());
        }
        for (_, feature) in on.of_dependencies.iter().filter(|(key, _)| *key == dependency.key) {
            features.insert((*feature).to_owned());
        }
    }
    Ok(())
}

/// Whether Cargo would compile and run a build script.
pub fn has_build_script(id: &CrateId, manifest: &Manifest, inputs: &Inputs<'_>) -> bool {
    match manifest.build {
        BuildScript::Stated(_) => true,
        BuildScript::Off => false,
        BuildScript::Automatic => inputs.with_build_rs.contains(id),
    }
}

/// What a set of features turns on.
struct Activated<'a> {
    dependencies: BTreeSet<&'a str>,
    of_dependencies: BTreeSet<(&'a str, &'a str)>,
}

/// Closes `features` over the manifest's table and collects what they say of dependencies.
fn activate<'a>(manifest: &'a Manifest, features: &mut BTreeSet<String>) -> Activated<'a> {
    let mut on = Activated { dependencies: BTreeSet::new(), of_dependencies: BTreeSet::new() };
    let optional: BTreeMap<&str, bool> = manifest
        .dependencies
        .iter()
        .map(|dependency| (dependency.key.as_str(), dependency.optional))
        .collect();
    let mut pending: Vec<String> = features.iter().cloned().collect();
    while let Some(name) = pending.pop() {
        let Some((_, implied)) = manifest.features.get_key_value(&name) else {
            // An optional dependency that no feature hides is a feature of its own name.
            if let Some((key, true)) = optional.get_key_value(name.as_str()) {
                on.dependencies.insert(key);
            }
            continue;
        };
        for item in implied {
            if let Some(dependency) = item.strip_prefix("dep:") {
                on.dependencies.insert(dependency);
            } else if let Some((dependency, feature)) = item.split_once('/') {
                let weak = dependency.strip_suffix('?');
                on.of_dependencies.insert((weak.unwrap_or(dependency), feature));
                if weak.is_none() && optional.get(dependency).copied().unwrap_or(false) {
                    on.dependencies.insert(dependency);
                    if features.insert(dependency.to_owned()) {
                        pending.push(dependency.to_owned());
                    }
                }
            } else if features.insert(item.clone()) {
                pending.push(item.clone());
            }
        }
    }
    on
}

/// The package of the lock that a dependency means.
fn locate(id: &CrateId, dependency: &Dependency, inputs: &Inputs<'_>) -> Result<CrateId> {
    let fits = |candidate: &&CrateId| {
        candidate.name == dependency.package
            && dependency.requirement.as_ref().is_none_or(|requirement| {
                Version::parse(&candidate.version).is_some_and(|version| requirement.matches(&version))
            })
    };
    let package = inputs.lock.packages.get(id);
    let found = package.and_then(|package| package.dependencies.iter().find(fits));
    found.cloned().ok_or_else(|| {
        let reason = format!("its manifest wants {}, Cargo.lock gives it none that fits", dependency.package);
        Finding::new(Class::LockMalformed, id.to_string(), reason)
    })
}
