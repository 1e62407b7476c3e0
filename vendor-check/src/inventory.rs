//! What runs at build time or is not plain Rust: build scripts, procedural macros, included files,
//! `links`, foreign code, native binaries; and `unsafe`, counted. Compared with `inventory.json`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::archive::Archive;
use crate::codec::sha256;
use crate::failure::{Class, Finding, Report, Result};
use crate::json::{self, Object};
use crate::lock::CrateId;
use crate::manifest::{BuildScript, Manifest};
use crate::scan;

const FILE: &str = "inventory.json";
const CLASS: Class = Class::InventoryMalformed;
/// Top-level directories whose sources Cargo does not compile into a dependency, unless another
/// file includes them, which is an entry of its own.
const NOT_COMPILED: [&str; 3] = ["tests/", "benches/", "examples/"];
const NATIVE_SUFFIXES: [&str; 10] =
    [".a", ".so", ".o", ".obj", ".dll", ".lib", ".dylib", ".wasm", ".exe", ".bc"];
/// The first bytes of ELF, ar, PE, Mach-O (both orders, and universal) and WebAssembly files, and LLVM bitcode.
const NATIVE_MAGIC: [&[u8]; 8] = [
    b"\x7fELF",
    b"!<arch>\n",
    b"MZ\x90\0",
    b"\xfe\xed\xfa\xcf",
    b"\xcf\xfa\xed\xfe",
    b"\xca\xfe\xba\xbe",
    b"\0asm",
    b"BC\xc0\xde",
];

/// The inventory of one crate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The build script and its hash.
    pub build_script: BTreeMap<String, String>,
    /// For a procedural macro: the hash of its whole tree, since all of it runs in the compiler.
    pub proc_macro: Option<String>,
    /// "file: argument" of each include, and the hash of the included file, or "computed" where the
    /// path is made at build time.
    pub includes: BTreeMap<String, String>,
    /// The `links` key.
    pub links: Option<String>,
    /// Files with foreign code or assembly, and their hashes.
    pub foreign: BTreeMap<String, String>,
    /// Native binaries and their hashes.
    pub native: BTreeMap<String, String>,
    /// Uses of `unsafe`.
    pub unsafe_uses: u64,
    /// Lines of Rust. Not pinned: the tree's hash is.
    pub lines: u64,
}

impl Entry {
    /// Whether Cargo runs a program of this crate before it is compiled.
    pub fn has_build_script(&self) -> bool {
        !self.build_script.is_empty()
    }

    fn to_json(&self) -> Value {
        let mut object = serde_json::Map::new();
        let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
        for (key, map) in [
            ("build_script", &self.build_script),
            ("includes", &self.includes),
            ("foreign", &self.foreign),
            ("native", &self.native),
        ] {
            if !map.is_empty() {
                put(key, json!(map));
            }
        }
        if let Some(hash) = &self.proc_macro {
            put("proc_macro", json!(hash));
        }
        if let Some(links) = &self.links {
            put("links", json!(links));
        }
        put("unsafe", json!(self.unsafe_uses));
        Value::Object(object)
    }
}

