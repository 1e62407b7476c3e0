//! Encodings by the type names of `PROTOCOL.md` alone: a second implementation of the primitive
//! encodings, which shares nothing with the crate's but the document.
#![allow(dead_code)] // Each test program uses its own part.

use serde_json::{Value, json};

/// A type of the document.
#[derive(Debug, Clone, PartialEq)]
pub enum Type {
    Unsigned(usize),
    Signed(usize),
    Bool,
    Text,
    Bytes,
    State,
    List(Box<Type>),
    Option(Box<Type>),
    Pair(Box<Type>, Box<Type>),
}

/// Reads a type's name.
pub fn parse(name: &str) -> Type {
    let name = name.trim();
    if let Some(inner) = name.strip_prefix("list<").and_then(|n| n.strip_suffix('>')) {
        return Type::List(Box::new(parse(inner)));
    }
    if let Some(inner) = name.strip_prefix("option<").and_then(|n| n.strip_suffix('>')) {
        return Type::Option(Box::new(parse(inner)));
    }
    if let Some(inner) = name.strip_prefix("pair<").and_then(|n| n.strip_suffix('>')) {
        let mut depth = 0;
        let at = inner
            .find(|c| {
                depth += i32::from(c == '<') - i32::from(c == '>');
                c == ',' && depth == 0
            })
            .unwrap_or_else(|| panic!("{name} has no comma"));
        return Type::Pair(Box::new(parse(&inner[..at])), Box::new(parse(&inner[at + 1..])));
    }
    match name {
        "u8" => Type::Unsigned(1),
        "u16" => Type::Unsigned(2),
        "u32" => Type::Unsigned(4),
        "u64" => Type::Unsigned(8),
        "i32" => Type::Signed(4),
        "i64" => Type::Signed(8),
        "bool" => Type::Bool,
        "text" => Type::Text,
        "bytes" => Type::Bytes,
        "state" => Type::State,
        other => panic!("PROTOCOL.md has a type that the vectors do not know: {other}"),
    }
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn from_hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "odd hex: {text}");
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap_or_else(|_| panic!("hex: {text}")))
        .collect()
}

fn put_counted(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Appends `value`, which must be of the type.
pub fn encode(kind: &Type, value: &Value, out: &mut Vec<u8>) {
    match kind {
        Type::Unsigned(n) => {
            out.extend_from_slice(&value.as_u64().expect("unsigned").to_be_bytes()[8 - n..]);
        }
        Type::Signed(n) => out.extend_from_slice(&value.as_i64().expect("signed").to_be_bytes()[8 - n..]),
        Type::State => out.push(value.as_u64().expect("state") as u8),
        Type::Bool => out.push(u8::from(value.as_bool().expect("bool"))),
        Type::Text => put_counted(value.as_str().expect("text").as_bytes(), out),
        Type::Bytes => put_counted(&from_hex(value.as_str().expect("hex")), out),
        Type::List(item) => {
            let items = value.as_array().expect("list");
            out.extend_from_slice(&(items.len() as u32).to_be_bytes());
            for value in items {
                encode(item, value, out);
            }
        }
        Type::Option(inner) => {
            out.push(u8::from(!value.is_null()));
            if !value.is_null() {
                encode(inner, value, out);
            }
        }
        Type::Pair(a, b) => {
            encode(a, &value[0], out);
            encode(b, &value[1], out);
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8], &'static str> {
    if n > rest.len() {
        return Err("unexpected_end");
    }
    let (head, tail) = rest.split_at(n);
    *rest = tail;
    Ok(head)
}

fn number(rest: &mut &[u8], n: usize) -> Result<u64, &'static str> {
    Ok(take(rest, n)?.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
}

/// Reads one value.
pub fn decode(kind: &Type, rest: &mut &[u8]) -> Result<Value, &'static str> {
    Ok(match kind {
        Type::Unsigned(n) => json!(number(rest, *n)?),
        Type::Signed(n) => {
            let shift = 64 - 8 * *n as u32;
            json!((number(rest, *n)? << shift) as i64 >> shift)
        }
        Type::State => match number(rest, 1)? {
            n if n <= 11 => json!(n),
            _ => return Err("bad_value"),
        },
        Type::Bool => match number(rest, 1)? {
            0 => json!(false),
            1 => json!(true),
            _ => return Err("bad_marker"),
        },
        Type::Text => {
            let n = number(rest, 4)? as usize;
            json!(std::str::from_utf8(take(rest, n)?).map_err(|_| "not_utf8")?)
        }
        Type::Bytes => {
            let n = number(rest, 4)? as usize;
            json!(to_hex(take(rest, n)?))
        }
        Type::List(item) => {
            let n = number(rest, 4)?;
            let mut items = Vec::new();
            for _ in 0..n {
                items.push(decode(item, rest)?);
            }
            json!(items)
        }
        Type::Option(inner) => match number(rest, 1)? {
            0 => Value::Null,
            1 => decode(inner, rest)?,
            _ => return Err("bad_marker"),
        },
        Type::Pair(a, b) => json!([decode(a, rest)?, decode(b, rest)?]),
    })
}

/// The value with everything empty or zero.
pub fn least(kind: &Type) -> Value {
    match kind {
        Type::Unsigned(_) | Type::Signed(_) | Type::State => json!(0),
        Type::Bool => json!(false),
        Type::Text | Type::Bytes => json!(""),
        Type::List(_) => json!([]),
        Type::Option(_) => Value::Null,
        Type::Pair(a, b) => json!([least(a), least(b)]),
    }
}

/// A value with something everywhere, different for each `seed`.
pub fn sample(kind: &Type, seed: u64) -> Value {
    match kind {
        Type::Unsigned(n) => {
            let all = u64::MAX >> (64 - 8 * *n as u32);
            json!((0x0102_0304_0506_0708u64.wrapping_mul(seed + 1)) & all)
        }
        Type::Signed(n) => {
            let shift = 64 - 8 * *n as u32;
            json!(((0xfedc_ba98_7654_3210u64.wrapping_mul(seed + 1)) << shift) as i64 >> shift)
        }
        Type::State => json!(seed % 12),
        Type::Bool => json!(true),
        Type::Text => json!(format!("text {seed} é")),
        Type::Bytes => json!(to_hex(&[0, 0xff, b'/', seed as u8])),
        Type::List(item) => json!([sample(item, seed), sample(item, seed + 1)]),
        Type::Option(inner) => sample(inner, seed),
        Type::Pair(a, b) => json!([sample(a, seed), sample(b, seed + 3)]),
    }
}
