//! What can be wrong: one class, one exit code, one slug each; and the report that collects them.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

macro_rules! classes {
    ($($(#[$doc:meta])* $variant:ident = $code:literal $slug:literal $meaning:literal;)*) => {
        /// A kind of failure. The discriminant is the exit code, and a lower code is reported first:
        /// what a later check says about a tree that an earlier check refused means little.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Class { $(#[doc = $meaning] $variant = $code,)* }

        impl Class {
            /// Every class, in the order of the codes.
            pub const ALL: &'static [Class] = &[$(Class::$variant,)*];

            /// The short name that `--json` and messages carry.
            pub fn slug(self) -> &'static str {
                match self { $(Class::$variant => $slug,)* }
            }

            /// One line for a person.
            pub fn meaning(self) -> &'static str {
                match self { $(Class::$variant => $meaning,)* }
            }
        }
    };
}

classes! {
    Usage = 2 "usage" "the command line is not understood";
    Io = 3 "io" "a file that is needed cannot be read or written";

    LockMalformed = 10 "lock-malformed" "Cargo.lock or a Cargo.toml is not in the strict subset";
    LockSource = 11 "lock-source" "a crate comes from git, a path or another registry";
    LockChecksum = 12 "lock-checksum" "a crate in Cargo.lock has no usable checksum";
    Patch = 13 "patch" "[patch] or [replace] is in use";
    CargoConfig = 14 "cargo-config" "Cargo is configured outside the one committed file";
    ArchiveMissing = 15 "archive-missing" "Cargo.lock names a crate whose archive is not there";
    ArchiveExtra = 16 "archive-extra" "an archive is there that Cargo.lock does not name";
    ArchiveHash = 17 "archive-hash" "an archive is not the one that Cargo.lock names";
    ArchiveMalformed = 18 "archive-malformed" "an archive is damaged, too large or not of the accepted form";
    ArchiveIdentity = 19 "archive-identity" "an archive says that it is another crate";
    CrateMissing = 20 "crate-missing" "vendor/ lacks a crate of Cargo.lock";
    CrateExtra = 21 "crate-extra" "vendor/ has a crate or file that Cargo.lock does not name";
    FileModified = 22 "file-modified" "a vendored file differs from its archive";
    FileExtra = 23 "file-extra" "a vendored file is not in its archive";
    FileMissing = 24 "file-missing" "a file of the archive is not vendored";
    Symlink = 25 "symlink" "a symbolic or hard link where a file should be";
    SpecialFile = 26 "special-file" "a device, pipe or socket where a file should be";
    EscapingPath = 27 "escaping-path" "a path leads out of its crate";
    CaseCollision = 28 "case-collision" "two paths differ only in case";
    HiddenPath = 29 "hidden-path" "a hidden path that the archive does not have";
    ChecksumEmpty = 30 "checksum-empty" "a .cargo-checksum.json without its files";
    ChecksumFiles = 31 "checksum-files" "a .cargo-checksum.json that lies about files";
    ChecksumPackage = 32 "checksum-package" "a .cargo-checksum.json that declares another package";

    PolicyMalformed = 40 "policy-malformed" "policy.json is not understood";
    DirectCrate = 41 "direct-crate" "a workspace crate names a crate that the policy does not allow it";
    Feature = 42 "feature" "a workspace crate asks for other features than the policy says";
    Banned = 43 "banned" "a banned crate is in the tree";
    BudgetExceeded = 44 "budget-exceeded" "a budget of the policy is exceeded";
    BudgetRaised = 45 "budget-raised" "a budget is above what was last reviewed";
    BudgetSlack = 46 "budget-slack" "a budget is higher than needed: lower it";
    UnknownMember = 47 "unknown-member" "a workspace member that the policy does not know";

    AuditsMalformed = 50 "audits-malformed" "audits.json is not understood";
    AuditHash = 51 "audit-hash" "an audit is bound to another tree";
    Unaudited = 52 "unaudited" "a crate is neither audited nor listed as unaudited";
    AuditExpired = 53 "audit-expired" "an audit has expired";
    Violation = 54 "violation" "a crate is marked as a violation";
    DeltaBroken = 55 "delta-broken" "a delta audit does not start at an audited tree";

    BuildScript = 60 "build-script" "a build script that is not pinned";
    ProcMacro = 61 "proc-macro" "a procedural macro that is not pinned";
    Include = 62 "include" "an included file that is not pinned";
    Links = 63 "links" "a links key that is not pinned";
    Ffi = 64 "ffi" "foreign code or assembly that is not pinned";
    NativeBlob = 65 "native-blob" "a native binary that is not pinned";
    UnsafeCount = 66 "unsafe-count" "the unsafe count of a crate is not the pinned one";
    InventoryMalformed = 67 "inventory-malformed" "inventory.json is not understood";

    LicenceMissing = 70 "licence-missing" "a crate without licence metadata or text";
    LicenceMismatch = 71 "licence-mismatch" "licence files and metadata disagree";
    LicenceDenied = 72 "licence-denied" "a licence that is not on the allow list";
    NoticeStale = 73 "notice-stale" "NOTICE is not what the tree gives";

    AdvisoriesMissing = 80 "advisories-missing" "no advisory snapshot";
    AdvisoriesMalformed = 81 "advisories-malformed" "the advisory snapshot is not understood";
    AdvisoriesStale = 82 "advisories-stale" "the advisory snapshot is too old, or older than one seen before";
    Vulnerable = 83 "vulnerable" "an advisory applies to a crate";
    SbomStale = 84 "sbom-stale" "an SBOM is not what the tree gives";

    BinaryMalformed = 90 "binary-malformed" "not an ELF file of the accepted form, or a damaged list";
    BinaryUnlisted = 91 "binary-unlisted" "a binary without a dependency list";
    BinaryMismatch = 92 "binary-mismatch" "a binary's dependency list is not that of Cargo.lock";

    InputsMalformed = 100 "inputs-malformed" "inputs.json is not understood";
    InputMissing = 101 "input-missing" "an input is not there";
    InputHash = 102 "input-hash" "an input is not the one that is pinned";
    InputKnownBad = 103 "input-known-bad" "an input is on its known-bad list";
    KeyFile = 104 "key-file" "the key file is unusable, or others can read it";
    Signature = 105 "signature" "the signature does not fit the manifest";
    ReleaseMalformed = 106 "release-malformed" "the release manifest is not understood";
    ReleaseFile = 107 "release-file" "a file of the release is modified or missing";
    ReleaseExtra = 108 "release-extra" "a file that the release manifest does not name";
}

