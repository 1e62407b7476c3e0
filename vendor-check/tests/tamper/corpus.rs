//! The tamper corpus: every attack that vendor-check claims to stop, each on a fresh workspace, with
//! the exit code of its own class and a message that names the file and the reason.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::support::{Fixture, outcome, text};
use serde_json::json;
use vendor_check::codec::{hex, sha256};
use vendor_check::failure::Class;

/// An attack: its name, the class that it must end in, a text that the finding must name, and the deed.
type Attack = (&'static str, Class, &'static str, fn(&mut Fixture) -> Command);

const LIB: &str = "vendor/dep-1.0.0/src/lib.rs";
const CHECKSUMS: &str = "vendor/dep-1.0.0/.cargo-checksum.json";
const ARCHIVE: &str = "dist/crates/dep-1.0.0.crate";

/// Adds an entry to the archive, with a lock that fits.
fn archive_entry(f: &mut Fixture, path: &str, kind: u8) -> Command {
    f.entries.push((path.to_owned(), kind, Vec::new()));
    f.relock();
    f.check()
}

fn upgrade(f: &mut Fixture, path: &str, text: &str) -> Command {
    f.set_entry(path, text);
    f.upgrade();
    f.check()
}

fn policy(f: &Fixture, change: impl FnOnce(&mut serde_json::Value)) -> Command {
    f.edit("judgements/policy.json", change);
    f.check()
}

fn budget(f: &Fixture, key: &str, delta: i64) -> Command {
    policy(f, |policy| {
        let value = &mut policy["budgets"][1][key];
        *value = json!(value.as_i64().expect("number") + delta);
    })
}

fn audit(f: &Fixture, change: impl FnOnce(&mut serde_json::Value)) -> Command {
    f.edit("judgements/audits.json", change);
    f.check()
}

/// The signature that the program would make: HMAC-SHA-256 with a key of less than a block.
fn sign(f: &Fixture, manifest: &[u8]) {
    use sha2::{Digest, Sha256};
    let key = f.read("key");
    let pad =
        |with: u8| -> Vec<u8> { (0..64).map(|index| key.get(index).copied().unwrap_or(0) ^ with).collect() };
    let inner = Sha256::digest([&pad(0x36)[..], b"wrenn release manifest v1\n", manifest].concat());
    let outer = Sha256::digest([&pad(0x5c)[..], &inner[..]].concat());
    f.write("release/release.json", manifest);
    f.write("release/release.json.hmac", hex(&outer));
}

