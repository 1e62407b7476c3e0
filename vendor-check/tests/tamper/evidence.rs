//! SBOMs, lists and NOTICE: the same bytes every time, and valid for tools that are not ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Fixture, outcome, text};

/// Where the validators are installed, once for all runs; bumped with the versions below.
const VALIDATORS: &str = "vendor-check-validators-1";
const PACKAGES: [&str; 2] = ["spdx-tools==0.8.5", "cyclonedx-python-lib[json-validation]==11.12.0"];

const VALIDATE: &str = r#"
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
failed = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
problems = [str(failed)] if failed else []
problems += [str(m) for m in validate_full_spdx_document(parse_file(sys.argv[2]))]
print("\n".join(problems))
sys.exit(1 if problems else 0)
"#;

/// A Python with public validators in it; `None`, said aloud, where they cannot be installed.
fn validators() -> Option<PathBuf> {
    let directory = std::env::temp_dir().join(VALIDATORS);
    let python = directory.join("bin/python");
    let works = || {
        let import = "import spdx_tools, cyclonedx.validation.json, jsonschema";
        Command::new(&python).args(["-c", import]).output().is_ok_and(|output| output.status.success())
    };
    if works() {
        return Some(python);
    }
    let made = Command::new("python3").args(["-m", "venv"]).arg(&directory).output();
    let installed = made.is_ok_and(|output| output.status.success())
        && Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--timeout", "20"])
            .args(PACKAGES)
            .output()
            .is_ok_and(|output| output.status.success());
    if installed && works() {
        return Some(python);
    }
    eprintln!("SKIPPED: SBOMs were not validated, {PACKAGES:?} cannot be installed here");
    None
}

fn sboms(f: &Fixture, directory: &str) -> (PathBuf, PathBuf) {
    let directory = f.path(directory);
    let made = outcome(f.run(&["sbom", text(&directory), "--created", "2026-06-01T00:00:00Z"]));
    assert_eq!(made.code, 0, "{made:?}");
    (directory.join("app.cdx.json"), directory.join("app.spdx.json"))
}

#[test]
fn sboms_are_deterministic_complete_and_valid() {
    let f = Fixture::new("sbom");
    let (cyclonedx, spdx) = sboms(&f, "one");
    let (again, spdx_again) = sboms(&f, "two");
    let read = |path: &Path| fs::read_to_string(path).expect("read");
    assert_eq!(read(&cyclonedx), read(&again));
    assert_eq!(read(&spdx), read(&spdx_again));
    let document: serde_json::Value = serde_json::from_str(&read(&cyclonedx)).expect("JSON");
    let component = &document["components"][0];
    assert_eq!(component["purl"], "pkg:cargo/dep@1.0.0");
    assert_eq!(component["licenses"][0]["expression"], "MIT");
    assert_eq!(component["hashes"][0]["content"].as_str().map(str::len), Some(64));
    assert_eq!(document["dependencies"][0]["dependsOn"][0], "pkg:cargo/dep@1.0.0");
    let Some(python) = validators() else { return };
    let output =
        Command::new(python).args(["-c", VALIDATE]).args([&cyclonedx, &spdx]).output().expect("runs");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[test]
fn a_binary_with_a_list_still_runs_and_embedding_twice_is_refused() {
    let f = Fixture::new("embedded");
    f.embedded();
    let status = Command::new(f.path("out/app")).arg("classes").output().expect("runs").status;
    assert!(status.success());
    let listed = outcome(f.run(&["list", text(&f.path("out/app"))]));
    let packages = listed.report["facts"]["list"]["packages"].as_array().cloned().expect("packages");
    assert_eq!(packages.len(), 2);
    assert_eq!(packages[0]["root"], true);
    assert_eq!(packages[1]["source"], "crates.io");
    let twice = outcome(f.run(&["embed", text(&f.path("out/app")), text(&f.path("again/app"))]));
    assert_eq!(twice.code, 90);
}

#[test]
fn notice_has_the_licence_texts() {
    let f = Fixture::new("notice");
    let path = f.path("NOTICE");
    assert_eq!(outcome(f.run(&["notice", text(&path)])).code, 0);
    let notice = fs::read_to_string(&path).expect("read");
    assert!(notice.contains("dep 1.0.0\nLicence: MIT") && notice.contains("Permission is hereby granted"));
    assert_eq!(outcome(f.run(&["notice", "--check", text(&path)])).code, 0);
}

#[test]
fn budgets_tighten_and_then_the_check_passes() {
    let f = Fixture::new("tighten");
    f.edit("judgements/policy.json", |policy| {
        policy["budgets"][1]["limit"] = 1000.into();
        policy["budgets"][1]["reviewed"] = 1000.into();
    });
    assert_eq!(outcome(f.check()).code, 46);
    assert_eq!(outcome(f.run(&["tighten"])).code, 0);
    assert_eq!(outcome(f.check()).code, 0);
}

#[test]
fn the_command_line_is_strict() {
    let f = Fixture::new("usage");
    for arguments in [&["nothing"][..], &["check", "--unknown"], &["embed"], &[], &["check", "--today"]] {
        assert_eq!(outcome(f.run(arguments)).code, 2, "{arguments:?}");
    }
    assert_eq!(outcome(f.run(&["list", text(&f.path("nowhere"))])).code, 3);
}
