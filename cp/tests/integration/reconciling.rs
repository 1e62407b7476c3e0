//! The recurring comparison of hosts and records.

use crate::stage::{ADMIN, Stage, json, text};
use serde_json::json;
use wire::message::{CapsuleInfo, CapsuleState};
use wrenn_cp::db::{Database, hosts};
use wrenn_cp::http::handler::Method::{Get, Post};

fn stage() -> (Stage, String) {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    (stage, bearer)
}

fn create(stage: &mut Stage, bearer: &str) -> String {
    let made = stage.request(Post, "/v1/capsules", ("authorization", bearer), "{}");
    assert_eq!(made.status, 201, "{:?}", made.error_message());
    text(&json(&made)["id"])
}

/// As if an hour had passed since everything.
fn age(stage: &Stage) {
    crate::postgres::client(&stage.url)
        .batch_execute(
            "update capsules set last_updated = last_updated - interval '1 hour';
             update hosts set reconciled_at = null",
        )
        .expect("update");
}

fn state(stage: &mut Stage, bearer: &str, id: &str) -> String {
    let answer = stage.request(Get, &format!("/v1/capsules/{id}"), ("authorization", bearer), "");
    text(&json(&answer)["status"])
}

#[test]
fn a_capsule_that_died_is_missing() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    stage.hosts[0].capsules.clear();
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "running", "it may have been made after the list");
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "missing");
    let exec = format!("/v1/capsules/{id}/exec");
    let answer = stage.request(Post, &exec, ("authorization", &bearer), r#"{"cmd":"x"}"#);
    assert_eq!(answer.status, 409);
    assert!(answer.error_message().is_some_and(|m| m.contains("its host does not know it any more")));
}

#[test]
fn an_orphan_is_destroyed() {
    let (mut stage, _) = stage();
    let id = "cl-0000000000000000000000009".to_string();
    let orphan =
        CapsuleInfo { capsule_id: id.clone(), state: CapsuleState::Running, ..CapsuleInfo::default() };
    stage.hosts[0].capsules.insert(id, orphan);
    stage.run_jobs();
    assert!(stage.hosts[0].capsules.is_empty());
}

#[test]
fn an_unfinished_destruction_is_finished() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    crate::postgres::client(&stage.url)
        .execute("update capsules set status = 'stopping'", &[])
        .expect("update");
    age(&stage);
    stage.run_jobs();
    assert!(stage.hosts[0].capsules.is_empty());
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "stopped");
}

#[test]
fn an_abandoned_start_becomes_what_it_is_on_the_host() {
    let (mut stage, bearer) = stage();
    let (runs, gone) = (create(&mut stage, &bearer), create(&mut stage, &bearer));
    stage.hosts[0].capsules.remove(&gone);
    crate::postgres::client(&stage.url)
        .execute("update capsules set status = 'starting', started_at = null", &[])
        .expect("update");
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &runs), "running");
    assert_eq!(state(&mut stage, &bearer, &gone), "error");
}

#[test]
fn agreement_changes_nothing_and_templates_are_noted() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    let auth = ("authorization", bearer.as_str());
    let path = format!("/v1/capsules/{id}");
    let before = json(&stage.request(Get, &path, auth, ""));
    stage.run_jobs();
    assert_eq!(json(&stage.request(Get, &path, auth, "")), before);
    let templates = json(&stage.request(Get, "/v1/snapshots?type=base", auth, ""));
    assert_eq!(templates[0]["name"], "minimal");
    assert_eq!(json(&stage.request(Get, "/v1/snapshots?type=snapshot", auth, "")), json!([]));
    let calls = stage.hosts[0].calls.len();
    stage.run_jobs();
    assert_eq!(stage.hosts[0].calls.len(), calls, "its next turn is in ten seconds");
}

#[test]
fn a_host_that_does_not_answer_is_left_alone() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    age(&stage);
    stage.hosts.clear();
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "running");
}

#[test]
fn several_control_planes_share_the_hosts() {
    let (mut stage, bearer) = stage();
    for n in 2..=4 {
        stage.add_host(&bearer, &format!("10.0.0.{n}:50051"), 4096);
    }
    let url = &stage.url;
    let claimed: Vec<String> = std::thread::scope(|scope| {
        let claim = || {
            scope.spawn(|| {
                let mut db = Database::connect(url).expect("connect");
                db.transaction(|sql| Ok(hosts::claim_for_reconciling(sql, 10.0)?)).expect("claim")
            })
        };
        let threads: Vec<_> = (0..8).map(|_| claim()).collect();
        threads.into_iter().filter_map(|t| t.join().expect("no panic")).map(|(id, _)| id).collect()
    });
    let distinct: std::collections::BTreeSet<_> = claimed.iter().collect();
    assert_eq!((claimed.len(), distinct.len()), (4, 4), "each host once");
}
