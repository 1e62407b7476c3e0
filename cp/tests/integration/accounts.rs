//! Logins, tokens, passwords, API keys.

use crate::stage::{ADMIN, PASSWORD, Stage, error, json, text};
use serde_json::json;
use wrenn_cp::api::users::{CreateError, create};
use wrenn_cp::http::handler::Method::{Delete, Get, Patch, Post};

#[test]
fn a_login_gives_a_token_that_is_taken() {
    let mut stage = Stage::new();
    let answer = stage.login("  Admin@Example.com ", PASSWORD);
    let body = json(&answer);
    assert_eq!((answer.status, text(&body["email"]).as_str()), (200, ADMIN));
    assert!(text(&body["user_id"]).starts_with("usr-") && text(&body["team_id"]).starts_with("team-"));
    let bearer = format!("bearer {}", text(&body["token"]));
    let me = stage.request(Get, "/v1/me", ("authorization", &bearer), "");
    assert_eq!(json(&me), json!({"name": "Admin", "email": ADMIN, "has_password": true, "providers": []}));
}

#[test]
fn wrong_passwords_and_unknown_accounts_look_the_same() {
    let mut stage = Stage::new();
    let wrong = stage.login(ADMIN, "not the password");
    assert_eq!(error(&wrong).0, 401);
    assert_eq!(stage.login("nobody@example.com", PASSWORD), wrong);
    for body in ["", "{}", r#"{"email":1,"password":"x"}"#, r#"{"email":"a@b","password":""}"#] {
        let answer = stage.request(Post, "/v1/auth/login", ("x-test", ""), body);
        assert_eq!(error(&answer).1, "invalid_request", "{body}");
    }
}

#[test]
fn failed_logins_are_bounded() {
    let mut stage = Stage::new();
    for _ in 0..wrenn_cp::auth::limiter::ACCOUNT_FAILURES {
        assert_eq!(stage.login("somebody@example.com", "wrong password").status, 401);
    }
    let answer = stage.login("somebody@example.com", "wrong password");
    assert_eq!((answer.status, error(&answer).1.as_str()), (429, "rate_limited"));
    assert!(answer.headers.iter().any(|(name, _)| *name == "retry-after"));
    assert_eq!(stage.login(ADMIN, PASSWORD).status, 200, "others are not concerned");
}

#[test]
fn bad_credentials_are_refused() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let tampered = format!("{}x", bearer);
    for header in [
        ("authorization", "Bearer "),
        ("authorization", "Bearer x"),
        ("authorization", "Basic YTpi"),
        ("authorization", tampered.as_str()),
        ("x-api-key", ""),
        ("x-api-key", "wrn_00000000000000000000000000000000"),
        ("x-api-key", "wrn_' or 1=1 --"),
        ("x-test", ""),
    ] {
        let answer = stage.request(Get, "/v1/capsules", header, "");
        assert_eq!(error(&answer).1, "unauthorized", "{header:?}");
    }
}

#[test]
fn api_keys_are_made_listed_and_revoked() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let made = stage.request(Post, "/v1/api-keys", auth, r#"{"name":"ci"}"#);
    assert_eq!(made.status, 201);
    let made = json(&made);
    let key = text(&made["key"]);
    assert_eq!(text(&made["key_prefix"]), format!("{}...", &key[..12]));
    assert_eq!(made["last_used"], serde_json::Value::Null);
    let as_key = ("x-api-key", key.as_str());
    assert_eq!(stage.request(Get, "/v1/capsules", as_key, "").status, 200);
    // A key acts for its team, not for the person.
    assert_eq!(error(&stage.request(Get, "/v1/api-keys", as_key, "")).0, 403);
    assert_eq!(error(&stage.request(Get, "/v1/me", as_key, "")).0, 403);
    let list = stage.request(Get, "/v1/api-keys", auth, "");
    assert!(!String::from_utf8_lossy(&list.body).contains(&key));
    assert_eq!(json(&list)[0]["name"], "ci");
    assert!(json(&list)[0]["last_used"].is_string(), "its use is noted");
    let path = format!("/v1/api-keys/{}", text(&made["id"]));
    let stranger = stage.person("stranger@example.com");
    assert_eq!(stage.request(Delete, &path, ("authorization", &stranger), "").status, 404);
    assert_eq!(stage.request(Delete, &path, auth, "").status, 204);
    assert_eq!(stage.request(Delete, &path, auth, "").status, 404);
    assert_eq!(stage.request(Get, "/v1/capsules", as_key, "").status, 401);
}

