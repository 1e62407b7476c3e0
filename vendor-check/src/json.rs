//! Strict reading of the JSON files that people write: every key is asked for, or it is an error.

use serde_json::{Map, Value};

use crate::failure::{Class, Finding, Result};

/// An object that is being read, with its place for messages.
pub struct Object<'a> {
    map: &'a Map<String, Value>,
    class: Class,
    place: String,
    asked: Vec<&'static str>,
}

/// Parses a file and gives its object.
///
/// # Errors
/// `class` with the file's name.
pub fn parse(text: &[u8], class: Class, file: &str) -> Result<Value> {
    serde_json::from_slice(text).map_err(|error| Finding::new(class, file, error.to_string()))
}

impl<'a> Object<'a> {
    /// Begins to read an object.
    ///
    /// # Errors
    /// `class` when it is none.
    pub fn new(value: &'a Value, class: Class, place: impl Into<String>) -> Result<Self> {
        let place = place.into();
        match value.as_object() {
            Some(map) => Ok(Self { map, class, place, asked: Vec::new() }),
            None => Err(Finding::new(class, place, "expected an object")),
        }
    }

    fn error(&self, key: &str, what: &str) -> Finding {
        Finding::new(self.class, format!("{}.{key}", self.place), what)
    }

    /// A key that may be missing.
    pub fn optional(&mut self, key: &'static str) -> Option<&'a Value> {
        self.asked.push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A key that must be there.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn value(&mut self, key: &'static str) -> Result<&'a Value> {
        self.optional(key).ok_or_else(|| self.error(key, "it is missing"))
    }

    /// A text.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn text(&mut self, key: &'static str) -> Result<String> {
        match self.value(key)?.as_str() {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => Err(self.error(key, "expected a text")),
        }
    }

    /// A text that may be missing.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn optional_text(&mut self, key: &'static str) -> Result<Option<String>> {
        match self.optional(key) {
            None => Ok(None),
            Some(value) => value
                .as_str()
                .map(|text| Some(text.to_owned()))
                .ok_or_else(|| self.error(key, "expected a text")),
        }
    }

    /// A SHA-256 in lower-case hexadecimal.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn sha256(&mut self, key: &'static str) -> Result<String> {
        let text = self.text(key)?;
        if crate::codec::is_sha256(&text) {
            Ok(text)
        } else {
            Err(self.error(key, "expected a SHA-256 in hexadecimal"))
        }
    }

    /// A day.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn date(&mut self, key: &'static str) -> Result<crate::date::Date> {
        let text = self.text(key)?;
        crate::date::Date::parse(&text).ok_or_else(|| self.error(key, "expected a date, YYYY-MM-DD"))
    }

    /// A whole number.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn number(&mut self, key: &'static str) -> Result<u64> {
        self.value(key)?.as_u64().ok_or_else(|| self.error(key, "expected a whole number"))
    }

    /// A truth value.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn boolean(&mut self, key: &'static str) -> Result<bool> {
        self.value(key)?.as_bool().ok_or_else(|| self.error(key, "expected true or false"))
    }

    /// A list; missing is empty.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn list(&mut self, key: &'static str) -> Result<&'a [Value]> {
        match self.optional(key) {
            None => Ok(&[]),
            Some(value) => {
                value.as_array().map(Vec::as_slice).ok_or_else(|| self.error(key, "expected a list"))
            }
        }
    }

    /// A list of texts; missing is empty.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn texts(&mut self, key: &'static str) -> Result<Vec<String>> {
        self.list(key)?
            .iter()
            .map(|value| value.as_str().map(str::to_owned).ok_or_else(|| self.error(key, "expected texts")))
            .collect()
    }

    /// A list of objects, each with its place; missing is empty.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn objects(&mut self, key: &'static str) -> Result<Vec<Object<'a>>> {
        let list = self.list(key)?;
        list.iter()
            .enumerate()
            .map(|(index, value)| Object::new(value, self.class, format!("{}.{key}[{index}]", self.place)))
            .collect()
    }

    /// The entries of an object whose keys are names; missing is empty.
    ///
    /// # Errors
    /// The class of the file, with the key.
    pub fn named(&mut self, key: &'static str) -> Result<Vec<(&'a str, Object<'a>)>> {
        let Some(value) = self.optional(key) else { return Ok(Vec::new()) };
        let map = value.as_object().ok_or_else(|| self.error(key, "expected an object"))?;
        map.iter()
            .map(|(name, value)| {
                Ok((name.as_str(), Object::new(value, self.class, format!("{}.{key}.{name}", self.place))?))
            })
            .collect()
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// The class of the file, with a key that nothing asked for.
    pub fn finish(self) -> Result<()> {
        match self.map.keys().find(|key| !self.asked.contains(&key.as_str())) {
            Some(key) => Err(self.error(key, "the key is not understood")),
            None => Ok(()),
        }
    }
}
