//! zlib (RFC 1950): reading any stream, writing stored blocks only.

use super::inflate::{InflateError, inflate};

const STORED_BLOCK_MAX: usize = 0xffff;
/// Adler-32's modulus (RFC 1950, 8.2) and how many bytes can be summed before it must be applied.
const ADLER_MODULUS: u32 = 65521;
const ADLER_RUN: usize = 5552;

/// Adler-32 of `bytes`.
pub fn adler32(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    for run in bytes.chunks(ADLER_RUN) {
        for &byte in run {
            a += u32::from(byte);
            b += a;
        }
        a %= ADLER_MODULUS;
        b %= ADLER_MODULUS;
    }
    b << 16 | a
}

/// Wraps `bytes` without making them smaller.
pub fn compress_stored(bytes: &[u8]) -> Vec<u8> {
    // Method 8 with a 32 KiB window; the second byte makes the pair a multiple of 31.
    let mut output = vec![0x78, 0x01];
    let blocks = bytes.len().div_ceil(STORED_BLOCK_MAX).max(1);
    for index in 0..blocks {
        let start = index * STORED_BLOCK_MAX;
        let block = &bytes[start..bytes.len().min(start + STORED_BLOCK_MAX)];
        let length = block.len() as u16;
        output.push(u8::from(index + 1 == blocks));
        output.extend(length.to_le_bytes());
        output.extend((!length).to_le_bytes());
        output.extend(block);
    }
    output.extend(adler32(bytes).to_be_bytes());
    output
}

/// Unpacks one zlib stream to at most `limit` bytes. Zero bytes may follow it: linkers pad sections.
///
/// # Errors
/// [`InflateError`], also for a header or checksum that does not fit.
pub fn decompress(input: &[u8], limit: usize) -> Result<Vec<u8>, InflateError> {
    let header = input.get(..2).ok_or(InflateError::Truncated)?;
    let dictionary = header[1] & 0x20 != 0;
    if header[0] & 15 != 8 || dictionary || !u16::from_be_bytes([header[0], header[1]]).is_multiple_of(31) {
        return Err(InflateError::Invalid("zlib header"));
    }
    let (output, used) = inflate(&input[2..], limit)?;
    let trailer = input.get(2 + used..6 + used).ok_or(InflateError::Truncated)?;
    if trailer != adler32(&output).to_be_bytes() {
        return Err(InflateError::Invalid("Adler-32"));
    }
    if input[6 + used..].iter().any(|&byte| byte != 0) {
        return Err(InflateError::Invalid("data after the end"));
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_over_block_borders() {
        for length in [0, 1, STORED_BLOCK_MAX, STORED_BLOCK_MAX + 1, 200_000] {
            let plain: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            assert_eq!(decompress(&compress_stored(&plain), plain.len()), Ok(plain));
        }
    }

    #[test]
    fn foreign_stream_and_damage() {
        // Python: zlib.compress(b"hello").
        let foreign = [0x78, 0x9c, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0, 0x06, 0x2c, 0x02, 0x15];
        assert_eq!(decompress(&foreign, 5), Ok(b"hello".to_vec()));
        let mut damaged = foreign;
        damaged[12] ^= 1;
        assert_eq!(decompress(&damaged, 5), Err(InflateError::Invalid("Adler-32")));
        assert_eq!(decompress(&foreign, 4), Err(InflateError::TooLarge));
    }
}
