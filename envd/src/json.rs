//! A small strict JSON reader (RFC 8259) for the one document that envd reads: an object whose string
//! members are wanted and whose other members are skipped.

use alloc::string::String;
use alloc::vec::Vec;

/// The longest document, in bytes.
pub const MAX_DOCUMENT: usize = 16 * 1024;
/// How deep skipped values may nest.
const MAX_DEPTH: usize = 16;

/// The text is not the JSON that is expected; where it stopped making sense, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JsonError {
    /// Offset of the first byte that is wrong.
    pub at: usize,
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

/// The string members of an object, in their order.
pub fn string_members(text: &[u8]) -> Result<Vec<(String, String)>, JsonError> {
    if text.len() > MAX_DOCUMENT {
        return Err(JsonError { at: MAX_DOCUMENT });
    }
    let mut reader = Reader { text, at: 0 };
    let mut members = Vec::new();
    reader.blanks();
    reader.object(0, Some(&mut members))?;
    reader.blanks();
    if reader.at == text.len() { Ok(members) } else { Err(reader.error()) }
}

impl Reader<'_> {
    fn error(&self) -> JsonError {
        JsonError { at: self.at }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.peek() != Some(byte) {
            return Err(self.error());
        }
        self.at += 1;
        Ok(())
    }

    fn object(
        &mut self,
        depth: usize,
        mut wanted: Option<&mut Vec<(String, String)>>,
    ) -> Result<(), JsonError> {
        self.list(b'{', b'}', |reader| {
            let name = reader.string()?;
            reader.blanks();
            reader.expect(b':')?;
            reader.blanks();
            match &mut wanted {
                Some(members) if reader.peek() == Some(b'"') => members.push((name, reader.string()?)),
                _ => reader.skip(depth + 1)?,
            }
            Ok(())
        })
    }

    /// Items between brackets, with commas between them.
    fn list(
        &mut self,
        open: u8,
        close: u8,
        mut item: impl FnMut(&mut Self) -> Result<(), JsonError>,
    ) -> Result<(), JsonError> {
        self.expect(open)?;
        self.blanks();
        if self.peek() == Some(close) {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.blanks();
            item(self)?;
            self.blanks();
            match self.peek() {
                Some(b',') => self.at += 1,
                _ => return self.expect(close),
            }
        }
    }

    fn skip(&mut self, depth: usize) -> Result<(), JsonError> {
        if depth > MAX_DEPTH {
            return Err(self.error());
        }
        match self.peek() {
            Some(b'{') => self.object(depth, None),
            Some(b'[') => self.list(b'[', b']', |reader| reader.skip(depth + 1)),
            Some(b'"') => self.string().map(drop),
            Some(b't') => self.word(b"true"),
            Some(b'f') => self.word(b"false"),
            Some(b'n') => self.word(b"null"),
            _ => self.number(),
        }
    }

    fn word(&mut self, word: &[u8]) -> Result<(), JsonError> {
        word.iter().try_for_each(|byte| self.expect(*byte))
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at > start { Ok(()) } else { Err(self.error()) }
    }

    fn number(&mut self) -> Result<(), JsonError> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn string(&mut self) -> Result<String, JsonError> {
        self.expect(b'"')?;
        let mut out = Vec::new();
        loop {
            let byte = self.peek().ok_or(self.error())?;
            match byte {
                b'"' => break,
                b'\\' => {
                    let c = self.escape()?;
                    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
                0..=0x1f => return Err(self.error()),
                _ => {
                    out.push(byte);
                    self.at += 1;
                }
            }
        }
        let text = String::from_utf8(out).map_err(|_| self.error())?;
        self.at += 1;
        Ok(text)
    }

    fn escape(&mut self) -> Result<char, JsonError> {
        let error = self.error();
        self.at += 1;
        let byte = self.peek().ok_or(error)?;
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let high = self.hex4()?;
                let code = if (0xd800..0xdc00).contains(&high) {
                    self.word(b"\\u")?;
                    let low = self.hex4()?;
                    if !(0xdc00..0xe000).contains(&low) {
                        return Err(error);
                    }
                    0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00)
                } else {
                    high
                };
                char::from_u32(code).ok_or(error)?
            }
            _ => return Err(error),
        })
    }

    fn hex4(&mut self) -> Result<u32, JsonError> {
        let mut value = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|b| char::from(b).to_digit(16)).ok_or(self.error())?;
            value = value << 4 | digit;
            self.at += 1;
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_string(), value.to_string())
    }

    #[test]
    fn string_members_are_found_and_the_rest_skipped() {
        let text = br#" {"instanceID":"cl-1", "n" : -0.5e+3, "deep":{"a":[1,{},[null,true]]},"envID":"t\u00e9\n\ud83d\ude00" } "#;
        assert_eq!(
            string_members(text),
            Ok(alloc::vec![pair("instanceID", "cl-1"), pair("envID", "té\n\u{1f600}")])
        );
        assert_eq!(string_members(b"{}"), Ok(Vec::new()));
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for bad in [
            "",
            "[]",
            "{",
            "{}x",
            "{,}",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":01}",
            "{\"a\":1.}",
            "{\"a\":tru}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\\ud800x\"}",
            "{\"a\":\"\n\"}",
            "{'a':1}",
            "{\"a\":+1}",
            "{\"a\":\"",
            "{\"a\":\"\\u12",
            "{\"a\" 1}",
        ] {
            assert!(string_members(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(string_members(b"{\"a\":\"\xff\"}").is_err());
        let deep = [b"{\"a\":".to_vec(), alloc::vec![b'['; 100]].concat();
        assert!(string_members(&deep).is_err());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let text = br#"{"a":"b\u0041","c":[1,2],"d":null}"#;
        for end in 0..text.len() {
            assert!(string_members(&text[..end]).is_err(), "{end}");
        }
    }
}
