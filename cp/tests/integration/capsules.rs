//! Capsules: made, placed, used, destroyed, and what bad requests get.

use crate::stage::{ADMIN, Stage, error, json, text};
use serde_json::{Value, json};
use wire::message::{CapsuleCreate, CapsuleDestroy, Code, Error, Message, ProcessExited};
use wrenn_cp::http::handler::HostError;
use wrenn_cp::http::handler::Method::{Delete, Get, Post};

struct Team {
    stage: Stage,
    key: String,
    bearer: String,
}

fn team() -> Team {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let key = stage.api_key(&bearer);
    stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    Team { stage, key, bearer }
}

impl Team {
    fn get(&mut self, path: &str) -> Value {
        let answer = self.stage.request(Get, path, ("x-api-key", &self.key), "");
        assert_eq!(answer.status, 200, "{path}: {:?}", answer.error_message());
        json(&answer)
    }

    fn post(&mut self, path: &str, body: &str) -> wrenn_cp::http::handler::Response {
        self.stage.request(Post, path, ("x-api-key", &self.key), body)
    }

    fn delete(&mut self, path: &str) -> u16 {
        self.stage.request(Delete, path, ("x-api-key", &self.key), "").status
    }

    fn create(&mut self) -> String {
        let answer = self.post("/v1/capsules", "{}");
        assert_eq!(answer.status, 201, "{:?}", answer.error_message());
        text(&json(&answer)["id"])
    }

    fn states(&mut self) -> Vec<String> {
        let rows = crate::postgres::client(&self.stage.url)
            .query("select status from capsules order by created_at", &[])
            .expect("query");
        rows.iter().map(|row| row.get("status")).collect()
    }
}