const ATTACKS: &[Attack] = &[
    ("lock-unknown-key", Class::LockMalformed, "Cargo.lock", |f| {
        f.append("Cargo.lock", "\n[metadata]\nx = \"y\"\n");
        f.check()
    }),
    ("lock-not-toml", Class::LockMalformed, "Cargo.lock", |f| {
        f.append("Cargo.lock", "\nx = 1979-05-27\n");
        f.check()
    }),
    ("lock-git-source", Class::LockSource, "dep 1.0.0", |f| {
        f.replace("Cargo.lock", crate::support::REGISTRY, "git+https://example.invalid/dep?rev=1#1");
        f.check()
    }),
    ("lock-other-registry", Class::LockSource, "dep 1.0.0", |f| {
        f.replace("Cargo.lock", crate::support::REGISTRY, "registry+https://example.invalid/index");
        f.check()
    }),
    ("lock-path-source", Class::LockSource, "dep 1.0.0", |f| {
        let text = String::from_utf8(f.read("Cargo.lock")).expect("text");
        f.write("Cargo.lock", text.split("source = ").next().expect("head"));
        f.check()
    }),
    ("manifest-git-dependency", Class::LockSource, "app/Cargo.toml", |f| {
        f.replace(
            "app/Cargo.toml",
            "dep.workspace = true",
            "dep = { git = \"https://example.invalid/dep\" }",
        );
        f.check()
    }),
    ("manifest-path-dependency", Class::LockSource, "no member of the workspace", |f| {
        f.replace("app/Cargo.toml", "dep.workspace = true", "dep = { path = \"../../dep\" }");
        f.check()
    }),
    ("manifest-path-to-a-double", Class::LockSource, "no member of the workspace", |f| {
        // Another directory, a package of a member's name.
        f.replace("Cargo.toml", "[\"app\"]", "[\"app\", \"lib\"]");
        for directory in ["lib", "double"] {
            f.write(&format!("{directory}/Cargo.toml"), "[package]\nname = \"lib\"\nversion = \"0.1.0\"\n");
            f.write(&format!("{directory}/src/lib.rs"), "");
        }
        f.append("app/Cargo.toml", "lib = { path = \"../double\" }\n");
        f.check()
    }),
    ("lock-no-checksum", Class::LockChecksum, "dep 1.0.0", |f| {
        let text = String::from_utf8(f.read("Cargo.lock")).expect("text");
        f.write("Cargo.lock", text.split("checksum = ").next().expect("head"));
        f.check()
    }),
    ("patch", Class::Patch, "Cargo.toml", |f| {
        f.append("Cargo.toml", "\n[patch.crates-io]\ndep = { path = \"vendor/dep-1.0.0\" }\n");
        f.check()
    }),
    ("replace", Class::Patch, "Cargo.toml", |f| {
        f.append("Cargo.toml", "\n[replace]\n\"dep:1.0.0\" = { path = \"vendor/dep-1.0.0\" }\n");
        f.check()
    }),
    ("config-rustc-wrapper", Class::CargoConfig, ".cargo/config.toml", |f| {
        f.write(".cargo/config.toml", "[build]\nrustc-wrapper = \"/usr/bin/env\"\n");
        f.check()
    }),
    ("config-old-name-in-member", Class::CargoConfig, "app/.cargo/config", |f| {
        f.write("app/.cargo/config", "[build]\nrustflags = [\"--cfg\", \"evil\"]\n");
        f.check()
    }),
    ("config-in-cargo-home", Class::CargoConfig, "cargo-home/config.toml", |f| {
        f.write("cargo-home/config.toml", "[source.crates-io]\nreplace-with = \"mirror\"\n");
        f.check()
    }),
    ("config-committed-changed", Class::CargoConfig, "judgements/offline.toml", |f| {
        f.append("judgements/offline.toml", "[build]\nrustc-wrapper = \"/usr/bin/env\"\n");
        f.check()
    }),
    ("config-linked-directory", Class::CargoConfig, ".cargo", |f| {
        f.symlink("/tmp", ".cargo");
        f.check()
    }),
    ("toolchain-file", Class::CargoConfig, "rust-toolchain.toml", |f| {
        f.write("rust-toolchain.toml", "[toolchain]\npath = \"/tmp/evil\"\n");
        f.check()
    }),
    ("environment-wrapper", Class::CargoConfig, "RUSTC_WRAPPER", |f| {
        f.variables.insert("RUSTC_WRAPPER".into(), "/usr/bin/env".into());
        f.check()
    }),
    ("archive-missing", Class::ArchiveMissing, "dep-1.0.0.crate", |f| {
        f.remove(ARCHIVE);
        f.check()
    }),
    ("archive-extra", Class::ArchiveExtra, "evil-1.0.0.crate", |f| {
        f.write("dist/crates/evil-1.0.0.crate", "x");
        f.check()
    }),
    ("archive-other-bytes", Class::ArchiveHash, "dep-1.0.0.crate", |f| {
        f.set_entry("src/lib.rs", "pub fn word() -> &'static str { \"evil\" }\n");
        let bytes = crate::support::pack(&f.entries);
        f.write(ARCHIVE, bytes);
        f.revendor();
        f.check()
    }),
    ("archive-not-gzip", Class::ArchiveMalformed, "dep-1.0.0.crate", |f| {
        f.lock_bytes(b"not an archive");
        f.check()
    }),
    ("archive-second-member", Class::ArchiveMalformed, "after the end", |f| {
        let archive = f.read(ARCHIVE);
        f.lock_bytes(&[&archive[..], &archive[..]].concat());
        f.check()
    }),
    ("archive-file-twice", Class::ArchiveMalformed, "twice", |f| {
        archive_entry(f, "dep-1.0.0/src/lib.rs", b'0')
    }),
    ("archive-file-and-directory", Class::ArchiveMalformed, "both a file and a directory", |f| {
        archive_entry(f, "dep-1.0.0/src/lib.rs/x", b'0')
    }),
    ("archive-of-another-crate", Class::ArchiveIdentity, "dep-1.0.0.crate", |f| {
        f.set_entry("Cargo.toml", "[package]\nname = \"other\"\nversion = \"1.0.0\"\n");
        f.relock();
        f.check()
    }),
    ("archive-symlink", Class::Symlink, "dep-1.0.0/link", |f| archive_entry(f, "dep-1.0.0/link", b'2')),
    ("archive-hard-link", Class::Symlink, "dep-1.0.0/link", |f| archive_entry(f, "dep-1.0.0/link", b'1')),
    ("archive-device", Class::SpecialFile, "dep-1.0.0/null", |f| archive_entry(f, "dep-1.0.0/null", b'3')),
    ("archive-escapes", Class::EscapingPath, "../evil", |f| archive_entry(f, "dep-1.0.0/../../evil", b'0')),
    ("archive-absolute", Class::EscapingPath, "/etc/evil", |f| archive_entry(f, "/etc/evil", b'0')),
    ("archive-other-directory", Class::EscapingPath, "other-1.0.0/x", |f| {
        archive_entry(f, "other-1.0.0/x", b'0')
    }),
    ("archive-case", Class::CaseCollision, "SRC/lib.rs", |f| archive_entry(f, "dep-1.0.0/SRC/lib.rs", b'0')),
    ("archive-case-directory", Class::CaseCollision, "SRC", |f| {
        archive_entry(f, "dep-1.0.0/SRC/other.rs", b'0')
    }),
    ("archive-own-checksums", Class::HiddenPath, ".cargo-checksum.json", |f| {
        archive_entry(f, "dep-1.0.0/.cargo-checksum.json", b'0')
    }),
    ("archive-link-on-disk", Class::Symlink, "dep-1.0.0.crate", |f| {
        let bytes = f.read(ARCHIVE);
        f.write("elsewhere", bytes);
        f.remove(ARCHIVE);
        f.symlink("../../elsewhere", ARCHIVE);
        f.check()
    }),
    ("vendor-crate-missing", Class::CrateMissing, "vendor/dep-1.0.0", |f| {
        f.remove("vendor/dep-1.0.0");
        f.check()
    }),
    ("vendor-crate-extra", Class::CrateExtra, "vendor/evil-1.0.0", |f| {
        f.write("vendor/evil-1.0.0/src/lib.rs", "");
        f.check()
    }),
    ("vendor-file-modified", Class::FileModified, LIB, |f| {
        f.append(LIB, "// evil\n");
        f.check()
    }),
    ("vendor-file-modified-same-length", Class::FileModified, LIB, |f| {
        f.replace(LIB, "honest", "h0nest");
        f.check()
    }),
    ("vendor-file-extra", Class::FileExtra, "src/evil.rs", |f| {
        f.write("vendor/dep-1.0.0/src/evil.rs", "");
        f.check()
    }),
    ("vendor-directory-extra", Class::FileExtra, "vendor/dep-1.0.0/empty", |f| {
        fs::create_dir(f.path("vendor/dep-1.0.0/empty")).expect("directory");
        f.check()
    }),
    ("vendor-file-missing", Class::FileMissing, "src/data.txt", |f| {
        f.remove("vendor/dep-1.0.0/src/data.txt");
        f.check()
    }),
    ("vendor-file-symlink", Class::Symlink, LIB, |f| {
        f.remove(LIB);
        f.symlink("data.txt", LIB);
        f.check()
    }),
    ("vendor-crate-symlink", Class::Symlink, "vendor/dep-1.0.0", |f| {
        fs::rename(f.path("vendor/dep-1.0.0"), f.path("elsewhere")).expect("rename");
        f.symlink("../elsewhere", "vendor/dep-1.0.0");
        f.check()
    }),
    ("vendor-hard-link", Class::Symlink, LIB, |f| {
        fs::hard_link(f.path(LIB), f.path("elsewhere")).expect("link");
        f.check()
    }),
    ("vendor-fifo", Class::SpecialFile, "vendor/dep-1.0.0/pipe", |f| {
        f.fifo("vendor/dep-1.0.0/pipe");
        f.check()
    }),
    ("vendor-symlink-escapes", Class::EscapingPath, LIB, |f| {
        f.remove(LIB);
        f.symlink("../../../app/src/main.rs", LIB);
        f.check()
    }),
    ("vendor-case", Class::CaseCollision, "src/LIB.rs", |f| {
        f.write("vendor/dep-1.0.0/src/LIB.rs", "pub fn word() -> &'static str { \"evil\" }\n");
        f.check()
    }),
    ("vendor-case-directory", Class::CaseCollision, "vendor/dep-1.0.0/SRC", |f| {
        fs::create_dir(f.path("vendor/dep-1.0.0/SRC")).expect("directory");
        f.check()
    }),
    ("vendor-hidden-file", Class::HiddenPath, ".evil", |f| {
        f.write("vendor/dep-1.0.0/.evil", "");
        f.check()
    }),
    ("vendor-hidden-configuration", Class::HiddenPath, "vendor/dep-1.0.0/.cargo", |f| {
        f.write("vendor/dep-1.0.0/.cargo/config.toml", "[build]\n");
        f.check()
    }),
    ("vendor-hidden-directory", Class::HiddenPath, "vendor/.evil", |f| {
        f.write("vendor/.evil/x", "");
        f.check()
    }),
    ("checksums-empty", Class::ChecksumEmpty, CHECKSUMS, |f| {
        f.edit(CHECKSUMS, |value| value["files"] = json!({}));
        f.check()
    }),
    ("checksums-missing", Class::ChecksumEmpty, CHECKSUMS, |f| {
        f.remove(CHECKSUMS);
        f.check()
    }),
    ("checksums-lie", Class::ChecksumFiles, "src/lib.rs", |f| {
        f.edit(CHECKSUMS, |value| value["files"]["src/lib.rs"] = json!(sha256(b"evil")));
        f.check()
    }),
    ("checksums-leave-out", Class::ChecksumFiles, "src/lib.rs", |f| {
        f.edit(CHECKSUMS, |value| {
            value["files"].as_object_mut().expect("map").remove("src/lib.rs");
        });
        f.check()
    }),
    ("checksums-other-package", Class::ChecksumPackage, CHECKSUMS, |f| {
        f.edit(CHECKSUMS, |value| value["package"] = json!(sha256(b"evil")));
        f.check()
    }),
    ("checksums-null-package", Class::ChecksumPackage, CHECKSUMS, |f| {
        f.edit(CHECKSUMS, |value| value["package"] = json!(null));
        f.check()
    }),
    ("policy-unknown-key", Class::PolicyMalformed, "policy.json", |f| {
        policy(f, |policy| policy["allow_all"] = json!(true))
    }),
    ("policy-direct-crate", Class::DirectCrate, "app -> dep", |f| {
        policy(f, |policy| policy["crates"] = json!([]))
    }),
    ("policy-feature", Class::Feature, "app -> dep", |f| {
        f.replace(
            "app/Cargo.toml",
            "dep.workspace = true",
            "dep = { version = \"1\", features = [\"extra\"] }",
        );
        f.check()
    }),
    ("policy-banned", Class::Banned, "dep 1.0.0", |f| {
        policy(f, |policy| policy["banned"] = json!([{ "name": "dep", "versions": "<2", "reason": "bad" }]))
    }),
    ("policy-budget-exceeded", Class::BudgetExceeded, "app", |f| budget(f, "limit", -1)),
    ("policy-budget-raised", Class::BudgetRaised, "app", |f| budget(f, "reviewed", -1)),
    ("policy-budget-slack", Class::BudgetSlack, "app", |f| {
        budget(f, "reviewed", 1);
        budget(f, "limit", 1)
    }),
    ("policy-unknown-member", Class::UnknownMember, "sneaky", |f| {
        f.replace("Cargo.toml", "[\"app\"]", "[\"app\", \"sneaky\"]");
        f.write("sneaky/Cargo.toml", "[package]\nname = \"sneaky\"\nversion = \"0.1.0\"\n");
        f.write("sneaky/src/lib.rs", "");
        f.check()
    }),
    ("audit-unknown-key", Class::AuditsMalformed, "audits.json", |f| {
        audit(f, |audits| audits["trust"] = json!("all"))
    }),
    ("audit-of-another-tree", Class::AuditHash, "dep 1.0.0", |f| {
        audit(f, |audits| audits["audits"][0]["tree_sha256"] = json!(sha256(b"")))
    }),
    ("audit-after-an-upgrade", Class::AuditHash, "dep 1.0.0", |f| {
        let audits = f.read("judgements/audits.json");
        f.set_entry("src/data.txt", "other\n");
        f.upgrade();
        f.write("judgements/audits.json", audits);
        f.check()
    }),
    ("audit-none", Class::Unaudited, "dep 1.0.0", |f| audit(f, |audits| audits["audits"] = json!([]))),
    ("audit-expired", Class::AuditExpired, "dep 1.0.0", |f| {
        audit(f, |audits| audits["audits"][0]["expires"] = json!("2026-05-31"))
    }),
    ("audit-violation", Class::Violation, "dep 1.0.0", |f| {
        let violation = json!([{ "name": "dep", "versions": "*", "who": "t", "date": "2026-01-01", "reason": "backdoor" }]);
        audit(f, |audits| audits["violations"] = violation)
    }),
    ("audit-delta-from-nowhere", Class::DeltaBroken, "dep 1.0.0", |f| {
        audit(f, |audits| {
            audits["audits"][0]["from"] = json!({ "version": "0.9.0", "tree_sha256": sha256(b"") });
        })
    }),
    ("inventory-build-script", Class::BuildScript, "build.rs", |f| {
        upgrade(f, "build.rs", "fn main() { /* evil */ }\n")
    }),
    ("inventory-proc-macro", Class::ProcMacro, "dep 1.0.0", |f| {
        let manifest =
            String::from_utf8(f.entry("Cargo.toml").clone()).expect("text") + "[lib]\nproc-macro = true\n";
        upgrade(f, "Cargo.toml", &manifest)
    }),
    ("inventory-include", Class::Include, "data.txt", |f| {
        upgrade(f, "src/lib.rs", "pub fn word() -> &'static str { include_str!(\"data.txt\") }\n")
    }),
    ("inventory-path-attribute", Class::Include, "hidden.txt", |f| {
        f.set_entry("tests/hidden.txt", "pub fn f() {}\n");
        let source = "#[path = \"../tests/hidden.txt\"] mod x;\npub fn word() -> &'static str { \"\" }\n";
        upgrade(f, "src/lib.rs", source)
    }),
    ("inventory-links", Class::Links, "dep 1.0.0", |f| {
        let manifest = String::from_utf8(f.entry("Cargo.toml").clone()).expect("text");
        upgrade(f, "Cargo.toml", &manifest.replace("build = ", "links = \"z\"\nbuild = "))
    }),
    ("inventory-ffi", Class::Ffi, "src/lib.rs", |f| {
        upgrade(f, "src/lib.rs", "extern \"C\" { fn system(); }\npub fn word() -> &'static str { \"\" }\n")
    }),
    ("inventory-native", Class::NativeBlob, "data.txt", |f| {
        upgrade(f, "src/data.txt", "\x7fELF\x02\x01\x01")
    }),
    ("inventory-unsafe", Class::UnsafeCount, "dep 1.0.0", |f| {
        upgrade(f, "src/lib.rs", "pub fn word() -> &'static str { unsafe { std::mem::zeroed() } }\n")
    }),
    ("inventory-unknown-key", Class::InventoryMalformed, "inventory.json", |f| {
        f.edit("judgements/inventory.json", |value| value["x"] = json!(1));
        f.check()
    }),
    ("licence-none", Class::LicenceMissing, "dep 1.0.0", |f| {
        let manifest = String::from_utf8(f.entry("Cargo.toml").clone()).expect("text");
        upgrade(f, "Cargo.toml", &manifest.replace("license = \"MIT\"\n", ""))
    }),
    ("licence-no-text", Class::LicenceMissing, "dep 1.0.0", |f| {
        f.entries.retain(|(path, ..)| !path.ends_with("LICENSE"));
        f.upgrade();
        f.check()
    }),
    ("licence-other-text", Class::LicenceMismatch, "GPL", |f| {
        f.set_entry("COPYING", "GNU GENERAL PUBLIC LICENSE\nVersion 3\n");
        f.upgrade();
        f.check()
    }),
    ("licence-denied", Class::LicenceDenied, "dep 1.0.0", |f| {
        let manifest = String::from_utf8(f.entry("Cargo.toml").clone()).expect("text");
        f.set_entry("LICENSE", "GNU GENERAL PUBLIC LICENSE\nVersion 3\n");
        upgrade(f, "Cargo.toml", &manifest.replace("\"MIT\"", "\"GPL-3.0-only\""))
    }),
    ("notice-stale", Class::NoticeStale, "NOTICE", |f| {
        f.write("NOTICE", "nothing\n");
        f.run(&["notice", "--check", text(&f.path("NOTICE"))])
    }),
    ("advisories-none", Class::AdvisoriesMissing, "advisories.json", |f| {
        f.remove("judgements/advisories.json");
        f.check()
    }),
    ("advisories-empty", Class::AdvisoriesMalformed, "advisories.json", |f| {
        f.edit("judgements/advisories.json", |value| value["advisories"] = json!([]));
        f.check()
    }),
    ("advisories-too-old", Class::AdvisoriesStale, "days old", |f| {
        f.edit("judgements/advisories.json", |value| value["date"] = json!("2026-05-01"));
        f.check()
    }),
    ("advisories-rolled-back", Class::AdvisoriesStale, "roll-back", |f| {
        f.edit("judgements/advisories.json", |value| value["sequence"] = json!(4));
        f.check()
    }),
    ("advisories-from-the-future", Class::AdvisoriesStale, "future", |f| {
        f.edit("judgements/advisories.json", |value| value["date"] = json!("2030-01-01"));
        f.check()
    }),
    ("advisory-applies", Class::Vulnerable, "dep 1.0.0", |f| {
        f.edit("judgements/advisories.json", |value| value["advisories"][0]["patched"] = json!([">=1.0.1"]));
        f.check()
    }),
    ("advisory-prerelease-is-not-fixed", Class::Vulnerable, "dep 1.0.0", |f| {
        f.edit("judgements/advisories.json", |value| {
            value["advisories"][0]["patched"] = json!([">1.0.0"]);
            value["advisories"][0]["unaffected"] = json!(["<1.0.0-rc.1"]);
        });
        f.check()
    }),
    ("sbom-stale", Class::SbomStale, "app.cdx.json", |f| {
        let directory = f.path("sbom");
        assert_eq!(outcome(f.run(&["sbom", text(&directory)])).code, 0);
        f.replace("sbom/app.cdx.json", "pkg:cargo/dep@1.0.0", "pkg:cargo/dep@1.0.1");
        f.run(&["sbom", "--check", text(&directory)])
    }),
    ("binary-damaged", Class::BinaryMalformed, "out/app", |f| {
        f.embedded();
        let mut bytes = f.read("out/app");
        let list = bytes.windows(12).rposition(|window| window == b"{\"packages\":").expect("the list");
        bytes[list] ^= 1;
        f.write("out/app", bytes);
        f.run(&["binary", text(&f.path("out/app"))])
    }),
    ("binary-not-elf", Class::BinaryMalformed, "out/app", |f| {
        f.write("out/app", "#!/bin/sh\n");
        f.run(&["binary", text(&f.path("out/app"))])
    }),
    ("binary-without-list", Class::BinaryUnlisted, "in/app", |f| {
        f.embedded();
        f.run(&["binary", text(&f.path("in/app"))])
    }),
    ("binary-of-another-lock", Class::BinaryMismatch, "app 0.1.0", |f| {
        f.embedded();
        f.replace("app/Cargo.toml", "0.1.0", "0.2.0");
        f.replace("Cargo.lock", "0.1.0", "0.2.0");
        f.run(&["binary", text(&f.path("out/app"))])
    }),
    ("input-unknown-key", Class::InputsMalformed, "inputs.json", |f| {
        f.edit("judgements/inputs.json", |value| value["x"] = json!(1));
        f.run(&["inputs", text(&f.path("release"))])
    }),
    ("input-missing", Class::InputMissing, "kernel", |f| {
        f.remove("release/kernel");
        f.run(&["inputs", text(&f.path("release"))])
    }),
    ("input-changed", Class::InputHash, "kernel", |f| {
        f.append("release/kernel", "evil");
        f.run(&["inputs", text(&f.path("release"))])
    }),
    ("input-known-bad-version", Class::InputKnownBad, "kernel", |f| {
        f.edit("judgements/inputs.json", |value| value["inputs"][0]["version"] = json!("5.0"));
        f.run(&["inputs", text(&f.path("release"))])
    }),
    ("input-known-bad-hash", Class::InputKnownBad, "kernel", |f| {
        let bad = json!([{ "sha256": sha256(b"kernel\n"), "reason": "backdoor" }]);
        f.edit("judgements/inputs.json", |value| value["inputs"][0]["known_bad"] = bad);
        f.run(&["inputs", text(&f.path("release"))])
    }),
    ("key-readable-by-others", Class::KeyFile, "chmod 600", |f| {
        f.set_mode("key", 0o640);
        f.verify_release()
    }),
    ("key-too-short", Class::KeyFile, "32", |f| {
        f.write("key", "short");
        f.verify_release()
    }),
    ("release-other-key", Class::Signature, "release.json", |f| {
        f.signed();
        f.write("key", "x".repeat(40));
        f.verify_release()
    }),
    ("release-manifest-edited", Class::Signature, "release.json", |f| {
        f.signed();
        f.replace("release/release.json", "1.0.0", "1.0.1");
        f.verify_release()
    }),
    ("release-manifest-of-another-format", Class::ReleaseMalformed, "release.json", |f| {
        sign(f, b"{\"format\": 2}");
        f.verify_release()
    }),
    ("release-file-changed", Class::ReleaseFile, "kernel", |f| {
        f.signed();
        f.append("release/kernel", "evil");
        f.verify_release()
    }),
    ("release-file-missing", Class::ReleaseFile, "kernel", |f| {
        f.signed();
        f.remove("release/kernel");
        f.verify_release()
    }),
    ("release-file-extra", Class::ReleaseExtra, "evil", |f| {
        f.signed();
        f.write("release/evil", "");
        f.verify_release()
    }),
];

