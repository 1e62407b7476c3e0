//! The subset of TOML 1.0 that Cargo's files use, strictly: what is not understood is refused.
//! No dates, no non-decimal or signed-special numbers; a key that is set twice is an error.

use std::collections::BTreeMap;
use std::fmt;

/// How deep values and tables may nest.
const MAX_DEPTH: usize = 32;

/// A table, keys sorted.
pub type Table = BTreeMap<String, Value>;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    String(String),
    /// A whole number.
    Integer(i64),
    /// A number with a fraction, as it is written: nothing here computes with it.
    Float(String),
    /// true or false.
    Boolean(bool),
    /// A list, also one made of `[[headers]]`.
    Array(Vec<Value>),
    /// A table.
    Table(Table),
}

impl Value {
    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(text) = self { Some(text) } else { None }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Boolean(value) = self { Some(*value) } else { None }
    }

    /// The whole number, if it is one.
    pub fn as_integer(&self) -> Option<i64> {
        if let Value::Integer(value) = self { Some(*value) } else { None }
    }

    /// The list, if it is one.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Value::Array(values) = self { Some(values) } else { None }
    }

    /// The table, if it is one.
    pub fn as_table(&self) -> Option<&Table> {
        if let Value::Table(table) = self { Some(table) } else { None }
    }
}

/// Where and why a text was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TomlError {
    /// The line, from 1.
    pub line: usize,
    /// What was not understood.
    pub what: &'static str,
}

impl fmt::Display for TomlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for TomlError {}

type Result<T> = std::result::Result<T, &'static str>;

/// Parses a document.
///
/// # Errors
/// [`TomlError`] with the line at which the parser stopped.
pub fn parse(text: &str) -> std::result::Result<Table, TomlError> {
    let mut parser = Parser { rest: text.strip_prefix('\u{feff}').unwrap_or(text), defined: BTreeMap::new() };
    parser.document().map_err(|what| {
        let consumed = text.len() - parser.rest.len();
        TomlError { line: text[..consumed].matches('\n').count() + 1, what }
    })
}

struct Parser<'a> {
    rest: &'a str,
    /// Table paths that a header opened: opening one twice is an error.
    defined: BTreeMap<Vec<String>, usize>,
}

