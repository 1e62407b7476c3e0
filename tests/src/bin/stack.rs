//! `make demo`, `make dev` and their like: a whole Wrenn on this machine, for trying it out.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use wrenn_tests::http::Client;
use wrenn_tests::stack::{Options, Stack};
use wrenn_tests::{Context, Failure, Result};

const HELP: &str = "\
usage: stack demo          boot a VM, run `uname -a` in it, take everything down again
       stack up            start PostgreSQL and the control plane, and leave them running
       stack agent         register this machine there, and start a host agent
       stack exec COMMAND  run a shell command in a capsule there, made if need be
       stack down          stop them and remove their state

The state is in $WRENN_STACK_DIR (default /var/lib/wrenn-dev), removed by `stack down`.
$WRENN_CP_LISTEN_ADDR and $WRENN_HOST_LISTEN_ADDR name other addresses than
127.0.0.1:8000 and 127.0.0.1:50051.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["demo"] => demo(),
        ["up"] => up(),
        ["agent"] => agent(),
        ["exec", command @ ..] if !command.is_empty() => exec(&command.join(" ")),
        ["down"] => down(),
        _ => Err(Failure(HELP.to_string())),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn directory() -> PathBuf {
    std::env::var_os("WRENN_STACK_DIR")
        .map_or_else(|| Path::new("/var/lib/wrenn-dev").to_path_buf(), PathBuf::from)
}

fn address(variable: &str, default_port: u16) -> String {
    match std::env::var(variable) {
        Ok(value) if value.starts_with(':') => format!("127.0.0.1{value}"),
        Ok(value) => value,
        Err(_) => format!("127.0.0.1:{default_port}"),
    }
}

fn options() -> Result<Options> {
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err(Failure(
            "the host agent needs root for networks and VMs: run this as root or with sudo".into(),
        ));
    }
    let directory = directory();
    if Stack::attach(&directory)?.is_some() {
        return Err(Failure(format!(
            "a stack already runs in {}: `make dev-down` stops it",
            directory.display()
        )));
    }
    let mut options = Options::new(&directory);
    options.cp_address = Some(address("WRENN_CP_LISTEN_ADDR", 8000));
    options.agent_address = Some(address("WRENN_HOST_LISTEN_ADDR", 50051));
    Ok(options)
}

fn step(text: &str) {
    println!("==> {text}");
}

fn demo() -> Result<u8> {
    let options = options()?;
    step("starting a private PostgreSQL, wrenn-cp and wrenn-agent");
    let done = run_demo(&options);
    let removed = std::fs::remove_dir_all(&options.directory).context(options.directory.display());
    done.and(removed)?;
    println!();
    println!("That was a real VM, and nothing of it is left. To go on:");
    println!("  make dev dev-agent                    the same, left running");
    println!("  make exec CMD='cat /etc/os-release'   the next command, in a capsule there");
    println!("  make dev-down                         stop it and remove its state");
    Ok(0)
}

fn run_demo(options: &Options) -> Result<()> {
    let mut stack = Stack::start(options)?;
    let done = use_once(&stack);
    if done.is_err() {
        for name in ["cp", "agent"] {
            eprintln!("the log of {name} ends:\n{}", wrenn_tests::process::tail(&stack.log(name)));
        }
    }
    done.and(stack.stop())
}

fn use_once(stack: &Stack) -> Result<()> {
    step("POST /v1/capsules: booting a microVM");
    let client = stack.client();
    let id = create(&client)?;
    step(&format!("POST /v1/capsules/{id}/exec: uname -a"));
    let answer = run(&client, &id, "uname -a")?;
    println!("{}", answer["stdout"].as_str().unwrap_or_default().trim_end());
    step(&format!("DELETE /v1/capsules/{id}"));
    client.delete(&format!("/v1/capsules/{id}"))?;
    Ok(())
}

fn up() -> Result<u8> {
    let options = options()?;
    let stack = Stack::start_without_host(&options)?;
    println!("control plane: http://{}", stack.cp_address);
    println!("API key and admin login: {}/stack.json (only root can read it)", options.directory.display());
    println!("next: make dev-agent    stop: make dev-down");
    stack.leave_running()?;
    Ok(0)
}

fn attached() -> Result<Stack> {
    let directory = directory();
    Stack::attach(&directory)?.ok_or_else(|| {
        Failure(format!("no stack runs in {}: start one with `make dev`", directory.display()))
    })
}

fn agent() -> Result<u8> {
    let mut stack = attached()?;
    if stack.left_running("agent") {
        return Err(Failure("a host agent runs there already: `make exec CMD='uname -a'` uses it".into()));
    }
    stack.add_host()?;
    println!("host {} is online, agent at {}", stack.host_id, stack.agent_address);
    println!("next: make exec CMD='uname -a'    stop: make dev-down");
    stack.leave_running()?;
    Ok(0)
}

fn create(client: &Client) -> Result<String> {
    let answer = client.post("/v1/capsules", &json!({"template": "minimal"}))?;
    let capsule = answer.json();
    if answer.status != 201 {
        return Err(Failure(format!("no capsule: {} {}", answer.status, answer.error_message())));
    }
    let id = capsule["id"].as_str().unwrap_or_default().to_string();
    wrenn_tests::process::wait_until("the capsule to run", wrenn_tests::http::DEFAULT_TIMEOUT, || {
        client
            .get(&format!("/v1/capsules/{id}"))
            .is_ok_and(|a| a.json()["status"] != "starting" && a.json()["status"] != "pending")
    })?;
    let capsule = client.get(&format!("/v1/capsules/{id}"))?.json();
    if capsule["status"] == "running" {
        Ok(id)
    } else {
        Err(Failure(format!("the capsule did not start: {capsule}")))
    }
}

fn run(client: &Client, id: &str, command: &str) -> Result<Value> {
    let body = json!({"cmd": "/bin/sh", "args": ["-c", command]});
    let answer = client.post(&format!("/v1/capsules/{id}/exec"), &body)?;
    if answer.status == 200 {
        Ok(answer.json())
    } else {
        Err(Failure(format!("exec: {} {}", answer.status, answer.error_message())))
    }
}

fn exec(command: &str) -> Result<u8> {
    let stack = attached()?;
    if !stack.left_running("agent") {
        return Err(Failure("no host agent runs there: start one with `make dev-agent`".into()));
    }
    let client = stack.client();
    let capsules = client.get("/v1/capsules")?.json();
    let running = capsules.as_array().into_iter().flatten().find(|c| c["status"] == "running");
    let id = match running.and_then(|c| c["id"].as_str()) {
        Some(id) => id.to_string(),
        None => create(&client)?,
    };
    let answer = run(&client, &id, command)?;
    print!("{}", answer["stdout"].as_str().unwrap_or_default());
    eprint!("{}", answer["stderr"].as_str().unwrap_or_default());
    Ok(answer["exit_code"].as_u64().and_then(|c| u8::try_from(c).ok()).unwrap_or(1))
}

fn down() -> Result<u8> {
    let directory = directory();
    match Stack::attach(&directory)? {
        Some(stack) => {
            stack.stop_and_remove()?;
            println!("stopped, and {} removed", directory.display());
        }
        None => println!("no stack runs in {}", directory.display()),
    }
    Ok(0)
}
