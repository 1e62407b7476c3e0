//! `audits.json`: who looked at which tree, when, at which depth, until when it counts. Every claim
//! is bound to the SHA-256 of the tree that was looked at; a violation beats every audit.

use std::collections::{BTreeMap, BTreeSet};

use crate::date::Date;
use crate::failure::{Class, Finding, Report, Result};
use crate::json::{self, Object};
use crate::lock::CrateId;
use crate::version::{Requirement, Version};

const FILE: &str = "audits.json";
const CLASS: Class = Class::AuditsMalformed;
/// The longest chain of deltas that is followed.
const MAX_DELTAS: usize = 64;

/// An audit of one tree, or of the way from one tree to another.
#[derive(Clone, Debug)]
struct Audit {
    id: CrateId,
    tree: String,
    /// For a delta: the version and tree that it starts at.
    from: Option<(CrateId, String)>,
    criteria: String,
    expires: Date,
}

/// A crate, or some versions of it, that must not be used.
#[derive(Clone, Debug)]
struct Violation {
    name: String,
    versions: Requirement,
    reason: String,
}

/// The audits.
#[derive(Clone, Debug)]
pub struct Audits {
    audits: Vec<Audit>,
    violations: Vec<Violation>,
    /// Crates that are said to be unaudited, each with its tree.
    unaudited: BTreeMap<CrateId, String>,
}

/// How a crate stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Audited, by these criteria.
    Audited(BTreeSet<String>),
    /// Nobody looked at it, and the file says so.
    Unaudited,
    /// Something is wrong; the report says what.
    Refused,
}

