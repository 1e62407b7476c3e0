//! The clients in other languages: all vectors, and a live server on loopback. They need `python3` and a C
//! compiler (`cc`, or what CC names).

mod common;

use std::path::PathBuf;
use std::process::Command;
use wire::session::Limits;

fn crate_path(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn run(command: &mut Command) {
    let output = command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}: install python3 and gcc"));
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&text));
}

#[test]
fn the_python_client_runs_all_vectors_and_talks() {
    run(Command::new("python3").arg(crate_path("clients/python/run_vectors.py")));
    let port = common::serve(Limits::default()).port();
    run(Command::new("python3").arg(crate_path("clients/python/echo.py")).arg(port.to_string()));
}

#[test]
fn the_c_client_builds_without_a_warning_runs_all_vectors_and_talks() {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut programs = Vec::new();
    for program in ["run_vectors", "echo", "scenario"] {
        let out = directory.join(format!("wire-c-{program}"));
        run(Command::new(&compiler)
            .args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"])
            .arg("-o")
            .arg(&out)
            .arg(crate_path(&format!("clients/c/{program}.c")))
            .arg(crate_path("clients/c/wrenn_wire.c")));
        programs.push(out);
    }
    run(Command::new(&programs[0]).arg(crate_path("vectors")));
    let port = common::serve(Limits::default()).port();
    run(Command::new(&programs[1]).arg(port.to_string()));
}
