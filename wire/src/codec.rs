//! Primitive encodings: how numbers, text, lists and options lie on the wire.
//!
//! Everything is big-endian. A length is a `u32` and is checked against the bytes that are really
//! there before anything is allocated for it. See `PROTOCOL.md`, section "Primitive encodings".

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// Why bytes did not decode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecodeError {
    /// The input ended inside a field.
    UnexpectedEnd,
    /// Bytes were left after the last field.
    TrailingBytes,
    /// A text field is not UTF-8.
    NotUtf8,
    /// A bool or option marker is neither 0 nor 1.
    BadMarker(u8),
    /// An enumerated field has a value that this version does not define.
    BadValue(&'static str),
    /// A list or text is longer than its field allows.
    TooLong(&'static str),
    /// An extension field that must be understood is not known here.
    UnknownCriticalField(u16),
    /// The message kind is not the one that was asked for.
    WrongKind(u16),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DecodeError::UnexpectedEnd => f.write_str("the message ends inside a field"),
            DecodeError::TrailingBytes => f.write_str("the message has bytes after its last field"),
            DecodeError::NotUtf8 => f.write_str("a text field is not UTF-8"),
            DecodeError::BadMarker(v) => write!(f, "a bool or option marker is {v}, not 0 or 1"),
            DecodeError::BadValue(what) => write!(f, "{what} has a value that is not defined"),
            DecodeError::TooLong(what) => write!(f, "{what} is longer than allowed"),
            DecodeError::UnknownCriticalField(tag) => {
                write!(f, "the critical extension field {tag:#06x} is not known here")
            }
            DecodeError::WrongKind(kind) => write!(f, "unexpected message kind {kind:#06x}"),
        }
    }
}

impl core::error::Error for DecodeError {}

/// A cursor over bytes that came from outside. Reading past the end is an error, never a panic.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        if n > self.rest.len() {
            return Err(DecodeError::UnexpectedEnd);
        }
        let (head, tail) = self.rest.split_at(n);
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    /// Everything that is left.
    pub fn take_rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.rest)
    }

    /// Succeeds when nothing is left.
    pub fn finish(&self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::TrailingBytes) }
    }
}

/// A value with an encoding. `decode(encode(x)) == x`, and nothing else decodes to `x`.
pub trait Field: Sized {
    /// The type's name in `PROTOCOL.md`.
    const TYPE: &'static str;
    /// The fewest bytes that an encoded value takes, for checking list lengths before allocating.
    const MIN_SIZE: usize;
    /// Appends the encoding.
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads one value.
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError>;
    /// The type's name in `PROTOCOL.md`, with that of its parts.
    fn type_name() -> String {
        Self::TYPE.to_string()
    }
}

macro_rules! integer {
    ($($t:ty),*) => {$(
        impl Field for $t {
            const TYPE: &'static str = stringify!($t);
            const MIN_SIZE: usize = size_of::<$t>();
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }
            fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(<$t>::from_be_bytes(r.array()?))
            }
        }
    )*};
}
integer!(u8, u16, u32, u64, i32, i64);

impl Field for bool {
    const TYPE: &'static str = "bool";
    const MIN_SIZE: usize = 1;
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::decode(r)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DecodeError::BadMarker(other)),
        }
    }
}

fn put_length(len: usize, out: &mut Vec<u8>) {
    // A message is bounded far below this by the frame limit; the session refuses longer ones.
    u32::try_from(len).unwrap_or(u32::MAX).encode(out);
}

fn take_counted<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], DecodeError> {
    let len = u32::decode(r)? as usize;
    r.take(len)
}

impl Field for String {
    const TYPE: &'static str = "text";
    const MIN_SIZE: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        out.extend_from_slice(self.as_bytes());
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match core::str::from_utf8(take_counted(r)?) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(DecodeError::NotUtf8),
        }
    }
}