#[test]
fn secrets_are_stored_as_hashes_and_verifiers() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let key = stage.api_key(&bearer);
    let host = stage.add_host(&bearer, "10.0.0.1:50051", 4096);
    assert!(host.starts_with("host-"));
    let mut client = crate::postgres::client(&stage.url);
    let mut all = String::new();
    for table in
        ["users", "api_keys", "hosts", "host_registration_tokens", "host_refresh_tokens", "audit_log"]
    {
        for row in client.simple_query(&format!("select t::text from {table} t")).expect("query") {
            if let postgres::SimpleQueryMessage::Row(row) = row {
                all.push_str(row.get(0).unwrap_or_default());
            }
        }
    }
    assert!(!all.contains(&key) && !all.contains(PASSWORD), "a secret is stored as it is");
    assert!(all.contains("pbkdf2-sha256$600000$") && all.contains("SCRAM-SHA-256$4096:"), "{all}");
    let row = client.query_one("select id, wire_verifier from api_keys", &[]).expect("one key");
    let verifier = wire::auth::Verifier::parse(row.get("wire_verifier")).expect("a verifier");
    assert!(format!("{verifier:?}").contains("4096"));
}

#[test]
fn another_password_makes_old_tokens_void() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let change =
        |current: &str, new: &str| json!({"current_password": current, "new_password": new}).to_string();
    let refused = stage.request(Post, "/v1/me/password", auth, &change("wrong", "another password"));
    assert_eq!(error(&refused).0, 401);
    let refused = stage.request(Post, "/v1/me/password", auth, &change(PASSWORD, "short"));
    assert_eq!(error(&refused).0, 400);
    // Tokens are void by the second: this one is of an earlier one.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let changed = stage.request(Post, "/v1/me/password", auth, &change(PASSWORD, "another password"));
    assert_eq!(changed.status, 204);
    assert_eq!(stage.request(Get, "/v1/me", auth, "").status, 401);
    assert_eq!(stage.login(ADMIN, PASSWORD).status, 401);
    assert_eq!(stage.login(ADMIN, "another password").status, 200);
}

#[test]
fn the_present_password_is_not_guessed_with_a_token() {
    let mut stage = Stage::new();
    let bearer = stage.person("guessed@example.com");
    let auth = ("authorization", bearer.as_str());
    let guess = json!({"current_password": "a guess", "new_password": "another password"}).to_string();
    let guesses = wrenn_cp::auth::limiter::ACCOUNT_FAILURES;
    let mut ask = || stage.request(Post, "/v1/me/password", auth, &guess).status;
    let answers: Vec<u16> = (0..=guesses).map(|_| ask()).collect();
    assert!(answers[..guesses as usize].iter().all(|status| *status == 401), "{answers:?}");
    assert_eq!(answers.last(), Some(&429));
}

#[test]
fn a_name_is_changed() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let answer = stage.request(Patch, "/v1/me", auth, r#"{"name":"Zoë"}"#);
    assert_eq!((answer.status, &json(&answer)["name"]), (200, &json!("Zoë")));
    assert_eq!(stage.request(Patch, "/v1/me", auth, r#"{"name":""}"#).status, 400);
    let long = json!({"name": "x".repeat(101)}).to_string();
    assert_eq!(stage.request(Patch, "/v1/me", auth, &long).status, 400);
}

#[test]
fn accounts_are_made_once_and_with_sense() {
    let mut stage = Stage::new();
    let mut make = |email: &str, password: &str| create(&mut stage.db, email, None, false, password);
    assert_eq!(make("ADMIN@example.com", PASSWORD), Err(CreateError::Exists(ADMIN.into())));
    assert!(matches!(make("nonsense", PASSWORD), Err(CreateError::BadEmail(_))));
    assert!(matches!(make("a@b", "short"), Err(CreateError::Password(_))));
    assert!(make("a@b", PASSWORD).is_ok());
}

#[test]
fn an_account_that_is_closed_is_out_at_once() {
    let mut stage = Stage::new();
    let bearer = stage.person("a@example.com");
    let auth = ("authorization", bearer.as_str());
    assert_eq!(stage.request(Get, "/v1/me", auth, "").status, 200);
    crate::postgres::client(&stage.url)
        .execute("update users set status = 'disabled' where email = 'a@example.com'", &[])
        .expect("update");
    assert_eq!(stage.request(Get, "/v1/me", auth, "").status, 401);
    assert_eq!(stage.login("a@example.com", PASSWORD).status, 401);
}

#[test]
fn health_needs_the_database() {
    let mut stage = Stage::new();
    assert_eq!(stage.request(Get, "/health", ("x-test", ""), "").status, 200);
}
