//! Programs by which a test looks at the machine from outside.

use std::process::Command;
use wrenn_agent::net::Slot;

/// What a program prints; it must succeed.
pub fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("the program runs");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same, in a capsule's network namespace.
pub fn in_namespace(slot: Slot, command: &[&str]) -> String {
    let name = slot.namespace_name();
    output("ip", &[&["netns", "exec", &name], command].concat())
}
