//! What a real capsule does: boots, runs commands, keeps to itself, goes away.

use crate::{Context, Outcome, Test, ensure};
use serde_json::{Value, json};
use wrenn_tests::http::Answer;
use wrenn_tests::leftovers::take_stock;
use wrenn_tests::process::wait_until;
use wrenn_tests::{Context as _, Failure, Result};

pub const TESTS: &[Test] = &[
    ("a_command_runs_and_its_output_comes_back", a_command_runs_and_its_output_comes_back),
    ("exit_codes_signals_and_stderr_are_told", exit_codes_signals_and_stderr_are_told),
    ("environment_and_directory_are_the_commands_own", environment_and_directory_are_the_commands_own),
    ("output_that_is_binary_or_long_comes_whole", output_that_is_binary_or_long_comes_whole),
    ("commands_that_cannot_run_say_why", commands_that_cannot_run_say_why),
    ("a_command_that_takes_too_long_is_ended", a_command_that_takes_too_long_is_ended),
    ("the_guest_is_what_it_should_be", the_guest_is_what_it_should_be),
    ("metadata_needs_a_token", metadata_needs_a_token),
    ("the_guest_reaches_nothing_by_default", the_guest_reaches_nothing_by_default),
    ("capsules_are_apart", capsules_are_apart),
    ("many_commands_at_once", many_commands_at_once),
    ("a_destroyed_capsule_leaves_nothing", a_destroyed_capsule_leaves_nothing),
];

impl Context {
    /// The capsule that tests share, made by the first one that asks.
    pub fn capsule(&mut self) -> Result<String> {
        if let Some(id) = &self.shared_capsule {
            return Ok(id.clone());
        }
        let id = self.create(&json!({"template": "minimal", "memory_mb": 256}))?;
        self.shared_capsule = Some(id.clone());
        Ok(id)
    }

    /// Makes a capsule and waits until it runs.
    pub fn create(&self, body: &Value) -> Result<String> {
        let client = self.stack.client();
        let made = client.post("/v1/capsules", body)?;
        ensure!(made.status == 201, "create: {} {}", made.status, made.json());
        let id = made.json()["id"].as_str().unwrap_or_default().to_string();
        ensure!(id.starts_with("cl-") && id.len() == 28, "the id's form: {id}");
        let path = format!("/v1/capsules/{id}");
        wait_until("the capsule to run", wrenn_tests::http::DEFAULT_TIMEOUT, || {
            client.get(&path).is_ok_and(|a| {
                !["pending", "starting"].contains(&a.json()["status"].as_str().unwrap_or_default())
            })
        })?;
        let capsule = client.get(&path)?.json();
        ensure!(capsule["status"] == "running", "the capsule does not run: {capsule}");
        Ok(id)
    }

    /// Posts to a capsule's exec.
    pub fn exec(&self, id: &str, body: &Value) -> Result<Answer> {
        self.stack.client().post(&format!("/v1/capsules/{id}/exec"), body)
    }

    /// Runs a shell command in a capsule and gives its standard output, which must be text.
    pub fn shell(&self, id: &str, command: &str) -> Result<String> {
        let answer = self.exec(id, &json!({"cmd": "/bin/sh", "args": ["-c", command]}))?;
        let body = answer.json();
        if answer.status != 200 || body["exit_code"] != 0 {
            return Err(Failure(format!("{command}: {} {body}", answer.status)));
        }
        Ok(body["stdout"].as_str().unwrap_or_default().trim_end().to_string())
    }

    /// Destroys a capsule.
    pub fn destroy(&self, id: &str) -> Result<()> {
        let answer = self.stack.client().delete(&format!("/v1/capsules/{id}"))?;
        ensure!(answer.status == 204, "destroy: {} {}", answer.status, answer.json());
        Ok(())
    }
}

