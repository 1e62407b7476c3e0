//! What goes on for long: `exec/stream`, `pty`, `processes/{selector}/stream` on WebSockets, and files'
//! content both ways.

use super::capsule_access::{Target, with_capsule, with_capsule_as};
use super::fields::{Fields, invalid};
use super::principal::Credential;
use crate::auth::random;
use crate::hosts::translators::{Download, ProcessOutput, Terminal};
use crate::http::context::Context;
use crate::http::handler::Method::{Get, Post};
use crate::http::handler::{BodyMode, Flow, HostCall, Relay, Request, Response, Route, Step, Upload};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use wire::message::{FileRead, Message, ProcessAttach, ProcessStart, ProcessStarted};

/// How long a capsule may take until its first answer, in milliseconds.
const TIMEOUT_MS: u64 = 30_000;
/// The longest path, in bytes: Linux's `PATH_MAX` without its NUL.
const MAX_PATH: usize = 4095;
/// The longest command with its arguments and variables, in bytes: it is one message of the wire
/// protocol.
const MAX_COMMAND_BYTES: usize = 65_000;
/// The terminal's program and size when the client says none.
const DEFAULT_SHELL: &str = "/bin/bash";
const DEFAULT_COLUMNS: u16 = 80;
const DEFAULT_ROWS: u16 = 24;
/// The HTTP library of the public Python client, which takes a terminal's output as binary messages from
/// the first one on. The API's description has it as base64, which is what others get.
const BINARY_AGENT: &str = "python-httpx/";

/// The routes of this file.
pub fn routes() -> Vec<Route> {
    let upload = |path| Route::new(Post, path, write_file).with_body(BodyMode::Streamed);
    vec![
        Route::new(Get, "/v1/capsules/{id}/exec/stream", exec_stream),
        Route::new(Get, "/v1/capsules/{id}/pty", pty),
        Route::new(Get, "/v1/capsules/{id}/processes/{selector}/stream", process_stream),
        upload("/v1/capsules/{id}/files/write"),
        upload("/v1/capsules/{id}/files/stream/write"),
        Route::new(Post, "/v1/capsules/{id}/files/read", read_file),
        Route::new(Post, "/v1/capsules/{id}/files/stream/read", read_file),
    ]
}

/// The first message of a WebSocket whose client could send no header (browsers).
#[derive(Debug, Deserialize)]
struct FirstMessage {
    #[serde(alias = "api_key", alias = "apiKey")]
    token: String,
}

/// Authenticates by header, or by the first message, and goes on with the capsule.
fn with_capsule_on_websocket(
    request: Request,
    context: &Arc<Context>,
    then: impl FnOnce(Target) -> Flow + Send + 'static,
) -> Flow {
    if request.header("x-api-key").is_some() || request.header("authorization").is_some() {
        return with_capsule(&request, context, then);
    }
    let context = Arc::clone(context);
    Step::read_message(move |text| {
        let credential: FirstMessage = serde_json::from_str(&text).map_err(|_| {
            Response::error(
                401,
                "unauthorized",
                "send a credential by header, or {\"type\":\"auth\",\"token\":…} as the first message",
            )
        })?;
        with_capsule_as(Credential::Secret(credential.token), request.param("id"), &context, then)
    })
}

/// A message that starts something.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Start {
    r#type: String,
    cmd: String,
    args: Vec<String>,
    envs: BTreeMap<String, String>,
    cwd: String,
    user: String,
    tag: String,
    cols: Option<u16>,
    rows: Option<u16>,
}

impl Start {
    fn parse(text: &str) -> Result<Start, Response> {
        serde_json::from_str(text).map_err(|e| invalid(&format!("the message is not acceptable: {e}")))
    }

    fn message(&self) -> Result<ProcessStart, Response> {
        if self.cmd.is_empty() {
            return Err(invalid("cmd is missing"));
        }
        if let Some(name) = self.envs.keys().find(|name| name.is_empty() || name.contains('=')) {
            return Err(invalid(&format!("{name:?} is not the name of a variable")));
        }
        let message = ProcessStart {
            argv: std::iter::once(&self.cmd).chain(&self.args).map(|a| a.as_bytes().into()).collect(),
            environment: self.envs.iter().map(|(n, v)| (n.as_bytes().into(), v.as_bytes().into())).collect(),
            cwd: self.cwd.as_bytes().into(),
            user: self.user.clone(),
            tag: self.tag.clone(),
            ..ProcessStart::default()
        };
        let mut encoded = Vec::new();
        message.encode(&mut encoded);
        if encoded.len() > MAX_COMMAND_BYTES {
            return Err(invalid(&format!(
                "the command with its arguments and variables has over {MAX_COMMAND_BYTES} bytes; \
                 write what is long into a file"
            )));
        }
        Ok(message)
    }
}

