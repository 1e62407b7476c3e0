//! `policy.json`: what the tree may be. See README.md for the format.

use std::collections::{BTreeMap, BTreeSet};

use crate::failure::{Class, Finding, Report, Result};
use crate::json::{self, Object};
use crate::manifest::{DependencyKind, Manifest};
use crate::version::{Requirement, Version};

const FILE: &str = "policy.json";
const CLASS: Class = Class::PolicyMalformed;

/// A committed file that is pinned by its hash.
#[derive(Clone, Debug)]
pub struct PinnedFile {
    /// Path below the workspace.
    pub path: String,
    /// Its SHA-256.
    pub sha256: String,
}

/// The features that a member asks of a direct dependency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// Whether the default ones are on.
    pub default: bool,
    /// The named ones.
    pub named: BTreeSet<String>,
}

/// A shipped binary.
#[derive(Clone, Debug)]
pub struct Binary {
    /// Its file name.
    pub name: String,
    /// The target that it is built for.
    pub target: String,
    /// The features of its package that it is built with, besides the default ones.
    pub features: BTreeSet<String>,
}

/// What the policy says of a workspace member.
#[derive(Clone, Debug)]
pub struct Member {
    /// Whether it is in a release; what is not may use development crates.
    pub shipped: bool,
    /// The binary that it makes, if that is shipped.
    pub binary: Option<Binary>,
    /// Its direct dependencies and their features (only for what is shipped).
    pub dependencies: BTreeMap<String, Features>,
}

/// A limit that goes down freely, and up only with a review.
#[derive(Clone, Debug)]
pub struct Budget {
    /// The limit in force.
    pub limit: u64,
    /// The limit that was last reviewed: `limit` must not be above it.
    pub reviewed: u64,
}

/// A banned crate.
#[derive(Clone, Debug)]
pub struct Ban {
    name: String,
    versions: Option<Requirement>,
    reason: String,
}

/// What the licence of a file or crate is, where the program cannot tell: a person's word, bound to
/// the file's hash.
#[derive(Clone, Debug)]
pub struct Clarification {
    /// "name version".
    pub crate_id: String,
    /// The file, and its hash; `None` where the crate has no licence text at all.
    pub file: Option<(String, String)>,
    /// The licence identifiers of the file.
    pub licences: Vec<String>,
}

/// An advisory that applies and was accepted, with a person's reason.
#[derive(Clone, Debug)]
pub struct Acceptance {
    /// The advisory's identifier.
    pub id: String,
    /// "name version": another version is not accepted.
    pub crate_id: String,
}

