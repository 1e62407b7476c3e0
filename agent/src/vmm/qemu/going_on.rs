//! Letting a guest go on, when QEMU's answer to that may be lost.
//!
//! A guest that goes on writes to its disk, which its image then fits no more. So one of which nobody knows whether it
//! does counts as one that does: taken for one that stands still, it would be ended and started of that image later.

use super::Monitor;
use crate::vmm::VmmError;

/// What QEMU says of a machine whose guest has not run since it was told to stand still, or ever.
const STANDING: [&str; 3] = ["paused", "prelaunch", "inmigrate"];

/// Lets the guest go on. QEMU has `timeout_ms` for each of two answers. Blocks.
///
/// # Errors
/// The guest stands still: QEMU has refused it, or tells so when it is asked, or has ended.
pub fn go_on(monitor: &mut Monitor, timeout_ms: u64) -> Result<(), VmmError> {
    let unanswered = match monitor.call("cont", None, None, timeout_ms) {
        Err(e @ VmmError::NoAnswer { .. }) => e,
        other => return other.map(drop),
    };
    match monitor.call("query-status", None, None, timeout_ms) {
        Ok(status) => match status["status"].as_str() {
            Some(status) if STANDING.contains(&status) => Err(unanswered),
            status => {
                log::warn!("{unanswered}, and when it was asked: {}", status.unwrap_or("in no state"));
                Ok(())
            }
        },
        Err(VmmError::NoAnswer { .. }) => {
            log::error!("{unanswered}, nor whether the guest goes on: it counts as one that does");
            Ok(())
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    const TIMEOUT_MS: u64 = 100;

    /// What comes of going on with a QEMU that answers each command so, or not at all.
    fn gone_on(answers: impl Fn(&str) -> Option<Value> + Send + 'static) -> Result<(), VmmError> {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("set");
        let double = std::thread::spawn(move || {
            let mut out = theirs.try_clone().expect("cloned");
            let version = json!({"qemu": {"major": 7, "minor": 2, "micro": 22}});
            writeln!(out, "{}", json!({"QMP": {"version": version}})).expect("written");
            for line in BufReader::new(theirs).lines().map_while(Result::ok) {
                let command: Value = serde_json::from_str(&line).expect("a command");
                let answer = match command["execute"].as_str() {
                    Some("qmp_capabilities") => Some(json!({"return": {}})),
                    Some("hang up") | None => return,
                    Some(other) => answers(other),
                };
                let Some(mut answer) = answer else { continue };
                if answer == json!("hang up") {
                    return;
                }
                answer["id"] = command["id"].clone();
                writeln!(out, "{answer}").expect("written");
            }
        });
        let result = go_on(&mut Monitor::new(ours), TIMEOUT_MS);
        double.join().expect("ended");
        result
    }

    fn status(status: &'static str) -> impl Fn(&str) -> Option<Value> + Send + 'static {
        move |command| (command == "query-status").then(|| json!({"return": {"status": status}}))
    }

    #[test]
    fn an_answer_that_is_lost_is_asked_after() {
        gone_on(|_| Some(json!({"return": {}}))).expect("answered");
        let refused = gone_on(|_| Some(json!({"error": {"class": "GenericError", "desc": "no"}})));
        assert!(matches!(refused, Err(VmmError::Refused { command: "cont", .. })), "{refused:?}");
        // It goes on, and has even stopped by itself since.
        for runs in ["running", "io-error", "shutdown"] {
            gone_on(status(runs)).expect(runs);
        }
        for stands in STANDING {
            let result = gone_on(status(stands));
            assert!(matches!(result, Err(VmmError::NoAnswer { command: "cont" })), "{stands}: {result:?}");
        }
        // Nobody knows.
        gone_on(|_| None).expect("counts as running");
        let ended = gone_on(|command| (command == "query-status").then(|| json!("hang up")));
        assert!(matches!(ended, Err(VmmError::MonitorClosed)), "{ended:?}");
    }
}
