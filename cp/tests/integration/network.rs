//! Network policies and metrics: checked, sent, noted, told.

use crate::stage::{ADMIN, Stage, error, json, text};
use serde_json::{Value, json};
use wire::message::{CapsuleCreate, CapsuleMetrics, CapsuleNetwork, Code, Error, Message};
use wrenn_cp::db::{Database, networks};
use wrenn_cp::http::handler::HostError;
use wrenn_cp::http::handler::Method::{Delete, Get, Patch, Post};
use wrenn_cp::http::handler::{Method, Response};

struct Team {
    stage: Stage,
    key: String,
}

impl Team {
    fn new() -> Team {
        let mut stage = Stage::new();
        let bearer = stage.person(ADMIN);
        let key = stage.api_key(&bearer);
        stage.add_host(&bearer, "10.0.0.1:50051", 4096);
        Team { stage, key }
    }

    fn ask(&mut self, method: Method, path: &str, body: &Value) -> Response {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.stage.request(method, path, ("x-api-key", &self.key), &body)
    }

    fn create(&mut self, body: &Value) -> String {
        let answer = self.ask(Post, "/v1/capsules", body);
        assert_eq!(answer.status, 201, "{:?}", answer.error_message());
        format!("/v1/capsules/{}", text(&json(&answer)["id"]))
    }

    fn audited(&mut self) -> Vec<(String, Value)> {
        crate::postgres::client(&self.stage.url)
            .query(
                "select outcome, metadata::text from audit_log where action = 'capsule.network'
                 order by created_at",
                &[],
            )
            .expect("query")
            .iter()
            .map(|row| (row.get(0), serde_json::from_str(row.get(1)).expect("JSON")))
            .collect()
    }
}

fn refused(answer: &Response) -> (u16, String) {
    let (status, code, _) = error(answer);
    (status, code)
}

fn closed() -> Value {
    json!({"allow_internet": false, "allow": [], "deny": [],
           "limits": {"egress_kbit": 0, "egress_packets": 0, "ingress_kbit": 0, "ingress_packets": 0}})
}

#[test]
fn a_policy_goes_before_the_capsule_that_it_is_for() {
    let mut team = Team::new();
    let plain = team.create(&json!({"network": {"allow_internet": true}}));
    assert_eq!(team.stage.hosts[0].calls.last(), Some(&CapsuleCreate::KIND));
    assert!(team.stage.hosts[0].networks.is_empty());
    let mut open = closed();
    open["allow_internet"] = json!(true);
    assert_eq!(json(&team.ask(Get, &format!("{plain}/network"), &Value::Null)), open);

    let network = json!({"allow": [{"cidr": "9.9.9.9", "protocol": "udp", "ports": 53}]});
    let path = team.create(&json!({"network": network}));
    let host = &team.stage.hosts[0];
    assert_eq!(host.calls.last(), Some(&CapsuleNetwork::KIND));
    let sent = &host.networks[0];
    assert_eq!((sent.capsule_id.as_str(), sent.revision, sent.allow_internet), ("", 0, false));
    assert_eq!(sent.allow, ["udp 9.9.9.9/32 53-53"]);
    let told = json(&team.ask(Get, &format!("{path}/network"), &Value::Null));
    assert_eq!(told["allow"], json!([{"cidr": "9.9.9.9/32", "protocol": "udp", "ports": "53"}]));

    for bad in
        [json!({"allow": ["10.0.0.1"]}), json!({"allow_internet": "yes"}), json!({"open": true}), json!(5)]
    {
        let answer = team.ask(Post, "/v1/capsules", &json!({"network": bad}));
        assert_eq!(refused(&answer), (400, "invalid_request".to_string()), "{bad}");
    }
}