/// The policy.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The one registry, as Cargo.lock writes it.
    pub registry: String,
    /// Committed Cargo configuration.
    pub cargo_config: Vec<PinnedFile>,
    /// The crates that shipped code may name.
    pub crates: BTreeSet<String>,
    /// The crates that tests may name besides.
    pub development_crates: BTreeSet<String>,
    /// Workspace members by package name.
    pub members: BTreeMap<String, Member>,
    /// Banned crates.
    pub banned: Vec<Ban>,
    /// Budgets by binary, then by what is counted.
    pub budgets: BTreeMap<String, BTreeMap<String, Budget>>,
    /// SPDX identifiers that are accepted.
    pub licences: BTreeSet<String>,
    /// Clarifications.
    pub clarifications: Vec<Clarification>,
    /// How old an advisory snapshot may be.
    pub advisory_max_age_days: u64,
    /// The sequence number below which a snapshot is a roll-back.
    pub advisory_min_sequence: u64,
    /// Accepted advisories.
    pub accepted_advisories: Vec<Acceptance>,
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// [`Class::PolicyMalformed`] with the place.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let value = json::parse(text, CLASS, FILE)?;
        let mut object = Object::new(&value, CLASS, FILE)?;
        if object.number("format")? != 1 {
            return Err(Finding::new(CLASS, FILE, "its format is not 1"));
        }
        let mut advisories = Object::new(object.value("advisories")?, CLASS, "policy.json.advisories")?;
        let mut licences = Object::new(object.value("licences")?, CLASS, "policy.json.licences")?;
        let policy = Self {
            registry: object.text("registry")?,
            cargo_config: object.objects("cargo_config")?.into_iter().map(pinned).collect::<Result<_>>()?,
            crates: object.texts("crates")?.into_iter().collect(),
            development_crates: object.texts("development_crates")?.into_iter().collect(),
            members: object
                .named("members")?
                .into_iter()
                .map(|(name, entry)| Ok((name.to_owned(), member(entry)?)))
                .collect::<Result<_>>()?,
            banned: object.objects("banned")?.into_iter().map(ban).collect::<Result<_>>()?,
            budgets: budgets(&mut object)?,
            licences: licences.texts("allow")?.into_iter().collect(),
            clarifications: licences
                .objects("clarify")?
                .into_iter()
                .map(clarification)
                .collect::<Result<_>>()?,
            advisory_max_age_days: advisories.number("max_age_days")?,
            advisory_min_sequence: advisories.number("min_sequence")?,
            accepted_advisories: advisories
                .objects("accepted")?
                .into_iter()
                .map(acceptance)
                .collect::<Result<_>>()?,
        };
        advisories.finish()?;
        licences.finish()?;
        object.finish()?;
        Ok(policy)
    }

    /// The shipped binaries, each with its package.
    pub fn binaries(&self) -> impl Iterator<Item = (&Binary, &str)> {
        self.members.iter().filter_map(|(package, member)| Some((member.binary.as_ref()?, package.as_str())))
    }

    /// Holds the members' manifests to the policy.
    pub fn check_members(&self, members: &BTreeMap<String, Manifest>, report: &mut Report) {
        for name in members.keys().filter(|name| !self.members.contains_key(*name)) {
            report.fail(Class::UnknownMember, name, "policy.json does not know this workspace member");
        }
        for (name, policy) in &self.members {
            match members.get(name) {
                Some(manifest) => self.check_member(name, policy, manifest, members, report),
                None => report.fail(Class::UnknownMember, name, "policy.json has it, the workspace does not"),
            }
        }
    }

    fn check_member(
        &self,
        name: &str,
        policy: &Member,
        manifest: &Manifest,
        members: &BTreeMap<String, Manifest>,
        report: &mut Report,
    ) {
        let subject = |dependency: &str| format!("{name} -> {dependency}");
        let mut unused: BTreeSet<&str> = policy.dependencies.keys().map(String::as_str).collect();
        for dependency in &manifest.dependencies {
            let package = dependency.package.as_str();
            let development = !policy.shipped || dependency.kind == DependencyKind::Development;
            if development {
                let known = members.contains_key(package)
                    || self.crates.contains(package)
                    || self.development_crates.contains(package);
                if !known {
                    let reason = "no development crate of policy.json; a new one needs a review";
                    report.fail(Class::DirectCrate, subject(package), reason);
                }
                continue;
            }
            let allowed = policy.dependencies.get(package);
            unused.remove(package);
            let Some(allowed) =
                allowed.filter(|_| members.contains_key(package) || self.crates.contains(package))
            else {
                let reason = "shipped code may not name this crate; a new one needs a review";
                report.fail(Class::DirectCrate, subject(package), reason);
                continue;
            };
            let asked = Features { default: dependency.default_features, named: dependency.features.clone() };
            if asked != *allowed {
                let reason = format!("it asks for {}, policy.json says {}", show(&asked), show(allowed));
                report.fail(Class::Feature, subject(package), reason);
            }
        }
        for package in unused {
            let reason = "policy.json allows a dependency that is not there: remove it";
            report.fail(Class::DirectCrate, subject(package), reason);
        }
    }

    /// Refuses banned crates.
    pub fn check_bans<'a>(
        &self,
        crates: impl Iterator<Item = &'a crate::lock::CrateId>,
        report: &mut Report,
    ) {
        for id in crates {
            for ban in self.banned.iter().filter(|ban| ban.name == id.name) {
                let version = Version::parse(&id.version);
                let hit = ban.versions.as_ref().is_none_or(|versions| {
                    version.as_ref().is_some_and(|version| versions.contains(version))
                });
                if hit {
                    report.fail(Class::Banned, id.to_string(), format!("it is banned: {}", ban.reason));
                }
            }
        }
    }

    /// Compares what was counted with the budgets: no more, and no slack.
    pub fn check_budgets(&self, counted: &BTreeMap<String, BTreeMap<String, u64>>, report: &mut Report) {
        for (binary, counts) in counted {
            for (what, &count) in counts {
                let subject = format!("{binary} {what}");
                let Some(budget) = self.budgets.get(binary).and_then(|budgets| budgets.get(what)) else {
                    report.fail(
                        CLASS,
                        subject,
                        format!("policy.json has no budget for it (counted: {count})"),
                    );
                    continue;
                };
                if budget.limit > budget.reviewed {
                    let reason =
                        format!("the limit {} is above the reviewed {}", budget.limit, budget.reviewed);
                    report.fail(Class::BudgetRaised, &subject, reason);
                }
                if count > budget.limit {
                    let reason = format!("counted {count}, the limit is {}", budget.limit);
                    report.fail(Class::BudgetExceeded, &subject, reason);
                } else if count < budget.limit {
                    let reason =
                        format!("counted {count}, the limit is {}: run vendor-check tighten", budget.limit);
                    report.fail(Class::BudgetSlack, &subject, reason);
                }
            }
        }
    }
}