impl Parser<'_> {
    fn document(&mut self) -> Result<Table> {
        let mut root = Table::new();
        let mut path: Vec<String> = Vec::new();
        loop {
            self.skip_blank();
            if self.rest.is_empty() {
                return Ok(root);
            }
            if self.eat("[[") {
                path = self.header("]]")?;
                let (last, parents) = path.split_last().ok_or("empty header")?;
                let parent = open(&mut root, parents)?;
                match parent.entry(last.clone()).or_insert_with(|| Value::Array(Vec::new())) {
                    Value::Array(tables) if tables.iter().all(|value| value.as_table().is_some()) => {
                        tables.push(Value::Table(Table::new()));
                    }
                    _ => return Err("a list of tables and another value share a key"),
                }
                // A new element: what its predecessor's sub-tables defined may be defined again.
                self.defined.retain(|known, _| !known.starts_with(&path));
                self.end_of_line()?;
            } else if self.eat("[") {
                path = self.header("]")?;
                if self.defined.insert(path.clone(), 1).is_some() {
                    return Err("a table is defined twice");
                }
                open(&mut root, &path)?;
                self.end_of_line()?;
            } else {
                let table = open(&mut root, &path)?;
                self.assignment(table, 0)?;
                self.end_of_line()?;
            }
        }
    }

    fn header(&mut self, close: &str) -> Result<Vec<String>> {
        let path = self.key()?;
        if self.eat(close) { Ok(path) } else { Err("a header is not closed") }
    }

    fn assignment(&mut self, table: &mut Table, depth: usize) -> Result<()> {
        let path = self.key()?;
        if !self.eat("=") {
            return Err("expected '='");
        }
        self.skip_space();
        let value = self.value(depth)?;
        let (last, parents) = path.split_last().ok_or("empty key")?;
        if open(table, parents)?.insert(last.clone(), value).is_some() {
            return Err("a key is set twice");
        }
        Ok(())
    }

    /// A dotted key, with the space around it.
    fn key(&mut self) -> Result<Vec<String>> {
        let mut path = Vec::new();
        loop {
            self.skip_space();
            let part = match self.rest.as_bytes().first() {
                Some(b'"') => self.basic_string()?,
                Some(b'\'') => self.literal_string()?,
                _ => {
                    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                    let end = self.rest.find(|c| !bare(c)).unwrap_or(self.rest.len());
                    if end == 0 {
                        return Err("expected a key");
                    }
                    let part = self.rest[..end].to_owned();
                    self.rest = &self.rest[end..];
                    part
                }
            };
            path.push(part);
            self.skip_space();
            if !self.eat(".") {
                return if path.len() <= MAX_DEPTH { Ok(path) } else { Err("nested too deep") };
            }
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        if depth > MAX_DEPTH {
            return Err("nested too deep");
        }
        match self.rest.as_bytes().first() {
            Some(b'"') if self.rest.starts_with("\"\"\"") => {
                self.multi_line("\"\"\"", true).map(Value::String)
            }
            Some(b'\'') if self.rest.starts_with("'''") => self.multi_line("'''", false).map(Value::String),
            Some(b'"') => self.basic_string().map(Value::String),
            Some(b'\'') => self.literal_string().map(Value::String),
            Some(b'[') => self.array(depth),
            Some(b'{') => self.inline_table(depth),
            _ => self.scalar(),
        }
    }

    fn scalar(&mut self) -> Result<Value> {
        let end = self.rest.find([',', ']', '}', '#', ' ', '\t', '\r', '\n']).unwrap_or(self.rest.len());
        let word = &self.rest[..end];
        let digits = word.strip_prefix('-').unwrap_or(word);
        let value = match word {
            "true" => Value::Boolean(true),
            "false" => Value::Boolean(false),
            _ if digits.is_empty() || digits.bytes().any(|c| !c.is_ascii_digit() && c != b'.') => {
                return Err("a value that is not understood");
            }
            _ => match digits.split_once('.') {
                None if digits.len() > 1 && digits.starts_with('0') => {
                    return Err("a number with leading zeros");
                }
                None => Value::Integer(word.parse().map_err(|_| "a number that is too large")?),
                Some((whole, fraction))
                    if !whole.is_empty() && !fraction.is_empty() && !fraction.contains('.') =>
                {
                    Value::Float(word.to_owned())
                }
                Some(_) => return Err("a number that is not understood"),
            },
        };
        self.rest = &self.rest[end..];
        Ok(value)
    }

    fn array(&mut self, depth: usize) -> Result<Value> {
        self.eat("[");
        let mut values = Vec::new();
        loop {
            self.skip_blank();
            if self.eat("]") {
                return Ok(Value::Array(values));
            }
            values.push(self.value(depth + 1)?);
            self.skip_blank();
            if !self.eat(",") && !self.rest.starts_with(']') {
                return Err("expected ',' or ']'");
            }
        }
    }

    fn inline_table(&mut self, depth: usize) -> Result<Value> {
        self.eat("{");
        let mut table = Table::new();
        self.skip_space();
        if self.eat("}") {
            return Ok(Value::Table(table));
        }
        loop {
            self.assignment(&mut table, depth + 1)?;
            self.skip_space();
            if self.eat("}") {
                return Ok(Value::Table(table));
            }
            if !self.eat(",") {
                return Err("expected ',' or '}'");
            }
        }
    }

    fn literal_string(&mut self) -> Result<String> {
        let body = &self.rest[1..];
        let end = body.find('\'').ok_or("a string is not closed")?;
        if body[..end].contains('\n') {
            return Err("a string is not closed");
        }
        self.rest = &body[end + 1..];
        Ok(body[..end].to_owned())
    }

    fn basic_string(&mut self) -> Result<String> {
        self.rest = &self.rest[1..];
        let mut text = String::new();
        loop {
            let c = self.next_char()?;
            match c {
                '"' => return Ok(text),
                '\\' => text.push(self.escape()?),
                '\n' => return Err("a string is not closed"),
                c if c.is_control() && c != '\t' => return Err("a control character in a string"),
                c => text.push(c),
            }
        }
    }

    fn multi_line(&mut self, quotes: &str, escapes: bool) -> Result<String> {
        self.rest = &self.rest[quotes.len()..];
        if !self.eat("\n") {
            self.eat("\r\n");
        }
        let mut text = String::new();
        loop {
            if self.rest.starts_with(quotes) {
                self.rest = &self.rest[quotes.len()..];
                // Up to two quotes may stand right before the closing three.
                for _ in 0..2 {
                    if self.eat(&quotes[..1]) {
                        text.push_str(&quotes[..1]);
                    }
                }
                return Ok(text);
            }
            match self.next_char()? {
                '\\' if escapes => {
                    let line = self.rest.trim_start_matches([' ', '\t', '\r']);
                    if line.starts_with('\n') {
                        self.rest = line.trim_start_matches([' ', '\t', '\r', '\n']);
                    } else {
                        text.push(self.escape()?);
                    }
                }
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char> {
        Ok(match self.next_char()? {
            'b' => '\u{8}',
            't' => '\t',
            'n' => '\n',
            'f' => '\u{c}',
            'r' => '\r',
            '"' => '"',
            '\\' => '\\',
            kind @ ('u' | 'U') => {
                let length = if kind == 'u' { 4 } else { 8 };
                let digits = self.rest.get(..length).ok_or("an escape that is cut off")?;
                let code = u32::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
                self.rest = &self.rest[length..];
                code.and_then(char::from_u32).ok_or("an escape that is no character")?
            }
            _ => return Err("an escape that is not understood"),
        })
    }

    fn next_char(&mut self) -> Result<char> {
        let c = self.rest.chars().next().ok_or("a string is not closed")?;
        self.rest = &self.rest[c.len_utf8()..];
        Ok(c)
    }

    fn eat(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn skip_comment(&mut self) {
        if self.rest.starts_with('#') {
            self.rest = &self.rest[self.rest.find('\n').unwrap_or(self.rest.len())..];
        }
    }

    fn skip_blank(&mut self) {
        loop {
            let before = self.rest.len();
            self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
            self.skip_comment();
            if self.rest.len() == before {
                return;
            }
        }
    }

    fn end_of_line(&mut self) -> Result<()> {
        self.skip_space();
        self.skip_comment();
        if self.rest.is_empty() || self.eat("\n") || self.eat("\r\n") {
            Ok(())
        } else {
            Err("something follows a value on its line")
        }
    }
}

/// The table at a path, made where it is not there; the last element of a list of tables counts.
fn open<'t>(mut table: &'t mut Table, path: &[String]) -> Result<&'t mut Table> {
    for part in path {
        let value = table.entry(part.clone()).or_insert_with(|| Value::Table(Table::new()));
        table = match value {
            Value::Table(table) => table,
            Value::Array(values) => match values.last_mut() {
                Some(Value::Table(table)) => table,
                _ => return Err("a key that is no table is used as one"),
            },
            _ => return Err("a key that is no table is used as one"),
        };
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_writes() {
        let text = "# c\nversion = 4 # x\n\n[[package]]\nname = \"a\"\ndependencies = [\n \"b\",\n \"c 1.0\",\n]\n\n\
                    [[package]]\nname = 'b'\n[target.'cfg(unix)'.dependencies.libc]\nversion = \"1\"\nfeatures=[ ]\n\
                    [features]\nx.y = { a = true, b = [\"1\", \"2\"] }\nf = -1.5\nm = \"\"\"\nl1\\\n   l2\"\"\"\n";
        let table = parse(text).expect("parses");
        assert_eq!(table["version"].as_integer(), Some(4));
        let packages = table["package"].as_array().expect("list");
        assert_eq!(
            packages[0].as_table().expect("table")["dependencies"].as_array().map(<[_]>::len),
            Some(2)
        );
        let libc = table["target"].as_table().expect("t")["cfg(unix)"].as_table().expect("t")["dependencies"]
            .as_table()
            .expect("t")["libc"]
            .as_table()
            .expect("t");
        assert_eq!(libc["version"].as_str(), Some("1"));
        let features = table["features"].as_table().expect("t");
        assert_eq!(features["m"].as_str(), Some("l1l2"));
        assert_eq!(features["f"], Value::Float("-1.5".into()));
    }

    #[test]
    fn refusals_name_the_line() {
        for (text, line) in [
            ("a = 1\na = 2", 2),
            ("[a]\n[a]", 2),
            ("a = 1979-05-27", 1),
            ("a = 0x10", 1),
            ("a = inf", 1),
            ("a = \"x", 1),
            ("a = 'x\ny'", 1),
            ("a = [1 2]", 1),
            ("a = {b = 1,}", 1),
            ("a = 1 b = 2", 1),
            ("\n= 1", 2),
            ("a = 1\n[a.b]", 2),
            ("a = \"\\q\"", 1),
            ("a = 01", 1),
            ("[a", 1),
            ("a = 99999999999999999999", 1),
        ] {
            assert_eq!(parse(text).map_err(|error| error.line), Err(line), "{text}");
        }
        let deep = format!("a = {}1{}", "[".repeat(100), "]".repeat(100));
        assert_eq!(parse(&deep).map_err(|error| error.what), Err("nested too deep"));
    }
}
