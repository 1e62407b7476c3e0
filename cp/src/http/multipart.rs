//! `multipart/form-data` (RFC 7578, RFC 2046 section 5.1), sans-I/O and streamed: the file's bytes are
//! handed on as they come, only small fields are held.

use std::fmt;

/// The longest boundary (RFC 2046 section 5.1.1).
const MAX_BOUNDARY_BYTES: usize = 70;
/// The longest head of a part, in bytes.
const MAX_PART_HEAD_BYTES: usize = 4096;
/// The longest field that is not a file, in bytes.
const MAX_FIELD_BYTES: usize = 8192;
/// The most parts of a body.
const MAX_PARTS: usize = 32;

/// What a body is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A small field.
    Field {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
    /// The part named `file` begins.
    FileStart,
    /// Bytes of the file, at least one.
    FileData(Vec<u8>),
    /// The file is complete.
    FileEnd,
    /// The body is complete.
    End,
}

/// Why a body is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MultipartError(&'static str);

impl fmt::Display for MultipartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the multipart body is malformed: {}", self.0)
    }
}

impl std::error::Error for MultipartError {}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Before the first boundary.
    Preamble,
    /// Right behind a boundary: CR LF goes on, `--` ends.
    AfterBoundary,
    /// In a part's head.
    PartHead,
    /// In a field of this name.
    Field(String),
    /// In the file.
    File,
    /// Behind the last boundary.
    Epilogue,
}

/// Reads one body.
#[derive(Debug)]
pub struct Multipart {
    /// `\r\n--boundary`.
    delimiter: Vec<u8>,
    state: State,
    buffer: Vec<u8>,
    parts: usize,
}

/// The boundary of a `Content-Type` value; `None` when it is not `multipart/form-data` with a good one.
fn boundary(content_type: &str) -> Option<String> {
    let mut pieces = content_type.split(';');
    if !pieces.next()?.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let value = pieces.find_map(|piece| {
        let (name, value) = piece.split_once('=')?;
        name.trim().eq_ignore_ascii_case("boundary").then(|| value.trim())
    })?;
    let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
    let is_good =
        (1..=MAX_BOUNDARY_BYTES).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_graphic());
    is_good.then(|| value.to_string())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

impl Multipart {
    /// A reader for a body with this `Content-Type`. `None` when that is not `multipart/form-data`.
    pub fn new(content_type: &str) -> Option<Multipart> {
        let delimiter = format!("\r\n--{}", boundary(content_type)?).into_bytes();
        // The first boundary may stand at the very start, without a line end before it.
        Some(Multipart { delimiter, state: State::Preamble, buffer: b"\r\n".to_vec(), parts: 0 })
    }

    /// Takes bytes and gives the parts in them.
    ///
    /// # Errors
    /// When the body is malformed or over a limit; nothing more is to be fed then.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Vec<Part>, MultipartError> {
        self.buffer.extend_from_slice(bytes);
        let mut parts = Vec::new();
        while self.step(&mut parts)? {}
        Ok(parts)
    }

    /// Whether the last boundary has come.
    pub fn is_complete(&self) -> bool {
        self.state == State::Epilogue
    }

    /// Does one transition; false when it needs more bytes.
    fn step(&mut self, parts: &mut Vec<Part>) -> Result<bool, MultipartError> {
        match &self.state {
            State::Preamble => match find(&self.buffer, &self.delimiter) {
                Some(at) => {
                    self.buffer.drain(..at + self.delimiter.len());
                    self.state = State::AfterBoundary;
                    Ok(true)
                }
                None if self.buffer.len() > MAX_PART_HEAD_BYTES => {
                    Err(MultipartError("there is no boundary"))
                }
                None => Ok(false),
            },
            State::AfterBoundary => match self.buffer.as_slice() {
                [b'\r', b'\n', ..] => {
                    self.parts += 1;
                    if self.parts > MAX_PARTS {
                        return Err(MultipartError("it has too many parts"));
                    }
                    self.state = State::PartHead;
                    Ok(true)
                }
                [b'-', b'-', ..] => {
                    self.buffer = Vec::new();
                    self.state = State::Epilogue;
                    parts.push(Part::End);
                    Ok(false)
                }
                [_, _, ..] => Err(MultipartError("a boundary has something behind it")),
                _ => Ok(false),
            },
            State::PartHead => match find(&self.buffer, b"\r\n\r\n") {
                Some(at) if at <= MAX_PART_HEAD_BYTES => {
                    let head: Vec<u8> = self.buffer.drain(..at + 4).collect();
                    let name = part_name(&head)?;
                    self.state = if name == "file" {
                        parts.push(Part::FileStart);
                        State::File
                    } else {
                        State::Field(name)
                    };
                    Ok(true)
                }
                Some(_) => Err(MultipartError("a part's head is too long")),
                None if self.buffer.len() > MAX_PART_HEAD_BYTES => {
                    Err(MultipartError("a part's head is too long"))
                }
                None => Ok(false),
            },
            State::Field(name) => match find(&self.buffer, &self.delimiter) {
                Some(at) if at <= MAX_FIELD_BYTES => {
                    let value = std::str::from_utf8(&self.buffer[..at])
                        .map_err(|_| MultipartError("a field is not UTF-8"))?
                        .to_string();
                    parts.push(Part::Field { name: name.clone(), value });
                    self.buffer.drain(..at + self.delimiter.len());
                    self.state = State::AfterBoundary;
                    Ok(true)
                }
                Some(_) => Err(MultipartError("a field is too long")),
                None if self.buffer.len() > MAX_FIELD_BYTES + self.delimiter.len() => {
                    Err(MultipartError("a field is too long"))
                }
                None => Ok(false),
            },
            State::File => match find(&self.buffer, &self.delimiter) {
                Some(at) => {
                    if at > 0 {
                        parts.push(Part::FileData(self.buffer[..at].to_vec()));
                    }
                    parts.push(Part::FileEnd);
                    self.buffer.drain(..at + self.delimiter.len());
                    self.state = State::AfterBoundary;
                    Ok(true)
                }
                None => {
                    // The delimiter may have begun in the last bytes.
                    let keep = (self.delimiter.len() - 1).min(self.buffer.len());
                    let at = self.buffer.len() - keep;
                    if at > 0 {
                        parts.push(Part::FileData(self.buffer.drain(..at).collect()));
                    }
                    Ok(false)
                }
            },
            State::Epilogue => {
                self.buffer = Vec::new();
                Ok(false)
            }
        }
    }
}