/// The path that an include in `from` means, if it stays inside the crate.
fn relative(from: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
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

fn build_script(archive: &Archive, manifest: &Manifest) -> Option<String> {
    match &manifest.build {
        BuildScript::Off => None,
        BuildScript::Automatic => archive.file("build.rs").map(|_| "build.rs".to_owned()),
        BuildScript::Stated(path) => Some(relative("Cargo.toml", path).unwrap_or_else(|| path.clone())),
    }
}

/// Takes the inventory of a crate.
pub fn take(archive: &Archive, manifest: &Manifest) -> Entry {
    let mut entry = Entry { links: manifest.links.clone(), ..Entry::default() };
    if manifest.proc_macro {
        entry.proc_macro = Some(archive.tree_hash());
    }
    if let Some(path) = build_script(archive, manifest) {
        let hash = archive.file(&path).map_or_else(|| "missing".to_owned(), sha256);
        entry.build_script.insert(path, hash);
    }
    for (path, data) in archive.files() {
        let native = NATIVE_SUFFIXES.iter().any(|suffix| path.ends_with(suffix))
            || NATIVE_MAGIC.iter().any(|magic| data.starts_with(magic));
        if native {
            entry.native.insert(path.to_owned(), sha256(data));
        }
        let compiled = manifest.library.as_deref() == Some(path)
            || !NOT_COMPILED.iter().any(|directory| path.starts_with(directory));
        if !path.ends_with(".rs") || !compiled {
            continue;
        }
        let source = String::from_utf8_lossy(data);
        let found = scan::scan(&source);
        entry.lines += found.lines;
        entry.unsafe_uses += found.unsafe_uses;
        if found.foreign > 0 {
            entry.foreign.insert(path.to_owned(), sha256(data));
        }
        for include in found.includes {
            let target = relative(path, &include).and_then(|target| archive.file(&target));
            let hash = target.map_or_else(|| "computed".to_owned(), sha256);
            entry.includes.insert(format!("{path}: {include}"), hash);
        }
    }
    entry
}

/// The text of `inventory.json` for a tree.
pub fn to_text(entries: &BTreeMap<CrateId, Entry>) -> String {
    let crates: BTreeMap<String, Value> =
        entries.iter().map(|(id, entry)| (id.to_string(), entry.to_json())).collect();
    let mut text =
        serde_json::to_string_pretty(&json!({ "format": 1, "crates": crates })).unwrap_or_default();
    text.push('\n');
    text
}

fn hashes(object: &mut Object<'_>, key: &'static str) -> Result<BTreeMap<String, String>> {
    let Some(value) = object.optional(key) else { return Ok(BTreeMap::new()) };
    let bad = || Finding::new(CLASS, FILE, format!("{key}: expected paths and hashes"));
    let map = value.as_object().ok_or_else(bad)?;
    map.iter().map(|(path, hash)| Ok((path.clone(), hash.as_str().ok_or_else(bad)?.to_owned()))).collect()
}

/// Reads `inventory.json`; entries by "name version".
///
/// # Errors
/// [`Class::InventoryMalformed`].
pub fn parse(text: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let value = json::parse(text, CLASS, FILE)?;
    let mut object = Object::new(&value, CLASS, FILE)?;
    if object.number("format")? != 1 {
        return Err(Finding::new(CLASS, FILE, "its format is not 1"));
    }
    let mut entries = BTreeMap::new();
    for (name, mut entry) in object.named("crates")? {
        let parsed = Entry {
            build_script: hashes(&mut entry, "build_script")?,
            proc_macro: entry.optional_text("proc_macro")?,
            includes: hashes(&mut entry, "includes")?,
            links: entry.optional_text("links")?,
            foreign: hashes(&mut entry, "foreign")?,
            native: hashes(&mut entry, "native")?,
            unsafe_uses: entry.number("unsafe")?,
            lines: 0,
        };
        entry.finish()?;
        entries.insert(name.to_owned(), parsed);
    }
    object.finish()?;
    Ok(entries)
}

/// Compares what is there with what is pinned.
pub fn compare(found: &BTreeMap<CrateId, Entry>, pinned: &BTreeMap<String, Entry>, report: &mut Report) {
    let nothing = Entry::default();
    for (id, entry) in found {
        let name = id.to_string();
        let pin = pinned.get(&name).unwrap_or(&nothing);
        for (class, is, was) in [
            (Class::BuildScript, &entry.build_script, &pin.build_script),
            (Class::Include, &entry.includes, &pin.includes),
            (Class::Ffi, &entry.foreign, &pin.foreign),
            (Class::NativeBlob, &entry.native, &pin.native),
        ] {
            for (path, hash) in is {
                let reason = match was.get(path) {
                    Some(pinned) if pinned == hash => continue,
                    Some(pinned) => format!("{}: SHA-256 {hash}, pinned {pinned}", class.meaning()),
                    None => format!("{} ({hash})", class.meaning()),
                };
                report.fail(class, format!("{name}: {path}"), reason);
            }
            for path in was.keys().filter(|path| !is.contains_key(*path)) {
                report.fail(class, format!("{name}: {path}"), "inventory.json pins it, and it is not there");
            }
        }
        if entry.proc_macro != pin.proc_macro {
            report.fail(Class::ProcMacro, &name, Class::ProcMacro.meaning());
        }
        if entry.links != pin.links {
            let reason = format!("it links {:?}, pinned {:?}", entry.links, pin.links);
            report.fail(Class::Links, &name, reason);
        }
        if !pinned.contains_key(&name) || entry.unsafe_uses != pin.unsafe_uses {
            let reason = format!("{} uses of unsafe, pinned {}", entry.unsafe_uses, pin.unsafe_uses);
            report.fail(Class::UnsafeCount, &name, reason);
        }
    }
    for name in pinned.keys().filter(|name| !found.keys().any(|id| id.to_string() == **name)) {
        report.fail(CLASS, FILE, format!("it pins {name}, which Cargo.lock does not have"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn includes_resolve_like_paths() {
        assert_eq!(relative("src/a/mod.rs", "../b.rs").as_deref(), Some("src/b.rs"));
        assert_eq!(relative("src/lib.rs", "x.bin").as_deref(), Some("src/x.bin"));
        assert_eq!(relative("src/lib.rs", "../../etc").as_deref(), None);
    }
}
