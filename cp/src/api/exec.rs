//! `POST /v1/capsules/{id}/exec`: runs a command, and waits for it or not.

use super::capsule_access::{Target, with_capsule};
use super::fields::{Fields, invalid};
use crate::auth::random;
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Reply, Request, Response, Step};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use std::sync::Arc;
use wire::message::{
    CHANNEL_STDERR, CHANNEL_STDOUT, Code, Error, Message, ProcessExited, ProcessStart, ProcessStarted,
};

/// How long a command may run when the request does not say, in seconds.
pub const DEFAULT_TIMEOUT_SEC: i32 = 30;
/// The longest that a request may say.
pub const MAX_TIMEOUT_SEC: i32 = 86_400;
/// How much longer than the command the call may take, in milliseconds: the guest ends the command
/// itself and tells what came of it.
const GRACE_MS: u64 = 10_000;
/// How long starting a background process may take, in milliseconds.
const START_TIMEOUT_MS: u64 = 15_000;
/// The most bytes of output, both streams together. What is more is dropped, and told.
pub const MAX_OUTPUT_BYTES: usize = 8 * 1024 * 1024;
/// The most arguments and variables.
pub const MAX_ARGUMENTS: usize = 4096;
/// The longest argument or variable, in characters: Linux allows 128 KiB (`MAX_ARG_STRLEN`).
pub const MAX_ARGUMENT: usize = 131_071;
/// The longest command with its arguments and variables, in bytes: it is one message of the wire protocol,
/// which has 65,536 with its own overhead.
pub const MAX_COMMAND_BYTES: usize = 65_000;
/// What `timeout(1)` exits with when a command's time ran out.
const EXIT_TIMED_OUT: u32 = 124;
/// What shells add to the number of the signal that ended a command.
const EXIT_SIGNAL: u32 = 128;

/// A command.
#[derive(Debug, Clone)]
struct Command {
    cmd: String,
    args: Vec<String>,
    envs: Vec<(String, String)>,
    cwd: String,
    tag: String,
    timeout_sec: i32,
    is_background: bool,
}

/// The longest tag, in characters.
const MAX_TAG: usize = 64;

impl Command {
    fn of(request: &Request) -> Result<Command, Response> {
        let fields = Fields::of(request)?;
        let command = Command {
            cmd: fields.required_text("cmd", MAX_ARGUMENT)?,
            args: fields.texts("args", MAX_ARGUMENTS, MAX_ARGUMENT)?,
            envs: fields.pairs("envs", MAX_ARGUMENTS, MAX_ARGUMENT)?,
            cwd: fields.text("cwd", 4095)?.unwrap_or_default(),
            tag: fields.text("tag", MAX_TAG)?.unwrap_or_default(),
            timeout_sec: fields.integer("timeout_sec", 1..=MAX_TIMEOUT_SEC)?.unwrap_or(DEFAULT_TIMEOUT_SEC),
            is_background: fields.boolean("background")?,
        };
        if let Some((name, _)) = command.envs.iter().find(|(name, _)| name.is_empty() || name.contains('=')) {
            return Err(invalid(&format!("{name:?} is not the name of a variable")));
        }
        if !command.tag.is_empty() && command.tag.bytes().all(|b| b.is_ascii_digit()) {
            return Err(invalid("a tag must not be a number: that would be a process id"));
        }
        let mut encoded = Vec::new();
        command.message().encode(&mut encoded);
        if encoded.len() > MAX_COMMAND_BYTES {
            return Err(invalid(&format!(
                "the command with its arguments and variables has {} bytes, and may have {MAX_COMMAND_BYTES}; \
                 write what is long into a file",
                encoded.len()
            )));
        }
        Ok(command)
    }

