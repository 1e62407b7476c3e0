//! The vectors in `wire/vectors`, which prove any implementation: that the code agrees with each, that
//! every message has its own, and that those of a released version never change.
//!
//! `WRENN_BLESS=1 cargo test -p wrenn-wire --test vectors` appends what is missing. A file has a vector
//! a line; the first lines are frozen by [`FROZEN`], and new ones go to the end.

mod common {
    pub mod handshake;
    pub mod schema;
}

use common::handshake;
use common::schema::{self, Type, from_hex, to_hex};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use wire::codec::DecodeError;
use wire::frame::{FRAME_TYPES, FrameType, Header, HeaderError};
use wire::message::{Description, descriptions, recode};

/// Version 1: how many lines of each file are frozen, and the SHA-256 of those lines.
const FROZEN: [(&str, usize, &str); 3] = [
    ("messages.json", 412, "85d7aaf8956bcf77ad45f237481d63cecf3ff4e8abd201873e6fa9d14d34b2f6"),
    ("frames.json", 38, "f788c5e83da0c46750d9607c14bbd6bf958c75280c6eae8a1de2ea80aacb04ce"),
    ("handshake.json", 67, "bb6e4c45a712c2f9a272c2619ab17aa24b78744eb46ff10bbb7559c62573db1b"),
];

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors").join(file)
}

/// The file's lines that hold a vector.
fn lines(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(path(file)).unwrap_or_default();
    text.lines().filter(|l| l.starts_with('{')).map(|l| l.trim_end_matches(',').to_string()).collect()
}

fn vectors(file: &str) -> Vec<Value> {
    lines(file)
        .iter()
        .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{file}: {e}: {l}")))
        .collect()
}

fn name(vector: &Value) -> &str {
    vector["name"].as_str().expect("a vector has a name")
}

/// Appends the wanted vectors that the file lacks, or fails when there are any.
fn complete(file: &str, wanted: Vec<Value>) {
    let mut all = lines(file);
    let known = vectors(file);
    let missing: Vec<&Value> = wanted.iter().filter(|w| !known.iter().any(|k| name(k) == name(w))).collect();
    if missing.is_empty() {
        return;
    }
    let names: Vec<&str> = missing.iter().map(|m| name(m)).collect();
    assert!(
        std::env::var_os("WRENN_BLESS").is_some(),
        "{file} lacks {names:?}: WRENN_BLESS=1 cargo test -p wrenn-wire --test vectors appends them"
    );
    all.extend(missing.iter().map(|m| m.to_string()));
    std::fs::write(path(file), format!("[\n{}\n]\n", all.join(",\n"))).expect("write the vectors");
}

fn error_name(error: &DecodeError) -> &'static str {
    match error {
        DecodeError::UnexpectedEnd => "unexpected_end",
        DecodeError::TrailingBytes => "trailing_bytes",
        DecodeError::NotUtf8 => "not_utf8",
        DecodeError::BadMarker(_) => "bad_marker",
        DecodeError::BadValue(_) => "bad_value",
        DecodeError::TooLong(_) => "too_long",
        DecodeError::UnknownCriticalField(_) => "unknown_critical_field",
        DecodeError::WrongKind(_) => "wrong_kind",
    }
}

fn types(message: &Description) -> Vec<(&'static str, Type)> {
    message.fields.iter().map(|(name, kind, _)| (*name, schema::parse(kind))).collect()
}

fn body(message: &Description, value: impl Fn(usize, &Type) -> Value) -> (Map<String, Value>, Vec<u8>) {
    let (mut decoded, mut out) = (Map::new(), Vec::new());
    for (i, (name, kind)) in types(message).iter().enumerate() {
        let value = value(i, kind);
        schema::encode(kind, &value, &mut out);
        decoded.insert(name.to_string(), value);
    }
    (decoded, out)
}