fn a_command_runs_and_its_output_comes_back(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let answer = context.exec(&id, &json!({"cmd": "uname", "args": ["-sm"]}))?;
    let body = answer.json();
    ensure!(answer.status == 200, "{} {body}", answer.status);
    ensure!(body["stdout"] == "Linux x86_64\n" && body["stderr"] == "", "{body}");
    ensure!(
        body["exit_code"] == 0 && body["encoding"] == "utf-8" && body["sandbox_id"] == id.as_str(),
        "{body}"
    );
    ensure!(body["duration_ms"].is_u64(), "{body}");
    let listed = context.stack.client().get("/v1/capsules")?.json();
    let entry = listed.as_array().into_iter().flatten().find(|c| c["id"] == id.as_str());
    let entry = entry.ok_or("the list does not have the capsule")?;
    ensure!(entry["status"] == "running" && entry["template"] == "minimal", "{entry}");
    ensure!(entry["vcpus"] == 1 && entry["memory_mb"] == 256, "{entry}");
    Ok(Outcome::Passed)
}

fn exit_codes_signals_and_stderr_are_told(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    for code in [0, 1, 42, 255] {
        let body =
            context.exec(&id, &json!({"cmd": "/bin/sh", "args": ["-c", format!("exit {code}")]}))?.json();
        ensure!(body["exit_code"] == code, "exit {code}: {body}");
    }
    let body = context
        .exec(&id, &json!({"cmd": "/bin/sh", "args": ["-c", "echo out; echo err >&2; exit 3"]}))?
        .json();
    ensure!(body["stdout"] == "out\n" && body["stderr"] == "err\n" && body["exit_code"] == 3, "{body}");
    let body = context.exec(&id, &json!({"cmd": "/bin/sh", "args": ["-c", "kill -TERM $$"]}))?.json();
    ensure!(body["exit_code"] == 128 + 15, "a signal is told as a shell does: {body}");
    Ok(Outcome::Passed)
}

fn environment_and_directory_are_the_commands_own(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let body = json!({
        "cmd": "/bin/sh", "args": ["-c", "echo \"$GREETING\"; pwd; echo \"$HOME\"; id -un"],
        "envs": {"GREETING": "hé=llo"}, "cwd": "/usr/share",
    });
    let body = context.exec(&id, &body)?.json();
    let stdout = body["stdout"].as_str().unwrap_or_default();
    let lines: Vec<&str> = stdout.lines().collect();
    ensure!(lines.len() == 4 && lines[0] == "hé=llo" && lines[1] == "/usr/share", "{body}");
    let env = context.shell(&id, "env")?;
    ensure!(env.contains(&format!("WRENN_SANDBOX_ID={id}")), "{env}");
    ensure!(env.contains("WRENN_TEMPLATE_ID=minimal") && env.contains("PATH="), "{env}");
    ensure!(!env.contains("GREETING"), "a command's environment stays: {env}");
    let file = context.shell(&id, "cat /run/wrenn/.WRENN_SANDBOX_ID")?;
    ensure!(file == id, "{file}");
    Ok(Outcome::Passed)
}

fn output_that_is_binary_or_long_comes_whole(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let body =
        context.exec(&id, &json!({"cmd": "/bin/sh", "args": ["-c", "printf '\\377\\000\\001'"]}))?.json();
    ensure!(body["encoding"] == "base64" && body["stdout"] == "/wAB", "{body}");
    let body = context
        .exec(&id, &json!({"cmd": "/bin/sh", "args": ["-c", "yes 0123456789abcde | head -c 3000000"]}))?
        .json();
    let stdout = body["stdout"].as_str().unwrap_or_default();
    ensure!(stdout.len() == 3_000_000 && body["exit_code"] == 0, "{} bytes came", stdout.len());
    ensure!(stdout.lines().all(|l| "0123456789abcde".starts_with(l)), "the bytes were mixed up");
    Ok(Outcome::Passed)
}

