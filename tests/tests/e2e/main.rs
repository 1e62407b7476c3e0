//! End to end: one stack with a real PostgreSQL, control plane, agent and VMs, shared by all tests.
//!
//! A runner of its own rather than libtest's, so that the stack is stopped and the machine looked over
//! whatever a test does. `cargo test -p wrenn-tests --test e2e NAME` runs the tests whose name has NAME
//! in it.

mod adversary;
mod api;
mod capsule;
mod crowd;
mod edge;
mod faults;
mod lifecycle;
mod network;
mod sdk;
mod wire;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use wrenn_tests::leftovers::take_stock;
use wrenn_tests::process::tail;
use wrenn_tests::stack::{Options, Stack};
use wrenn_tests::{Failure, Result};

/// What a test came to, when it did not fail.
pub enum Outcome {
    /// It ran.
    Passed,
    /// It could not run here; why.
    Skipped(String),
}

/// What the tests share.
pub struct Context {
    /// The running stack.
    pub stack: Stack,
    /// A capsule that tests use one after another, once one has asked for it.
    pub shared_capsule: Option<String>,
    /// A capsule that tests maltreat, once one has asked for it.
    pub victim: Option<String>,
}

type Test = (&'static str, fn(&mut Context) -> Result<Outcome>);

/// In this order: the cheap ones first, those that take parts of the stack down last.
fn tests() -> Vec<Test> {
    [
        api::TESTS,
        capsule::TESTS,
        network::TESTS,
        lifecycle::TESTS,
        wire::TESTS,
        sdk::TESTS,
        edge::TESTS,
        adversary::TESTS,
        crowd::TESTS,
        faults::TESTS,
    ]
    .concat()
}

/// Fails the test with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(wrenn_tests::Failure(format!($($message)+)));
        }
    };
}

fn main() -> ExitCode {
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let selected: Vec<Test> = tests()
        .into_iter()
        .filter(|(name, _)| filter.is_empty() || filter.iter().any(|f| name.contains(f.as_str())))
        .collect();
    if std::env::args().any(|a| a == "--list") {
        for (name, _) in selected {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        println!("e2e: SKIPPED, all of it: the host agent needs root");
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", selected.len());
    let before = take_stock();
    let directory = PathBuf::from(format!("/var/tmp/wrenn-e2e-{}", std::process::id()));
    let mut tally = Tally::default();
    match Stack::start(&Options::new(&directory)) {
        Ok(stack) => {
            let mut context = Context { stack, shared_capsule: None, victim: None };
            tally.last = Some(Instant::now());
            for (name, test) in &selected {
                let result = catch_unwind(AssertUnwindSafe(|| test(&mut context)))
                    .unwrap_or_else(|_| Err(Failure("it panicked".into())));
                tally.count(name, result, Some(&context.stack));
            }
            let stopped = context.stack.stop().map(|()| Outcome::Passed);
            tally.count("the_stack_stops", stopped, Some(&context.stack));
        }
        Err(e) => tally.count("the_stack_starts", Err(e), None),
    }
    tally.count("nothing_is_left_behind", check_leftovers(&before, &directory), None);
    tally.finish()
}

fn check_leftovers(
    before: &std::collections::BTreeSet<wrenn_tests::leftovers::Thing>,
    directory: &Path,
) -> Result<Outcome> {
    let capsules =
        std::fs::read_dir(directory.join("data/sandboxes")).map(Iterator::count).unwrap_or_default();
    let _ = std::fs::remove_dir_all(directory);
    ensure!(capsules == 0, "{capsules} capsule directories are left");
    let left: Vec<_> = take_stock().difference(before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Outcome::Passed)
}

#[derive(Default)]
struct Tally {
    passed: u32,
    failed: Vec<String>,
    skipped: u32,
    last: Option<Instant>,
}

impl Tally {
    fn count(&mut self, name: &str, result: Result<Outcome>, stack: Option<&Stack>) {
        let took = self.last.replace(Instant::now()).map_or(0.0, |t| t.elapsed().as_secs_f32());
        match result {
            Ok(Outcome::Passed) => {
                self.passed += 1;
                println!("test {name} ... ok ({took:.1} s)");
            }
            Ok(Outcome::Skipped(why)) => {
                self.skipped += 1;
                println!("test {name} ... SKIPPED: {why}");
            }
            Err(e) => {
                self.failed.push(name.to_string());
                println!("test {name} ... FAILED\n  {e}");
                for log in ["cp", "agent"] {
                    if let Some(stack) = stack {
                        println!("  -- {log} log ends:\n{}", tail(&stack.log(log)));
                    }
                }
            }
        }
    }

    fn finish(self) -> ExitCode {
        let verdict = if self.failed.is_empty() { "ok" } else { "FAILED" };
        if !self.failed.is_empty() {
            println!("\nfailures:\n    {}", self.failed.join("\n    "));
        }
        println!(
            "\ntest result: {verdict}. {} passed; {} failed; {} ignored; 0 measured; 0 filtered out\n",
            self.passed,
            self.failed.len(),
            self.skipped
        );
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
