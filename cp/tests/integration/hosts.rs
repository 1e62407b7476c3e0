//! Hosts: records, registration, heartbeats, tokens, deletion.

use crate::stage::{ADMIN, Stage, error, json, text};
use serde_json::json;
use wrenn_cp::http::handler::Method::{Delete, Get, Post};

const FACTS: &str = r#""arch":"x86_64","cpu_cores":2,"memory_mb":4096,"disk_gb":10"#;

fn register(stage: &mut Stage, token: &str, address: &str) -> (u16, serde_json::Value) {
    let body = format!(r#"{{"token":"{token}","address":"{address}",{FACTS}}}"#);
    let answer = stage.request(Post, "/v1/hosts/register", ("x-test", ""), &body);
    (answer.status, json(&answer))
}

#[test]
fn a_registration_token_is_good_once() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let made = json(&stage.request(Post, "/v1/hosts", auth, r#"{"type":"regular","provider":"local"}"#));
    let (first, id) = (text(&made["registration_token"]), text(&made["host"]["id"]));
    assert_eq!((first.len(), &made["host"]["status"]), (64, &json!("pending")));
    let renewed = json(&stage.request(Post, &format!("/v1/hosts/{id}/token"), auth, ""));
    let second = text(&renewed["registration_token"]);
    assert_eq!(register(&mut stage, &first, "10.0.0.1:50051").0, 401, "it was replaced");
    assert_eq!(register(&mut stage, &second, "nonsense").0, 400, "and a mistake does not use it up");
    let (status, body) = register(&mut stage, &second, "10.0.0.1:50051");
    assert_eq!((status, &body["host"]["status"]), (201, &json!("online")));
    assert!(wire::auth::Verifier::parse(&text(&body["wire_verifier"])).is_some());
    assert_eq!(register(&mut stage, &second, "10.0.0.1:50051").0, 401);
    let late = stage.request(Post, &format!("/v1/hosts/{id}/token"), auth, "");
    assert_eq!(error(&late).1, "invalid_state");
    let bad = ["0.0.0.0:1", "10.0.0.1", "10.0.0.1:0", "host:1", "10.0.0.1:70000", ""];
    for address in bad {
        assert_eq!(register(&mut stage, &"0".repeat(64), address).0, 400, "{address}");
    }
}

#[test]
fn a_host_that_does_not_tell_its_size_is_there_and_gets_no_capsules() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let made = json(&stage.request(Post, "/v1/hosts", auth, r#"{"type":"regular"}"#));
    let body = json!({"token": made["registration_token"], "address": "10.0.0.1:50051"}).to_string();
    let registered = json(&stage.request(Post, "/v1/hosts/register", ("x-test", ""), &body));
    let host = &registered["host"];
    assert_eq!((&host["status"], &host["memory_mb"]), (&json!("online"), &json!(null)));
    let beat = format!("/v1/hosts/{}/heartbeat", text(&host["id"]));
    let token = text(&registered["token"]);
    assert_eq!(stage.request(Post, &beat, ("x-host-token", &token), "").status, 204);
    assert_eq!(error(&stage.request(Post, "/v1/capsules", auth, "{}")).1, "host_unavailable");
}

#[test]
fn a_token_that_is_an_hour_old_is_refused() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let made = stage.request(Post, "/v1/hosts", ("authorization", &bearer), r#"{"type":"regular"}"#);
    let token = text(&json(&made)["registration_token"]);
    crate::postgres::client(&stage.url)
        .execute("update host_registration_tokens set expires_at = expires_at - interval '1 hour'", &[])
        .expect("update");
    assert_eq!(register(&mut stage, &token, "10.0.0.1:50051").0, 401);
}

#[test]
fn heartbeats_need_the_hosts_own_token() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let made = stage.request(Post, "/v1/hosts", ("authorization", &bearer), r#"{"type":"regular"}"#);
    let (_, body) = register(&mut stage, &text(&json(&made)["registration_token"]), "10.0.0.1:50051");
    let (id, token, refresh) =
        (text(&body["host"]["id"]), text(&body["token"]), text(&body["refresh_token"]));
    let path = format!("/v1/hosts/{id}/heartbeat");
    let beat = |stage: &mut Stage, token: &str, path: &str| {
        stage.request(Post, path, ("x-host-token", token), "{}").status
    };
    assert_eq!(beat(&mut stage, &token, &path), 204);
    assert_eq!(beat(&mut stage, "", &path), 401);
    assert_eq!(beat(&mut stage, bearer.trim_start_matches("Bearer "), &path), 401, "a user's token");
    assert_eq!(beat(&mut stage, &token, "/v1/hosts/host-0000000000000000000000000/heartbeat"), 403);
    // And a host's token is no user's.
    let as_user = format!("Bearer {token}");
    assert_eq!(stage.request(Get, "/v1/hosts", ("authorization", &as_user), "").status, 401);

    let ask = json!({"refresh_token": refresh}).to_string();
    let fresh = stage.request(Post, "/v1/hosts/auth/refresh", ("x-test", ""), &ask);
    assert_eq!(fresh.status, 200);
    assert_eq!(json(&fresh)["wire_verifier"], body["wire_verifier"], "it changes with JWT_SECRET only");
    let again = stage.request(Post, "/v1/hosts/auth/refresh", ("x-test", ""), &ask);
    assert_eq!(error(&again).0, 401, "a refresh token is good once");
    assert_eq!(beat(&mut stage, &text(&json(&fresh)["token"]), &path), 204);
    assert_eq!(beat(&mut stage, &token, &path), 204, "the agent may not have saved the new one yet");
    let ask = json!({"refresh_token": json(&fresh)["refresh_token"]}).to_string();
    assert_eq!(stage.request(Post, "/v1/hosts/auth/refresh", ("x-test", ""), &ask).status, 200);
    assert_eq!(beat(&mut stage, &token, &path), 401, "two generations ago");
}

#[test]
fn a_silent_host_is_unreachable() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let id = stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    let path = format!("/v1/hosts/{id}");
    assert_eq!(json(&stage.request(Get, &path, auth, ""))["status"], "online");
    crate::postgres::client(&stage.url)
        .execute("update hosts set last_heartbeat_at = now() - interval '91 seconds'", &[])
        .expect("update");
    assert_eq!(json(&stage.request(Get, &path, auth, ""))["status"], "unreachable");
    let refused = stage.request(Post, "/v1/capsules", auth, "{}");
    assert_eq!((error(&refused).0, error(&refused).1.as_str()), (503, "host_unavailable"));
}

#[test]
fn a_host_gets_no_capsule_before_its_first_heartbeat() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let made = stage.request(Post, "/v1/hosts", auth, r#"{"type":"regular"}"#);
    let (_, body) = register(&mut stage, &text(&json(&made)["registration_token"]), "10.0.0.1:50051");
    let path = format!("/v1/hosts/{}", text(&body["host"]["id"]));
    let host = json(&stage.request(Get, &path, auth, ""));
    assert_eq!((&host["status"], &host["last_heartbeat_at"]), (&json!("online"), &json!(null)));
    let refused = stage.request(Post, "/v1/capsules", auth, "{}");
    assert_eq!((error(&refused).0, error(&refused).1.as_str()), (503, "host_unavailable"));
    // One that registers and is never heard of is not online for ever.
    crate::postgres::client(&stage.url)
        .execute("update hosts set updated_at = now() - interval '91 seconds'", &[])
        .expect("update");
    assert_eq!(json(&stage.request(Get, &path, auth, ""))["status"], "unreachable");
}

#[test]
fn who_may_manage_hosts() {
    let mut stage = Stage::new();
    let admin = stage.person(ADMIN);
    let owner = stage.person("owner@example.com");
    let auth = ("authorization", owner.as_str());
    let team = text(&json(&stage.request(Get, "/v1/teams", auth, ""))[0]["id"]);
    let regular = stage.request(Post, "/v1/hosts", auth, r#"{"type":"regular"}"#);
    assert_eq!(error(&regular).0, 403);
    assert_eq!(stage.request(Post, "/v1/hosts", auth, r#"{"type":"byoc"}"#).status, 400);
    assert_eq!(stage.request(Post, "/v1/hosts", auth, r#"{"type":"other"}"#).status, 400);
    let body = json!({"type": "byoc", "team_id": team}).to_string();
    let own = stage.request(Post, "/v1/hosts", auth, &body);
    assert_eq!(own.status, 201);
    let path = format!("/v1/hosts/{}", text(&json(&own)["host"]["id"]));

    let stranger = stage.person("stranger@example.com");
    assert_eq!(stage.request(Get, &path, ("authorization", &stranger), "").status, 404);
    assert_eq!(json(&stage.request(Get, "/v1/hosts", ("authorization", &stranger), "")), json!([]));
    assert_eq!(stage.request(Get, &path, ("authorization", &admin), "").status, 200);
    let tags = format!("{path}/tags");
    assert_eq!(stage.request(Post, &tags, auth, r#"{"tag":"gpu"}"#).status, 204);
    assert_eq!(stage.request(Post, &tags, auth, r#"{"tag":"a b"}"#).status, 400);
    assert_eq!(json(&stage.request(Get, &tags, auth, "")), json!(["gpu"]));
    assert_eq!(stage.request(Delete, &format!("{tags}/gpu"), auth, "").status, 204);
    assert_eq!(stage.request(Delete, &format!("{tags}/gpu"), auth, "").status, 404);
    assert_eq!(stage.request(Delete, &path, ("authorization", &stranger), "").status, 404);
    assert_eq!(stage.request(Delete, &path, auth, "").status, 204);
}

#[test]
fn a_host_with_capsules_is_deleted_only_by_force() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let id = stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    let capsule = text(&json(&stage.request(Post, "/v1/capsules", auth, "{}"))["id"]);
    let path = format!("/v1/hosts/{id}");
    let refused = stage.request(Delete, &path, auth, "");
    assert_eq!(error(&refused).1, "host_has_capsules");
    assert_eq!(json(&refused)["error"]["capsule_ids"], json!([capsule]));
    let preview = stage.request(Get, &format!("{path}/delete-preview"), auth, "");
    assert_eq!(json(&preview)["sandbox_ids"], json!([capsule]));
    assert_eq!(stage.request(Delete, &format!("{path}?force=true"), auth, "").status, 204);
    assert!(stage.hosts[0].capsules.is_empty());
    assert_eq!(stage.request(Get, &path, auth, "").status, 404);
    let gone = stage.request(Get, &format!("/v1/capsules/{capsule}"), auth, "");
    assert_eq!(json(&gone)["status"], "stopped");
}

#[test]
fn a_host_that_is_gone_can_be_deleted() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let id = stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    assert_eq!(stage.request(Post, "/v1/capsules", auth, "{}").status, 201);
    stage.hosts.clear();
    assert_eq!(stage.request(Delete, &format!("/v1/hosts/{id}?force=true"), auth, "").status, 204);
    assert_eq!(json(&stage.request(Get, "/v1/capsules", auth, "")), json!([]));
}
