//! A terminal: `pty`. Its bytes are base64 in JSON, as the API describes it, or binary WebSocket messages,
//! as its Python client wants them: output goes in the form in which input comes.

use super::{ended_early, exited, failed, pong, refused, text};
use crate::hosts::error::HostError;
use crate::hosts::relay::{Action, Translator};
use crate::http::handler::encode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use wire::message::{CHANNEL_STDIN, Message, ProcessAttached, ProcessExited, ProcessSignal, TerminalResize};

const SIGKILL: u32 = 9;

/// The translator of a terminal that is watched.
#[derive(Debug, Default)]
pub struct Terminal {
    is_binary: bool,
}

impl Terminal {
    /// `is_binary` says the form of output until the first input.
    pub fn new(is_binary: bool) -> Terminal {
        Terminal { is_binary }
    }
}

/// A size in a client's message: 1 to 65,535.
fn cells(value: &Value, name: &str) -> Option<u16> {
    value.get(name)?.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0)
}

impl Translator for Terminal {
    fn message(&mut self, kind: u16, body: &[u8], actions: &mut Vec<Action>) {
        match kind {
            ProcessAttached::KIND => match ProcessAttached::decode(body) {
                Ok(m) => actions.push(text(&json!({"type": "started", "tag": m.tag, "pid": m.pid}))),
                Err(error) => failed(&HostError::BadReply(error.to_string()), actions),
            },
            ProcessExited::KIND => exited(body, actions),
            _ => {}
        }
    }

    fn data(&mut self, _channel: u8, bytes: &[u8], actions: &mut Vec<Action>) {
        actions.push(if self.is_binary {
            Action::Binary(bytes.to_vec())
        } else {
            text(&json!({"type": "output", "data": STANDARD.encode(bytes)}))
        });
    }

    fn finished(&mut self, actions: &mut Vec<Action>) {
        ended_early(actions);
    }

    fn failed(&mut self, error: HostError, actions: &mut Vec<Action>) {
        failed(&error, actions);
    }

    fn client_text(&mut self, message: &str, actions: &mut Vec<Action>) {
        let value: Value = serde_json::from_str(message).unwrap_or_default();
        actions.push(match value.get("type").and_then(Value::as_str) {
            Some("input") => match value.get("data").and_then(Value::as_str).map(|d| STANDARD.decode(d)) {
                Some(Ok(bytes)) => {
                    self.is_binary = false;
                    Action::Data(CHANNEL_STDIN, bytes)
                }
                _ => refused("input needs data in base64"),
            },
            Some("resize") => match (cells(&value, "cols"), cells(&value, "rows")) {
                (Some(columns), Some(rows)) => Action::Send(encode(&TerminalResize { columns, rows })),
                _ => refused("resize needs cols and rows from 1 to 65535"),
            },
            // On a process's own stream the selector is not looked at.
            Some("kill") => Action::Send(encode(&ProcessSignal { selector: String::new(), signal: SIGKILL })),
            Some("ping") => pong(),
            Some("pong") => return,
            _ => refused("messages here are of type input, resize, kill or ping"),
        });
    }

    fn client_binary(&mut self, bytes: &[u8], actions: &mut Vec<Action>) {
        self.is_binary = true;
        actions.push(Action::Data(CHANNEL_STDIN, bytes.to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_session() {
        let mut terminal = Terminal::default();
        let mut actions = Vec::new();
        let mut body = Vec::new();
        ProcessAttached { pid: 7, tag: "pty-1".into(), from_byte: 0 }.encode(&mut body);
        terminal.message(ProcessAttached::KIND, &body, &mut actions);
        terminal.data(3, b"$ ", &mut actions);
        terminal.client_text(r#"{"type":"input","data":"bHMK"}"#, &mut actions);
        terminal.client_binary(b"ls\n", &mut actions);
        terminal.client_text(r#"{"type":"resize","cols":120,"rows":40}"#, &mut actions);
        terminal.client_text(r#"{"type":"resize","cols":0,"rows":40}"#, &mut actions);
        terminal.client_text(r#"{"type":"kill"}"#, &mut actions);
        assert_eq!(actions[0], Action::Text(r#"{"pid":7,"tag":"pty-1","type":"started"}"#.into()));
        assert_eq!(actions[1], Action::Text(r#"{"data":"JCA=","type":"output"}"#.into()));
        assert_eq!(actions[2], Action::Data(CHANNEL_STDIN, b"ls\n".to_vec()));
        assert_eq!(actions[3], actions[2]);
        assert_eq!(actions[4], Action::Send(encode(&TerminalResize { columns: 120, rows: 40 })));
        assert!(matches!(&actions[5], Action::Text(t) if t.contains("error")));
        assert!(matches!(&actions[6], Action::Send(_)));
        actions.clear();
        terminal.data(3, b"$ ", &mut actions);
        assert_eq!(actions, [Action::Binary(b"$ ".to_vec())]);
    }
}
