//! tar, reading: the subset that Cargo and its ancestors wrote into `.crate` archives (ustar, GNU
//! long names, pax paths). Only regular files come out; links and devices are refused by name.

use std::fmt;

const BLOCK: usize = 512;
/// More entries than any crate has (the largest of the tree have a few hundred).
const MAX_ENTRIES: usize = 50_000;
/// The longest path accepted, far over any that a file system takes.
const MAX_PATH: usize = 4096;

/// A regular file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The path as the archive has it.
    pub path: String,
    /// The content.
    pub data: &'a [u8],
}

/// Why an archive was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarError {
    /// The archive ends within an entry, or without its end marker.
    Truncated,
    /// A header whose checksum does not fit.
    Checksum,
    /// A number, name or extension that is not of the accepted form.
    Malformed(&'static str),
    /// A symbolic or hard link.
    Link(String),
    /// A device, pipe or an entry type that no crate needs.
    Special(String, u8),
    /// More entries than [`MAX_ENTRIES`].
    TooMany,
}

impl fmt::Display for TarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TarError::Truncated => f.write_str("the tar archive ends early"),
            TarError::Checksum => f.write_str("a tar header has a wrong checksum"),
            TarError::Malformed(what) => write!(f, "the tar archive is damaged ({what})"),
            TarError::Link(path) => write!(f, "the archive has a link at {path}"),
            TarError::Special(path, kind) => {
                write!(f, "the archive has an entry of type {:?} at {path}", char::from(*kind))
            }
            TarError::TooMany => write!(f, "the archive has more than {MAX_ENTRIES} entries"),
        }
    }
}

impl std::error::Error for TarError {}

fn octal(field: &[u8]) -> Result<u64, TarError> {
    let text = field.trim_ascii_start();
    let end = text.iter().position(|&byte| byte == 0 || byte == b' ').unwrap_or(text.len());
    if text[end..].iter().any(|&byte| byte != 0 && byte != b' ') {
        return Err(TarError::Malformed("number"));
    }
    text[..end].iter().try_fold(0u64, |value, &byte| match byte {
        b'0'..=b'7' if value < 1 << 50 => Ok(value << 3 | u64::from(byte - b'0')),
        _ => Err(TarError::Malformed("number")),
    })
}

fn text(field: &[u8]) -> Result<&str, TarError> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).map_err(|_| TarError::Malformed("name is not UTF-8"))
}

fn check_header(header: &[u8]) -> Result<(), TarError> {
    let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    let field: u64 = header[148..156].iter().map(|&byte| u64::from(byte)).sum();
    // The checksum is taken with its own field full of spaces.
    if sum - field + 8 * u64::from(b' ') != octal(&header[148..156])? {
        return Err(TarError::Checksum);
    }
    Ok(())
}