#[test]
fn the_honest_workspace_passes() {
    let f = Fixture::new("honest");
    let honest = outcome(f.check());
    assert_eq!(honest.code, 0, "{:#}", honest.report);
    assert_eq!(honest.report["facts"]["audited"]["dep 1.0.0"], json!(["read"]));
    f.embedded();
    let binary = outcome(f.run(&["binary", text(&f.path("out/app"))]));
    assert_eq!(binary.code, 0, "{:#}", binary.report);
    f.signed();
    assert_eq!(outcome(f.verify_release()).code, 0);
    assert_eq!(outcome(f.run(&["inputs", text(&f.path("release"))])).code, 0);
}

#[test]
fn every_attack_is_caught_with_its_own_exit_code() {
    let mut missed = Vec::new();
    for (name, class, names, deed) in ATTACKS {
        let mut fixture = Fixture::new(name);
        let outcome = outcome(deed(&mut fixture));
        let findings = outcome.report["findings"].as_array().cloned().unwrap_or_default();
        let named = findings.iter().any(|finding| {
            let has = |key: &str| finding[key].as_str().is_some_and(|text| text.contains(names));
            finding["class"] == class.slug() && (has("subject") || has("reason")) && finding["reason"] != ""
        });
        if outcome.code != i32::from(class.code()) || !named {
            missed.push(format!("{name}: exit {} instead of {}: {findings:#?}", outcome.code, class.code()));
        }
    }
    assert!(
        missed.is_empty(),
        "{} of {} not caught as they should:\n{}",
        missed.len(),
        ATTACKS.len(),
        missed.join("\n")
    );
}

#[test]
fn the_corpus_has_every_class() {
    let attacked: BTreeSet<Class> = ATTACKS.iter().map(|(_, class, ..)| *class).collect();
    let all: BTreeSet<Class> =
        Class::ALL.iter().copied().filter(|class| !matches!(class, Class::Usage | Class::Io)).collect();
    assert_eq!(attacked, all);
    let names: BTreeSet<&str> = ATTACKS.iter().map(|(name, ..)| *name).collect();
    assert_eq!(names.len(), ATTACKS.len(), "a name is used twice");
}
