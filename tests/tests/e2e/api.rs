//! The public API without a VM: who may do what, and what bad input gets.

use crate::{Context, Outcome, Test, ensure};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;
use wrenn_tests::process::run;
use wrenn_tests::{Context as _, Result};

pub const TESTS: &[Test] = &[
    ("health_answers", health_answers),
    ("login_needs_the_right_password", login_needs_the_right_password),
    ("tokens_that_were_changed_are_refused", tokens_that_were_changed_are_refused),
    ("api_keys_are_made_listed_and_revoked", api_keys_are_made_listed_and_revoked),
    ("bad_requests_say_what_is_wrong", bad_requests_say_what_is_wrong),
    ("requests_that_cannot_be_met_are_refused", requests_that_cannot_be_met_are_refused),
    ("a_huge_header_is_cut_off", a_huge_header_is_cut_off),
    ("another_teams_capsule_is_not_there", another_teams_capsule_is_not_there),
    ("host_registration_tokens_work_once", host_registration_tokens_work_once),
    ("secrets_stay_secret_on_the_host", secrets_stay_secret_on_the_host),
    ("configuration_errors_name_the_variable", configuration_errors_name_the_variable),
];

fn health_answers(context: &mut Context) -> Result<Outcome> {
    let answer = context.stack.anonymous().get("/health")?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.json());
    Ok(Outcome::Passed)
}

fn login_needs_the_right_password(context: &mut Context) -> Result<Outcome> {
    let anonymous = context.stack.anonymous();
    for body in [
        json!({"email": wrenn_tests::stack::ADMIN_EMAIL, "password": "not the password"}),
        json!({"email": "nobody@example.com", "password": "not the password"}),
    ] {
        let answer = anonymous.post("/v1/auth/login", &body)?;
        ensure!(
            answer.status == 401 && answer.error_code() == "unauthorized",
            "{} {}",
            answer.status,
            answer.json()
        );
    }
    let answer = anonymous.get("/v1/capsules")?;
    ensure!(answer.status == 401, "without credentials: {}", answer.status);
    context.stack.admin()?;
    Ok(Outcome::Passed)
}

fn tokens_that_were_changed_are_refused(context: &mut Context) -> Result<Outcome> {
    let login = json!({"email": wrenn_tests::stack::ADMIN_EMAIL, "password": context.stack.password});
    let token = context.stack.anonymous().post("/v1/auth/login", &login)?.json()["token"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    let parts: Vec<&str> = token.split('.').collect();
    ensure!(parts.len() == 3, "a JWT has three parts: {token}");
    // {"alg":"none"}, and the claims of somebody else under the old signature.
    let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", parts[1]);
    let other_claims = format!("{}.{}A.{}", parts[0], parts[1], parts[2]);
    let mut flipped = token.clone().into_bytes();
    let at = flipped.len() - 10;
    flipped[at] = if flipped[at] == b'A' { b'B' } else { b'A' };
    let flipped = String::from_utf8(flipped).context("a JWT is ASCII")?;
    for bad in [unsigned, other_claims, flipped, "x".into(), String::new()] {
        let client = context.stack.anonymous().with_header("Authorization", &format!("Bearer {bad}"));
        let answer = client.get("/v1/hosts")?;
        ensure!(answer.status == 401, "{bad:?} got {}", answer.status);
    }
    Ok(Outcome::Passed)
}

fn api_keys_are_made_listed_and_revoked(context: &mut Context) -> Result<Outcome> {
    let admin = context.stack.admin()?;
    let made = admin.post("/v1/api-keys", &json!({"name": "short-lived"}))?;
    ensure!(made.status == 201, "{} {}", made.status, made.json());
    let key = made.json();
    let secret = key["key"].as_str().unwrap_or_default().to_string();
    let digits = secret.strip_prefix("wrn_").unwrap_or_default();
    ensure!(
        digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit()),
        "the key's form: {}",
        secret.len()
    );
    let client = context.stack.anonymous().with_header("X-API-Key", &secret);
    ensure!(client.get("/v1/capsules")?.status == 200, "the new key is not taken");
    let listed = admin.get("/v1/api-keys")?;
    ensure!(!String::from_utf8_lossy(&listed.body).contains(&secret), "the list shows the key");
    let id = key["id"].as_str().unwrap_or_default();
    ensure!(admin.delete(&format!("/v1/api-keys/{id}"))?.status == 204, "the key is not deleted");
    ensure!(client.get("/v1/capsules")?.status == 401, "a deleted key is still taken");
    Ok(Outcome::Passed)
}

