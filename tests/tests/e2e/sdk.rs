//! The public Python SDK, as its users run it, against this control plane.

use crate::{Context, Outcome, Test, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use wrenn_tests::process::run;
use wrenn_tests::stack::project_root;
use wrenn_tests::{Context as _, Result};

pub const TESTS: &[Test] = &[("the_python_sdk_works_unchanged", the_python_sdk_works_unchanged)];

/// The release of the SDK that is tested against.
const SDK: &str = "wrenn==0.3.0";

/// A Python 3.13, which the SDK asks for: on PATH, or where pyenv keeps them.
fn python() -> Option<PathBuf> {
    let pyenv = std::env::var("PYENV_ROOT").unwrap_or_else(|_| "/root/.pyenv".into());
    let mut candidates = vec![PathBuf::from("python3.13")];
    candidates.extend(
        std::fs::read_dir(Path::new(&pyenv).join("versions"))
            .into_iter()
            .flatten()
            .filter_map(|e| Some(e.ok()?.path().join("bin/python3.13"))),
    );
    candidates
        .into_iter()
        .find(|p| Command::new(p).arg("--version").output().is_ok_and(|o| o.status.success()))
}

fn the_python_sdk_works_unchanged(context: &mut Context) -> Result<Outcome> {
    let Some(python) = python() else {
        return Ok(Outcome::Skipped(
            "Python 3.13 is not on PATH nor in pyenv; the SDK runs on no other".into(),
        ));
    };
    // Kept in the build folder, so that a second run needs no download.
    let venv = project_root().join("builds/sdk-venv");
    if !venv.join("installed").exists() {
        let _ = std::fs::remove_dir_all(&venv);
        run(Command::new(&python).args(["-m", "venv"]).arg(&venv), None).context("python -m venv")?;
        let pip = run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", SDK]), None);
        if let Err(e) = pip {
            return Ok(Outcome::Skipped(format!("{SDK} cannot be installed: {e}")));
        }
        std::fs::write(venv.join("installed"), SDK).context("mark the venv")?;
    }
    if let Some(shared) = context.shared_capsule.take() {
        context.destroy(&shared)?;
    }
    let output = run(
        Command::new(venv.join("bin/python"))
            .arg(project_root().join("tests/clients/sdk_check.py"))
            .env("WRENN_API_KEY", &context.stack.api_key)
            .env("WRENN_BASE_URL", format!("http://{}", context.stack.cp_address)),
        None,
    )?;
    ensure!(output.contains("SDK check passed"), "{output}");
    Ok(Outcome::Passed)
}