fn show(features: &Features) -> String {
    let mut names: Vec<&str> = features.named.iter().map(String::as_str).collect();
    if features.default {
        names.insert(0, "default");
    }
    format!("[{}]", names.join(", "))
}

fn pinned(mut object: Object<'_>) -> Result<PinnedFile> {
    let pin = PinnedFile { path: object.text("path")?, sha256: object.sha256("sha256")? };
    object.finish()?;
    Ok(pin)
}

fn member(mut object: Object<'_>) -> Result<Member> {
    let binary = match object.optional_text("binary")? {
        Some(name) => Some(Binary {
            name,
            target: object.text("target")?,
            features: object.texts("features")?.into_iter().collect(),
        }),
        None => None,
    };
    let member = Member {
        shipped: object.boolean("shipped")?,
        binary,
        dependencies: object
            .named("dependencies")?
            .into_iter()
            .map(|(name, mut entry)| {
                let features = Features {
                    default: entry.boolean("default_features")?,
                    named: entry.texts("features")?.into_iter().collect(),
                };
                entry.finish()?;
                Ok((name.to_owned(), features))
            })
            .collect::<Result<_>>()?,
    };
    object.finish()?;
    Ok(member)
}

fn ban(mut object: Object<'_>) -> Result<Ban> {
    let versions = match object.optional_text("versions")? {
        Some(text) => Some(
            Requirement::parse(&text)
                .ok_or_else(|| Finding::new(CLASS, FILE, format!("{text:?} is no version requirement")))?,
        ),
        None => None,
    };
    let ban = Ban { name: object.text("name")?, versions, reason: object.text("reason")? };
    object.finish()?;
    Ok(ban)
}

fn budgets(object: &mut Object<'_>) -> Result<BTreeMap<String, BTreeMap<String, Budget>>> {
    let mut all = BTreeMap::new();
    for mut entry in object.objects("budgets")? {
        let binary = entry.text("binary")?;
        let what = entry.text("what")?;
        let budget = Budget { limit: entry.number("limit")?, reviewed: entry.number("reviewed")? };
        entry.text("by")?;
        entry.date("date")?;
        entry.text("reason")?;
        entry.finish()?;
        let budgets: &mut BTreeMap<String, Budget> = all.entry(binary.clone()).or_default();
        if budgets.insert(what.clone(), budget).is_some() {
            return Err(Finding::new(CLASS, FILE, format!("two budgets for {binary} {what}")));
        }
    }
    Ok(all)
}

fn clarification(mut object: Object<'_>) -> Result<Clarification> {
    let file = match object.optional_text("file")? {
        Some(file) => Some((file, object.sha256("sha256")?)),
        None => None,
    };
    let clarification =
        Clarification { crate_id: object.text("crate")?, file, licences: object.texts("licences")? };
    object.text("reason")?;
    object.finish()?;
    Ok(clarification)
}

fn acceptance(mut object: Object<'_>) -> Result<Acceptance> {
    let acceptance = Acceptance { id: object.text("id")?, crate_id: object.text("crate")? };
    object.text("by")?;
    object.date("date")?;
    object.text("reason")?;
    object.finish()?;
    Ok(acceptance)
}
