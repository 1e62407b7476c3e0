//! Pausing, resuming, snapshots and clones, through the API and into real virtual machines.

use crate::{Context, Outcome, Test, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use wrenn_tests::Result;
use wrenn_tests::process::wait_until;

pub const TESTS: &[Test] = &[
    ("lifecycle_a_paused_capsule_goes_on_where_it_was", a_paused_capsule_goes_on_where_it_was),
    ("lifecycle_an_idle_capsule_is_paused", an_idle_capsule_is_paused),
    ("lifecycle_clones_go_on_apart", clones_go_on_apart),
    ("lifecycle_a_snapshot_is_a_template", a_snapshot_is_a_template),
];

/// How far a guest's clock may be off, in seconds.
const CLOCK_TOLERANCE_SEC: u64 = 2;

impl Context {
    fn change(&self, id: &str, what: &str) -> Result<Value> {
        let answer = self.stack.client().post(&format!("/v1/capsules/{id}/{what}"), &json!({}))?;
        ensure!(answer.status == 200, "{what}: {} {}", answer.status, answer.json());
        Ok(answer.json())
    }

    /// Starts what counts in its memory alone, in the background.
    fn start_counter(&self, id: &str) -> Result<()> {
        let script = "n=41; trap 'n=$((n+1)); echo $n >/tmp/told' USR1; echo $$ >/tmp/pid; \
                      while :; do sleep 0.05; done";
        let body = json!({"cmd": "/bin/sh", "args": ["-c", script], "background": true, "tag": "counter"});
        let answer = self.exec(id, &body)?;
        ensure!([200, 202].contains(&answer.status), "counter: {} {}", answer.status, answer.json());
        self.shell(id, "while [ ! -s /tmp/pid ]; do sleep 0.05; done").map(drop)
    }

    /// The counter's next number: only a process that lives on knows it.
    fn count(&self, id: &str) -> Result<String> {
        self.shell(
            id,
            "rm -f /tmp/told; kill -USR1 $(cat /tmp/pid) || exit; \
             while [ ! -s /tmp/told ]; do sleep 0.05; done; cat /tmp/told",
        )
    }

    fn check_clock(&self, id: &str) -> Result<()> {
        let guest: u64 = self.shell(id, "date +%s")?.parse().unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or_default();
        ensure!(now.abs_diff(guest) <= CLOCK_TOLERANCE_SEC, "{id}: the guest has {guest}, it is {now}");
        Ok(())
    }

    fn status(&self, id: &str) -> Result<String> {
        let capsule = self.stack.client().get(&format!("/v1/capsules/{id}"))?.json();
        Ok(capsule["status"].as_str().unwrap_or_default().to_string())
    }
}

fn a_paused_capsule_goes_on_where_it_was(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"memory_mb": 256}))?;
    context.start_counter(&id)?;
    context.shell(&id, "echo in-memory >/dev/shm/kept")?;
    for round in 0..2 {
        let begun = Instant::now();
        let paused = context.change(&id, "pause")?;
        let took = begun.elapsed();
        ensure!(paused["status"] == "paused", "{paused}");
        for (what, body) in [("exec", json!({"cmd": "true"})), ("pause", json!({})), ("clone", json!({}))] {
            let refused = context.stack.client().post(&format!("/v1/capsules/{id}/{what}"), &body)?;
            let error = refused.json()["error"].clone();
            let message = error["message"].as_str().unwrap_or_default();
            ensure!(refused.status == 409 && message.contains("is paused"), "{what}: {error}");
        }
        std::thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        let resumed = context.change(&id, "resume")?;
        println!("  paused in {took:.2?}, resumed in {:.2?}", begun.elapsed());
        ensure!(resumed["status"] == "running", "{resumed}");
        let counted = context.count(&id)?;
        ensure!(counted == (42 + round).to_string(), "the process is another: {counted}");
        ensure!(context.shell(&id, "cat /dev/shm/kept")? == "in-memory", "memory is lost");
        context.check_clock(&id)?;
    }
    context.change(&id, "pause")?;
    context.destroy(&id)?;
    Ok(Outcome::Passed)
}