impl Audits {
    /// Reads the file.
    ///
    /// # Errors
    /// [`Class::AuditsMalformed`] with the place.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let value = json::parse(text, CLASS, FILE)?;
        let mut object = Object::new(&value, CLASS, FILE)?;
        if object.number("format")? != 1 {
            return Err(Finding::new(CLASS, FILE, "its format is not 1"));
        }
        let criteria: BTreeMap<String, String> = object
            .named("criteria")?
            .into_iter()
            .map(|(name, mut entry)| {
                let description = entry.text("description")?;
                entry.finish()?;
                Ok((name.to_owned(), description))
            })
            .collect::<Result<_>>()?;
        let audits = object.objects("audits")?.into_iter().map(audit).collect::<Result<Vec<_>>>()?;
        if let Some(unknown) = audits.iter().find(|audit| !criteria.contains_key(&audit.criteria)) {
            let reason = format!("{}: the criteria {:?} are not described", unknown.id, unknown.criteria);
            return Err(Finding::new(CLASS, FILE, reason));
        }
        let violations = object.objects("violations")?.into_iter().map(violation).collect::<Result<_>>()?;
        let mut unaudited = BTreeMap::new();
        for mut entry in object.objects("unaudited")? {
            let id = crate_id(&mut entry)?;
            let tree = entry.sha256("tree_sha256")?;
            entry.finish()?;
            unaudited.insert(id, tree);
        }
        object.finish()?;
        Ok(Self { audits, violations, unaudited })
    }

    /// Judges every crate of `trees` (crate to tree hash) as of `today`.
    pub fn judge(
        &self,
        trees: &BTreeMap<CrateId, String>,
        today: Date,
        report: &mut Report,
    ) -> BTreeMap<CrateId, Standing> {
        let standings: BTreeMap<CrateId, Standing> =
            trees.iter().map(|(id, tree)| (id.clone(), self.judge_crate(id, tree, today, report))).collect();
        for id in self.unaudited.keys().filter(|id| !trees.contains_key(*id)) {
            report.fail(CLASS, FILE, format!("it lists {id} as unaudited, which Cargo.lock does not have"));
        }
        standings
    }

    fn judge_crate(&self, id: &CrateId, tree: &str, today: Date, report: &mut Report) -> Standing {
        let version = Version::parse(&id.version);
        for violation in self.violations.iter().filter(|violation| violation.name == id.name) {
            if version.as_ref().is_some_and(|version| violation.versions.contains(version)) {
                report.fail(
                    Class::Violation,
                    id.to_string(),
                    format!("it must not be used: {}", violation.reason),
                );
                return Standing::Refused;
            }
        }
        let mut criteria = BTreeSet::new();
        let mut failure = None;
        for audit in self.audits.iter().filter(|audit| audit.id == *id) {
            match self.follow(audit, tree, today, 0) {
                Ok(()) => {
                    criteria.insert(audit.criteria.clone());
                }
                Err(finding) => failure = Some(finding),
            }
        }
        if !criteria.is_empty() {
            return Standing::Audited(criteria);
        }
        if let Some(failure) = failure {
            report.findings.push(failure);
            return Standing::Refused;
        }
        match self.unaudited.get(id) {
            Some(listed) if listed == tree => Standing::Unaudited,
            Some(listed) => {
                let reason = format!("audits.json lists it as unaudited with tree {listed}, it is {tree}");
                report.fail(Class::AuditHash, id.to_string(), reason);
                Standing::Refused
            }
            None => {
                let reason = "nobody audited it, and audits.json does not list it as unaudited";
                report.fail(Class::Unaudited, id.to_string(), reason);
                Standing::Refused
            }
        }
    }

    /// Whether an audit holds for a tree: its hash, its expiry, and for a delta the audit before it.
    fn follow(&self, audit: &Audit, tree: &str, today: Date, depth: usize) -> Result<()> {
        let subject = audit.id.to_string();
        if audit.tree != tree {
            let reason = format!("the audit is of tree {}, this is {tree}", audit.tree);
            return Err(Finding::new(Class::AuditHash, subject, reason));
        }
        if audit.expires < today {
            let reason = format!("the audit expired on {}: look again", audit.expires);
            return Err(Finding::new(Class::AuditExpired, subject, reason));
        }
        let Some((from, from_tree)) = &audit.from else { return Ok(()) };
        let broken =
            |why: String| Finding::new(Class::DeltaBroken, &subject, format!("the delta from {from} {why}"));
        if depth == MAX_DELTAS {
            return Err(broken(format!("is in a chain of more than {MAX_DELTAS}")));
        }
        let mut failure = None;
        for base in self.audits.iter().filter(|base| base.id == *from && base.criteria == audit.criteria) {
            match self.follow(base, from_tree, today, depth + 1) {
                Ok(()) => return Ok(()),
                Err(finding) => failure = Some(finding),
            }
        }
        Err(match failure {
            Some(finding) => broken(format!("does not hold: {}", finding.reason)),
            None => broken("has no audit to start at".to_owned()),
        })
    }
}

fn crate_id(object: &mut Object<'_>) -> Result<CrateId> {
    Ok(CrateId { name: object.text("name")?, version: object.text("version")? })
}

fn audit(mut object: Object<'_>) -> Result<Audit> {
    let id = crate_id(&mut object)?;
    let from = match object.optional("from") {
        None => None,
        Some(value) => {
            let mut from = Object::new(value, CLASS, "audits.json: from")?;
            let pair = (
                CrateId { name: id.name.clone(), version: from.text("version")? },
                from.sha256("tree_sha256")?,
            );
            from.finish()?;
            Some(pair)
        }
    };
    let audit = Audit {
        tree: object.sha256("tree_sha256")?,
        from,
        criteria: object.text("criteria")?,
        expires: object.date("expires")?,
        id,
    };
    object.text("who")?;
    let date = object.date("date")?;
    object.text("looked_at")?;
    object.finish()?;
    if audit.expires < date {
        return Err(Finding::new(CLASS, FILE, format!("{}: it expires before it was made", audit.id)));
    }
    Ok(audit)
}

