//! The fields of a JSON request body, checked one by one with messages that name them.
//!
//! `null` is the same as a field that is not there, and fields that no one asks for are left alone, so
//! that a newer client can talk to this server.

use crate::http::handler::{Request, Response};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// The longest part of a bad value that is told back, in characters.
const MAX_SHOWN: usize = 40;

/// A request body that is a JSON object.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

/// 400 `invalid_request`.
pub fn invalid(message: &str) -> Response {
    Response::error(400, "invalid_request", message)
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= MAX_SHOWN {
        return text;
    }
    text.chars().take(MAX_SHOWN).chain("…".chars()).collect()
}

impl Fields {
    /// The body of a request.
    ///
    /// # Errors
    /// 400 when it is not a JSON object.
    pub fn of(request: &Request) -> Result<Fields, Response> {
        match request.json()? {
            Value::Object(fields) => Ok(Fields(fields)),
            other => Err(invalid(&format!("the request body must be a JSON object, not {}", shown(&other)))),
        }
    }

    /// The same, where a request without a body means one without fields.
    ///
    /// # Errors
    /// 400 when there is a body that is not a JSON object.
    pub fn of_optional(request: &Request) -> Result<Fields, Response> {
        if request.body.is_empty() { Ok(Fields(Map::new())) } else { Fields::of(request) }
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// All of them, for what is checked elsewhere.
    pub fn all(&self) -> &Map<String, Value> {
        &self.0
    }

    /// An object, if it is there.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn object(&self, name: &str) -> Result<Option<Fields>, Response> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Fields(fields.clone()))),
            Some(other) => Err(invalid(&format!("{name} must be an object, not {}", shown(other)))),
        }
    }

    /// A text, if it is there. NUL characters are refused: neither paths nor the database can hold them.
    ///
    /// # Errors
    /// 400 when it is something else or longer than `max_chars`.
    pub fn text(&self, name: &str, max_chars: usize) -> Result<Option<String>, Response> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => check_text(name, text, max_chars).map(Some),
            Some(other) => Err(invalid(&format!("{name} must be a string, not {}", shown(other)))),
        }
    }

    /// A text that must be there and not be empty.
    ///
    /// # Errors
    /// 400 when it is not.
    pub fn required_text(&self, name: &str, max_chars: usize) -> Result<String, Response> {
        match self.text(name, max_chars)? {
            Some(text) if !text.is_empty() => Ok(text),
            Some(_) => Err(invalid(&format!("{name} must not be empty"))),
            None => Err(invalid(&format!("{name} is missing"))),
        }
    }

    /// An integer, if it is there.
    ///
    /// # Errors
    /// 400 when it is something else or out of range.
    pub fn integer(&self, name: &str, range: RangeInclusive<i32>) -> Result<Option<i32>, Response> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_i64().and_then(|n| i32::try_from(n).ok()).filter(|n| range.contains(n));
        number.map(Some).ok_or_else(|| {
            invalid(&format!(
                "{name} must be an integer from {} to {}, not {}",
                range.start(),
                range.end(),
                shown(value)
            ))
        })
    }

    /// A boolean; `false` when it is not there.
    ///
    /// # Errors
    /// 400 when it is something else.
    pub fn boolean(&self, name: &str) -> Result<bool, Response> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(invalid(&format!("{name} must be true or false, not {}", shown(other)))),
        }
    }

    /// An array of texts; empty when it is not there.
    ///
    /// # Errors
    /// 400 when it is something else, or longer than `max_items`, or an item than `max_chars`.
    pub fn texts(&self, name: &str, max_items: usize, max_chars: usize) -> Result<Vec<String>, Response> {
        let items = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(other) => {
                return Err(invalid(&format!("{name} must be an array of strings, not {}", shown(other))));
            }
        };
        if items.len() > max_items {
            return Err(invalid(&format!("{name} may have {max_items} items, not {}", items.len())));
        }
        let item = |(index, value): (usize, &Value)| match value {
            Value::String(text) => check_text(&format!("{name}[{index}]"), text, max_chars),
            other => Err(invalid(&format!("{name}[{index}] must be a string, not {}", shown(other)))),
        };
        items.iter().enumerate().map(item).collect()
    }

    /// An object of texts; empty when it is not there.
    ///
    /// # Errors
    /// 400 when it is something else, or has more than `max_items`, or a text longer than `max_chars`.
    pub fn pairs(
        &self,
        name: &str,
        max_items: usize,
        max_chars: usize,
    ) -> Result<Vec<(String, String)>, Response> {
        let items = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(Value::Object(items)) => items,
            Some(other) => {
                return Err(invalid(&format!("{name} must be an object of strings, not {}", shown(other))));
            }
        };
        if items.len() > max_items {
            return Err(invalid(&format!("{name} may have {max_items} entries, not {}", items.len())));
        }
        let item = |(key, value): (&String, &Value)| {
            check_text(name, key, max_chars)?;
            match value {
                Value::String(text) => {
                    Ok((key.clone(), check_text(&format!("{name}.{key}"), text, max_chars)?))
                }
                other => Err(invalid(&format!("{name}.{key} must be a string, not {}", shown(other)))),
            }
        };
        items.iter().map(item).collect()
    }
}