#[test]
fn a_capsule_is_made_used_and_destroyed() {
    let mut team = team();
    let body = r#"{"template":"minimal","vcpus":2,"memory_mb":256,"timeout_sec":60,"metadata":{"job":"7"}}"#;
    let made = team.post("/v1/capsules", body);
    assert_eq!(made.status, 201);
    let made = json(&made);
    let id = text(&made["id"]);
    assert_eq!((id.len(), made["status"].as_str()), (28, Some("running")));
    assert_eq!(
        (&made["vcpus"], &made["memory_mb"], &made["timeout_sec"]),
        (&json!(2), &json!(256), &json!(60))
    );
    assert_eq!(made["metadata"], json!({"job": "7", "agent_version": "0.1.0"}));
    assert_eq!((&made["guest_ip"], &made["disk_size_mb"]), (&json!("169.254.0.21"), &json!(2048)));
    assert!(made["started_at"].is_string() && made["last_active_at"].is_string());
    assert!(made.get("host_id").is_none() && made.get("error").is_none(), "{made}");
    assert_eq!(team.get("/v1/capsules")[0]["id"], id.as_str());

    team.stage.hosts[0].stdout = b"hello\n".to_vec();
    let path = format!("/v1/capsules/{id}");
    let answer = team
        .post(&format!("{path}/exec"), r#"{"cmd":"echo","args":["hello"],"envs":{"A":"b"},"cwd":"/tmp"}"#);
    assert_eq!(
        json(&answer),
        json!({"sandbox_id": id, "cmd": "echo", "stdout": "hello\n", "stderr": "", "exit_code": 0,
               "duration_ms": 5, "encoding": "utf-8"})
    );
    let started = &team.stage.hosts[0].started[0];
    assert_eq!((started.argv.len(), &*started.cwd, started.timeout_ms), (2, &b"/tmp"[..], 30_000));
    assert_eq!(started.environment, [("A".into(), "b".into())]);
    assert_eq!(team.post(&format!("{path}/ping"), "").status, 204);

    assert_eq!(team.delete(&path), 204);
    assert!(team.stage.hosts[0].capsules.is_empty());
    assert_eq!(team.get(&path)["status"], "stopped");
    assert_eq!(team.get("/v1/capsules"), json!([]));
    assert_eq!(error(&team.post(&format!("{path}/exec"), r#"{"cmd":"x"}"#)).1, "invalid_state");
    assert_eq!(error(&team.post(&format!("{path}/ping"), "")).1, "invalid_state");
    assert_eq!(team.delete(&path), 404);
    assert_eq!(team.states(), ["stopped"]);
}

#[test]
fn bad_requests_say_what_is_wrong() {
    let mut team = team();
    for (body, told) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "JSON object"),
        (r#"{"vcpus":"two"}"#, "vcpus must be an integer from 1 to 64, not \"two\""),
        (r#"{"vcpus":0}"#, "vcpus"),
        (r#"{"vcpus":99999999999999999999}"#, "vcpus"),
        (r#"{"memory_mb":-512}"#, "memory_mb must be an integer from 128 to 1048576, not -512"),
        (r#"{"memory_mb":1.5}"#, "memory_mb"),
        (r#"{"timeout_sec":-1}"#, "timeout_sec"),
        (r#"{"template":7}"#, "template must be a string"),
        (r#"{"template":"../../etc"}"#, "is not the name of a template"),
        (r#"{"metadata":{"bad key":"x"}}"#, "metadata"),
        (r#"{"metadata":{"k":1}}"#, "metadata.k"),
        (r#"{"memory_mb":1000000}"#, "memory_mb up to 3808"),
    ] {
        let (status, code, message) = error(&team.post("/v1/capsules", body));
        assert_eq!((status, code.as_str()), (400, "invalid_request"), "{body}: {message}");
        assert!(message.contains(told), "{body}: {message}");
    }
    assert!(team.states().is_empty());
    for id in ["cl-nothere", "cl-0000000000000000000000000", "..", "x"] {
        let answer = team.stage.request(Get, &format!("/v1/capsules/{id}"), ("x-api-key", &team.key), "");
        assert_eq!(error(&answer).0, 404, "{id}");
    }
    assert_eq!(team.post("/v1/capsules", r#"{"unknown":true,"template":null}"#).status, 201);
}

#[test]
fn another_teams_capsule_is_not_there() {
    let mut team = team();
    let path = format!("/v1/capsules/{}", team.create());
    let other = team.stage.person("other@example.com");
    let other = team.stage.api_key(&other);
    let auth = ("x-api-key", other.as_str());
    assert_eq!(json(&team.stage.request(Get, "/v1/capsules", auth, "")), json!([]));
    assert_eq!(team.stage.request(Get, &path, auth, "").status, 404);
    assert_eq!(team.stage.request(Delete, &path, auth, "").status, 404);
    assert_eq!(team.stage.request(Post, &format!("{path}/ping"), auth, "").status, 404);
    for body in [r#"{"cmd":"/bin/true"}"#, "nonsense"] {
        assert_eq!(team.stage.request(Post, &format!("{path}/exec"), auth, body).status, 404);
    }
    assert_eq!(team.get(&path)["status"], "running");
}

#[test]
fn failed_creates_leave_nothing() {
    let remote = |code| HostError::Remote(Error::new(code, "it went wrong"));
    for (failure, status, code) in [
        (remote(Code::Internal), 502, "agent_error"),
        (remote(Code::DeadlineExceeded), 502, "agent_error"),
        (remote(Code::Unavailable), 502, "agent_error"),
        (remote(Code::ResourceExhausted), 503, "host_unavailable"),
        (remote(Code::NotFound), 404, "not_found"),
        (remote(Code::InvalidRequest), 400, "invalid_request"),
        (HostError::Busy, 503, "host_unavailable"),
    ] {
        let mut team = team();
        team.stage.hosts[0].failures.push_back(failure.clone());
        let answer = error(&team.post("/v1/capsules", "{}"));
        assert_eq!((answer.0, answer.1.as_str()), (status, code), "{failure:?}");
        if failure == remote(Code::Internal) || failure == remote(Code::NotFound) {
            assert!(!answer.2.contains("it went wrong"), "the host's own words: {}", answer.2);
        }
        assert_eq!(team.stage.hosts[0].calls, [CapsuleCreate::KIND], "{failure:?}");
        assert_eq!(team.get("/v1/capsules"), json!([]));
        assert_eq!(team.states(), ["error"]);
        // Its room is free again.
        assert_eq!(team.post("/v1/capsules", r#"{"memory_mb":3808}"#).status, 201);
    }
    let mut team = team();
    let answer = error(&team.post("/v1/capsules", r#"{"template":"no-such-template"}"#));
    assert_eq!(answer.0, 404);
    assert!(answer.2.contains("no-such-template"), "{}", answer.2);
}

#[test]
fn a_create_whose_answer_is_lost_is_cleaned_up() {
    for lost in [
        HostError::Lost { address: "x".into(), reason: "reset".into() },
        HostError::TimedOut { after_ms: 27_000 },
        HostError::Cancelled,
    ] {
        let mut team = team();
        team.stage.hosts[0].lost_answers.push_back(lost.clone());
        assert!(team.post("/v1/capsules", "{}").status >= 500, "{lost:?}");
        assert_eq!(team.stage.hosts[0].calls, [CapsuleCreate::KIND, CapsuleDestroy::KIND], "{lost:?}");
        assert!(team.stage.hosts[0].capsules.is_empty(), "{lost:?}");
        assert_eq!(team.states(), ["error"]);
    }
}

#[test]
fn a_create_that_is_cut_short_by_a_destruction_is_a_conflict() {
    let mut team = team();
    let destroyed = HostError::Remote(Error::new(Code::Cancelled, "destroyed"));
    team.stage.hosts[0].failures.push_back(destroyed);
    let answer = error(&team.post("/v1/capsules", "{}"));
    assert_eq!((answer.0, answer.1.as_str()), (409, "conflict"), "{}", answer.2);
}

#[test]
fn where_a_host_is_stays_with_its_operator() {
    let mut team = team();
    team.stage.hosts.clear();
    let began = std::time::Instant::now();
    let answer = error(&team.post("/v1/capsules", "{}"));
    assert_eq!((answer.0, answer.1.as_str()), (503, "host_unavailable"));
    assert!(began.elapsed().as_secs() < 12, "{:?}", began.elapsed());
    assert_eq!(team.states(), ["error"]);
    assert!(answer.2.contains("refused") && !answer.2.contains("10.0.0.1"), "{}", answer.2);
}

#[test]
fn a_host_that_declines_is_passed_over() {
    let mut team = team();
    let bearer = team.bearer.clone();
    team.stage.add_host(&bearer, "10.0.0.2:50051", 2048);
    let full = HostError::Remote(Error::new(Code::ResourceExhausted, "all slots are in use"));
    // The first is the larger one, and is asked first.
    team.stage.hosts[0].failures.push_back(full.clone());
    team.create();
    assert_eq!((team.stage.hosts[0].capsules.len(), team.stage.hosts[1].capsules.len()), (0, 1));
    let exec = format!("/v1/capsules/{}/exec", text(&team.get("/v1/capsules")[0]["id"]));
    assert_eq!(team.post(&exec, r#"{"cmd":"true"}"#).status, 200, "it is asked where it is");
    // When all decline, the first one's reason is told.
    team.stage.hosts[0].failures.push_back(full);
    team.stage.hosts[1].failures.push_back(HostError::Busy);
    assert_eq!(team.post("/v1/capsules", "{}").status, 503);
    assert_eq!(team.states(), ["running", "error"]);
}

#[test]
fn a_host_is_never_promised_twice() {
    let mut team = team();
    // 4096 MiB less 256 of reserve hold three capsules of 1024 and their overhead, not four.
    let results: Vec<u16> = std::thread::scope(|scope| {
        let (url, key) = (&team.stage.url, &team.key);
        let context = &team.stage.context;
        let one = move || {
            let mut stage = Stage::attach(url, context);
            stage.hosts.push(crate::fake_host::FakeHost::new("10.0.0.1:50051"));
            stage.request(Post, "/v1/capsules", ("x-api-key", key), r#"{"memory_mb":1024}"#).status
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    });
    assert_eq!(results.iter().filter(|status| **status == 201).count(), 3, "{results:?}");
    assert_eq!(results.iter().filter(|status| **status == 503).count(), 5, "{results:?}");
    assert_eq!(team.states().iter().filter(|state| *state == "running").count(), 3);
}

#[test]
fn a_destruction_that_cannot_reach_the_host_is_made_up_for() {
    let mut team = team();
    let path = format!("/v1/capsules/{}", team.create());
    let lost = HostError::Unreachable { address: "x".into(), reason: "refused".into() };
    team.stage.hosts[0].failures.push_back(lost);
    assert_eq!(team.delete(&path), 503);
    assert_eq!(team.get(&path)["status"], "stopping");
    assert_eq!(team.delete(&path), 204, "and it may be asked again");
}

#[test]
fn commands_end_as_they_end() {
    let mut team = team();
    let exec = format!("/v1/capsules/{}/exec", team.create());
    let ended = |exit_code, signal, timed_out| ProcessExited { exit_code, signal, timed_out, duration_ms: 1 };
    for (exited, code) in [
        (ended(0, 0, false), 0),
        (ended(255, 0, false), 255),
        (ended(0, 15, false), 143),
        (ended(0, 15, true), 124),
    ] {
        team.stage.hosts[0].exited = exited.clone();
        let body = json(&team.post(&exec, r#"{"cmd":"x","timeout_sec":1}"#));
        assert_eq!(body["exit_code"], code, "{body}");
        assert_eq!(body["timed_out"] == json!(true), exited.timed_out);
    }
    team.stage.hosts[0].stdout = vec![0xff, 0, 1];
    let body = json(&team.post(&exec, r#"{"cmd":"x"}"#));
    assert_eq!((&body["encoding"], &body["stdout"]), (&json!("base64"), &json!("/wAB")));

    assert_eq!(body.get("truncated"), None);
    team.stage.hosts[0].dropped_bytes = 7;
    let body = json(&team.post(&exec, r#"{"cmd":"x"}"#));
    assert_eq!((&body["truncated"], &body["dropped_bytes"]), (&json!(true), &json!(7)));

    let (status, code, message) = error(&team.post(&exec, r#"{"cmd":"no-such-program"}"#));
    assert_eq!((status, code.as_str()), (400, "invalid_request"));
    assert_eq!(message, "command not found: no-such-program");
    for body in [
        "{}",
        r#"{"cmd":""}"#,
        r#"{"cmd":5}"#,
        r#"{"cmd":"x","args":"y"}"#,
        r#"{"cmd":"x","args":[1]}"#,
        r#"{"cmd":"x","timeout_sec":-1}"#,
        r#"{"cmd":"a\u0000b"}"#,
        r#"{"cmd":"x","envs":{"A=B":"c"}}"#,
        r#"{"cmd":"x","background":true,"tag":"123"}"#,
    ] {
        assert_eq!(error(&team.post(&exec, body)).1, "invalid_request", "{body}");
    }
    let long = json!({"cmd": "x", "args": ["y".repeat(66_000)]}).to_string();
    assert!(error(&team.post(&exec, &long)).2.contains("write what is long into a file"));
    // The host lost it, and the record does not know yet.
    team.stage.hosts[0].capsules.clear();
    assert_eq!(error(&team.post(&exec, r#"{"cmd":"x"}"#)).0, 404);
}

#[test]
fn processes_run_in_the_background() {
    let mut team = team();
    let path = format!("/v1/capsules/{}", team.create());
    let started = team.post(&format!("{path}/exec"), r#"{"cmd":"sleep","args":["9"],"background":true}"#);
    let body = json(&started);
    assert_eq!((started.status, &body["pid"]), (202, &json!(42)));
    assert!(text(&body["tag"]).starts_with("proc-"), "{body}");
    assert_eq!(team.stage.hosts[0].started[0].timeout_ms, 0, "it has no time limit");
    assert_eq!(
        team.get(&format!("{path}/processes")),
        json!({"processes": [{"pid": 42, "tag": "web", "cmd": "sleep", "args": ["9"]}]})
    );
    assert_eq!(team.delete(&format!("{path}/processes/web")), 204);
    assert_eq!(team.delete(&format!("{path}/processes/42?signal=SIGTERM")), 204);
    assert_eq!(team.delete(&format!("{path}/processes/42?signal=SIGSTOP")), 400);
    assert_eq!(team.delete(&format!("{path}/processes/43")), 404);
}

#[test]
fn what_happened_is_written_down() {
    let mut team = team();
    let path = format!("/v1/capsules/{}", team.create());
    assert_eq!(team.delete(&path), 204);
    assert_eq!(team.post("/v1/capsules", r#"{"template":"none"}"#).status, 404);
    let rows = crate::postgres::client(&team.stage.url)
        .query(
            "select action || ' ' || outcome || ' ' || actor_type as t from audit_log order by created_at",
            &[],
        )
        .expect("query");
    let told: Vec<String> = rows.iter().map(|row| row.get("t")).collect();
    assert_eq!(
        told,
        [
            "user.create success system",
            "api_key.create success user",
            "host.create success user",
            "host.register success host",
            "capsule.create success api_key",
            "capsule.destroy success api_key",
            "capsule.create failure api_key",
        ]
    );
}

#[test]
fn an_agent_that_is_being_restarted_is_waited_for_when_there_is_no_other() {
    let mut team = team();
    team.stage.away = team.stage.hosts.pop();
    let answer = team.post("/v1/capsules", "{}");
    assert_eq!(answer.status, 201, "{:?}", answer.error_message());
    assert_eq!(team.stage.hosts.len(), 1, "it was asked again");
    assert_eq!(team.states(), ["running"]);
}
