//! The whole check, in the order of trust: integrity first; only a tree that passed is judged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::json;

use crate::advisories::Snapshot;
use crate::archive::{self, Archive, in_parallel};
use crate::audits::{Audits, Standing};
use crate::codec::sha256;
use crate::configuration;
use crate::date::Date;
use crate::failure::{Class, Finding, Report, Result};
use crate::files;
use crate::inventory::{self, Entry};
use crate::licence::{self, Licence};
use crate::lock::{self, CrateId, Lock};
use crate::manifest::{self, Manifest, Workspace};
use crate::policy::Policy;
use crate::resolve::{self, Graph, Inputs};
use crate::target::Target;
use crate::vendor;

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// The workspace.
    pub root: PathBuf,
    /// The `.crate` archives.
    pub archives: PathBuf,
    /// The vendored sources.
    pub vendor: PathBuf,
    /// Policy, audits, inventory and advisories.
    pub judgements: PathBuf,
    /// Cargo's home, whose configuration a build would obey.
    pub cargo_home: Option<PathBuf>,
}

/// A workspace and its archives, read and proven to be those of the lock.
pub struct Tree {
    /// The policy.
    pub policy: Policy,
    /// The lock.
    pub lock: Lock,
    /// The SHA-256 of the lock's text.
    pub lock_sha256: String,
    /// The members.
    pub workspace: Workspace,
    /// The archives.
    pub archives: BTreeMap<CrateId, Archive>,
    /// The manifests of all packages, members among them.
    pub manifests: BTreeMap<CrateId, Manifest>,
    with_build_rs: BTreeSet<CrateId>,
}

/// Reads policy, workspace, lock and archives. `None` when there is nothing to go on with.
pub fn load(places: &Places, report: &mut Report) -> Option<Tree> {
    let policy = report
        .take(files::read(&places.judgements.join("policy.json")).and_then(|text| Policy::parse(&text)))?;
    let workspace = manifest::of_workspace(&places.root, report);
    let workspace = report.take(workspace)?;
    let text = report.take(files::read_text(&places.root.join("Cargo.lock")))?;
    let members = workspace.members.keys().cloned().collect();
    let lock = lock::read(&text, &policy.registry, &members, report);
    let archives = archive::load_all(&places.archives, &lock, report);
    let mut manifests: BTreeMap<CrateId, Manifest> = BTreeMap::new();
    for manifest in workspace.members.values() {
        manifests.insert(manifest.id.clone(), manifest.clone());
    }
    let jobs: Vec<&Archive> = archives.values().collect();
    for result in in_parallel(&jobs, |archive| {
        let subject = format!("{}.crate: Cargo.toml", archive.id.directory());
        manifest::of_archive(archive.text("Cargo.toml").unwrap_or_default(), &subject)
            .map(|manifest| (archive.id.clone(), manifest))
    }) {
        manifests.extend(report.take(result));
    }
    let with_build_rs = archives
        .values()
        .filter(|archive| archive.file("build.rs").is_some())
        .map(|one| one.id.clone())
        .collect();
    let lock_sha256 = sha256(text.as_bytes());
    Some(Tree { policy, lock, lock_sha256, workspace, archives, manifests, with_build_rs })
}

/// The integrity part: nothing but what the lock names, byte for byte.
pub fn verify(places: &Places, variables: &[String], report: &mut Report) -> Option<Tree> {
    let tree = load(places, report)?;
    // What vendor/ is compared with must be sound itself.
    let sound = report.findings.is_empty();
    let pinned = &tree.policy.cargo_config;
    configuration::check(&places.root, places.cargo_home.as_deref(), variables, pinned, report);
    if sound {
        vendor::compare(&places.vendor, &tree.archives, report);
    }
    report.facts.insert("archives".into(), json!(tree.archives.len()));
    report.findings.is_empty().then_some(tree)
}

impl Tree {
    /// What is compiled for a shipped binary.
    ///
    /// # Errors
    /// A finding for a binary or target that is not known, or a lock that does not fit.
    pub fn graph(&self, binary: &str) -> Result<Graph> {
        let known = self.policy.binaries().find(|(one, _)| one.name == binary);
        let (shipped, package) = known.ok_or_else(|| {
            Finding::new(Class::Usage, binary, "policy.json does not know a shipped binary of this name")
        })?;
        let target = Target::new(&shipped.target).ok_or_else(|| {
            Finding::new(
                Class::PolicyMalformed,
                binary,
                format!("the target {} is not known", shipped.target),
            )
        })?;
        self.resolve(package, &shipped.features, Some(&target))
    }