fn check_text(name: &str, text: &str, max_chars: usize) -> Result<String, Response> {
    if text.chars().count() > max_chars {
        return Err(invalid(&format!("{name} is longer than {max_chars} characters")));
    }
    if text.contains('\0') {
        return Err(invalid(&format!("{name} contains a NUL character")));
    }
    Ok(text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::handler::Method;
    use std::net::{IpAddr, Ipv4Addr};

    fn fields(body: &str) -> Result<Fields, Response> {
        Fields::of(&Request {
            method: Method::Post,
            path: "/".into(),
            query: Vec::new(),
            headers: Vec::new(),
            body: body.as_bytes().to_vec(),
            params: Vec::new(),
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            proven_key: None,
        })
    }

    fn refused<T: std::fmt::Debug>(result: Result<T, Response>) -> String {
        let response = result.expect_err("it must be refused");
        assert_eq!(response.status, 400);
        response.error_message().expect("an error has a message")
    }

    #[test]
    fn only_objects_are_bodies() {
        for body in ["", "{", "[]", "\"x\"", "1", "{\"a\":{\"a\":", "\u{feff}{}"] {
            refused(fields(body));
        }
        let deep = "{\"a\":".repeat(10_000);
        refused(fields(&deep));
        assert_eq!(refused(fields("[]")), "the request body must be a JSON object, not []");
    }

    #[test]
    fn integers_are_integers_in_range() {
        let f = fields(r#"{"a":1,"b":-1,"c":1.5,"d":"1","e":99999999999999999999,"f":null,"g":1e3}"#);
        let f = f.expect("an object");
        assert_eq!(f.integer("a", 1..=2), Ok(Some(1)));
        assert_eq!(f.integer("f", 1..=2), Ok(None));
        assert_eq!(f.integer("x", 1..=2), Ok(None));
        assert_eq!(refused(f.integer("b", 0..=9)), "b must be an integer from 0 to 9, not -1");
        for bad in ["c", "d", "e", "g"] {
            refused(f.integer(bad, 0..=i32::MAX));
        }
    }

    #[test]
    fn texts_are_bounded_and_have_no_nul() {
        let f = fields(r#"{"a":"héllo","b":"","c":"x\u0000y","d":["x"],"e":{"k":"v","n":1}}"#);
        let f = f.expect("an object");
        assert_eq!(f.text("a", 5), Ok(Some("héllo".into())));
        assert_eq!(refused(f.text("a", 4)), "a is longer than 4 characters");
        assert_eq!(refused(f.required_text("b", 5)), "b must not be empty");
        assert_eq!(refused(f.required_text("x", 5)), "x is missing");
        assert_eq!(refused(f.text("c", 5)), "c contains a NUL character");
        assert_eq!(f.texts("d", 1, 1), Ok(vec!["x".into()]));
        refused(f.texts("d", 0, 1));
        refused(f.texts("a", 1, 1));
        assert_eq!(refused(f.pairs("e", 2, 5)), "e.n must be a string, not 1");
        refused(f.boolean("a"));
    }

    #[test]
    fn long_values_are_told_in_part() {
        let f = fields(&format!(r#"{{"a":"{}"}}"#, "é".repeat(1000))).expect("an object");
        assert!(refused(f.integer("a", 0..=1)).chars().count() < 120);
    }
}
