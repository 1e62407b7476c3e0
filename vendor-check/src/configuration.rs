//! Cargo configuration: refused wherever Cargo would find it, but for the committed files that the
//! policy pins. A configuration can put a wrapper around the compiler or another source behind a crate.

use std::path::Path;

use crate::codec::sha256;
use crate::failure::{Class, Report};
use crate::files::{self, Kind};
use crate::policy::PinnedFile;

/// What Cargo and rustup read in the directory of a build and in every one above it.
const CONFIGURATION_FILES: [&str; 4] =
    [".cargo/config", ".cargo/config.toml", "rust-toolchain", "rust-toolchain.toml"];
/// Directories of the workspace that hold build products or what other checks cover.
const SKIPPED: [&str; 5] = ["target", "builds", "vendor", "dist", ".git"];
/// Variables that change what Cargo builds, or with which program.
const VARIABLES: [&str; 10] = [
    "RUSTC",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_REGISTRY_DEFAULT",
    "RUSTC_BOOTSTRAP",
];
const VARIABLE_PREFIXES: [&str; 5] =
    ["CARGO_SOURCE_", "CARGO_REGISTRIES_", "CARGO_PROFILE_", "CARGO_TARGET_X86_64_", "CARGO_UNSTABLE_"];

/// Looks for configuration in the workspace, in the directories above it, in Cargo's home and in
/// the environment (`variables`: the names that are set).
pub fn check(
    root: &Path,
    cargo_home: Option<&Path>,
    variables: &[String],
    pinned: &[PinnedFile],
    report: &mut Report,
) {
    const ADVICE: &str = "Cargo would obey it: remove it, or have it reviewed into policy.json";
    for directory in root.ancestors().skip(1) {
        for name in CONFIGURATION_FILES {
            let path = directory.join(name);
            if path.symlink_metadata().is_ok() {
                report.fail(Class::CargoConfig, path.display().to_string(), ADVICE);
            }
        }
    }
    for name in ["config", "config.toml"] {
        if let Some(path) =
            cargo_home.map(|home| home.join(name)).filter(|path| path.symlink_metadata().is_ok())
        {
            report.fail(Class::CargoConfig, path.display().to_string(), ADVICE);
        }
    }
    let skip =
        |path: &str| SKIPPED.contains(&path) || path.ends_with("/target") || path.ends_with("/node_modules");
    for entry in report.take(files::walk(root, &skip)).unwrap_or_default() {
        let path = entry.path.as_str();
        let is_configuration =
            CONFIGURATION_FILES.iter().any(|name| path == *name || path.ends_with(&format!("/{name}")));
        // A link in place of .cargo would be followed by Cargo.
        let linked = entry.kind == Kind::Link && (path == ".cargo" || path.ends_with("/.cargo"));
        if (is_configuration || linked) && !pinned.iter().any(|pin| pin.path == path) {
            report.fail(Class::CargoConfig, path, ADVICE);
        }
    }
    for pin in pinned {
        let Some(bytes) = report.take(files::read(&root.join(&pin.path))) else { continue };
        if sha256(&bytes) != pin.sha256 {
            report.fail(Class::CargoConfig, &pin.path, "it is not the file that policy.json pins");
        }
    }
    for name in variables {
        let known = VARIABLES.contains(&name.as_str());
        if known || VARIABLE_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            report.fail(
                Class::CargoConfig,
                format!("environment variable {name}"),
                "it changes the build: unset it",
            );
        }
    }
}
