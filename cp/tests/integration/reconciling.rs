//! The recurring comparison of hosts and records.

use crate::stage::{ADMIN, Stage, json, text};
use serde_json::json;
use wire::message::{CapsuleInfo, CapsuleState, Code, Error};
use wrenn_cp::db::{Database, hosts};
use wrenn_cp::http::handler::HostError;
use wrenn_cp::http::handler::Method::{Delete, Get, Post};

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
             update orphans set since = since - interval '1 hour';
             update snapshot_orphans set since = since - interval '1 hour';
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

fn audited(stage: &Stage, id: &str) -> Vec<(String, String)> {
    crate::postgres::client(&stage.url)
        .query(
            "select action, metadata::text from audit_log where resource_id = $1 and actor_type = 'system'
             order by created_at, id",
            &[&id],
        )
        .expect("query")
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect()
}

#[test]
fn an_orphan_is_destroyed_after_its_grace_and_audited() {
    let (mut stage, _) = stage();
    let id = "cl-0000000000000000000000009".to_string();
    let orphan =
        CapsuleInfo { capsule_id: id.clone(), state: CapsuleState::Running, ..CapsuleInfo::default() };
    stage.hosts[0].capsules.insert(id.clone(), orphan.clone());
    stage.run_jobs();
    assert_eq!(stage.hosts[0].capsules.len(), 1, "its grace has begun");
    // What is gone for a moment begins anew.
    age(&stage);
    stage.hosts[0].capsules.clear();
    stage.run_jobs();
    stage.hosts[0].capsules.insert(id.clone(), orphan);
    age(&stage);
    stage.run_jobs();
    assert_eq!(stage.hosts[0].capsules.len(), 1, "its grace has begun again");
    assert_eq!(audited(&stage, &id), []);
    age(&stage);
    stage.run_jobs();
    assert!(stage.hosts[0].capsules.is_empty());
    let told = audited(&stage, &id);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].0 == "capsule.destroy" && told[0].1.contains("orphaned"), "{told:?}");
}

#[test]
fn a_snapshot_that_nobody_can_use_is_deleted_after_its_grace() {
    let (mut stage, bearer) = stage();
    let auth = ("authorization", bearer.as_str());
    let id = create(&mut stage, &bearer);
    let take = |stage: &mut Stage, name: &str| {
        let body = json!({"sandbox_id": id, "name": name}).to_string();
        stage.request(Post, "/v1/snapshots", auth, &body).status
    };
    assert_eq!(take(&mut stage, "kept"), 201);
    let kept = stage.hosts[0].snapshots.clone();
    // Made, and its answer lost.
    stage.hosts[0].lost_answers.push_back(HostError::TimedOut { after_ms: 1 });
    assert_eq!(take(&mut stage, "lost"), 502);
    assert_eq!(stage.hosts[0].snapshots.len(), 2);
    // Put there by somebody else.
    stage.hosts[0].snapshots.insert("golden".into());
    stage.run_jobs();
    assert_eq!(stage.hosts[0].snapshots.len(), 3, "its grace has begun");
    age(&stage);
    let lost = stage.hosts[0].snapshots.iter().find(|n| *n != "golden" && !kept.contains(*n)).cloned();
    let lost = lost.expect("it is there");
    stage.run_jobs();
    assert_eq!(stage.hosts[0].snapshots, &kept | &["golden".to_string()].into());
    let told = audited(&stage, &lost);
    assert!(told.len() == 1 && told[0].0 == "template.snapshot.delete", "{told:?}");
    // What is left of a deleted team.
    let team = text(&json(&stage.request(Get, "/v1/teams", auth, ""))[0]["id"]);
    assert_eq!(stage.request(Delete, &format!("/v1/teams/{team}"), auth, "").status, 204);
    for _ in 0..3 {
        age(&stage);
        stage.run_jobs();
    }
    assert_eq!(stage.hosts[0].snapshots, ["golden".to_string()].into());
    let told = audited(&stage, "kept");
    assert!(told.len() == 1 && told[0].1.contains("orphaned"), "{told:?}");
}

