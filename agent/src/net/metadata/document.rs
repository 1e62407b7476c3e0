//! Looking things up in the metadata document.

use serde_json::Value;

/// What is at a path.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The value, as JSON text.
    Json(String),
    /// A string, or an object's keys one a line, those of objects with a slash behind.
    Text(String),
    /// Nothing.
    Missing,
    /// A number, a boolean, null or a list, which have no text form in EC2's format.
    NotText,
}

/// The value at `path`, whose segments are keys; empty ones count for nothing.
pub fn look_up(document: &Value, path: &str, as_json: bool) -> Lookup {
    let mut value = document;
    for key in path.split('/').filter(|key| !key.is_empty()) {
        match value.as_object().and_then(|object| object.get(key)) {
            Some(inner) => value = inner,
            None => return Lookup::Missing,
        }
    }
    match value {
        _ if as_json => Lookup::Json(value.to_string()),
        Value::String(text) => Lookup::Text(text.clone()),
        Value::Object(object) => {
            let line = |(key, value): (&String, &Value)| {
                format!("{key}{}", if value.is_object() { "/" } else { "" })
            };
            Lookup::Text(object.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
        _ => Lookup::NotText,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_found_by_path_and_shown_in_both_forms() {
        let document = json!({"instanceID": "c-1", "latest": {"meta": {"count": 3}, "name": "x"}});
        let text = |path| look_up(&document, path, false);
        assert_eq!(text("/"), Lookup::Text("instanceID\nlatest/".into()));
        assert_eq!(text("//latest///name/"), Lookup::Text("x".into()));
        assert_eq!(text("/latest"), Lookup::Text("meta/\nname".into()));
        assert_eq!(text("/latest/meta/count"), Lookup::NotText);
        assert_eq!(text("/instanceID/x"), Lookup::Missing);
        assert_eq!(text("/nothing"), Lookup::Missing);
        assert_eq!(look_up(&document, "/latest/meta", true), Lookup::Json("{\"count\":3}".into()));
        assert_eq!(look_up(&document, "/instanceID", true), Lookup::Json("\"c-1\"".into()));
    }
}