/// The name in a part's `Content-Disposition`.
fn part_name(head: &[u8]) -> Result<String, MultipartError> {
    let head = std::str::from_utf8(head).map_err(|_| MultipartError("a part's head is not UTF-8"))?;
    let disposition = head
        .split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("content-disposition"))
        .map(|(_, value)| value)
        .ok_or(MultipartError("a part has no Content-Disposition"))?;
    disposition
        .split(';')
        .filter_map(|piece| piece.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("name"))
        .map(|(_, value)| value.trim().trim_matches('"').to_string())
        .ok_or(MultipartError("a part has no name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPE: &str = "multipart/form-data; boundary=\"xyz\"";

    fn body() -> Vec<u8> {
        let mut body = b"--xyz\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/tmp/a\r\n".to_vec();
        body.extend_from_slice(b"--xyz\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n");
        body.extend_from_slice(b"Content-Type: application/octet-stream\r\n\r\n");
        body.extend_from_slice(b"one\r\n--xy\r\n-- two\r\n\r\n--xyz--\r\n");
        body
    }

    fn joined(parts: Vec<Part>) -> Vec<Part> {
        let mut out: Vec<Part> = Vec::new();
        for part in parts {
            match (out.last_mut(), part) {
                (Some(Part::FileData(data)), Part::FileData(more)) => data.extend_from_slice(&more),
                (_, part) => out.push(part),
            }
        }
        out
    }

    #[test]
    fn any_split_gives_the_same_parts() {
        let expected = vec![
            Part::Field { name: "path".into(), value: "/tmp/a".into() },
            Part::FileStart,
            Part::FileData(b"one\r\n--xy\r\n-- two\r\n".to_vec()),
            Part::FileEnd,
            Part::End,
        ];
        let body = body();
        for size in 1..=body.len() {
            let mut reader = Multipart::new(TYPE).expect("a boundary");
            let parts: Vec<Part> =
                body.chunks(size).flat_map(|chunk| reader.receive(chunk).expect("well-formed")).collect();
            assert_eq!(joined(parts), expected, "pieces of {size}");
            assert!(reader.is_complete());
        }
    }

    #[test]
    fn malformed_bodies_and_types_are_refused() {
        for bad in [
            "text/plain",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/mixed; boundary=a",
        ] {
            assert!(Multipart::new(bad).is_none(), "{bad}");
        }
        for bad in [
            b"--xyzz\r\n".as_slice(),
            b"--xyz\r\nContent-Type: a/b\r\n\r\n",
            b"--xyz\r\nContent-Disposition: form-data\r\n\r\n",
            &[b'a'; MAX_PART_HEAD_BYTES + 1],
        ] {
            let mut reader = Multipart::new(TYPE).expect("a boundary");
            assert!(reader.receive(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
        let mut reader = Multipart::new(TYPE).expect("a boundary");
        assert_eq!(
            reader.receive(b"--xyz\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n"),
            Ok(vec![])
        );
        assert!(reader.receive(&[b'a'; MAX_FIELD_BYTES + 100]).is_err());
    }
}