fn commands_that_cannot_run_say_why(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    for (body, told) in [
        (json!({"cmd": "/no/such/program"}), "/no/such/program"),
        (json!({"cmd": "no-such-program"}), "no-such-program"),
        (json!({"cmd": "/etc/passwd"}), "/etc/passwd"),
        (json!({"cmd": "/bin/true", "cwd": "/no/such/directory"}), "/no/such/directory"),
    ] {
        let answer = context.exec(&id, &body)?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let failed =
            answer.status != 200 || answer.json()["exit_code"].as_u64().is_some_and(|c| c == 126 || c == 127);
        ensure!(failed && text.contains(told), "{body} got {} {text}", answer.status);
    }
    for body in [
        json!({}),
        json!({"cmd": ""}),
        json!({"cmd": 5}),
        json!({"cmd": "/bin/true", "args": "x"}),
        json!({"cmd": "/bin/true", "timeout_sec": -1}),
        json!({"cmd": "a\u{0}b"}),
    ] {
        let answer = context.exec(&id, &body)?;
        ensure!(
            answer.status == 400 && answer.error_code() == "invalid_request",
            "{body} got {} {}",
            answer.status,
            answer.json()
        );
    }
    Ok(Outcome::Passed)
}

fn a_command_that_takes_too_long_is_ended(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "echo before; sleep 1000 & wait"], "timeout_sec": 1});
    let answer = context.exec(&id, &body)?;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    ensure!(answer.status != 200 || answer.json()["exit_code"] != 0, "{} {text}", answer.status);
    wait_until("the command and its child to be gone", std::time::Duration::from_secs(30), || {
        let count = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 100[0]' || true";
        context.shell(&id, count).is_ok_and(|lines| lines == "0")
    })?;
    Ok(Outcome::Passed)
}

fn the_guest_is_what_it_should_be(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    ensure!(context.shell(&id, "cat /proc/1/comm")? == "tini", "PID 1 is not tini");
    let address = context.shell(&id, "cat /proc/net/fib_trie")?;
    ensure!(address.contains("169.254.0.21"), "the address is missing: {address}");
    let root = context.shell(&id, "findmnt -no FSTYPE / 2>/dev/null || grep ' / ' /proc/mounts")?;
    ensure!(root.contains("ext4"), "{root}");
    let missing = context.shell(
        &id,
        "for t in tini socat chronyd sudo wget curl git; do command -v $t > /dev/null || echo $t; done",
    )?;
    ensure!(missing.is_empty(), "tools are missing: {missing}");
    let free_kb = context.shell(&id, "df -k --output=avail / | tail -n 1")?;
    ensure!(free_kb.trim().parse().is_ok_and(|kb: u64| kb > 1024 * 1024), "{free_kb} KiB free on the disk");
    ensure!(
        context.shell(&id, "sudo -u user -H sh -c 'id -un; echo $HOME'")? == "user\n/home/user",
        "the user account"
    );
    let hostname = context.shell(&id, "hostname")?;
    ensure!(!hostname.is_empty() && hostname != "(none)" && hostname != "localhost", "{hostname}");
    let zombies = context.shell(&id, "cat /proc/[0-9]*/stat 2>/dev/null | awk '$3 == \"Z\"' | wc -l")?;
    ensure!(zombies == "0", "{zombies} zombies");
    // What is written stays, and stays in this capsule.
    context.shell(&id, "echo kept > /var/tmp/kept")?;
    ensure!(context.shell(&id, "cat /var/tmp/kept")? == "kept", "a file is gone");
    Ok(Outcome::Passed)
}

fn metadata_needs_a_token(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let url = "http://169.254.169.254";
    let status = context.shell(&id, &format!("curl -s -m 10 -o /dev/null -w '%{{http_code}}' {url}/"))?;
    ensure!(status == "401", "without a token: {status}");
    let document = context.shell(
        &id,
        &format!(
            "T=$(curl -s -m 10 -X PUT -H 'X-metadata-token-ttl-seconds: 60' {url}/latest/api/token); \
             curl -s -m 10 -H \"X-metadata-token: $T\" -H 'Accept: application/json' {url}/"
        ),
    )?;
    let document: Value = serde_json::from_str(&document).context("the metadata document")?;
    ensure!(document["instanceID"] == id.as_str() && document["envID"] == "minimal", "{document}");
    Ok(Outcome::Passed)
}