    fn resolve(&self, package: &str, features: &BTreeSet<String>, target: Option<&Target>) -> Result<Graph> {
        let member = self.workspace.members.get(package);
        let root = member.ok_or_else(|| {
            Finding::new(Class::UnknownMember, package, "the workspace does not have this package")
        })?;
        let inputs =
            Inputs { lock: &self.lock, manifests: &self.manifests, with_build_rs: &self.with_build_rs };
        resolve::resolve(&root.id, features, target, &inputs)
    }

    /// The inventory of every crate.
    pub fn inventory(&self) -> BTreeMap<CrateId, Entry> {
        let jobs: Vec<(&Archive, &Manifest)> = self
            .archives
            .values()
            .filter_map(|archive| Some((archive, self.manifests.get(&archive.id)?)))
            .collect();
        let entries = in_parallel(&jobs, |(archive, manifest)| inventory::take(archive, manifest));
        jobs.iter().map(|(archive, _)| archive.id.clone()).zip(entries).collect()
    }

    /// The tree hash of every crate.
    pub fn tree_hashes(&self) -> BTreeMap<CrateId, String> {
        let jobs: Vec<&Archive> = self.archives.values().collect();
        let hashes = in_parallel(&jobs, |archive| archive.tree_hash());
        jobs.iter().map(|archive| archive.id.clone()).zip(hashes).collect()
    }

    /// The licence of every crate.
    pub fn licences(&self, report: &mut Report) -> BTreeMap<CrateId, Licence> {
        let mut licences = BTreeMap::new();
        for archive in self.archives.values() {
            let Some(manifest) = self.manifests.get(&archive.id) else { continue };
            if let Some(licence) = licence::check(archive, manifest, &self.policy, report) {
                licences.insert(archive.id.clone(), licence);
            }
        }
        licences
    }

    /// The NOTICE of a release: every crate that is compiled into a shipped binary.
    ///
    /// # Errors
    /// A finding where a binary cannot be resolved.
    pub fn notice(&self, licences: &BTreeMap<CrateId, Licence>) -> Result<String> {
        let mut crates = BTreeSet::new();
        for (binary, _) in self.policy.binaries() {
            crates.extend(self.graph(&binary.name)?.nodes.into_keys().map(|(id, _)| id));
        }
        let mut text = String::from("Wrenn\nLicence: Apache-2.0 (the file LICENSE)\n\n");
        text.push_str("The programs are compiled from these crates besides; their licences follow.\n");
        for id in crates {
            if let (Some(archive), Some(licence)) = (self.archives.get(&id), licences.get(&id)) {
                text.push_str(&format!("\n{}\n\n", "=".repeat(80)));
                text.push_str(&licence::notice_section(archive, licence));
            }
        }
        Ok(text)
    }
}

/// What is counted for a binary: its registry crates.
pub fn count(graph: &Graph, inventory: &BTreeMap<CrateId, Entry>) -> BTreeMap<String, u64> {
    let entries: Vec<&Entry> = graph.crates().keys().filter_map(|id| inventory.get(*id)).collect();
    let sum = |of: &dyn Fn(&Entry) -> u64| entries.iter().map(|entry| of(entry)).sum::<u64>();
    BTreeMap::from([
        ("crates".to_owned(), entries.len() as u64),
        ("lines".to_owned(), sum(&|entry| entry.lines)),
        ("unsafe".to_owned(), sum(&|entry| entry.unsafe_uses)),
        ("build_scripts".to_owned(), sum(&|entry| u64::from(entry.has_build_script()))),
        ("proc_macros".to_owned(), sum(&|entry| u64::from(entry.proc_macro.is_some()))),
    ])
}

/// The counts of every shipped binary.
///
/// # Errors
/// A finding where a binary cannot be resolved.
pub fn count_all(
    tree: &Tree,
    inventory: &BTreeMap<CrateId, Entry>,
) -> Result<BTreeMap<String, BTreeMap<String, u64>>> {
    tree.policy
        .binaries()
        .map(|(binary, _)| Ok((binary.name.clone(), count(&tree.graph(&binary.name)?, inventory))))
        .collect()
}