fn bad_requests_say_what_is_wrong(context: &mut Context) -> Result<Outcome> {
    let client = context.stack.client();
    for body in [
        "",
        "{",
        "[]",
        "\"x\"",
        "{\"vcpus\": \"two\"}",
        "{\"memory_mb\": -512}",
        "{\"vcpus\": 0}",
        "{\"memory_mb\": 1.5}",
        "{\"template\": 7}",
        "{\"template\": \"../../etc\"}",
        "{\"timeout_sec\": -1}",
        "{\"vcpus\": 99999999999999999999}",
        "{\"a\":{\"a\":{\"a\":",
    ] {
        let answer = client.request("POST", "/v1/capsules", Some(("application/json", body.as_bytes())))?;
        ensure!(
            (400..=404).contains(&answer.status) && !answer.error_message().is_empty(),
            "{body:?} got {} {}",
            answer.status,
            answer.json()
        );
    }
    let answer = client.get("/v1/nothing-here")?;
    ensure!(
        answer.status == 404 && answer.error_code() == "not_found",
        "{} {}",
        answer.status,
        answer.json()
    );
    let answer = client.request("PUT", "/v1/capsules", None)?;
    ensure!(answer.status == 405, "PUT got {}", answer.status);
    for id in ["cl-nothere", "cl-0000000000000000000000000", "%2e%2e", "x"] {
        let answer = client.get(&format!("/v1/capsules/{id}"))?;
        ensure!(answer.status == 404, "{id} got {}", answer.status);
    }
    Ok(Outcome::Passed)
}

fn requests_that_cannot_be_met_are_refused(context: &mut Context) -> Result<Outcome> {
    let client = context.stack.client();
    let answer = client.post("/v1/capsules", &json!({"template": "no-such-template"}))?;
    ensure!((400..=404).contains(&answer.status), "{} {}", answer.status, answer.json());
    ensure!(answer.error_message().contains("no-such-template"), "{}", answer.error_message());
    let answer = client.post("/v1/capsules", &json!({"memory_mb": 1_000_000}))?;
    ensure!(
        answer.status >= 400 && !answer.error_message().is_empty(),
        "{} {}",
        answer.status,
        answer.json()
    );
    let listed = client.get("/v1/capsules")?.json();
    let alive = listed
        .as_array()
        .into_iter()
        .flatten()
        .filter(|c| c["status"] == "running" || c["status"] == "starting")
        .count();
    ensure!(alive == 0, "refused requests made capsules: {listed}");
    Ok(Outcome::Passed)
}

fn a_huge_header_is_cut_off(context: &mut Context) -> Result<Outcome> {
    let mut request = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: ".to_vec();
    request.resize(request.len() + 10 * 1024 * 1024, b'a');
    request.extend_from_slice(b"\r\n\r\n");
    // The server may cut the connection before all is sent; then there is no whole answer to read.
    if let Ok(answer) = context.stack.anonymous().raw(&request) {
        ensure!(answer.status == 431, "{}", answer.status);
    }
    let mut slow = TcpStream::connect(&context.stack.cp_address).context("connect")?;
    slow.write_all(b"GET /health HTTP/1.1\r\nX-Slow: ").context("write")?;
    ensure!(context.stack.anonymous().get("/health")?.status == 200, "one slow client stops the others");
    slow.set_read_timeout(Some(Duration::from_secs(90))).context("timeout")?;
    let mut answer = Vec::new();
    let _ = slow.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    ensure!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "a slow client got {answer}");
    Ok(Outcome::Passed)
}

