//! A process's output, as text: `exec/stream` and `processes/{selector}/stream`.

use super::{ended_early, exited, failed, pong, refused, text};
use crate::hosts::error::HostError;
use crate::hosts::relay::{Action, Translator};
use crate::http::handler::encode;
use serde_json::{Value, json};
use wire::message::{
    CHANNEL_STDERR, CHANNEL_STDIN, CHANNEL_STDOUT, CHANNEL_TERMINAL, Message, ProcessAttached, ProcessExited,
    ProcessSignal, ProcessStarted,
};

const SIGTERM: u32 = 15;

/// The translator.
#[derive(Debug, Default)]
pub struct ProcessOutput {
    stdout: Utf8Pieces,
    stderr: Utf8Pieces,
}

impl Translator for ProcessOutput {
    fn message(&mut self, kind: u16, body: &[u8], actions: &mut Vec<Action>) {
        let pid = match kind {
            ProcessStarted::KIND => ProcessStarted::decode(body).map(|m| m.pid),
            ProcessAttached::KIND => ProcessAttached::decode(body).map(|m| m.pid),
            ProcessExited::KIND => {
                for (name, pieces) in [("stdout", &mut self.stdout), ("stderr", &mut self.stderr)] {
                    let rest = pieces.finish();
                    if !rest.is_empty() {
                        actions.push(text(&json!({"type": name, "data": rest})));
                    }
                }
                return exited(body, actions);
            }
            _ => return,
        };
        match pid {
            Ok(pid) => actions.push(text(&json!({"type": "start", "pid": pid}))),
            Err(error) => failed(&HostError::BadReply(error.to_string()), actions),
        }
    }

    fn data(&mut self, channel: u8, bytes: &[u8], actions: &mut Vec<Action>) {
        let (name, pieces) = match channel {
            CHANNEL_STDOUT | CHANNEL_TERMINAL => ("stdout", &mut self.stdout),
            CHANNEL_STDERR => ("stderr", &mut self.stderr),
            _ => return,
        };
        let data = pieces.push(bytes);
        if !data.is_empty() {
            actions.push(text(&json!({"type": name, "data": data})));
        }
    }

    fn finished(&mut self, actions: &mut Vec<Action>) {
        ended_early(actions);
    }

    fn failed(&mut self, error: HostError, actions: &mut Vec<Action>) {
        failed(&error, actions);
    }

    fn client_text(&mut self, message: &str, actions: &mut Vec<Action>) {
        let value: Value = serde_json::from_str(message).unwrap_or_default();
        match value.get("type").and_then(Value::as_str) {
            Some("stop") => {
                // On a process's own stream the selector is not looked at.
                let signal = ProcessSignal { selector: String::new(), signal: SIGTERM };
                actions.push(Action::Send(encode(&signal)));
            }
            Some("stdin" | "input") => match value.get("data").and_then(Value::as_str) {
                Some(data) => actions.push(Action::Data(CHANNEL_STDIN, data.as_bytes().to_vec())),
                None => actions.push(refused("input needs data")),
            },
            Some("ping") => actions.push(pong()),
            Some("pong") => {}
            _ => actions.push(refused("messages here are of type stop, stdin or ping")),
        }
    }

    fn client_binary(&mut self, bytes: &[u8], actions: &mut Vec<Action>) {
        actions.push(Action::Data(CHANNEL_STDIN, bytes.to_vec()));
    }
}

/// Makes text of bytes that come in any pieces: a character that is cut waits for its rest, bytes that
/// are no UTF-8 become U+FFFD.
#[derive(Debug, Default)]
struct Utf8Pieces {
    /// The beginning of a character, at most 3 bytes.
    cut: Vec<u8>,
}

impl Utf8Pieces {
    fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.cut);
        all.extend_from_slice(bytes);
        let whole = all.len() - cut_len(&all);
        self.cut = all.split_off(whole);
        String::from_utf8_lossy(&all).into_owned()
    }

    /// What is left at the end.
    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.cut)).into_owned()
    }
}

/// How many bytes at the end are the beginning of a character whose rest may still come.
fn cut_len(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let needs = match bytes[bytes.len() - back] {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 0,
        };
        return if needs > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::message::{Code, Error};

    fn body<M: Message>(message: &M) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    #[test]
    fn characters_that_are_cut_wait_for_their_rest() {
        let whole = "aä€😀z".as_bytes();
        for size in 1..=whole.len() {
            let mut pieces = Utf8Pieces::default();
            let mut out: String = whole.chunks(size).map(|chunk| pieces.push(chunk)).collect();
            out.push_str(&pieces.finish());
            assert_eq!(out, "aä€😀z", "pieces of {size}");
        }
        let mut pieces = Utf8Pieces::default();
        assert_eq!(pieces.push(b"\xff\xf0\x9f"), "\u{fffd}");
        assert_eq!(pieces.finish(), "\u{fffd}");
    }

    #[test]
    fn a_process_is_told_from_start_to_exit() {
        let mut translator = ProcessOutput::default();
        let mut actions = Vec::new();
        let started = ProcessStarted { pid: 42, tag: String::new() };
        translator.message(ProcessStarted::KIND, &body(&started), &mut actions);
        translator.data(CHANNEL_STDOUT, b"hi\n", &mut actions);
        translator.data(CHANNEL_STDERR, b"oops \xe2\x82", &mut actions);
        let exited = ProcessExited { signal: 9, ..Default::default() };
        translator.message(ProcessExited::KIND, &body(&exited), &mut actions);
        let expected = [
            r#"{"pid":42,"type":"start"}"#,
            r#"{"data":"hi\n","type":"stdout"}"#,
            r#"{"data":"oops ","type":"stderr"}"#,
            "{\"data\":\"\u{fffd}\",\"type\":\"stderr\"}",
            r#"{"exit_code":137,"type":"exit"}"#,
        ];
        let mut expected: Vec<Action> = expected.map(|t| Action::Text(t.to_string())).into();
        expected.push(Action::Close(1000, String::new()));
        assert_eq!(actions, expected);
    }

    #[test]
    fn clients_stop_write_and_err() {
        let mut translator = ProcessOutput::default();
        let mut actions = Vec::new();
        translator.client_text(r#"{"type":"stop"}"#, &mut actions);
        translator.client_text(r#"{"type":"ping"}"#, &mut actions);
        translator.client_binary(b"in", &mut actions);
        translator.client_text("nonsense", &mut actions);
        translator.failed(HostError::Remote(Error::new(Code::NotFound, "no such program")), &mut actions);
        assert!(matches!(&actions[0], Action::Send(m) if m.starts_with(&ProcessSignal::KIND.to_be_bytes())));
        assert_eq!(actions[1], Action::Text(r#"{"type":"pong"}"#.to_string()));
        assert_eq!(actions[2], Action::Data(CHANNEL_STDIN, b"in".to_vec()));
        assert!(matches!(&actions[3], Action::Text(t) if t.contains(r#""fatal":false"#)));
        assert!(matches!(&actions[4], Action::Text(t) if t.contains("no such program")));
        assert_eq!(actions[5], Action::Close(1008, "no such program".to_string()));
    }
}