fn violation(mut object: Object<'_>) -> Result<Violation> {
    let name = object.text("name")?;
    let versions = object.text("versions")?;
    let versions = Requirement::parse(&versions).ok_or_else(|| {
        Finding::new(CLASS, FILE, format!("{name}: {versions:?} is no version requirement"))
    })?;
    let violation = Violation { name, versions, reason: object.text("reason")? };
    object.text("who")?;
    object.date("date")?;
    object.finish()?;
    Ok(violation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(file: serde_json::Value) -> (Vec<Class>, Standing) {
        let audits = Audits::parse(file.to_string().as_bytes()).expect("parses");
        let id = CrateId { name: "a".into(), version: "1.1.0".into() };
        let today = Date::parse("2026-06-01").expect("date");
        let mut report = Report::default();
        let mut standings = audits.judge(&BTreeMap::from([(id.clone(), "1".repeat(64))]), today, &mut report);
        let classes = report.findings.iter().map(|finding| finding.class).collect();
        (classes, standings.remove(&id).expect("standing"))
    }

    fn file(
        audits: serde_json::Value,
        violations: serde_json::Value,
        unaudited: serde_json::Value,
    ) -> serde_json::Value {
        json!({"format": 1, "criteria": {"read": {"description": "d"}}, "audits": audits, "violations": violations,
               "unaudited": unaudited})
    }

    fn full(version: &str, tree: &str, expires: &str) -> serde_json::Value {
        json!({"name": "a", "version": version, "tree_sha256": tree, "criteria": "read", "who": "w",
               "date": "2026-01-01", "expires": expires, "looked_at": "all"})
    }

    #[test]
    fn standings() {
        let (one, two) = ("1".repeat(64), "2".repeat(64));
        let listed = json!([{"name": "a", "version": "1.1.0", "tree_sha256": one}]);
        let good = full("1.1.0", &one, "2027-01-01");
        let audited = Standing::Audited(["read".to_owned()].into());
        assert_eq!(run(file(json!([good]), json!([]), json!([]))), (vec![], audited.clone()));
        assert_eq!(run(file(json!([]), json!([]), listed)), (vec![], Standing::Unaudited));
        let violation =
            json!([{"name": "a", "versions": "<2", "who": "w", "date": "2026-01-01", "reason": "r"}]);
        let mut delta = full("1.1.0", &one, "2027-01-01");
        delta["from"] = json!({"version": "1.0.0", "tree_sha256": two});
        let base = full("1.0.0", &two, "2027-01-01");
        assert_eq!(run(file(json!([delta, base]), json!([]), json!([]))), (vec![], audited));
        let other_base = full("1.0.0", &one, "2027-01-01");
        for (audits, violations, unaudited, class) in [
            (json!([good]), violation, json!([]), Class::Violation),
            (json!([full("1.1.0", &two, "2027-01-01")]), json!([]), json!([]), Class::AuditHash),
            (json!([full("1.1.0", &one, "2026-05-31")]), json!([]), json!([]), Class::AuditExpired),
            (json!([]), json!([]), json!([]), Class::Unaudited),
            (
                json!([]),
                json!([]),
                json!([{"name": "a", "version": "1.1.0", "tree_sha256": two}]),
                Class::AuditHash,
            ),
            (json!([delta]), json!([]), json!([]), Class::DeltaBroken),
            (json!([delta, other_base]), json!([]), json!([]), Class::DeltaBroken),
        ] {
            assert_eq!(run(file(audits, violations, unaudited)), (vec![class], Standing::Refused));
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in [
            json!({"format": 2}),
            json!({"format": 1, "extra": 1}),
            file(json!([{"name": "a"}]), json!([]), json!([])),
            file(json!([full("1.0.0", "short", "2027-01-01")]), json!([]), json!([])),
            file(json!([full("1.0.0", &"1".repeat(64), "2025-01-01")]), json!([]), json!([])),
        ] {
            assert_eq!(
                Audits::parse(text.to_string().as_bytes()).map(|_| ()).map_err(|error| error.class),
                Err(CLASS)
            );
        }
    }
}