/// The vectors of one message: two that decode, one with an unknown field, and the telling negatives.
fn of_message(message: &Description) -> Vec<Value> {
    let mut all = Vec::new();
    let mut add = |what: &str, body: &[u8], key: &str, value: Value| {
        all.push(json!({
            "name": format!("{} {what}", message.name), "kind": message.kind, "hex": to_hex(body), key: value,
        }));
    };
    let no_extensions = [0, 0];
    let (least, bytes) = body(message, |_, kind| schema::least(kind));
    add("least", &[&bytes[..], &no_extensions].concat(), "decoded", json!(least));
    let (full, bytes) = body(message, |i, kind| schema::sample(kind, i as u64));
    let good = [&bytes[..], &no_extensions].concat();
    if !message.fields.is_empty() {
        add("full", &good, "decoded", json!(full));
    }
    let extended = [&bytes[..], &[0, 1, 0x00, 0x07, 0, 0, 0, 2, 0xca, 0xfe]].concat();
    add("with an unknown field", &extended, "decoded", json!(full));
    let critical = [&bytes[..], &[0, 1, 0x80, 0x07, 0, 0, 0, 0]].concat();
    add("with an unknown critical field", &critical, "error", json!("unknown_critical_field"));
    add("cut short", &good[..good.len() - 1], "error", json!("unexpected_end"));
    add("with a byte too many", &[&good[..], &[0]].concat(), "error", json!("trailing_bytes"));
    add("with too many fields", &[&bytes[..], &[0, 65]].concat(), "error", json!("too_long"));

    // One wrong value for each kind of value that can be wrong, at its first field.
    let mut before = Vec::new();
    let mut seen = Vec::new();
    for (i, (field, kind)) in types(message).iter().enumerate() {
        let wrong = match kind {
            Type::Bool | Type::Option(_) => Some((vec![2], "bad_marker")),
            Type::Text => Some((vec![0, 0, 0, 2, 0xc3, 0x28], "not_utf8")),
            Type::State => Some((vec![12], "bad_value")),
            Type::List(_) | Type::Bytes => Some((vec![0xff, 0xff, 0xff, 0xff, 0], "unexpected_end")),
            _ => None,
        };
        if let Some((wrong, error)) = wrong.filter(|w| !seen.contains(&w.1)) {
            seen.push(error);
            add(&format!("with a wrong {field}"), &[&before[..], &wrong].concat(), "error", json!(error));
        }
        schema::encode(kind, &schema::sample(kind, i as u64), &mut before);
    }
    all
}

#[test]
fn messages_decode_as_their_vectors_say() {
    let messages = descriptions();
    complete("messages.json", messages.iter().flat_map(of_message).collect());
    for vector in vectors("messages.json") {
        let kind = vector["kind"].as_u64().expect("kind") as u16;
        let message = messages.iter().find(|m| m.kind == kind).unwrap_or_else(|| panic!("{vector}"));
        let body = from_hex(vector["hex"].as_str().expect("hex"));
        let result = recode(kind, &body).unwrap_or_else(|| panic!("{vector}"));
        match vector["error"].as_str() {
            Some(error) => assert_eq!(result.map_err(|e| error_name(&e)), Err(error), "{vector}"),
            None => {
                let (_, again) = result.unwrap_or_else(|e| panic!("{vector}: {e}"));
                // Decoded by the document's types alone, and encoded again by the crate.
                let mut rest = &body[..];
                let mut decoded = Map::new();
                for (name, kind) in types(message) {
                    decoded.insert(name.into(), schema::decode(&kind, &mut rest).expect("decodes"));
                }
                assert_eq!(Value::Object(decoded), vector["decoded"], "{vector}");
                let fields = body.len() - rest.len();
                assert_eq!(again, [&body[..fields], &[0, 0]].concat(), "{vector}");
            }
        }
    }
}