#[test]
fn a_policy_is_changed_field_by_field() {
    let mut team = Team::new();
    let path = team.create(&json!({"network": {"allow_internet": true}}));
    let network = format!("{path}/network");
    let answer = team.ask(Patch, &network, &json!({"deny": ["8.8.8.8"], "limits": {"egress_kbit": 1000}}));
    assert_eq!(answer.status, 200, "{:?}", answer.error_message());
    let answer = team.ask(Patch, &network, &json!({"allow_internet": false, "allow": ["1.1.1.1"]}));
    let expected = json!({
        "allow_internet": false,
        "allow": [{"cidr": "1.1.1.1/32", "protocol": "any", "ports": null}],
        "deny": [{"cidr": "8.8.8.8/32", "protocol": "any", "ports": null}],
        "limits": {"egress_kbit": 1000, "egress_packets": 0, "ingress_kbit": 0, "ingress_packets": 0},
    });
    assert_eq!(json(&answer), expected);
    assert_eq!(json(&team.ask(Get, &network, &Value::Null)), expected);
    let sent = &team.stage.hosts[0].networks;
    assert_eq!(sent.iter().map(|n| n.revision).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((sent[1].allow.len(), sent[1].deny.len(), sent[1].egress_kbit), (1, 1, 1000));
    assert!(path.ends_with(&sent[1].capsule_id));
    let audited = team.audited();
    assert_eq!(audited.len(), 2);
    assert_eq!((audited[1].0.as_str(), &audited[1].1["network"]), ("success", &expected));

    // What the host does not do is not on record as done.
    let fault = Error::new(Code::Internal, "nft did not finish");
    team.stage.hosts[0].failures.push_back(HostError::Remote(fault));
    let answer = team.ask(Patch, &network, &json!({"deny": []}));
    assert_eq!(error(&answer).0, 502);
    assert_eq!(json(&team.ask(Get, &network, &Value::Null)), expected);
    assert_eq!(team.audited()[2].0, "failure");

    for bad in
        [json!({}), json!([]), json!({"deny": null}), json!({"deny": ["x"]}), json!({"limits": {"x": 1}})]
    {
        let answer = team.ask(Patch, &network, &bad);
        assert_eq!(refused(&answer), (400, "invalid_request".to_string()), "{bad}");
    }
}

#[test]
fn only_what_runs_has_a_policy_that_can_be_changed_and_metrics() {
    let mut team = Team::new();
    let path = team.create(&json!({}));
    let answer = team.ask(Get, &format!("{path}/metrics?range=2h"), &Value::Null);
    assert_eq!(answer.status, 200, "{:?}", answer.error_message());
    let told = json(&answer);
    assert!(path.ends_with(told["sandbox_id"].as_str().expect("an id")));
    assert_eq!(told["range"], "2h");
    let point = json!({"timestamp_unix": 7200, "cpu_pct": 12.5, "mem_bytes": 4096, "disk_bytes": 512});
    assert_eq!(told["points"], json!([point]));
    assert_eq!(team.stage.hosts[0].calls.last(), Some(&CapsuleMetrics::KIND));
    let answer = team.ask(Get, &format!("{path}/metrics?range=3h"), &Value::Null);
    assert_eq!(refused(&answer), (400, "invalid_request".to_string()));

    assert_eq!(team.ask(Delete, &path, &Value::Null).status, 204);
    for (method, what, body) in [(Get, "metrics", Value::Null), (Get, "network", Value::Null)] {
        let answer = team.ask(method, &format!("{path}/{what}"), &body);
        assert_eq!(refused(&answer), (404, "not_found".to_string()), "{what}");
    }
    let answer = team.ask(Patch, &format!("{path}/network"), &json!({"allow_internet": true}));
    assert_eq!(refused(&answer), (409, "invalid_state".to_string()));
    assert_eq!(team.stage.hosts[0].networks, []);
    let nobody = "/v1/capsules/cl-0000000000000000000000000/network";
    assert_eq!(team.ask(Patch, nobody, &json!({"allow_internet": true})).status, 404);
}

#[test]
fn one_change_at_a_time() {
    let mut team = Team::new();
    let path = team.create(&json!({"network": {"allow_internet": true}}));
    let network = format!("{path}/network");
    let id = path.rsplit('/').next().expect("an id").to_string();
    let url = team.stage.url.clone();
    // Of those that begin at the same time one does.
    let begun: Vec<u64> = std::thread::scope(|scope| {
        let begin = || {
            scope.spawn(|| {
                let mut db = Database::connect(&url).expect("connect");
                db.transaction(|sql| Ok(networks::begin(sql, &id, 20.0)?)).expect("begin")
            })
        };
        let threads: Vec<_> = (0..8).map(|_| begin()).collect();
        threads.into_iter().filter_map(|t| t.join().expect("no panic")).map(|s| s.revision).collect()
    });
    assert_eq!(begun, [1]);
    let answer = team.ask(Patch, &network, &json!({"deny": ["8.8.8.8"]}));
    assert_eq!(refused(&answer), (409, "conflict".to_string()));
    assert!(team.stage.hosts[0].networks.is_empty());
    // An earlier one does not end a later one, its own end does.
    let end = |revision| {
        let mut db = Database::connect(&url).expect("connect");
        db.transaction(|sql| Ok(networks::end(sql, &id, revision)?)).expect("end");
    };
    end(0);
    assert_eq!(team.ask(Patch, &network, &json!({"deny": ["8.8.8.8"]})).status, 409);
    end(1);
    assert_eq!(team.ask(Patch, &network, &json!({"deny": ["8.8.8.8"]})).status, 200);
    // One that failed, or whose control plane is gone, holds nobody up.
    team.stage.hosts[0].failures.push_back(HostError::Remote(Error::new(Code::Internal, "nft")));
    assert_eq!(team.ask(Patch, &network, &json!({"deny": []})).status, 502);
    assert_eq!(team.ask(Patch, &network, &json!({"allow": ["1.1.1.1"]})).status, 200);
    crate::postgres::client(&url)
        .execute("update capsules set network_changing_since = now() - interval '1 minute'", &[])
        .expect("update");
    let answer = team.ask(Patch, &network, &json!({"allow_internet": false}));
    assert_eq!(answer.status, 200);
    let told = json(&answer);
    assert_eq!(
        (&told["allow"][0]["cidr"], &told["deny"][0]["cidr"]),
        (&json!("1.1.1.1/32"), &json!("8.8.8.8/32"))
    );
}

#[test]
fn a_change_whose_answer_was_lost_is_taken_back() {
    let mut team = Team::new();
    let path = team.create(&json!({"network": {"allow_internet": true}}));
    let network = format!("{path}/network");
    let on_record = json(&team.ask(Get, &network, &Value::Null));
    let lost = HostError::Unreachable { address: "10.0.0.1:50051".into(), reason: "reset".into() };
    team.stage.hosts[0].lost_answers.push_back(lost.clone());
    assert_eq!(team.ask(Patch, &network, &json!({"deny": ["8.8.8.8"]})).status, 503);
    // The host denies it, and whoever asks is told that it does not.
    assert_eq!(team.stage.hosts[0].networks[0].deny.len(), 1);
    assert_eq!(json(&team.ask(Get, &network, &Value::Null)), on_record);

    // One that does not run has no rules to change.
    let again = "update hosts set reconciled_at = null";
    let update = |team: &Team, sql: &str| {
        crate::postgres::client(&team.stage.url).execute(sql, &[]).expect("update");
    };
    update(&team, "update capsules set status = 'pausing'");
    team.stage.run_jobs();
    assert_eq!(team.stage.hosts[0].networks.len(), 1);
    update(&team, "update capsules set status = 'running'");
    // While a change is under way, or may be, nobody else makes one.
    update(&team, "update capsules set network_changing_since = now()");
    update(&team, again);
    team.stage.run_jobs();
    assert_eq!(team.stage.hosts[0].networks.len(), 1);
    update(&team, "update capsules set network_changing_since = now() - interval '1 minute'");
    // What fails here as well is tried again.
    team.stage.hosts[0].lost_answers.push_back(lost);
    for _ in 0..2 {
        update(&team, again);
        team.stage.run_jobs();
    }
    let told = &team.stage.hosts[0].networks;
    assert_eq!(told.iter().map(|n| n.revision).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(told[2].allow_internet && told[2].deny.is_empty() && path.ends_with(&told[2].capsule_id));
    assert_eq!(json(&team.ask(Get, &network, &Value::Null)), on_record);
    let audited = team.audited();
    assert_eq!(audited.iter().map(|a| a.0.as_str()).collect::<Vec<_>>(), ["failure", "success"]);
    assert_eq!(audited[1].1["network"], on_record);

    // Then all agree, and nothing more is sent; a change goes on from there.
    update(&team, again);
    team.stage.run_jobs();
    assert_eq!(team.stage.hosts[0].networks.len(), 3);
    assert_eq!(team.ask(Patch, &network, &json!({"deny": ["9.9.9.9"]})).status, 200);
    update(&team, again);
    team.stage.run_jobs();
    let told = &team.stage.hosts[0].networks;
    assert_eq!((told.len(), told[3].revision, told[3].deny.len()), (4, 4, 1));
}