/// Bytes that need not be UTF-8: file names, arguments, environment values.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// The bytes as text for a person, with U+FFFD where they are not UTF-8.
    pub fn lossy(&self) -> alloc::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl core::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Self {
        Bytes(text.as_bytes().to_vec())
    }
}

impl From<String> for Bytes {
    fn from(text: String) -> Self {
        Bytes(text.into_bytes())
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Bytes(bytes.to_vec())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes(bytes)
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

impl Field for Bytes {
    const TYPE: &'static str = "bytes";
    const MIN_SIZE: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        out.extend_from_slice(self);
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Bytes(take_counted(r)?.to_vec()))
    }
}

impl<T: Field> Field for Vec<T> {
    const TYPE: &'static str = "list";
    const MIN_SIZE: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        for item in self {
            item.encode(out);
        }
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = u32::decode(r)? as usize;
        // Every item takes at least MIN_SIZE bytes, so a count that the input cannot hold is refused
        // before memory is reserved for it.
        if count > r.remaining() / T::MIN_SIZE.max(1) {
            return Err(DecodeError::UnexpectedEnd);
        }
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(T::decode(r)?);
        }
        Ok(items)
    }
    fn type_name() -> String {
        format!("list<{}>", T::type_name())
    }
}

impl<T: Field> Field for Option<T> {
    const TYPE: &'static str = "option";
    const MIN_SIZE: usize = 1;
    fn encode(&self, out: &mut Vec<u8>) {
        self.is_some().encode(out);
        if let Some(value) = self {
            value.encode(out);
        }
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        if bool::decode(r)? { Ok(Some(T::decode(r)?)) } else { Ok(None) }
    }
    fn type_name() -> String {
        format!("option<{}>", T::type_name())
    }
}

/// A name and its value: one environment variable, one label.
impl<A: Field, B: Field> Field for (A, B) {
    const TYPE: &'static str = "pair";
    const MIN_SIZE: usize = A::MIN_SIZE + B::MIN_SIZE;
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
        self.1.encode(out);
    }
    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok((A::decode(r)?, B::decode(r)?))
    }
    fn type_name() -> String {
        format!("pair<{}, {}>", A::type_name(), B::type_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<T: Field>(value: &T) -> Vec<u8> {
        let mut out = Vec::new();
        value.encode(&mut out);
        out
    }

    #[test]
    fn primitives_have_the_documented_bytes() {
        assert_eq!(bytes(&0x0102_0304u32), [1, 2, 3, 4]);
        assert_eq!(bytes(&-2i32), [0xff, 0xff, 0xff, 0xfe]);
        assert_eq!(bytes(&"hé".to_string()), [0, 0, 0, 3, b'h', 0xc3, 0xa9]);
        assert_eq!(bytes(&Some(7u8)), [1, 7]);
        assert_eq!(bytes(&None::<u8>), [0]);
        assert_eq!(bytes(&vec![(Bytes::from("A"), 9u8)]), [0, 0, 0, 1, 0, 0, 0, 1, b'A', 9]);
    }

    #[test]
    fn a_count_beyond_the_input_is_refused_before_allocating() {
        let mut r = Reader::new(&[0xff, 0xff, 0xff, 0xff, 0, 0]);
        assert_eq!(Vec::<u64>::decode(&mut r), Err(DecodeError::UnexpectedEnd));
        let mut r = Reader::new(&[0x7f, 0xff, 0xff, 0xff, b'x']);
        assert_eq!(String::decode(&mut r), Err(DecodeError::UnexpectedEnd));
    }

    #[test]
    fn wrong_markers_and_text_are_refused() {
        assert_eq!(bool::decode(&mut Reader::new(&[2])), Err(DecodeError::BadMarker(2)));
        assert_eq!(String::decode(&mut Reader::new(&[0, 0, 0, 1, 0xff])), Err(DecodeError::NotUtf8));
        assert_eq!(Option::<u8>::decode(&mut Reader::new(&[1])), Err(DecodeError::UnexpectedEnd));
    }
}