/// `GET /v1/capsules/{id}/exec/stream`.
fn exec_stream(request: Request, context: &Arc<Context>) -> Flow {
    with_capsule_on_websocket(request, context, |target| {
        Step::read_message(move |text| {
            let start = Start::parse(&text)?;
            if start.r#type != "start" {
                return Err(invalid("the first message must be of type start"));
            }
            let message = ProcessStart { stdin: true, ..start.message()? };
            Relay::websocket(&target, &message, TIMEOUT_MS, ProcessOutput::default())
        })
    })
}

/// `GET /v1/capsules/{id}/processes/{selector}/stream`.
fn process_stream(request: Request, context: &Arc<Context>) -> Flow {
    let selector = request.param("selector").to_string();
    with_capsule_on_websocket(request, context, |target| {
        let attach = ProcessAttach { selector, from_byte: 0 };
        Relay::websocket(&target, &attach, TIMEOUT_MS, ProcessOutput::default())
    })
}

/// `GET /v1/capsules/{id}/pty`.
fn pty(request: Request, context: &Arc<Context>) -> Flow {
    let is_binary = request.header("user-agent").is_some_and(|agent| agent.starts_with(BINARY_AGENT));
    with_capsule_on_websocket(request, context, move |target| {
        Step::read_message(move |text| {
            let start = Start::parse(&text)?;
            match start.r#type.as_str() {
                "start" => start_terminal(target, start, is_binary),
                "connect" if start.tag.is_empty() => Err(invalid("connect needs a tag")),
                "connect" => watch_terminal(&target, start.tag, is_binary),
                _ => Err(invalid("the first message must be of type start or connect")),
            }
        })
    })
}

/// Starts a terminal that outlives its WebSocket, then watches it from its first byte.
fn start_terminal(target: Target, mut start: Start, is_binary: bool) -> Flow {
    if start.cmd.is_empty() {
        start.cmd = DEFAULT_SHELL.to_string();
    }
    if start.tag.is_empty() {
        start.tag = format!("pty-{}", random::hex(&random::bytes::<4>()));
    }
    let size = |given: Option<u16>, default| given.filter(|n| *n > 0).unwrap_or(default);
    let message = ProcessStart {
        detached: true,
        stdin: true,
        terminal_columns: size(start.cols, DEFAULT_COLUMNS),
        terminal_rows: size(start.rows, DEFAULT_ROWS),
        ..start.message()?
    };
    HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message, TIMEOUT_MS)
        .until::<ProcessStarted>()
        .then(move |result| {
            result?;
            watch_terminal(&target, start.tag, is_binary)
        })
}

fn watch_terminal(target: &Target, tag: String, is_binary: bool) -> Flow {
    let attach = ProcessAttach { selector: tag, from_byte: 0 };
    Relay::websocket(target, &attach, TIMEOUT_MS, Terminal::new(is_binary))
}

/// `POST /v1/capsules/{id}/files/write` and `files/stream/write`.
fn write_file(request: Request, context: &Arc<Context>) -> Flow {
    let content_type = request.header("content-type").unwrap_or_default().to_string();
    with_capsule(&request, context, move |target| {
        Ok(Step::Upload(Upload {
            target,
            content_type,
            then: Box::new(|result| {
                result?;
                Step::respond(Response::no_content())
            }),
        }))
    })
}

/// `POST /v1/capsules/{id}/files/read` and `files/stream/read`.
fn read_file(request: Request, context: &Arc<Context>) -> Flow {
    let path = Fields::of(&request).and_then(|fields| fields.required_text("path", MAX_PATH));
    with_capsule(&request, context, move |target| {
        let read = FileRead { path: path?.into(), ..FileRead::default() };
        Relay::download(&target, &read, TIMEOUT_MS, Download::default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_messages_are_checked() {
        let text = r#"{"type":"start","cmd":"tail","args":["-f","x"],"envs":{"A":"b"},"cwd":"/tmp"}"#;
        let message = Start::parse(text).and_then(|s| s.message());
        assert_eq!(
            message.map(|m| (m.argv.len(), m.environment.len(), m.cwd.0)),
            Ok((3, 1, b"/tmp".to_vec()))
        );
        for bad in [
            r#"{"type":"start"}"#,
            r#"{"cmd":7}"#,
            "[]",
            "",
            r#"{"cmd":"a","envs":{"A=B":"c"}}"#,
            r#"{"cmd":"a","cols":70000}"#,
        ] {
            assert_eq!(Start::parse(bad).and_then(|s| s.message()).map_err(|r| r.status), Err(400), "{bad}");
        }
        let long = Start { cmd: "a".into(), args: vec!["b".repeat(MAX_COMMAND_BYTES)], ..Start::default() };
        assert_eq!(long.message().map_err(|r| r.status), Err(400));
    }
}