fn the_guest_reaches_nothing_by_default(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    let host = context.stack.cp_address.clone();
    let port = host.rsplit(':').next().unwrap_or_default();
    let targets = ["169.254.0.22", "10.11.0.1", "10.12.0.0", "10.12.0.2", "127.0.0.1"];
    for target in targets {
        let url = format!("http://{target}:{port}/health");
        let got =
            context.shell(&id, &format!("curl -s -m 2 -o /dev/null -w '%{{http_code}}' {url} || true"))?;
        ensure!(got == "000", "the guest reached {url}: {got}");
    }
    let ping = context.shell(
        &id,
        "timeout 3 sh -c 'echo > /dev/tcp/10.12.0.0/22' 2>/dev/null && echo reached || echo no",
    )?;
    ensure!(ping == "no", "{ping}");
    Ok(Outcome::Passed)
}

fn capsules_are_apart(context: &mut Context) -> Result<Outcome> {
    let first = context.capsule()?;
    let second = context.create(&json!({"memory_mb": 256, "vcpus": 2}))?;
    let checked = check_apart(context, &first, &second);
    context.destroy(&second)?;
    checked?;
    let answer = context.exec(&second, &json!({"cmd": "/bin/true"}))?;
    ensure!(answer.status == 404 || answer.status == 409, "exec in a destroyed capsule: {}", answer.status);
    ensure!(context.shell(&first, "echo still here")? == "still here", "the first one went too");
    Ok(Outcome::Passed)
}

fn check_apart(context: &Context, first: &str, second: &str) -> Result<()> {
    ensure!(
        context.shell(second, "ls /var/tmp/kept 2>/dev/null || echo none")? == "none",
        "the disk is shared"
    );
    ensure!(context.shell(second, "nproc")? == "2", "it has not two CPUs");
    let id_of = |id: &str| context.shell(id, "cat /proc/sys/kernel/random/boot_id");
    ensure!(id_of(first)? != id_of(second)?, "two capsules, one boot");
    Ok(())
}

fn many_commands_at_once(context: &mut Context) -> Result<Outcome> {
    const COMMANDS: usize = 24;
    let id = context.capsule()?;
    let client = context.stack.client();
    let results: Vec<Result<Answer>> = std::thread::scope(|scope| {
        let run = |n: usize| {
            let (client, id) = (client.clone(), id.clone());
            move || {
                let body = json!({"cmd": "/bin/sh", "args": ["-c", format!("sleep 0.2; echo {n}")]});
                client.post(&format!("/v1/capsules/{id}/exec"), &body)
            }
        };
        let threads: Vec<_> = (0..COMMANDS).map(|n| scope.spawn(run(n))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    for (n, result) in results.into_iter().enumerate() {
        let body = result?.json();
        ensure!(body["stdout"] == format!("{n}\n"), "command {n} got {body}");
    }
    Ok(Outcome::Passed)
}

fn a_destroyed_capsule_leaves_nothing(context: &mut Context) -> Result<Outcome> {
    let before = take_stock();
    let id = context.create(&json!({"memory_mb": 256}))?;
    ensure!(take_stock() != before, "a capsule takes nothing of the machine");
    context.shell(&id, "echo x > /root/x 2>/dev/null || true")?;
    context.destroy(&id)?;
    let answer = context.stack.client().get(&format!("/v1/capsules/{id}"))?;
    ensure!(
        answer.status == 404 || answer.json()["status"] == "stopped",
        "{} {}",
        answer.status,
        answer.json()
    );
    ensure!(!context.stack.data().join("sandboxes").join(&id).exists(), "its directory is left");
    let left: Vec<_> = take_stock().difference(&before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Outcome::Passed)
}
