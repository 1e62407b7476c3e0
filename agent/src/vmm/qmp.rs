//! QEMU's machine protocol (QEMU docs/interop/qmp-spec): JSON objects, one a line. Sans-I/O: bytes in,
//! messages and bytes out.
//!
//! The peer is a VMM that a guest may have taken over, so a line, and what waits to be looked at, has a
//! bound.

use serde_json::{Map, Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::fmt;

/// The longest line that is accepted. What we ask for is answered in less than a kilobyte.
pub const MAX_LINE_BYTES: usize = 64 * 1024;
/// Messages that may wait to be taken. The owner takes them after each read.
pub const MAX_MESSAGES: usize = 4_096;
/// Commands that may be without an answer.
pub const MAX_COMMANDS: usize = 64;

/// The id of the command that ends the negotiation.
const NEGOTIATION: u64 = 0;

/// A command that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommandId(u64);

/// What QEMU says.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The monitor is open and takes commands. Comes once a connection.
    Ready {
        /// QEMU's version: major, minor, micro.
        version: [u64; 3],
    },
    /// A command's answer.
    Answer {
        /// The command.
        id: CommandId,
        /// What it returned, or why it failed.
        result: Result<Value, CommandError>,
    },
    /// Something happened.
    Event {
        /// Its name, in capitals.
        name: String,
        /// What else there is to know of it.
        data: Map<String, Value>,
    },
}

/// Why QEMU refused a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandError {
    /// The kind of error, as `GenericError`.
    pub class: String,
    /// In words.
    pub description: String,
}

/// Why a connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QmpError {
    /// A line is longer than [`MAX_LINE_BYTES`].
    LineTooLong,
    /// A line is not a JSON object, or none that the protocol knows.
    Malformed,
    /// Something other than a greeting came first, or an answer to no question.
    Unexpected,
    /// More than [`MAX_MESSAGES`] wait.
    TooManyMessages,
    /// More than [`MAX_COMMANDS`] have no answer.
    TooManyCommands,
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            QmpError::LineTooLong => "QEMU's monitor has sent a line that is too long",
            QmpError::Malformed => "QEMU's monitor has sent something that is not QMP",
            QmpError::Unexpected => "QEMU's monitor has sent a message out of turn",
            QmpError::TooManyMessages => "QEMU's monitor sends more messages than are taken",
            QmpError::TooManyCommands => "QEMU's monitor does not answer",
        })
    }
}

impl std::error::Error for QmpError {}

/// One connection to a monitor, from the beginning.
#[derive(Debug)]
pub struct Client {
    input: Vec<u8>,
    output: Vec<u8>,
    messages: VecDeque<Message>,
    pending: BTreeSet<u64>,
    next_id: u64,
    version: Option<[u64; 3]>,
}

impl Client {
    /// A connection on which nothing has been said yet. Commands may be given at once: QEMU takes them in
    /// order, after the negotiation that comes first.
    pub fn new() -> Client {
        let mut client = Client {
            input: Vec::new(),
            output: Vec::new(),
            messages: VecDeque::new(),
            pending: BTreeSet::new(),
            next_id: NEGOTIATION,
            version: None,
        };
        client.queue("qmp_capabilities", None);
        client
    }

    /// Gives a command, with its arguments where it has any.
    pub fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<CommandId, QmpError> {
        if self.pending.len() >= MAX_COMMANDS {
            return Err(QmpError::TooManyCommands);
        }
        Ok(self.queue(command, arguments))
    }

    fn queue(&mut self, command: &str, arguments: Option<Value>) -> CommandId {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({ "execute": command, "id": id });
        if let Some(arguments) = arguments {
            line["arguments"] = arguments;
        }
        self.output.extend_from_slice(line.to_string().as_bytes());
        self.output.extend_from_slice(b"\r\n");
        self.pending.insert(id);
        CommandId(id)
    }

    /// What is to be written.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The first `count` bytes of the output have been written.
    pub fn consume_output(&mut self, count: usize) {
        self.output.drain(..count.min(self.output.len()));
    }

    /// Bytes have come. After an error the connection is of no more use.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), QmpError> {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            if self.input.len() + piece.len() > MAX_LINE_BYTES {
                return Err(QmpError::LineTooLong);
            }
            self.input.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.input);
                self.line(&line)?;
            }
        }
        Ok(())
    }

    /// The next thing that QEMU has said.
    pub fn poll(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    fn line(&mut self, line: &[u8]) -> Result<(), QmpError> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else {
            return Err(QmpError::Malformed);
        };
        if self.messages.len() >= MAX_MESSAGES {
            return Err(QmpError::TooManyMessages);
        }
        let Some(version) = self.version else {
            self.version = Some(greeting(&object)?);
            return Ok(());
        };
        if let Some(Value::String(name)) = object.remove("event") {
            let data = match object.remove("data") {
                Some(Value::Object(data)) => data,
                _ => Map::new(),
            };
            self.messages.push_back(Message::Event { name, data });
            return Ok(());
        }
        let result = match (object.remove("return"), object.remove("error")) {
            (Some(value), None) => Ok(value),
            (None, Some(error)) => {
                Err(CommandError { class: text(&error["class"]), description: text(&error["desc"]) })
            }
            _ => return Err(QmpError::Malformed),
        };
        let id = object.get("id").and_then(Value::as_u64).filter(|id| self.pending.remove(id));
        match (id, result) {
            (None, _) | (Some(NEGOTIATION), Err(_)) => return Err(QmpError::Unexpected),
            (Some(NEGOTIATION), Ok(_)) => self.messages.push_back(Message::Ready { version }),
            (Some(id), result) => self.messages.push_back(Message::Answer { id: CommandId(id), result }),
        }
        Ok(())
    }
}

