//! Every message, defined once: its number, its fields in order, its documentation.
//!
//! A message body is its fields one after another, then a list of extension fields, usually empty:
//! `u16 count`, and for each `u16 tag, bytes value`. That is how a later version adds a field without
//! breaking this one: a tag below 0x8000 that is not known is skipped; one from 0x8000 up must be
//! understood, and is refused otherwise.

use alloc::string::String;
use alloc::vec::Vec;

pub mod capsule;
pub mod capsule_life;
pub mod capsule_net;
pub mod common;
pub mod file;
pub mod guest;
pub mod process;

pub use capsule::*;
pub use capsule_life::*;
pub use capsule_net::*;
pub use common::*;
pub use file::*;
pub use guest::*;
pub use process::*;

use crate::codec::{DecodeError, Field, Reader};

/// The most extension fields that a message may carry.
pub const MAX_EXTENSIONS: u16 = 64;
/// From this tag up an extension field must be understood.
pub const CRITICAL_TAG: u16 = 0x8000;

/// One message of the protocol.
pub trait Message: Sized {
    /// Its number, unique among all messages.
    const KIND: u16;
    /// Its name in `PROTOCOL.md`.
    const NAME: &'static str;
    /// Appends the body: all fields and an empty extension list.
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads a body. Unknown extension fields are skipped unless critical; any other byte after the
    /// last field is an error.
    fn decode(body: &[u8]) -> Result<Self, DecodeError>;
}

/// What `PROTOCOL.md` has to say about a message: its number, name and fields (name, type).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The message's number.
    pub kind: u16,
    /// The message's name.
    pub name: &'static str,
    /// What it is for.
    pub purpose: String,
    /// Its fields in order: name, type, meaning.
    pub fields: Vec<(&'static str, String, String)>,
}

/// Reads and checks the extension list that closes every body.
pub(crate) fn skip_extensions(r: &mut Reader<'_>) -> Result<(), DecodeError> {
    let count = u16::decode(r)?;
    if count > MAX_EXTENSIONS {
        return Err(DecodeError::TooLong("the extension list"));
    }
    for _ in 0..count {
        let tag = u16::decode(r)?;
        let len = u32::decode(r)? as usize;
        r.take(len)?;
        if tag >= CRITICAL_TAG {
            return Err(DecodeError::UnknownCriticalField(tag));
        }
    }
    r.finish()
}

/// Defines messages: struct, number, encoding, decoding and description from one list of fields.
macro_rules! messages {
    ($($(#[doc = $doc:literal])* $name:ident = $kind:literal {
        $($(#[doc = $field_doc:literal])* $field:ident: $ty:ty,)*
    })*) => {
        $(
            $(#[doc = $doc])*
            #[derive(Debug, Clone, PartialEq, Eq, Default)]
            pub struct $name {
                $($(#[doc = $field_doc])* pub $field: $ty,)*
            }

            impl $crate::message::Message for $name {
                const KIND: u16 = $kind;
                const NAME: &'static str = stringify!($name);
                fn encode(&self, out: &mut alloc::vec::Vec<u8>) {
                    $($crate::codec::Field::encode(&self.$field, out);)*
                    $crate::codec::Field::encode(&0u16, out);
                }
                fn decode(body: &[u8]) -> Result<Self, $crate::codec::DecodeError> {
                    let mut r = $crate::codec::Reader::new(body);
                    let message = $name {
                        $($field: <$ty as $crate::codec::Field>::decode(&mut r)?,)*
                    };
                    $crate::message::skip_extensions(&mut r)?;
                    Ok(message)
                }
            }
        )*

        /// Every message of this file, for the documentation and vector checks.
        pub(crate) fn descriptions() -> alloc::vec::Vec<$crate::message::Description> {
            alloc::vec![$($crate::message::Description {
                kind: $kind,
                name: stringify!($name),
                purpose: $crate::message::one_line(&[$($doc),*]),
                fields: alloc::vec![$((
                    stringify!($field),
                    <$ty as $crate::codec::Field>::type_name(),
                    $crate::message::one_line(&[$($field_doc),*]),
                ),)*],
            },)*]
        }

        /// Decodes a body of one of this file's kinds and encodes it again, with its debug form.
        /// `None` when the kind is not of this file.
        pub(crate) fn recode(kind: u16, body: &[u8]) -> Option<Result<(alloc::string::String, alloc::vec::Vec<u8>), $crate::codec::DecodeError>> {
            match kind {
                $($kind => Some(<$name as $crate::message::Message>::decode(body).map(|m| {
                    let mut out = alloc::vec::Vec::new();
                    $crate::message::Message::encode(&m, &mut out);
                    (alloc::format!("{m:?}"), out)
                })),)*
                _ => None,
            }
        }
    };
}
pub(crate) use messages;

/// A doc comment's lines as one.
pub(crate) fn one_line(lines: &[&str]) -> String {
    lines.iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ")
}

/// All messages, ordered by number.
pub fn descriptions() -> Vec<Description> {
    let mut all = Vec::new();
    all.extend(common::descriptions());
    all.extend(capsule::descriptions());
    all.extend(capsule_life::descriptions());
    all.extend(capsule_net::descriptions());
    all.extend(process::descriptions());
    all.extend(file::descriptions());
    all.extend(guest::descriptions());
    all.sort_by_key(|d| d.kind);
    all
}

/// Decodes a body of any known kind and encodes it again: the debug form and the bytes. `None` when no
/// message has the number. For vectors, fuzzing and traces.
pub fn recode(kind: u16, body: &[u8]) -> Option<Result<(String, Vec<u8>), DecodeError>> {
    common::recode(kind, body)
        .or_else(|| capsule::recode(kind, body))
        .or_else(|| capsule_life::recode(kind, body))
        .or_else(|| capsule_net::recode(kind, body))
        .or_else(|| process::recode(kind, body))
        .or_else(|| file::recode(kind, body))
        .or_else(|| guest::recode(kind, body))
}

/// Decodes `body` as `M` when `kind` is `M`'s.
pub fn expect<M: Message>(kind: u16, body: &[u8]) -> Result<M, DecodeError> {
    if kind == M::KIND { M::decode(body) } else { Err(DecodeError::WrongKind(kind)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique() {
        let all = descriptions();
        for pair in all.windows(2) {
            assert_ne!(pair[0].kind, pair[1].kind, "{} and {}", pair[0].name, pair[1].name);
        }
        let mut names: Vec<_> = all.iter().map(|d| d.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn unknown_extensions_are_skipped_and_critical_ones_refused() {
        let mut body = Vec::new();
        Done {}.encode(&mut body);
        assert_eq!(body, [0, 0]);
        assert_eq!(Done::decode(&[0, 1, 0, 9, 0, 0, 0, 1, 0xaa]), Ok(Done {}));
        assert_eq!(
            Done::decode(&[0, 1, 0x80, 9, 0, 0, 0, 0]),
            Err(DecodeError::UnknownCriticalField(0x8009))
        );
        assert_eq!(Done::decode(&[0, 0, 0]), Err(DecodeError::TrailingBytes));
        assert_eq!(Done::decode(&[0]), Err(DecodeError::UnexpectedEnd));
    }
}
