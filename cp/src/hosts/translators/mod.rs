//! The translators of the API's streams: process output and terminals as JSON messages on WebSockets,
//! files as response bodies.

mod download;
mod process;
mod terminal;

pub use download::Download;
pub use process::ProcessOutput;
pub use terminal::Terminal;

use super::error::HostError;
use super::relay::Action;
use serde_json::{Value, json};
use wire::message::{Code, Message, ProcessExited};
use wire::websocket::close_code;

/// What shells add to the number of the signal that ended a command.
const EXIT_SIGNAL: u32 = 128;
/// What `timeout(1)` exits with when a command's time ran out.
const EXIT_TIMED_OUT: u32 = 124;

fn text(value: &Value) -> Action {
    Action::Text(value.to_string())
}

/// The answer to a client's `{"type":"ping"}`.
fn pong() -> Action {
    text(&json!({"type": "pong"}))
}

/// A process ended: the `exit` message and the close.
fn exited(body: &[u8], actions: &mut Vec<Action>) {
    match ProcessExited::decode(body) {
        Ok(exited) => {
            let exit_code = match (exited.timed_out, exited.signal) {
                (true, _) => EXIT_TIMED_OUT,
                (false, 0) => exited.exit_code,
                (false, signal) => EXIT_SIGNAL.saturating_add(signal),
            };
            actions.push(text(&json!({"type": "exit", "exit_code": exit_code})));
            actions.push(Action::Close(close_code::NORMAL, String::new()));
        }
        Err(error) => failed(&HostError::BadReply(format!("ProcessExited: {error}")), actions),
    }
}

/// The stream failed: a fatal `error` message and the close.
fn failed(error: &HostError, actions: &mut Vec<Action>) {
    actions.push(text(&json!({"type": "error", "data": error.to_string(), "fatal": true})));
    let is_request = matches!(
        error.remote_code(),
        Some(Code::InvalidRequest | Code::NotFound | Code::PermissionDenied | Code::InvalidState)
    );
    let code = if is_request { close_code::POLICY } else { close_code::INTERNAL };
    actions.push(Action::Close(code, error.to_string()));
}

/// The host ended its half without a word of why.
fn ended_early(actions: &mut Vec<Action>) {
    failed(&HostError::BadReply("the stream ended before the process".to_string()), actions);
}

/// Something in a client's message is wrong; the stream goes on.
fn refused(why: &str) -> Action {
    text(&json!({"type": "error", "data": why, "fatal": false}))
}