    fn message(&self) -> ProcessStart {
        let argv = std::iter::once(&self.cmd).chain(&self.args).map(|a| a.as_bytes().into()).collect();
        let variable = |(name, value): &(String, String)| (name.as_bytes().into(), value.as_bytes().into());
        let timeout_ms = if self.is_background { 0 } else { self.timeout_sec.unsigned_abs() * 1000 };
        ProcessStart {
            argv,
            environment: self.envs.iter().map(variable).collect(),
            cwd: self.cwd.as_bytes().into(),
            tag: self.tag.clone(),
            timeout_ms,
            detached: self.is_background,
            ..ProcessStart::default()
        }
    }

    fn failed(&self, error: HostError) -> Response {
        match &error {
            HostError::Remote(remote) if remote.errno != 0 => invalid(&self.cannot_run(remote)),
            // Without an errno it is the host that does not have the capsule.
            HostError::Remote(remote) if remote.code() == Code::NotFound && remote.errno == 0 => {
                Response::error(404, "not_found", &remote.text)
            }
            _ => error.into(),
        }
    }

    /// What to tell of a command that could not be started; the guest's words mostly say what it was.
    fn cannot_run(&self, error: &Error) -> String {
        if error.text.contains(&self.cmd) {
            return error.text.clone();
        }
        format!("cannot run {}: {}", self.cmd, error.text)
    }
}

/// `POST /v1/capsules/{id}/exec`.
pub fn exec(request: Request, context: &Arc<Context>) -> Flow {
    // The body is refused only once the credential and the capsule are known to be good: who may not come
    // in learns nothing.
    let command = Command::of(&request);
    with_capsule(&request, context, move |target| {
        let command = command?;
        if command.is_background { start(target, command) } else { run(target, command) }
    })
}

fn run(target: Target, command: Command) -> Flow {
    let timeout_ms = u64::from(command.timeout_sec.unsigned_abs()) * 1000 + GRACE_MS;
    HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &command.message(), timeout_ms)
        .until::<ProcessExited>()
        .max_data_bytes(MAX_OUTPUT_BYTES)
        .then(move |result| {
            let reply = result.map_err(|error| command.failed(error))?;
            reply.answer(move |reply| output(&target, &command, reply))
        })
}

fn output(target: &Target, command: &Command, reply: &Reply) -> Result<Response, HostError> {
    let exited: ProcessExited = reply.message()?;
    let (stdout, stderr) = (reply.channel(CHANNEL_STDOUT), reply.channel(CHANNEL_STDERR));
    let (stdout, stderr, encoding) = match (std::str::from_utf8(stdout), std::str::from_utf8(stderr)) {
        (Ok(stdout), Ok(stderr)) => (stdout.to_string(), stderr.to_string(), "utf-8"),
        _ => (STANDARD.encode(stdout), STANDARD.encode(stderr), "base64"),
    };
    let exit_code = match (exited.timed_out, exited.signal) {
        (true, _) => EXIT_TIMED_OUT,
        (false, 0) => exited.exit_code,
        (false, signal) => EXIT_SIGNAL.saturating_add(signal),
    };
    let mut body = json!({
        "sandbox_id": target.capsule_id,
        "cmd": command.cmd,
        "stdout": stdout,
        "stderr": stderr,
        "exit_code": exit_code,
        "duration_ms": exited.duration_ms,
        "encoding": encoding,
    });
    if exited.timed_out {
        body["timed_out"] = json!(true);
    }
    if reply.dropped_bytes > 0 {
        body["truncated"] = json!(true);
        body["dropped_bytes"] = json!(reply.dropped_bytes);
    }
    Ok(Response::json(200, &body))
}

fn start(target: Target, mut command: Command) -> Flow {
    if command.tag.is_empty() {
        command.tag = format!("proc-{}", random::hex(&random::bytes::<4>()));
    }
    let message = command.message();
    HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message, START_TIMEOUT_MS)
        .until::<ProcessStarted>()
        .then(move |result| {
            let reply = result.map_err(|error| command.failed(error))?;
            let started: ProcessStarted = reply.message()?;
            Step::respond(Response::json(
                202,
                &json!({
                    "sandbox_id": target.capsule_id,
                    "cmd": command.cmd,
                    "pid": started.pid,
                    "tag": command.tag,
                }),
            ))
        })
}
