//! What heads of requests and responses have in common: finding their end, fields, framing.

use super::{Framing, HttpError, Limits};

/// Header fields in the order in which they came; names in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    fields: Vec<(String, String)>,
}

impl Headers {
    /// The first field with this name, given in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|f| f.0 == name).map(|f| f.1.as_str())
    }

    /// All fields with this name, given in lower case.
    pub fn get_all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields.iter().filter(move |f| f.0 == name).map(|f| f.1.as_str())
    }

    /// Whether a comma-separated list field has this member, in any case.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.get_all(name).flat_map(|value| value.split(',')).any(|t| t.trim().eq_ignore_ascii_case(token))
    }

    /// All fields.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|f| (f.0.as_str(), f.1.as_str()))
    }

    /// All fields, by value.
    pub fn into_fields(self) -> Vec<(String, String)> {
        self.fields
    }
}

/// Gathers a head up to its empty line, within the limit.
#[derive(Debug, Default)]
pub(super) struct HeadBuffer {
    bytes: Vec<u8>,
}

impl HeadBuffer {
    /// Takes from `input` up to the end of the head. Returns how much was taken and whether the head is
    /// complete.
    pub fn take(&mut self, input: &[u8], max_bytes: usize) -> Result<(usize, bool), HttpError> {
        for (i, byte) in input.iter().enumerate() {
            let last = self.bytes.last().copied();
            match byte {
                b'\n' if last != Some(b'\r') => {
                    return Err(HttpError::Malformed("a line ends with a bare LF"));
                }
                0 => return Err(HttpError::Malformed("a NUL byte")),
                b'\n' => {}
                _ if last == Some(b'\r') => {
                    return Err(HttpError::Malformed("a CR without an LF"));
                }
                _ => {}
            }
            // An empty line before the first one is skipped (RFC 9112 section 2.2).
            if *byte == b'\n' && self.bytes == b"\r" {
                self.bytes.clear();
                continue;
            }
            if self.bytes.len() >= max_bytes {
                return Err(HttpError::HeadTooLong);
            }
            self.bytes.push(*byte);
            if *byte == b'\n' && self.bytes.ends_with(b"\r\n\r\n") {
                return Ok((i + 1, true));
            }
        }
        Ok((input.len(), false))
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes of the first line are there so far.
    pub fn first_line_len(&self) -> usize {
        self.bytes.iter().position(|b| *b == b'\r').unwrap_or(self.bytes.len())
    }

    /// The head without its empty line; the buffer is empty afterwards.
    pub fn finish(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.truncate(bytes.len().saturating_sub(2));
        bytes
    }
}

/// Takes a head apart: its first line and its fields.
pub(super) fn parse_lines(head: &[u8], limits: &Limits) -> Result<(String, Headers), HttpError> {
    let mut lines = head.split_inclusive(|b| *b == b'\n').map(|line| &line[..line.len().saturating_sub(2)]);
    let first = lines.next().unwrap_or_default();
    let first =
        std::str::from_utf8(first).map_err(|_| HttpError::Malformed("the first line is not ASCII"))?;
    let mut fields = Vec::new();
    for line in lines {
        if fields.len() >= limits.max_headers {
            return Err(HttpError::TooManyHeaders);
        }
        fields.push(parse_field(line)?);
    }
    Ok((first.to_string(), Headers { fields }))
}

/// Reads one field line (RFC 9112 section 5).
pub(super) fn parse_field(line: &[u8]) -> Result<(String, String), HttpError> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(HttpError::Malformed("a folded header line"));
    }
    let colon =
        line.iter().position(|b| *b == b':').ok_or(HttpError::Malformed("a header line without a colon"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if !is_token(name) {
        return Err(HttpError::Malformed("a header name has a character that is not allowed"));
    }
    let value = value.trim_ascii();
    if value.iter().any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f) {
        return Err(HttpError::Malformed("a header value has a control character"));
    }
    let value =
        std::str::from_utf8(value).map_err(|_| HttpError::Malformed("a header value is not UTF-8"))?;
    // A token is ASCII, so the conversion loses nothing.
    Ok((String::from_utf8_lossy(name).to_ascii_lowercase(), value.to_string()))
}

/// `token` of RFC 9110 section 5.6.2.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

/// The framing that the fields say; `None` when they say nothing.
pub(super) fn framing(headers: &Headers, minor_version: u8) -> Result<Option<Framing>, HttpError> {
    let mut encodings = headers.get_all("transfer-encoding");
    let mut lengths = headers.get_all("content-length");
    match (encodings.next(), lengths.next()) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => {
            Err(HttpError::Malformed("both Transfer-Encoding and Content-Length are given"))
        }
        (Some(encoding), None) => {
            if minor_version == 0 {
                return Err(HttpError::Malformed("HTTP/1.0 has no Transfer-Encoding"));
            }
            if encodings.next().is_some() || !encoding.eq_ignore_ascii_case("chunked") {
                return Err(HttpError::NotImplemented("a transfer coding other than chunked"));
            }
            Ok(Some(Framing::Chunked))
        }
        (None, Some(length)) => {
            if lengths.next().is_some() {
                return Err(HttpError::Malformed("Content-Length is given more than once"));
            }
            if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
                return Err(HttpError::Malformed("Content-Length is not a number"));
            }
            let length =
                length.parse().map_err(|_| HttpError::Malformed("Content-Length is out of range"))?;
            Ok(Some(Framing::Length(length)))
        }
    }
}

/// The minor version of `HTTP/1.x`.
pub(super) fn minor_version(text: &str) -> Result<u8, HttpError> {
    match text {
        "HTTP/1.1" => Ok(1),
        "HTTP/1.0" => Ok(0),
        _ => {
            let digits = text.strip_prefix("HTTP/").map(str::as_bytes);
            match digits {
                Some([a, b'.', b]) if a.is_ascii_digit() && b.is_ascii_digit() => Err(HttpError::Version),
                _ => Err(HttpError::Malformed("the first line has no HTTP version")),
            }
        }
    }
}

/// Whether the connection goes on after this message (RFC 9112 section 9.3).
pub(super) fn keeps_alive(headers: &Headers, minor_version: u8) -> bool {
    if headers.has_token("connection", "close") {
        return false;
    }
    minor_version >= 1 || headers.has_token("connection", "keep-alive")
}

/// Decodes `%XX` (RFC 3986 section 2.1). `None` when an escape is cut short or no hex, when the result
/// is not UTF-8, or when it has a NUL.
pub fn percent_decode(text: &str) -> Option<String> {
    decode(text, false)
}

fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let high = char::from(bytes.next()?).to_digit(16)?;
                let low = char::from(bytes.next()?).to_digit(16)?;
                // Two hex digits are at most 255.
                out.push((high * 16 + low) as u8);
            }
            b'+' if plus_is_space => out.push(b' '),
            byte => out.push(byte),
        }
    }
    if out.contains(&0) {
        return None;
    }
    String::from_utf8(out).ok()
}

/// The most pairs that a query may have.
pub const MAX_QUERY_PAIRS: usize = 100;

/// Takes a query apart (`application/x-www-form-urlencoded`). `None` when it is malformed or has over
/// [`MAX_QUERY_PAIRS`] pairs.
pub fn parse_query(query: &str) -> Option<Vec<(String, String)>> {
    let pairs: Vec<&str> = query.split('&').filter(|p| !p.is_empty()).collect();
    if pairs.len() > MAX_QUERY_PAIRS {
        return None;
    }
    pairs
        .into_iter()
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(name, true)?, decode(value, true)?))
        })
        .collect()
}