fn another_teams_capsule_is_not_there(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let stack = &context.stack;
    let create = ["user", "create", "--email", "other@example.com", "--password-stdin"];
    run(&mut stack.command("wrenn-cp", &create), Some("another password\n")).context("user create")?;
    let login = json!({"email": "other@example.com", "password": "another password"});
    let token = stack.anonymous().post("/v1/auth/login", &login)?.json()["token"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    let other = stack.anonymous().with_header("Authorization", &format!("Bearer {token}"));
    let key = other.post("/v1/api-keys", &json!({}))?.json()["key"].as_str().unwrap_or_default().to_string();
    let other = stack.anonymous().with_header("X-API-Key", &key);
    ensure!(other.get("/v1/capsules")?.json() == json!([]), "the other team sees capsules");
    let path = format!("/v1/capsules/{id}");
    ensure!(other.get(&path)?.status == 404, "get");
    ensure!(other.delete(&path)?.status == 404, "delete");
    let body = json!({"cmd": "/bin/true"});
    ensure!(other.post(&format!("{path}/exec"), &body)?.status == 404, "exec");
    ensure!(stack.client().get(&path)?.status == 200, "its own team does not see it");
    Ok(Outcome::Passed)
}

fn host_registration_tokens_work_once(context: &mut Context) -> Result<Outcome> {
    let admin = context.stack.admin()?;
    let made = admin.post("/v1/hosts", &json!({"type": "regular"}))?.json();
    let token = made["registration_token"].as_str().unwrap_or_default();
    let id = made["host"]["id"].as_str().unwrap_or_default();
    ensure!(token.len() == 64, "a token has 64 digits: {}", token.len());
    let body = json!({"token": token, "address": "127.0.0.1:1", "arch": "x86_64", "cpu_cores": 1, "memory_mb": 1, "disk_gb": 1});
    let anonymous = context.stack.anonymous();
    let renewed = admin.post(&format!("/v1/hosts/{id}/token"), &json!({}))?;
    ensure!(renewed.status == 201, "a pending host's token is not renewed: {}", renewed.status);
    ensure!(anonymous.post("/v1/hosts/register", &body)?.status == 401, "a replaced token is taken");
    let mut body = body;
    body["token"] = renewed.json()["registration_token"].clone();
    let registered = anonymous.post("/v1/hosts/register", &body)?;
    ensure!(registered.status == 201, "{} {}", registered.status, registered.error_message());
    ensure!(anonymous.post("/v1/hosts/register", &body)?.status == 401, "a token is taken twice");
    let host_token = registered.json()["token"].as_str().unwrap_or_default().to_string();
    let as_host = anonymous.with_header("X-Host-Token", &host_token);
    ensure!(as_host.post(&format!("/v1/hosts/{id}/heartbeat"), &json!({}))?.status == 204, "heartbeat");
    let other = &context.stack.host_id;
    ensure!(
        as_host.post(&format!("/v1/hosts/{other}/heartbeat"), &json!({}))?.status == 403,
        "another's heartbeat"
    );
    ensure!(
        anonymous.post(&format!("/v1/hosts/{id}/heartbeat"), &json!({}))?.status == 401,
        "nobody's heartbeat"
    );
    ensure!(admin.delete(&format!("/v1/hosts/{id}?force=true"))?.status == 204, "the host is not deleted");
    Ok(Outcome::Passed)
}

fn secrets_stay_secret_on_the_host(context: &mut Context) -> Result<Outcome> {
    use std::os::unix::fs::PermissionsExt;
    let token = context.stack.data().join("host-token");
    let mode = std::fs::metadata(&token).context(token.display())?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "host-token has mode {mode:o}");
    let (cp, agent) = context.stack.pids();
    for pid in [cp, agent].into_iter().flatten() {
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.pid)).context("cmdline")?;
        let line = String::from_utf8_lossy(&line).into_owned();
        ensure!(!line.contains("postgresql:") && !line.contains("secret"), "a secret in argv: {line}");
    }
    for log in ["cp", "agent"] {
        let text = std::fs::read_to_string(context.stack.log(log)).context(log)?;
        for secret in [&context.stack.api_key, &context.stack.password] {
            ensure!(!text.contains(secret.as_str()), "the {log} log holds a secret");
        }
    }
    Ok(Outcome::Passed)
}

fn configuration_errors_name_the_variable(context: &mut Context) -> Result<Outcome> {
    for (program, variable, value) in [
        ("wrenn-cp", "WRENN_CP_LISTEN_ADDR", "nonsense"),
        ("wrenn-cp", "JWT_SECRET", "short"),
        ("wrenn-cp", "LOG_LEVEL", "loud"),
        ("wrenn-cp", "WRENN_NO_SUCH_THING", "1"),
        ("wrenn-cp", "DATABASE_URL", ""),
        ("wrenn-agent", "WRENN_HOST_LISTEN_ADDR", "1:2:3"),
        ("wrenn-agent", "WRENN_CP_URL", "gopher://x"),
        ("wrenn-agent", "WRENN_DIR", "relative/path"),
    ] {
        let mut command: Command = context.stack.command(program, &[]);
        command.env(variable, value);
        let output = command.output().context(program)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success() && said.contains(variable),
            "{program} with {variable}={value:?} said {said:?}"
        );
    }
    Ok(Outcome::Passed)
}