fn an_idle_capsule_is_paused(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"memory_mb": 256, "timeout_sec": 3}))?;
    for _ in 0..5 {
        std::thread::sleep(Duration::from_secs(1));
        let ping = context.stack.client().post(&format!("/v1/capsules/{id}/ping"), &json!({}))?;
        ensure!(ping.status == 204, "ping: {} {}", ping.status, ping.json());
    }
    // The reconciler notes what the host did by itself.
    wait_until("the idle capsule to be paused", Duration::from_secs(60), || {
        context.status(&id).is_ok_and(|status| status == "paused")
    })?;
    context.change(&id, "resume")?;
    context.destroy(&id)?;
    Ok(Outcome::Passed)
}

fn clones_go_on_apart(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"memory_mb": 256}))?;
    context.start_counter(&id)?;
    let begun = Instant::now();
    let answer = context.stack.client().post(&format!("/v1/capsules/{id}/clone"), &json!({"count": 2}))?;
    println!("  two clones in {:.2?}", begun.elapsed());
    ensure!(answer.status == 201, "clone: {} {}", answer.status, answer.json());
    let clones = answer.json();
    let ids: Vec<&str> = clones.as_array().into_iter().flatten().filter_map(|c| c["id"].as_str()).collect();
    ensure!(ids.len() == 2, "{clones}");
    let mut different = std::collections::BTreeSet::new();
    for one in [ids[0], ids[1], &id] {
        let counted = context.count(one)?;
        ensure!(counted == "42", "{one}: {counted}, but each goes on from the same moment");
        context.check_clock(one)?;
        different.insert(context.shell(one, "head -c 16 /dev/urandom | od -An -tx1")?);
        for name in ["hostname", "cat /etc/hostname", "cat /run/wrenn/.WRENN_SANDBOX_ID"] {
            let told = context.shell(one, name)?;
            ensure!(told == *one, "{one}: {name} says {told}");
        }
        let itself = context.shell(one, "getent hosts $(hostname) | cut -d ' ' -f 1")?;
        ensure!(itself == "127.0.1.1", "{one}: its own name leads to {itself:?}");
        context.shell(one, &format!("echo {one} >/tmp/own; sync"))?;
    }
    ensure!(different.len() == 3, "random bytes are the same: {different:?}");
    let hosts: std::collections::BTreeSet<String> =
        clones.as_array().into_iter().flatten().map(|c| c["host_ip"].to_string()).collect();
    ensure!(hosts.len() == 2, "clones share an address: {hosts:?}");
    for one in [ids[0], ids[1], &id] {
        ensure!(context.shell(one, "cat /tmp/own")? == *one, "disks are shared");
        context.destroy(one)?;
    }
    Ok(Outcome::Passed)
}

fn a_snapshot_is_a_template(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"memory_mb": 256}))?;
    context.start_counter(&id)?;
    let client = context.stack.client();
    let body = json!({"sandbox_id": id, "name": "warm"});
    let made = client.post("/v1/snapshots", &body)?;
    ensure!(made.status == 201 && made.json()["type"] == "snapshot", "{} {}", made.status, made.json());
    ensure!(client.post("/v1/snapshots", &body)?.status == 409, "the name is taken");
    let replaced = client.post("/v1/snapshots?overwrite=true", &body)?;
    ensure!(replaced.status == 201, "{} {}", replaced.status, replaced.json());
    context.destroy(&id)?;
    let begun = Instant::now();
    let started = context.create(&json!({"template": "warm"}))?;
    println!("  started from a snapshot in {:.2?}", begun.elapsed());
    let deleted = client.delete("/v1/snapshots/warm")?;
    ensure!(deleted.status == 204, "{} {}", deleted.status, deleted.json());
    ensure!(context.count(&started)? == "42", "the process is another");
    // What it was made of is gone; it still is paused and resumed.
    context.change(&started, "pause")?;
    context.change(&started, "resume")?;
    ensure!(context.count(&started)? == "43", "the process is another");
    context.destroy(&started)?;
    Ok(Outcome::Passed)
}
