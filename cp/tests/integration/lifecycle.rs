//! Pausing, resuming and pinging.

use crate::stage::{ADMIN, Stage, json, text};
use serde_json::Value;
use wire::message::{CapsulePing, CapsuleState, Code, Error, Message};
use wrenn_cp::http::handler::Method::{Delete, Get, Post};
use wrenn_cp::http::handler::{HostError, Response};

struct One {
    stage: Stage,
    key: String,
    id: String,
}

fn one(body: &str) -> One {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let key = stage.api_key(&bearer);
    stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    let made = stage.request(Post, "/v1/capsules", ("x-api-key", &key), body);
    assert_eq!(made.status, 201, "{:?}", made.error_message());
    let id = text(&json(&made)["id"]);
    One { stage, key, id }
}

impl One {
    fn post(&mut self, what: &str, body: &str) -> Response {
        let path = format!("/v1/capsules/{}/{what}", self.id);
        self.stage.request(Post, &path, ("x-api-key", &self.key), body)
    }

    fn status(&mut self) -> String {
        let path = format!("/v1/capsules/{}", self.id);
        text(&json(&self.stage.request(Get, &path, ("x-api-key", &self.key), ""))["status"])
    }

    fn audited(&mut self) -> Vec<Value> {
        let rows = crate::postgres::client(&self.stage.url)
            .query("select to_jsonb(a)::text as row from audit_log a order by id", &[])
            .expect("query");
        rows.iter().map(|row| serde_json::from_str(row.get("row")).expect("JSON")).collect()
    }
}