impl Class {
    /// The process exit code.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Its class.
    pub class: Class,
    /// The file or crate that it is about.
    pub subject: String,
    /// What is wrong with it, for a person.
    pub reason: String,
}

impl Finding {
    /// A finding about `subject`.
    pub fn new(class: Class, subject: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { class, subject: subject.into(), reason: reason.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} {}] {}: {}", self.class.code(), self.class.slug(), self.subject, self.reason)
    }
}

impl std::error::Error for Finding {}

/// Shorthand: most steps fail with one finding.
pub type Result<T> = std::result::Result<T, Finding>;

/// What a run found: failures, and what a reader should know though it is not a failure.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Failures, in the order they were found.
    pub findings: Vec<Finding>,
    /// Remarks for a person.
    pub notes: Vec<String>,
    /// Figures and lists, by name, for `--json`.
    pub facts: BTreeMap<String, Value>,
}

impl Report {
    /// Records a failure.
    pub fn fail(&mut self, class: Class, subject: impl Into<String>, reason: impl Into<String>) {
        self.findings.push(Finding::new(class, subject, reason));
    }

    /// Records a failure that a step returned, and gives the value otherwise.
    pub fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|finding| self.findings.push(finding)).ok()
    }

    /// Zero, or the code of the gravest class (the lowest).
    pub fn exit_code(&self) -> u8 {
        self.findings.iter().map(|finding| finding.class.code()).min().unwrap_or(0)
    }

    /// The report as JSON, keys sorted, findings in order of their classes.
    pub fn to_json(&self) -> Value {
        let mut findings = self.findings.clone();
        findings.sort();
        json!({
            "ok": findings.is_empty(),
            "exit_code": self.exit_code(),
            "findings": findings.iter().map(|finding| json!({
                "class": finding.class.slug(),
                "code": finding.class.code(),
                "subject": finding.subject,
                "reason": finding.reason,
            })).collect::<Vec<_>>(),
            "notes": self.notes,
            "facts": self.facts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_slugs_are_unique_and_ordered() {
        let codes: Vec<u8> = Class::ALL.iter().map(|class| class.code()).collect();
        assert!(codes.windows(2).all(|pair| pair[0] < pair[1]));
        let mut slugs: Vec<_> = Class::ALL.iter().map(|class| class.slug()).collect();
        slugs.sort_unstable();
        slugs.dedup();
        assert_eq!(slugs.len(), Class::ALL.len());
    }

    #[test]
    fn the_gravest_class_gives_the_exit_code() {
        let mut report = Report::default();
        assert_eq!(report.exit_code(), 0);
        report.fail(Class::Vulnerable, "a", "b");
        report.fail(Class::FileExtra, "c", "d");
        assert_eq!(report.exit_code(), Class::FileExtra.code());
        assert_eq!(report.to_json()["findings"][0]["class"], "file-extra");
    }
}