impl Default for Client {
    fn default() -> Client {
        Client::new()
    }
}

fn greeting(object: &Map<String, Value>) -> Result<[u64; 3], QmpError> {
    let greeting = object.get("QMP").ok_or(QmpError::Unexpected)?;
    let version = &greeting["version"]["qemu"];
    let part = |name| version[name].as_u64().ok_or(QmpError::Malformed);
    Ok([part("major")?, part("minor")?, part("micro")?])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \
                            \"package\": \"Debian\"}, \"capabilities\": [\"oob\"]}}\r\n";
    const NEGOTIATED: &str = "{\"return\": {}, \"id\": 0}\r\n";

    fn ready() -> Client {
        let mut client = Client::new();
        assert_eq!(client.receive(format!("{GREETING}{NEGOTIATED}").as_bytes()), Ok(()));
        assert_eq!(client.poll(), Some(Message::Ready { version: [7, 2, 22] }));
        client
    }

    #[test]
    fn a_connection_is_negotiated_and_commands_follow() {
        let mut client = Client::new();
        let id = client.execute("stop", None);
        assert_eq!(
            String::from_utf8_lossy(client.output()),
            "{\"execute\":\"qmp_capabilities\",\"id\":0}\r\n{\"execute\":\"stop\",\"id\":1}\r\n"
        );
        client.consume_output(usize::MAX);
        assert!(client.output().is_empty());
        let bytes = format!("{GREETING}{NEGOTIATED}{{\"return\": {{\"a\": 1}}, \"id\": 1}}\r\n");
        for byte in bytes.as_bytes() {
            assert_eq!(client.receive(&[*byte]), Ok(()));
        }
        assert_eq!(client.poll(), Some(Message::Ready { version: [7, 2, 22] }));
        let answer = client.poll();
        assert!(
            matches!(&answer, Some(Message::Answer { id: i, result: Ok(v) }) if Ok(*i) == id && v["a"] == 1)
        );
        assert_eq!(client.poll(), None);
    }

    #[test]
    fn events_and_errors_are_told_apart() {
        let mut client = ready();
        let id = client.execute("cont", Some(json!({"x": [1]})));
        assert!(client.output().ends_with(b"{\"arguments\":{\"x\":[1]},\"execute\":\"cont\",\"id\":1}\r\n"));
        let lines = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"SHUTDOWN\", \
                     \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n\
                     {\"id\": 1, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n";
        assert_eq!(client.receive(lines.as_bytes()), Ok(()));
        match client.poll() {
            Some(Message::Event { name, data }) => {
                assert_eq!((name.as_str(), &data["reason"]), ("SHUTDOWN", &json!("guest-shutdown")));
            }
            other => panic!("{other:?}"),
        }
        let error = CommandError { class: "GenericError".into(), description: "no".into() };
        match client.poll() {
            Some(Message::Answer { id: i, result }) => assert_eq!((Ok(i), result), (id, Err(error))),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nonsense_ends_the_connection() {
        let cases = [
            ("{\"return\": {}, \"id\": 0}\n", QmpError::Unexpected),
            ("{\"QMP\": {}}\n", QmpError::Malformed),
            ("[]\n", QmpError::Malformed),
            ("hello\n", QmpError::Malformed),
            ("{\"QMP\": \n", QmpError::Malformed),
            ("\u{0}\n", QmpError::Malformed),
        ];
        for (line, error) in cases {
            assert_eq!(Client::new().receive(line.as_bytes()), Err(error), "{line}");
        }
        for line in
            ["{\"return\": {}, \"id\": 9}\n", "{\"return\": {}}\n", "{\"return\": {}, \"id\": \"0\"}\n"]
        {
            assert_eq!(ready().receive(line.as_bytes()), Err(QmpError::Unexpected), "{line}");
        }
        assert_eq!(ready().receive(b"{}\n"), Err(QmpError::Malformed));
        let mut client = Client::new();
        let refused = "{\"error\": {\"class\": \"x\", \"desc\": \"y\"}, \"id\": 0}\n";
        assert_eq!(client.receive(format!("{GREETING}{refused}").as_bytes()), Err(QmpError::Unexpected));
    }

    #[test]
    fn a_line_a_queue_and_a_silence_have_their_bounds() {
        let mut client = ready();
        assert_eq!(client.receive(&vec![b' '; MAX_LINE_BYTES]), Ok(()));
        assert_eq!(client.receive(b" "), Err(QmpError::LineTooLong));
        let mut client = ready();
        let flood = "{\"event\": \"X\"}\n".repeat(MAX_MESSAGES + 1);
        assert_eq!(client.receive(flood.as_bytes()), Err(QmpError::TooManyMessages));
        let mut client = ready();
        assert!((0..MAX_COMMANDS).all(|_| client.execute("stop", None).is_ok()));
        assert_eq!(client.execute("stop", None), Err(QmpError::TooManyCommands));
    }
}
