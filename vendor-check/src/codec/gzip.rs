//! gzip (RFC 1952), one member, reading; and the CRC-32 that it carries.

use std::fmt;

use super::inflate::{InflateError, inflate};

const HEADER_BYTES: usize = 10;
const TRAILER_BYTES: usize = 8;
/// RFC 1952, 2.3.1: flag bits.
const FLAG_HEADER_CRC: u8 = 2;
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
const FLAG_COMMENT: u8 = 16;
const FLAGS_RESERVED: u8 = 0xe0;

/// Why a gzip file was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GzipError {
    /// Not gzip, a method that is not DEFLATE, or reserved flags.
    Header,
    /// The compressed data.
    Inflate(InflateError),
    /// The checksum or length at the end does not fit the data.
    Checksum,
    /// Bytes after the end: another member, or something hidden.
    Trailing,
}

impl fmt::Display for GzipError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GzipError::Header => f.write_str("not a gzip file that this program accepts"),
            GzipError::Inflate(error) => error.fmt(f),
            GzipError::Checksum => f.write_str("the gzip checksum does not fit"),
            GzipError::Trailing => f.write_str("there is data after the end of the gzip member"),
        }
    }
}

impl std::error::Error for GzipError {}

/// Unpacks a gzip file of exactly one member to at most `limit` bytes.
///
/// # Errors
/// [`GzipError`].
pub fn decompress(input: &[u8], limit: usize) -> Result<Vec<u8>, GzipError> {
    let header = input.get(..HEADER_BYTES).ok_or(GzipError::Header)?;
    let flags = header[3];
    if header[..3] != [0x1f, 0x8b, 8] || flags & FLAGS_RESERVED != 0 {
        return Err(GzipError::Header);
    }
    let mut rest = &input[HEADER_BYTES..];
    if flags & FLAG_EXTRA != 0 {
        let length = rest.get(..2).map(|bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])));
        rest = length.and_then(|length| rest.get(2 + length..)).ok_or(GzipError::Header)?;
    }
    for flag in [FLAG_NAME, FLAG_COMMENT] {
        if flags & flag != 0 {
            let end = rest.iter().position(|&byte| byte == 0).ok_or(GzipError::Header)?;
            rest = &rest[end + 1..];
        }
    }
    if flags & FLAG_HEADER_CRC != 0 {
        rest = rest.get(2..).ok_or(GzipError::Header)?;
    }
    let (output, used) = inflate(rest, limit).map_err(GzipError::Inflate)?;
    let trailer = rest.get(used..used + TRAILER_BYTES).ok_or(GzipError::Inflate(InflateError::Truncated))?;
    let word =
        |at: usize| u32::from_le_bytes([trailer[at], trailer[at + 1], trailer[at + 2], trailer[at + 3]]);
    if word(0) != crc32(&output) || word(4) != output.len() as u32 {
        return Err(GzipError::Checksum);
    }
    if rest.len() != used + TRAILER_BYTES {
        return Err(GzipError::Trailing);
    }
    Ok(output)
}

const fn crc_tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { 0xedb8_8320 ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        tables[0][index] = value;
        index += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut index = 0;
        while index < 256 {
            let before = tables[table - 1][index];
            tables[table][index] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            index += 1;
        }
        table += 1;
    }
    tables
}

/// One table a byte of an eight-byte step ("slicing by 8"): archives are tens of megabytes.
static CRC_TABLES: [[u32; 256]; 8] = crc_tables();

/// CRC-32 as in RFC 1952, 8.
pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    let (chunks, rest) = bytes.as_chunks::<8>();
    for chunk in chunks {
        let low = crc ^ u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        crc = CRC_TABLES[7][(low & 0xff) as usize]
            ^ CRC_TABLES[6][(low >> 8 & 0xff) as usize]
            ^ CRC_TABLES[5][(low >> 16 & 0xff) as usize]
            ^ CRC_TABLES[4][(low >> 24) as usize]
            ^ CRC_TABLES[3][usize::from(chunk[4])]
            ^ CRC_TABLES[2][usize::from(chunk[5])]
            ^ CRC_TABLES[1][usize::from(chunk[6])]
            ^ CRC_TABLES[0][usize::from(chunk[7])];
    }
    for &byte in rest {
        crc = (crc >> 8) ^ CRC_TABLES[0][((crc ^ u32::from(byte)) & 0xff) as usize];
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "hello\n" by gzip -n.
    const HELLO: &[u8] = &[
        0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 0xe7, 0x02, 0, 0x20, 0x30, 0x3a,
        0x36, 6, 0, 0, 0,
    ];

    #[test]
    fn crc_of_the_check_string() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn one_member() {
        assert_eq!(decompress(HELLO, 6), Ok(b"hello\n".to_vec()));
        let mut named = HELLO.to_vec();
        named[3] = FLAG_NAME;
        named.splice(10..10, *b"a\0");
        assert_eq!(decompress(&named, 6), Ok(b"hello\n".to_vec()));
    }

    #[test]
    fn refusals() {
        assert_eq!(decompress(HELLO, 5), Err(GzipError::Inflate(InflateError::TooLarge)));
        assert_eq!(decompress(&HELLO[..20], 6), Err(GzipError::Inflate(InflateError::Truncated)));
        let mut damaged = HELLO.to_vec();
        damaged[18] ^= 1;
        assert_eq!(decompress(&damaged, 6), Err(GzipError::Checksum));
        let twice = [HELLO, HELLO].concat();
        assert_eq!(decompress(&twice, 100), Err(GzipError::Trailing));
        assert_eq!(decompress(b"PK\x03\x04______", 100), Err(GzipError::Header));
    }
}
