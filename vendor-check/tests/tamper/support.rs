//! A small honest workspace in a temporary directory: one program, one crate, its archive, its
//! vendored copy, and judgements that fit. Each test then does to it what an attacker would.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use vendor_check::archive::{self, Archive};
use vendor_check::check::{self, Places};
use vendor_check::codec::{gzip, sha256, zlib};
use vendor_check::failure::Report;
use vendor_check::lock::CrateId;
use vendor_check::{inventory, vendor};

pub const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";
pub const TODAY: &str = "2026-06-01";

const MIT: &str = "Permission is hereby granted, free of charge, to any person\nThe above copyright notice and this \
                   permission notice shall be included\n";

/// The program under test.
pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_vendor-check")
}

/// A tar entry: path, type flag, content.
pub type TarEntry = (String, u8, Vec<u8>);

/// One entry in tar's form (ustar).
fn tar_entry(path: &str, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut block = vec![0u8; 512];
    block[..path.len()].copy_from_slice(path.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    block[156] = kind;
    block[257..263].copy_from_slice(b"ustar\0");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.extend(data);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

/// gzip with stored blocks.
pub fn gzip(plain: &[u8]) -> Vec<u8> {
    let wrapped = zlib::compress_stored(plain);
    let mut bytes = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    bytes.extend(&wrapped[2..wrapped.len() - 4]);
    bytes.extend(gzip::crc32(plain).to_le_bytes());
    bytes.extend((plain.len() as u32).to_le_bytes());
    bytes
}

/// A `.crate` archive of entries.
pub fn pack(entries: &[TarEntry]) -> Vec<u8> {
    let mut tar: Vec<u8> =
        entries.iter().flat_map(|(path, kind, data)| tar_entry(path, *kind, data)).collect();
    tar.resize(tar.len() + 1024, 0);
    gzip(&tar)
}

/// The workspace.
pub struct Fixture {
    pub root: PathBuf,
    /// What the archive of `dep` is made of.
    pub entries: Vec<TarEntry>,
    /// Set for the program when it runs.
    pub variables: BTreeMap<String, String>,
    keep: bool,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}

impl Fixture {
    /// An honest workspace. With VENDOR_CHECK_CORPUS_DIR set, it is made there under its name and
    /// kept, so that other tools can be run on the same corpus.
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let kept = std::env::var_os("VENDOR_CHECK_CORPUS_DIR").map(PathBuf::from);
        let root = match &kept {
            Some(directory) => directory.join(name),
            None => std::env::temp_dir().join(format!("vendor-check-{}-{number}", std::process::id())),
        };
        let _ = fs::remove_dir_all(&root);
        let file = |path: &str, text: &str| (format!("dep-1.0.0/{path}"), b'0', text.as_bytes().to_vec());
        let manifest = "[package]\nname = \"dep\"\nversion = \"1.0.0\"\nedition = \"2021\"\nlicense = \"MIT\"\n\
                        build = \"build.rs\"\n\n[features]\nextra = []\n";
        let entries = vec![
            file("Cargo.toml", manifest),
            file("build.rs", "fn main() {}\n"),
            file("LICENSE", MIT),
            file(".gitignore", "target\n"),
            file("src/lib.rs", "pub fn word() -> &'static str { \"honest\" }\n"),
            file("src/data.txt", "data\n"),
        ];
        let fixture = Self { root, entries, variables: BTreeMap::new(), keep: kept.is_some() };
        fixture.write(
            "Cargo.toml",
            "[workspace]\nresolver = \"2\"\nmembers = [\"app\"]\n\n[workspace.dependencies]\ndep = \"1\"\n",
        );
        fixture.write(
            "app/Cargo.toml",
            "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\nlicense = \"MIT\"\n\n[dependencies]\n\
             dep.workspace = true\n",
        );
        fixture.write("app/src/main.rs", "fn main() { println!(\"{}\", dep::word()); }\n");
        let offline =
            "[source.crates-io]\nreplace-with = \"vendored\"\n[source.vendored]\ndirectory = \"vendor\"\n";
        fixture.write("judgements/offline.toml", offline);
        fixture.relock();
        fixture.revendor();
        fixture.write("judgements/policy.json", fixture.policy(&BTreeMap::new()).to_string());
        fixture.judge(true);
        fixture.write(
            "judgements/advisories.json",
            json!({
                "format": "advisory-snapshot 1", "source": "test", "date": "2026-05-20", "sequence": 7,
                "advisories": [{ "id": "TEST-1", "package": "dep", "title": "old ones leak",
                                 "patched": [">=1.0.0"], "unaffected": [] }],
            })
            .to_string(),
        );
        fixture.write("release/kernel", "kernel\n");
        fixture.write(
            "judgements/inputs.json",
            json!({ "format": 1, "inputs": [{
                "name": "kernel", "version": "6.1", "path": "kernel", "source": "test", "required": true,
                "sha256": sha256(b"kernel\n"), "known_bad": [{ "version": "5.0", "reason": "old" }],
            }]})
            .to_string(),
        );
        fixture.write("key", "k".repeat(40));
        fixture.set_mode("key", 0o600);
        fixture
    }

    fn policy(&self, counts: &BTreeMap<String, BTreeMap<String, u64>>) -> Value {
        let budgets: Vec<Value> = counts
            .iter()
            .flat_map(|(binary, counts)| counts.iter().map(move |(what, count)| (binary, what, count)))
            .map(|(binary, what, count)| {
                json!({ "binary": binary, "what": what, "limit": count, "reviewed": count, "by": "t",
                        "date": "2026-01-01", "reason": "first" })
            })
            .collect();
        json!({
            "format": 1,
            "registry": REGISTRY,
            "cargo_config": [{ "path": "judgements/offline.toml", "sha256": sha256(&self.read("judgements/offline.toml")) }],
            "crates": ["dep"],
            "members": { "app": { "shipped": true, "binary": "app", "target": "x86_64-unknown-linux-gnu",
                                  "dependencies": { "dep": { "default_features": true, "features": [] } } } },
            "banned": [{ "name": "evil", "reason": "it is" }],
            "budgets": budgets,
            "licences": { "allow": ["MIT"] },
            "advisories": { "max_age_days": 30, "min_sequence": 5 },
        })
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        fs::write(path, text).expect("write");
    }

    pub fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.path(path)).expect("read")
    }

    /// Replaces a text in a file; it must be there.
    pub fn replace(&self, path: &str, from: &str, to: &str) {
        let text = String::from_utf8(self.read(path)).expect("text");
        assert!(text.contains(from), "{path} has no {from}");
        self.write(path, text.replace(from, to));
    }

    pub fn append(&self, path: &str, text: &str) {
        let mut bytes = self.read(path);
        bytes.extend(text.as_bytes());
        self.write(path, bytes);
    }

    pub fn remove(&self, path: &str) {
        let path = self.path(path);
        if path.is_dir() {
            fs::remove_dir_all(path).expect("remove")
        } else {
            fs::remove_file(path).expect("remove")
        }
    }

    pub fn symlink(&self, target: &str, path: &str) {
        std::os::unix::fs::symlink(target, self.path(path)).expect("symlink");
    }

    pub fn fifo(&self, path: &str) {
        assert!(Command::new("mkfifo").arg(self.path(path)).status().expect("mkfifo").success());
    }

    pub fn set_mode(&self, path: &str, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).expect("mode");
    }

    /// Changes a JSON file.
    pub fn edit(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&self.read(path)).expect("JSON");
        change(&mut value);
        self.write(path, value.to_string());
    }

    /// The content of an entry of the archive that is to be made.
    pub fn entry(&mut self, path: &str) -> &mut Vec<u8> {
        let path = format!("dep-1.0.0/{path}");
        if !self.entries.iter().any(|(name, ..)| *name == path) {
            self.entries.push((path.clone(), b'0', Vec::new()));
        }
        &mut self.entries.iter_mut().find(|(name, ..)| *name == path).expect("entry").2
    }

    pub fn set_entry(&mut self, path: &str, text: &str) {
        *self.entry(path) = text.as_bytes().to_vec();
    }

    /// Puts an archive there with these bytes, and a lock that names it.
    pub fn lock_bytes(&self, bytes: &[u8]) {
        self.write("dist/crates/dep-1.0.0.crate", bytes);
        self.write(
            "Cargo.lock",
            format!(
                "# This file is automatically @generated by Cargo.\n# It is not intended for manual editing.\n\
                 version = 4\n\n[[package]]\nname = \"app\"\nversion = \"0.1.0\"\ndependencies = [\n \"dep\",\n]\n\n\
                 [[package]]\nname = \"dep\"\nversion = \"1.0.0\"\nsource = \"{REGISTRY}\"\nchecksum = \"{}\"\n",
                sha256(bytes)
            ),
        );
    }

    pub fn relock(&self) {
        self.lock_bytes(&pack(&self.entries));
    }

    fn archives(&self) -> BTreeMap<CrateId, Archive> {
        let id = CrateId { name: "dep".into(), version: "1.0.0".into() };
        let bytes = self.read("dist/crates/dep-1.0.0.crate");
        let archive = Archive::unpack(&id, &sha256(&bytes), &bytes).expect("an archive that is sound");
        BTreeMap::from([(id, archive)])
    }

    pub fn revendor(&self) {
        vendor::write(&self.path("vendor"), &self.archives()).expect("vendor");
    }

    /// Budgets and audits that fit the tree as it is now, and the inventory too if that is wanted.
    pub fn judge(&self, with_inventory: bool) {
        let places = Places {
            root: self.root.clone(),
            archives: self.path("dist/crates"),
            vendor: self.path("vendor"),
            judgements: self.path("judgements"),
            cargo_home: None,
        };
        let mut report = Report::default();
        let tree = check::load(&places, &mut report).unwrap_or_else(|| panic!("{:?}", report.findings));
        let found = tree.inventory();
        let mut counts = check::count_all(&tree, &found).expect("counts");
        counts.insert("Cargo.lock".into(), [("crates".into(), 1)].into());
        self.write("judgements/policy.json", self.policy(&counts).to_string());
        if with_inventory {
            self.write("judgements/inventory.json", inventory::to_text(&found));
        }
        let trees = archive::in_parallel(&tree.archives.values().collect::<Vec<_>>(), |one| one.tree_hash());
        self.write(
            "judgements/audits.json",
            json!({
                "format": 1,
                "criteria": { "read": { "description": "read" } },
                "audits": [{ "name": "dep", "version": "1.0.0", "tree_sha256": trees[0], "criteria": "read",
                             "who": "t", "date": "2026-01-01", "expires": "2027-01-01", "looked_at": "all" }],
                "violations": [],
                "unaudited": [],
            })
            .to_string(),
        );
    }

    /// A new version of the crate's sources: archive, lock, vendor, budgets and audits are renewed;
    /// nobody looked at the inventory.
    pub fn upgrade(&self) {
        self.relock();
        self.revendor();
        self.judge(false);
    }

    /// The program on this workspace.
    pub fn run(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.env_clear().envs(&self.variables).arg("--json").arg("--root").arg(&self.root);
        command
            .arg("--judgements")
            .arg(self.path("judgements"))
            .arg("--cargo-home")
            .arg(self.path("cargo-home"));
        command.args(["--today", TODAY]).args(arguments);
        command
    }

    pub fn check(&self) -> Command {
        self.run(&["check"])
    }

    /// A binary of the name that the policy has, with its list inside.
    pub fn embedded(&self) {
        self.write("in/app", fs::read(program()).expect("program"));
        self.set_mode("in/app", 0o755);
        self.write("out/none", "");
        let (from, to) = (self.path("in/app"), self.path("out/app"));
        let outcome = outcome(self.run(&["embed", text(&from), text(&to)]));
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }

    /// A release directory that is signed.
    pub fn signed(&self) {
        let outcome = outcome(self.run(&[
            "release-manifest",
            text(&self.path("release")),
            "--key",
            text(&self.path("key")),
            "--release",
            "1.0.0",
        ]));
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }

    pub fn verify_release(&self) -> Command {
        self.run(&["verify-release", text(&self.path("release")), "--key", text(&self.path("key"))])
    }
}

/// A path as text; the fixtures' are.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// How a run of the program ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub report: Value,
}

pub fn outcome(mut command: Command) -> Outcome {
    let output = command.output().expect("runs");
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "no JSON ({error}): {} {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    });
    Outcome { code: output.status.code().expect("an exit code"), report }
}
