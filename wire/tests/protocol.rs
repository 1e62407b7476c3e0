//! `PROTOCOL.md` and the code say the same.

use std::fmt::Write as _;
use std::path::PathBuf;
use wire::frame::FRAME_TYPES;
use wire::message::{CAPSULE_STATES, CODES, descriptions};

const BEGIN: &str = "<!-- messages: from here on written from the code by";
const END: &str = "<!-- end of messages -->";

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("PROTOCOL.md")
}

fn document() -> String {
    std::fs::read_to_string(path()).expect("PROTOCOL.md")
}

/// The cells of the table whose header line starts with `header`.
fn table(document: &str, header: &str) -> Vec<Vec<String>> {
    let at = document.find(header).unwrap_or_else(|| panic!("no table {header:?}"));
    document[at..]
        .lines()
        .skip(2)
        .take_while(|l| l.starts_with('|'))
        .map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_string()).collect())
        .collect()
}

fn messages() -> String {
    let mut out = String::new();
    for message in descriptions() {
        let _ = writeln!(out, "\n### {:#06x} {}\n\n{}\n", message.kind, message.name, message.purpose);
        if message.fields.is_empty() {
            out.push_str("It has no fields.\n");
            continue;
        }
        out.push_str("| field | type | meaning |\n| --- | --- | --- |\n");
        for (name, type_name, meaning) in message.fields {
            let _ = writeln!(out, "| `{name}` | {type_name} | {meaning} |");
        }
    }
    out.push('\n');
    out
}

#[test]
fn every_message_is_described_as_it_is() {
    let document = document();
    let begin = document.find(BEGIN).expect("the begin mark");
    let begin = begin + document[begin..].find('\n').expect("the mark's line end") + 1;
    let end = document.find(END).expect("the end mark");
    let written = messages();
    if std::env::var_os("WRENN_BLESS").is_some() {
        let blessed = format!("{}{written}{}", &document[..begin], &document[end..]);
        std::fs::write(path(), blessed).expect("write PROTOCOL.md");
        return;
    }
    assert!(
        document[begin..end] == written,
        "PROTOCOL.md differs from the messages: WRENN_BLESS=1 cargo test -p wrenn-wire --test protocol writes it"
    );
}

#[test]
fn frame_types_codes_and_states_are_described_as_they_are() {
    let document = document();
    let frames: Vec<(String, String)> = table(&document, "| type | name | stream |")
        .into_iter()
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    let expected: Vec<(String, String)> =
        FRAME_TYPES.iter().map(|(t, name)| (format!("{:#04x}", *t as u8), name.to_string())).collect();
    assert_eq!(frames, expected);

    let codes: Vec<Vec<String>> =
        table(&document, "| code | name | again? |").into_iter().map(|row| row[..3].to_vec()).collect();
    let expected: Vec<Vec<String>> = CODES
        .iter()
        .map(|(code, name, again)| {
            vec![(*code as u16).to_string(), name.to_string(), if *again { "yes" } else { "no" }.to_string()]
        })
        .collect();
    assert_eq!(codes, expected);

    let states: Vec<(String, String)> = table(&document, "| number | state |")
        .into_iter()
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    let expected: Vec<(String, String)> =
        CAPSULE_STATES.iter().map(|(s, name)| ((*s as u8).to_string(), name.to_string())).collect();
    assert_eq!(states, expected);
}

#[test]
fn limits_are_described_as_they_are() {
    use wire::session;
    let document = document();
    let limits = table(&document, "| what | limit |");
    let limit = |what: &str| -> String {
        limits.iter().find(|row| row[0] == what).map(|row| row[1].replace(',', "")).expect(what)
    };
    assert_eq!(limit("payload of a frame"), format!("{} bytes", wire::frame::MAX_PAYLOAD));
    assert_eq!(
        limit("payload before the handshake is done"),
        format!("{} bytes", session::MAX_HANDSHAKE_PAYLOAD)
    );
    assert_eq!(limit("handshake"), format!("{} s", session::HANDSHAKE_TIMEOUT_MS / 1000));
    assert_eq!(limit("window"), format!("{} to 2^30 bytes", session::MIN_WINDOW));
    assert_eq!(session::MAX_WINDOW, 1 << 30);
    assert_eq!(limit("credit per frame beyond its payload"), format!("{} bytes", wire::frame::FRAME_CHARGE));
    assert_eq!(limit("extension fields of a message"), wire::message::MAX_EXTENSIONS.to_string());
    assert_eq!(limit("reason of RESET and GOAWAY"), format!("{} bytes", wire::frame::MAX_REASON));
    let silence = (session::PING_AFTER_MS / 1000, session::DEAD_AFTER_MS / 1000);
    assert_eq!(limit("silence before PING, before the end"), format!("{} s {} s", silence.0, silence.1));
    assert_eq!(session::OUTPUT_HARD_LIMIT, 1 << 20);
}

/// The tables of messages in the clients of other languages: the file, how a line begins, and its end.
const CLIENTS: [(&str, &str, &str, &str); 2] =
    [("clients/python/wrenn_wire.py", "    ", ": (", "),"), ("clients/c/wrenn_wire.c", "    {", ", ", "},")];

#[test]
fn other_clients_have_the_messages_as_they_are() {
    for (file, begin, separator, end) in CLIENTS {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file);
        let source = std::fs::read_to_string(&path).expect(file);
        let start = source.find("messages: begin").expect("the begin mark");
        // After the mark's own line and the one that opens the table.
        let start = start + source[start..].match_indices('\n').nth(1).expect("two lines").0 + 1;
        // The lines of the table are indented; the one that closes it is not.
        let length: usize =
            source[start..].split_inclusive('\n').take_while(|l| l.starts_with(' ')).map(str::len).sum();
        let mut table = String::new();
        for message in descriptions() {
            let fields: Vec<String> =
                message.fields.iter().map(|(name, kind, _)| format!("{name} {kind}")).collect();
            let (kind, name, fields) = (message.kind, message.name, fields.join("; "));
            let _ = writeln!(table, "{begin}{kind:#06x}{separator}\"{name}\", \"{fields}\"{end}");
        }
        if std::env::var_os("WRENN_BLESS").is_some() {
            let blessed = format!("{}{table}{}", &source[..start], &source[start + length..]);
            std::fs::write(&path, blessed).expect(file);
        } else {
            assert!(source[start..start + length] == table, "{file} has other messages: bless this test");
        }
    }
}