#[test]
fn a_capsule_is_paused_and_resumed() {
    let mut one = one("{}");
    let paused = one.post("pause", "");
    assert_eq!((paused.status, text(&json(&paused)["status"]).as_str()), (200, "paused"));
    assert_eq!(text(&json(&paused)["id"]), one.id);
    for what in ["pause", "ping"] {
        let refused = one.post(what, "");
        assert_eq!(refused.status, 409);
        let message = refused.error_message().unwrap_or_default();
        assert!(message.contains("the capsule is paused"), "{message}");
    }
    let refused = one.post("exec", r#"{"cmd":"true"}"#);
    assert_eq!(refused.status, 409);
    assert!(refused.error_message().is_some_and(|m| m.contains("the capsule is paused")));
    let resumed = one.post("resume", "");
    assert_eq!((resumed.status, text(&json(&resumed)["status"]).as_str()), (200, "running"));
    assert_eq!(one.post("resume", "").status, 409);
    let audited = format!("{:?}", one.audited());
    assert!(audited.contains("capsule.pause") && audited.contains("capsule.resume"), "{audited}");
    one.id = "cl-0000000000000000000000000".into();
    assert_eq!((one.post("pause", "").status, one.post("resume", "").status), (404, 404));
}

#[test]
fn a_ping_goes_to_the_host_that_counts_the_idle_time() {
    let mut timed = one(r#"{"timeout_sec":60}"#);
    assert_eq!(timed.post("ping", "").status, 204);
    assert_eq!(timed.stage.hosts[0].calls.last(), Some(&CapsulePing::KIND));
    let mut untimed = one("{}");
    assert_eq!(untimed.post("ping", "").status, 204);
    assert!(!untimed.stage.hosts[0].calls.contains(&CapsulePing::KIND));
}

#[test]
fn what_fails_on_the_host_leaves_the_capsule_as_it_was() {
    let mut one = one("{}");
    let broken = || HostError::Remote(Error::new(Code::Internal, "writing /secret/path: no space left"));
    one.stage.hosts[0].failures.push_back(broken());
    let failed = one.post("pause", "");
    let message = failed.error_message().unwrap_or_default();
    assert_eq!(failed.status, 502);
    assert!(message.contains("it runs on") && !message.contains("/secret"), "{message}");
    assert_eq!(one.status(), "running");
    assert_eq!(one.post("pause", "").status, 200);
    let full = HostError::Remote(Error::new(Code::ResourceExhausted, "only 12 left"));
    one.stage.hosts[0].failures.push_back(full);
    let failed = one.post("resume", "");
    assert_eq!(failed.status, 503);
    assert!(failed.error_message().is_some_and(|m| m.contains("only 12 left")));
    assert_eq!(one.status(), "paused");
    assert_eq!(one.post("resume", "").status, 200);
}

#[test]
fn an_answer_that_is_lost_is_found_out() {
    let mut one = one("{}");
    let lost = || HostError::Lost { address: "10.0.0.1:50051".into(), reason: "reset".into() };
    one.stage.hosts[0].lost_answers.push_back(lost());
    assert_eq!(one.post("pause", "").status, 503);
    assert_eq!(one.status(), "pausing");
    assert_eq!(one.post("resume", "").status, 409, "nobody knows yet");
    let settle = |one: &mut One| {
        crate::postgres::client(&one.stage.url)
            .batch_execute(
                "update capsules set last_updated = last_updated - interval '1 hour';
                 update hosts set reconciled_at = null",
            )
            .expect("update");
        one.stage.run_jobs();
    };
    settle(&mut one);
    assert_eq!(one.status(), "paused");
    // The host resumed and paused it by itself.
    for (state, name) in [(CapsuleState::Running, "running"), (CapsuleState::Paused, "paused")] {
        let id = one.id.clone();
        one.stage.hosts[0].capsules.get_mut(&id).expect("there").state = state;
        settle(&mut one);
        assert_eq!(one.status(), name);
    }
    one.stage.hosts[0].capsules.clear();
    settle(&mut one);
    assert_eq!(one.status(), "missing");
}

#[test]
fn a_paused_capsule_is_destroyed() {
    let mut one = one("{}");
    assert_eq!(one.post("pause", "").status, 200);
    let path = format!("/v1/capsules/{}", one.id);
    assert_eq!(one.stage.request(Delete, &path, ("x-api-key", &one.key), "").status, 204);
    assert!(one.stage.hosts[0].capsules.is_empty());
}

#[test]
fn a_snapshot_is_a_template_of_its_team_until_it_is_deleted() {
    let mut one = one(r#"{"vcpus":2,"memory_mb":256}"#);
    let body = format!(r#"{{"sandbox_id":"{}","name":"warm"}}"#, one.id);
    let key = one.key.clone();
    let header = ("x-api-key", key.as_str());
    let made = one.stage.request(Post, "/v1/snapshots", header, &body);
    assert_eq!(made.status, 201, "{:?}", made.error_message());
    let shown = json(&made);
    assert_eq!((text(&shown["name"]), text(&shown["type"])), ("warm".into(), "snapshot".into()));
    assert_eq!((&shown["vcpus"], &shown["memory_mb"]), (&2.into(), &256.into()));
    assert_eq!(one.status(), "running");
    let again = one.stage.request(Post, "/v1/snapshots", header, &body);
    assert_eq!(again.status, 409);
    let before: Vec<String> = one.stage.hosts[0].snapshots.iter().cloned().collect();
    let replaced = one.stage.request(Post, "/v1/snapshots?overwrite=true", header, &body);
    assert_eq!(replaced.status, 201, "{:?}", replaced.error_message());
    assert_eq!(one.stage.hosts[0].snapshots.len(), 1, "the old one goes");
    assert!(!one.stage.hosts[0].snapshots.contains(&before[0]));
    let unnamed = format!(r#"{{"sandbox_id":"{}"}}"#, one.id);
    let unnamed = one.stage.request(Post, "/v1/snapshots", header, &unnamed);
    let name = text(&json(&unnamed)["name"]);
    assert!(name.starts_with("template-") && name.len() == 17, "{name}");
    let listed = json(&one.stage.request(Get, "/v1/snapshots?type=snapshot", header, ""));
    assert_eq!(listed.as_array().map(Vec::len), Some(2), "{listed}");
    let created = one.stage.request(Post, "/v1/capsules", header, r#"{"template":"warm","memory_mb":512}"#);
    assert_eq!(created.status, 201, "{:?}", created.error_message());
    let created = json(&created);
    assert_eq!((text(&created["template"]), &created["memory_mb"]), ("warm".into(), &256.into()));
    for name in ["warm", &name] {
        let path = format!("/v1/snapshots/{name}");
        assert_eq!(one.stage.request(Delete, &path, header, "").status, 204);
        assert_eq!(one.stage.request(Delete, &path, header, "").status, 404);
    }
    assert!(one.stage.hosts[0].snapshots.is_empty());
    let gone = one.stage.request(Post, "/v1/capsules", header, r#"{"template":"warm"}"#);
    assert_eq!(gone.status, 404);
}

#[test]
fn clones_are_capsules_of_a_snapshot_that_goes_again() {
    let mut one = one("{}");
    let made = one.post("clone", r#"{"count":3}"#);
    assert_eq!(made.status, 201, "{:?}", made.error_message());
    let clones = json(&made);
    let ids: std::collections::BTreeSet<String> =
        clones.as_array().into_iter().flatten().map(|c| text(&c["id"])).collect();
    assert_eq!(ids.len(), 3, "{clones}");
    assert!(clones.as_array().into_iter().flatten().all(|c| text(&c["status"]) == "running"));
    assert!(one.stage.hosts[0].snapshots.is_empty(), "nobody sees it");
    assert_eq!(one.stage.hosts[0].capsules.len(), 4);
    assert_eq!(one.post("clone", r#"{"count":21}"#).status, 400);
    assert_eq!(one.status(), "running");
    assert_eq!(one.post("pause", "").status, 200);
    assert_eq!(one.post("clone", "").status, 409);
}