fn header_path(header: &[u8]) -> Result<String, TarError> {
    let name = text(&header[..100])?;
    let prefix =
        if &header[257..262] == b"ustar" && header[262] == 0 { text(&header[345..500])? } else { "" };
    Ok(if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") })
}

/// The `path` of a pax extended header: records of "length key=value\n".
fn pax_path(mut data: &[u8]) -> Result<Option<String>, TarError> {
    const BAD: TarError = TarError::Malformed("pax record");
    let mut path = None;
    while !data.is_empty() {
        let space = data.iter().position(|&byte| byte == b' ').ok_or(BAD)?;
        let length = std::str::from_utf8(&data[..space]).ok().and_then(|text| text.parse::<usize>().ok());
        let record = length.and_then(|length| data.get(space + 1..length)).ok_or(BAD)?;
        let record =
            record.strip_suffix(b"\n").and_then(|record| std::str::from_utf8(record).ok()).ok_or(BAD)?;
        match record.split_once('=').ok_or(BAD)? {
            ("path", value) => path = Some(value.to_owned()),
            // Times and owners do not reach the compiler; a link or size would change what we read.
            ("mtime" | "atime" | "ctime" | "uid" | "gid" | "uname" | "gname" | "comment", _) => {}
            _ => return Err(TarError::Malformed("pax key")),
        }
        data = &data[space + 2 + record.len()..];
    }
    Ok(path)
}

/// The regular files of an archive, in its order.
///
/// # Errors
/// [`TarError`].
pub fn entries(archive: &[u8]) -> Result<Vec<Entry<'_>>, TarError> {
    let mut files = Vec::new();
    let mut long_path: Option<String> = None;
    let mut rest = archive;
    for _ in 0..MAX_ENTRIES {
        let header = rest.get(..BLOCK).ok_or(TarError::Truncated)?;
        if header.iter().all(|&byte| byte == 0) {
            if rest.iter().any(|&byte| byte != 0) {
                return Err(TarError::Malformed("data after the end"));
            }
            return if long_path.is_none() {
                Ok(files)
            } else {
                Err(TarError::Malformed("long name of nothing"))
            };
        }
        check_header(header)?;
        let size = usize::try_from(octal(&header[124..136])?).map_err(|_| TarError::Malformed("size"))?;
        let data = rest.get(BLOCK..BLOCK + size).ok_or(TarError::Truncated)?;
        rest = rest.get(BLOCK + size.next_multiple_of(BLOCK)..).ok_or(TarError::Truncated)?;
        match header[156] {
            kind @ (b'L' | b'x') => {
                if long_path.is_some() {
                    return Err(TarError::Malformed("two long names"));
                }
                long_path = if kind == b'L' { Some(text(data)?.to_owned()) } else { pax_path(data)? };
                continue;
            }
            kind => {
                let path = match long_path.take() {
                    Some(path) => path,
                    None => header_path(header)?,
                };
                if path.is_empty() || path.len() > MAX_PATH {
                    return Err(TarError::Malformed("path length"));
                }
                match kind {
                    b'0' | 0 => files.push(Entry { path, data }),
                    b'1' | b'2' => return Err(TarError::Link(path)),
                    b'5' if size == 0 => {}
                    kind => return Err(TarError::Special(path, kind)),
                }
            }
        }
    }
    Err(TarError::TooMany)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(path: &str, size: usize, kind: u8) -> Vec<u8> {
        let mut block = vec![0u8; BLOCK];
        block[..path.len()].copy_from_slice(path.as_bytes());
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = kind;
        block[257..263].copy_from_slice(b"ustar\0");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn entry(path: &str, data: &[u8], kind: u8) -> Vec<u8> {
        let mut bytes = header(path, data.len(), kind);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

    #[test]
    fn files_long_names_and_pax_paths() {
        let archive = [
            entry("a/b", b"one", b'0'),
            entry("a", b"", b'5'),
            entry("././@LongLink", b"a/very/long\0", b'L'),
            entry("a/very", b"two", b'0'),
            entry("pax", b"14 path=a/pax\n", b'x'),
            entry("short", b"three", b'0'),
            END.to_vec(),
        ]
        .concat();
        let files = entries(&archive).unwrap_or_default();
        let files: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.data)).collect();
        assert_eq!(files, [("a/b", &b"one"[..]), ("a/very/long", b"two"), ("a/pax", b"three")]);
    }

    #[test]
    fn refusals() {
        let of = |parts: &[Vec<u8>]| entries(&parts.concat()).map(|files| files.len());
        let end = || END.to_vec();
        assert_eq!(of(&[entry("l", b"", b'2'), end()]), Err(TarError::Link("l".into())));
        assert_eq!(of(&[entry("l", b"", b'1'), end()]), Err(TarError::Link("l".into())));
        assert_eq!(of(&[entry("p", b"", b'6'), end()]), Err(TarError::Special("p".into(), b'6')));
        assert_eq!(of(&[entry("g", b"", b'g'), end()]), Err(TarError::Special("g".into(), b'g')));
        assert_eq!(of(&[entry("f", b"x", b'0')]), Err(TarError::Truncated));
        assert_eq!(of(&[header("f", 4096, b'0'), end()]), Err(TarError::Truncated));
        let mut wrong = entry("f", b"x", b'0');
        wrong[0] ^= 1;
        assert_eq!(of(&[wrong, end()]), Err(TarError::Checksum));
        assert_eq!(of(&[end(), entry("f", b"x", b'0')]), Err(TarError::Malformed("data after the end")));
        assert_eq!(
            of(&[entry("x", b"11 size=99\n", b'x'), entry("f", b"x", b'0'), end()]),
            Err(TarError::Malformed("pax key"))
        );
    }
}