/// Everything: integrity, then policy, audits, inventory, licences and advisories.
pub fn full(places: &Places, variables: &[String], today: Date, report: &mut Report) {
    let Some(tree) = verify(places, variables, report) else { return };
    tree.policy.check_members(&tree.workspace.members, report);
    tree.policy.check_bans(tree.archives.keys(), report);
    let inventory = tree.inventory();
    let judgement = |name: &str| files::read(&places.judgements.join(name));
    if let Some(pinned) = report.take(judgement("inventory.json").and_then(|text| inventory::parse(&text))) {
        inventory::compare(&inventory, &pinned, report);
    }
    if let Some(audits) = report.take(judgement("audits.json").and_then(|text| Audits::parse(&text))) {
        let standings = audits.judge(&tree.tree_hashes(), today, report);
        note_standings(&standings, report);
    }
    tree.licences(report);
    check_advisories(places, &tree, today, report);
    classify(&tree, report);
    if let Some(mut counted) = report.take(count_all(&tree, &inventory)) {
        report.facts.insert("binaries".into(), json!(counted));
        let lock_crates = BTreeMap::from([("crates".to_owned(), tree.archives.len() as u64)]);
        counted.insert("Cargo.lock".to_owned(), lock_crates);
        tree.policy.check_budgets(&counted, report);
    }
}

fn note_standings(standings: &BTreeMap<CrateId, Standing>, report: &mut Report) {
    let mut audited = BTreeMap::new();
    let mut unaudited = Vec::new();
    for (id, standing) in standings {
        match standing {
            Standing::Audited(criteria) => {
                audited.insert(id.to_string(), criteria.iter().cloned().collect::<Vec<_>>());
            }
            Standing::Unaudited => unaudited.push(id.to_string()),
            Standing::Refused => {}
        }
    }
    report.facts.insert("audited".into(), json!(audited));
    report.facts.insert("unaudited".into(), json!(unaudited));
}

fn check_advisories(places: &Places, tree: &Tree, today: Date, report: &mut Report) {
    let path = places.judgements.join("advisories.json");
    if path.symlink_metadata().is_err() {
        let reason = "there is no snapshot: without one nothing is known, which is not the same as clean";
        report.fail(Class::AdvisoriesMissing, path.display().to_string(), reason);
        return;
    }
    let snapshot = files::read(&path).and_then(|text| Snapshot::parse(&text));
    if let Some(snapshot) = report.take(snapshot) {
        let (date, sequence, count) = snapshot.summary();
        let summary = json!({ "date": date.to_string(), "sequence": sequence, "advisories": count });
        report.facts.insert("advisories".into(), summary);
        snapshot.check(tree.archives.keys(), &tree.policy, today, report);
    }
}

/// Sorts the crates of the lock by what they are there for.
fn classify(tree: &Tree, report: &mut Report) {
    let shipped_members = tree.policy.members.iter().filter(|(_, member)| member.shipped);
    let (mut compiled, mut any_platform) = (BTreeSet::new(), BTreeSet::new());
    for (binary, ..) in tree.policy.binaries() {
        compiled.extend(
            report.take(tree.graph(&binary.name)).into_iter().flat_map(|graph| graph.nodes.into_keys()),
        );
    }
    for (package, member) in shipped_members {
        let nothing = BTreeSet::new();
        let features = member.binary.as_ref().map_or(&nothing, |binary| &binary.features);
        let graph = report.take(tree.resolve(package, features, None));
        any_platform.extend(graph.into_iter().flat_map(|graph| graph.nodes.into_keys()));
    }
    let names = |set: &BTreeSet<(CrateId, resolve::Side)>| -> BTreeSet<CrateId> {
        set.iter().map(|(id, _)| id.clone()).filter(|id| tree.archives.contains_key(id)).collect()
    };
    let (compiled, any_platform) = (names(&compiled), names(&any_platform));
    let rest = tree.archives.keys().filter(|id| !compiled.contains(*id));
    let (other_platforms, development): (Vec<_>, Vec<_>) = rest.partition(|id| any_platform.contains(*id));
    let text = |ids: Vec<&CrateId>| ids.into_iter().map(CrateId::to_string).collect::<Vec<_>>();
    report.facts.insert(
        "crates".into(),
        json!({
            "shipped": text(compiled.iter().collect()),
            "other_platforms_only": text(other_platforms),
            "development_only": text(development),
        }),
    );
}
