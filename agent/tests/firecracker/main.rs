//! The Firecracker driver, against doubles of Firecracker and its jailer that take nothing that the real ones
//! would not: this program is both of them, under their names, and the tests. It needs no KVM; the guest is
//! the one thing that is not there.

mod cases;
mod double;
mod jailer;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "the network's tests use the rest")]
mod support;

use std::panic::catch_unwind;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let name = arguments.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    match name.to_str() {
        Some("firecracker") => double::main(&arguments[1..]),
        Some("jailer") => jailer::main(&arguments[1..]),
        _ => run(&arguments[1..]),
    }
}

/// Runs the cases whose names contain the first argument that is no option.
fn run(arguments: &[String]) -> ExitCode {
    let wanted = arguments.iter().find(|a| !a.starts_with('-'));
    let mut failed = Vec::new();
    for (name, case) in cases::CASES {
        if wanted.is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        let ok = catch_unwind(case).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        if !ok {
            failed.push(*name);
        }
    }
    println!("\n{} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
