//! Three ways to put other code into a build from a vendored directory that Cargo itself does not
//! notice. Each is shown to pass `cargo build --locked --offline`, code run and all, and to be caught.

use std::fs;
use std::process::Command;

use crate::support::{Fixture, Outcome, outcome};
use serde_json::json;
use vendor_check::codec::sha256;

const LIB: &str = "vendor/dep-1.0.0/src/lib.rs";
const CHECKSUMS: &str = "vendor/dep-1.0.0/.cargo-checksum.json";
const EVIL: &str = "pub fn word() -> &'static str { \"evil\" }\n";

/// Builds the fixture with real Cargo and gives what its program says.
fn build_and_run(f: &Fixture) -> String {
    let output = Command::new(env!("CARGO"))
        .current_dir(&f.root)
        .args(["--config", "judgements/offline.toml", "build", "--locked", "--offline", "--quiet"])
        .env("CARGO_TARGET_DIR", f.path("target"))
        .env("CARGO_HOME", f.path("empty-cargo-home"))
        .env_remove("RUSTFLAGS")
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(f.path("target/debug/app")).output().expect("the program runs");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

fn classes(outcome: &Outcome) -> Vec<String> {
    let findings = outcome.report["findings"].as_array().cloned().unwrap_or_default();
    findings.iter().map(|finding| finding["class"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn an_unlisted_build_script_is_compiled_and_run() {
    let mut f = Fixture::new("hole-unlisted-build-script");
    // The honest crate has no build script, and says nothing about one.
    f.entries.retain(|(path, ..)| !path.ends_with("build.rs"));
    let manifest = String::from_utf8(f.entry("Cargo.toml").clone()).expect("text");
    f.set_entry("Cargo.toml", &manifest.replace("build = \"build.rs\"\n", ""));
    f.relock();
    f.revendor();
    f.judge(true);
    assert_eq!(outcome(f.check()).code, 0);
    let trace = f.path("trace");
    f.write(
        "vendor/dep-1.0.0/build.rs",
        format!("fn main() {{ std::fs::write({trace:?}, \"ran\").unwrap(); }}\n"),
    );
    assert_eq!(build_and_run(&f), "honest");
    assert_eq!(fs::read_to_string(trace).expect("Cargo ran the build script"), "ran");
    let caught = outcome(f.check());
    assert_eq!(classes(&caught), ["file-extra"]);
    assert_eq!(caught.code, 23);
}

#[test]
fn an_empty_files_map_checks_nothing() {
    let f = Fixture::new("hole-empty-files-map");
    f.write(LIB, EVIL);
    f.edit(CHECKSUMS, |value| value["files"] = json!({}));
    assert_eq!(build_and_run(&f), "evil");
    let caught = outcome(f.check());
    assert_eq!(classes(&caught), ["file-modified", "checksum-empty"]);
    assert_eq!(caught.code, 22);
}

#[test]
fn the_package_hash_is_what_the_directory_says_it_is() {
    let f = Fixture::new("hole-self-declared-hash");
    f.write(LIB, EVIL);
    f.edit(CHECKSUMS, |value| value["files"]["src/lib.rs"] = json!(sha256(EVIL.as_bytes())));
    assert_eq!(build_and_run(&f), "evil");
    let caught = outcome(f.check());
    assert_eq!(classes(&caught), ["file-modified", "checksum-files"]);
    assert_eq!(caught.code, 22);
}