#[test]
fn a_capsule_that_was_destroyed_and_is_there_again_is_destroyed_again() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    let kept = stage.hosts[0].capsules[&id].clone();
    let path = format!("/v1/capsules/{id}");
    assert_eq!(stage.request(Delete, &path, ("authorization", &bearer), "").status, 204);
    stage.hosts[0].capsules.insert(id.clone(), kept);
    age(&stage);
    stage.run_jobs();
    assert!(stage.hosts[0].capsules.is_empty());
    let told = audited(&stage, &id);
    assert!(told.len() == 1 && told[0].1.contains("over"), "{told:?}");
}

#[test]
fn what_a_host_does_by_itself_is_noted_and_a_hibernated_capsule_resumes() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    for (reported, name) in [
        (CapsuleState::Paused, "paused"),
        (CapsuleState::Hibernated, "hibernated"),
        (CapsuleState::Paused, "paused"),
        (CapsuleState::Running, "running"),
        (CapsuleState::Hibernated, "hibernated"),
    ] {
        stage.hosts[0].capsules.get_mut(&id).expect("there").state = reported;
        age(&stage);
        stage.run_jobs();
        assert_eq!(state(&mut stage, &bearer, &id), name);
    }
    assert_eq!(audited(&stage, &id).iter().filter(|(action, _)| action == "capsule.state").count(), 5);
    let auth = ("authorization", bearer.as_str());
    let refused = stage.request(Post, &format!("/v1/capsules/{id}/pause"), auth, "");
    assert_eq!(refused.status, 409);
    assert!(refused.error_message().is_some_and(|m| m.contains("hibernated")));
    // A resume that fails leaves it as it was.
    let full = HostError::Remote(Error::new(Code::ResourceExhausted, "only 12 left"));
    stage.hosts[0].failures.push_back(full);
    assert_eq!(stage.request(Post, &format!("/v1/capsules/{id}/resume"), auth, "").status, 503);
    assert_eq!(state(&mut stage, &bearer, &id), "hibernated");
    let resumed = stage.request(Post, &format!("/v1/capsules/{id}/resume"), auth, "");
    assert_eq!((resumed.status, text(&json(&resumed)["status"]).as_str()), (200, "running"));
}

#[test]
fn a_start_that_nobody_waited_for_and_that_the_host_has_paused_is_paused() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    crate::postgres::client(&stage.url)
        .execute("update capsules set status = 'starting', started_at = null", &[])
        .expect("update");
    stage.hosts[0].capsules.get_mut(&id).expect("there").state = CapsuleState::Paused;
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "paused");
}

#[test]
fn a_host_that_is_back_with_its_capsules_has_lost_none() {
    let (mut stage, bearer) = stage();
    let id = create(&mut stage, &bearer);
    let host = stage.hosts.pop().expect("a host");
    for _ in 0..3 {
        age(&stage);
        stage.run_jobs();
        assert_eq!(state(&mut stage, &bearer, &id), "running", "its host is silent");
    }
    crate::postgres::client(&stage.url)
        .execute("update hosts set last_heartbeat_at = now() - interval '1 hour'", &[])
        .expect("update");
    let exec = format!("/v1/capsules/{id}/exec");
    let away = stage.request(Post, &exec, ("authorization", &bearer), r#"{"cmd":"x"}"#);
    assert_eq!(away.status, 503, "{:?}", away.error_message());
    crate::postgres::client(&stage.url)
        .execute("update hosts set last_heartbeat_at = now()", &[])
        .expect("update");
    stage.hosts.push(host);
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "running");
    // An answer without it is another thing; should it come back even so, it runs.
    let kept = std::mem::take(&mut stage.hosts[0].capsules);
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "missing");
    stage.hosts[0].capsules = kept;
    age(&stage);
    stage.run_jobs();
    assert_eq!(state(&mut stage, &bearer, &id), "running");
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