fn frame_vectors() -> Vec<Value> {
    let mut all = Vec::new();
    for (kind, name) in FRAME_TYPES {
        let stream = u32::from(matches!(
            kind,
            FrameType::Open | FrameType::Message | FrameType::Data | FrameType::Credit | FrameType::Reset
        )) * 5;
        for fin in [false, true] {
            let header = Header { length: 7, stream, frame_type: kind, fin };
            let hex = to_hex(&header.encode());
            let may_finish = matches!(kind, FrameType::Open | FrameType::Message | FrameType::Data);
            if fin && !may_finish {
                all.push(json!({"name": format!("{name} with FIN"), "hex": hex, "error": "bad_flags"}));
            } else {
                let name = format!("{name}{}", if fin { " with FIN" } else { "" });
                let decoded = json!({"length": 7, "stream": stream, "type": kind as u8, "fin": fin});
                all.push(json!({"name": name, "hex": hex, "decoded": decoded}));
            }
        }
        if kind != FrameType::Credit {
            let header = Header { length: 7, stream: 5 - stream, frame_type: kind, fin: false };
            let hex = to_hex(&header.encode());
            all.push(
                json!({"name": format!("{name} on the wrong stream"), "hex": hex, "error": "bad_stream"}),
            );
        }
    }
    for (name, hex, error) in [
        ("a payload one byte too long", "000100010000000512000000", "too_long"),
        ("a length of all ones", "ffffffff0000000512000000", "too_long"),
        ("type 0", "000000070000000500000000", "unknown_type"),
        ("type 0x15", "000000070000000515000000", "unknown_type"),
        ("type 0xff", "0000000700000005ff000000", "unknown_type"),
        ("an undefined flag", "000000070000000512020000", "bad_flags"),
        ("reserved low byte set", "000000070000000512000001", "bad_reserved"),
        ("reserved high byte set", "000000070000000512008000", "bad_reserved"),
    ] {
        all.push(json!({"name": name, "hex": hex, "error": error}));
    }
    let longest = json!({"length": 65536, "stream": 0x7fff_ffff, "type": 0x12, "fin": true});
    all.push(json!({"name": "the longest payload", "hex": "000100007fffffff12010000", "decoded": longest}));
    all
}

#[test]
fn frame_headers_decode_as_their_vectors_say() {
    complete("frames.json", frame_vectors());
    for vector in vectors("frames.json") {
        let bytes = from_hex(vector["hex"].as_str().expect("hex"));
        let result = Header::decode(bytes.first_chunk().expect("12 bytes"));
        match vector["error"].as_str() {
            Some(error) => {
                let found = result.map_err(|e| match e {
                    HeaderError::TooLong(_) => "too_long",
                    HeaderError::UnknownType(_) => "unknown_type",
                    HeaderError::BadFlags(_) => "bad_flags",
                    HeaderError::BadReserved(_) => "bad_reserved",
                    HeaderError::BadStream(_) => "bad_stream",
                });
                assert_eq!(found, Err(error), "{vector}");
            }
            None => {
                let h = result.unwrap_or_else(|e| panic!("{vector}: {e}"));
                let decoded =
                    json!({"length": h.length, "stream": h.stream, "type": h.frame_type as u8, "fin": h.fin});
                assert_eq!(decoded, vector["decoded"], "{vector}");
                assert_eq!(h.encode().to_vec(), bytes, "{vector}");
            }
        }
    }
}

#[test]
fn handshakes_go_as_their_vectors_say() {
    complete("handshake.json", handshake::vectors());
    for vector in vectors("handshake.json") {
        handshake::check(&vector);
    }
}

#[test]
fn vectors_of_a_released_version_do_not_change() {
    for (file, count, frozen) in FROZEN {
        let lines = lines(file);
        let mut hash = Sha256::new();
        for line in lines.iter().take(count) {
            hash.update(line);
            hash.update(b"\n");
        }
        let hash = to_hex(&hash.finalize());
        assert!(
            lines.len() >= count && hash == frozen,
            "the first {count} vectors of {file} ({} there) hash to {hash}: they are frozen",
            lines.len()
        );
    }
}
