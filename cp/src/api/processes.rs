//! `/v1/capsules/{id}/processes`: what was started in a capsule and still runs.

use super::capsule_access::with_capsule;
use super::fields::invalid;
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, Request, Response, Step};
use serde_json::{Value, json};
use std::sync::Arc;
use wire::codec::Bytes;
use wire::message::{ProcessList, ProcessListReply, ProcessSignal};

/// How long a capsule may take to answer, in milliseconds.
const TIMEOUT_MS: u64 = 15_000;
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// `GET /v1/capsules/{id}/processes`.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    with_capsule(&request, context, |target| {
        let message = ProcessList {};
        HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message, TIMEOUT_MS).then(
            |result| {
                result?.answer(|reply| {
                    // A long list comes in several messages.
                    let replies = reply.all::<ProcessListReply>()?;
                    let processes: Vec<Value> =
                        replies.iter().flat_map(|r| &r.processes).map(entry).collect();
                    Ok(Response::json(200, &json!({"processes": processes})))
                })
            },
        )
    })
}

/// A process as the API has it: id and tag, program and arguments.
fn entry(((pid, tag), argv): &((u32, String), Vec<Bytes>)) -> Value {
    let argv: Vec<_> = argv.iter().map(|a| a.lossy().into_owned()).collect();
    let (cmd, args) = argv.split_first().map_or(("", &[][..]), |(c, a)| (c.as_str(), a));
    json!({"pid": pid, "tag": tag, "cmd": cmd, "args": args})
}

/// `DELETE /v1/capsules/{id}/processes/{selector}`.
pub fn kill(request: Request, context: &Arc<Context>) -> Flow {
    let signal = match request.query("signal") {
        None | Some("" | "SIGKILL") => Ok(SIGKILL),
        Some("SIGTERM") => Ok(SIGTERM),
        Some(other) => Err(invalid(&format!("signal must be SIGKILL or SIGTERM, not {other:?}"))),
    };
    let selector = request.param("selector").to_string();
    with_capsule(&request, context, move |target| {
        let message = ProcessSignal { selector, signal: signal? };
        HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message, TIMEOUT_MS).then(
            |result| {
                result?;
                Step::respond(Response::no_content())
            },
        )
    })
}
