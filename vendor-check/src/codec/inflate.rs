//! DEFLATE (RFC 1951), decoding only, with a bound on the output.

use std::fmt;

/// The longest code of any alphabet (RFC 1951, 3.2.7).
const MAX_CODE_BITS: usize = 15;
/// Codes up to this length are found with one table look-up.
const FAST_BITS: usize = 10;
const LITERALS: usize = 288;
const DISTANCES: usize = 30;

/// RFC 1951, 3.2.5: base length and extra bits of the symbols 257 to 285.
const LENGTH_BASE: [u16; 29] = [
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
    227, 258,
];
const LENGTH_EXTRA: [u8; 29] =
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
/// RFC 1951, 3.2.5: base distance and extra bits.
const DISTANCE_BASE: [u16; DISTANCES] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073,
    4097, 6145, 8193, 12289, 16385, 24577,
];
const DISTANCE_EXTRA: [u8; DISTANCES] =
    [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
/// RFC 1951, 3.2.7: the order in which the lengths of the code length codes come.
const CODE_LENGTH_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// Why compressed data was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InflateError {
    /// The data ends within a block.
    Truncated,
    /// A block type, length or symbol that RFC 1951 does not have.
    Invalid(&'static str),
    /// More output than the caller allows.
    TooLarge,
}

impl fmt::Display for InflateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InflateError::Truncated => f.write_str("the compressed data ends early"),
            InflateError::Invalid(what) => write!(f, "the compressed data is damaged ({what})"),
            InflateError::TooLarge => f.write_str("the data unpacks to more than the limit"),
        }
    }
}

impl std::error::Error for InflateError {}

struct Bits<'a> {
    input: &'a [u8],
    position: usize,
    buffer: u64,
    count: u32,
}

impl Bits<'_> {
    fn refill(&mut self) {
        while self.count <= 56 {
            let Some(&byte) = self.input.get(self.position) else { return };
            self.buffer |= u64::from(byte) << self.count;
            self.position += 1;
            self.count += 8;
        }
    }

    fn take(&mut self, bits: u32) -> Result<u32, InflateError> {
        if self.count < bits {
            self.refill();
            if self.count < bits {
                return Err(InflateError::Truncated);
            }
        }
        let value = (self.buffer & ((1u64 << bits) - 1)) as u32;
        self.buffer >>= bits;
        self.count -= bits;
        Ok(value)
    }

    /// Drops the rest of the current byte and hands whole bytes back to the input.
    fn align(&mut self) {
        self.position -= (self.count / 8) as usize;
        self.buffer = 0;
        self.count = 0;
    }
}

/// A canonical Huffman code: how many codes of each length, and their symbols in order.
struct Huffman {
    counts: [u16; MAX_CODE_BITS + 1],
    symbols: Vec<u16>,
    /// Indexed by the next `FAST_BITS` bits: symbol << 4 | length, or 0 for a longer code.
    fast: Vec<u16>,
}

impl Huffman {
    /// Builds a code. An incomplete one is accepted only with a single code (RFC 1951, 3.2.7).
    fn new(lengths: &[u8]) -> Result<Self, InflateError> {
        let mut counts = [0u16; MAX_CODE_BITS + 1];
        for &length in lengths {
            counts[usize::from(length)] += 1;
        }
        counts[0] = 0;
        let mut left = 1i32;
        for &count in &counts[1..] {
            left = (left << 1) - i32::from(count);
            if left < 0 {
                return Err(InflateError::Invalid("over-subscribed code"));
            }
        }
        let used: u16 = counts.iter().sum();
        if left > 0 && used > 1 {
            return Err(InflateError::Invalid("incomplete code"));
        }
        let mut offsets = [0u16; MAX_CODE_BITS + 2];
        let mut next_code = [0u16; MAX_CODE_BITS + 2];
        for bits in 1..=MAX_CODE_BITS {
            offsets[bits + 1] = offsets[bits] + counts[bits];
            next_code[bits + 1] = (next_code[bits] + counts[bits]) << 1;
        }
        let mut symbols = vec![0u16; usize::from(used)];
        let mut fast = vec![0u16; 1 << FAST_BITS];
        for (symbol, &length) in lengths.iter().enumerate() {
            let bits = usize::from(length);
            if bits == 0 {
                continue;
            }
            symbols[usize::from(offsets[bits])] = symbol as u16;
            offsets[bits] += 1;
            let code = next_code[bits];
            next_code[bits] += 1;
            if bits <= FAST_BITS {
                let reversed = usize::from(code.reverse_bits() >> (16 - bits));
                for slot in fast[reversed..].iter_mut().step_by(1 << bits) {
                    *slot = (symbol as u16) << 4 | bits as u16;
                }
            }
        }
        Ok(Self { counts, symbols, fast })
    }

    fn decode(&self, bits: &mut Bits<'_>) -> Result<usize, InflateError> {
        if bits.count < MAX_CODE_BITS as u32 {
            bits.refill();
        }
        let entry = self.fast[(bits.buffer & ((1 << FAST_BITS) - 1)) as usize];
        let length = u32::from(entry & 15);
        if length != 0 {
            if length > bits.count {
                return Err(InflateError::Truncated);
            }
            bits.buffer >>= length;
            bits.count -= length;
            return Ok(usize::from(entry >> 4));
        }
        let (mut code, mut first, mut index) = (0i32, 0i32, 0i32);
        for length in 1..=MAX_CODE_BITS {
            code |= bits.take(1)? as i32;
            let count = i32::from(self.counts[length]);
            if code - count < first {
                return Ok(usize::from(self.symbols[(index + code - first) as usize]));
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        Err(InflateError::Invalid("unused code"))
    }
}

fn fixed_codes() -> Result<(Huffman, Huffman), InflateError> {
    let mut lengths = [8u8; LITERALS];
    lengths[144..256].fill(9);
    lengths[256..280].fill(7);
    // All 32 five-bit codes exist, though two of them never stand for a distance.
    Ok((Huffman::new(&lengths)?, Huffman::new(&[5u8; 32])?))
}

fn dynamic_codes(bits: &mut Bits<'_>) -> Result<(Huffman, Huffman), InflateError> {
    let literals = bits.take(5)? as usize + 257;
    let distances = bits.take(5)? as usize + 1;
    let code_lengths = bits.take(4)? as usize + 4;
    if literals > 286 || distances > DISTANCES {
        return Err(InflateError::Invalid("too many codes"));
    }
    let mut lengths = [0u8; 320];
    for &index in &CODE_LENGTH_ORDER[..code_lengths] {
        lengths[index] = bits.take(3)? as u8;
    }
    let code = Huffman::new(&lengths[..19])?;
    lengths.fill(0);
    let mut index = 0;
    while index < literals + distances {
        let symbol = code.decode(bits)?;
        let (value, repeat) = match symbol {
            0..=15 => (symbol as u8, 1),
            16 if index == 0 => return Err(InflateError::Invalid("repeat without a length")),
            16 => (lengths[index - 1], 3 + bits.take(2)? as usize),
            17 => (0, 3 + bits.take(3)? as usize),
            _ => (0, 11 + bits.take(7)? as usize),
        };
        if index + repeat > literals + distances {
            return Err(InflateError::Invalid("too many lengths"));
        }
        lengths[index..index + repeat].fill(value);
        index += repeat;
    }
    if lengths[256] == 0 {
        return Err(InflateError::Invalid("no end of block"));
    }
    Ok((Huffman::new(&lengths[..literals])?, Huffman::new(&lengths[literals..literals + distances])?))
}

/// Unpacks one DEFLATE stream at the start of `input` to at most `limit` bytes, and says how many
/// bytes of `input` it took.
///
/// # Errors
/// [`InflateError`] for data that is truncated, damaged or too large.
pub fn inflate(input: &[u8], limit: usize) -> Result<(Vec<u8>, usize), InflateError> {
    let mut bits = Bits { input, position: 0, buffer: 0, count: 0 };
    let mut output = Vec::new();
    loop {
        let last = bits.take(1)? == 1;
        match bits.take(2)? {
            0 => stored(&mut bits, &mut output, limit)?,
            1 => {
                let (literals, distances) = fixed_codes()?;
                block(&mut bits, &literals, &distances, &mut output, limit)?;
            }
            2 => {
                let (literals, distances) = dynamic_codes(&mut bits)?;
                block(&mut bits, &literals, &distances, &mut output, limit)?;
            }
            _ => return Err(InflateError::Invalid("block type")),
        }
        if last {
            bits.align();
            return Ok((output, bits.position));
        }
    }
}

fn stored(bits: &mut Bits<'_>, output: &mut Vec<u8>, limit: usize) -> Result<(), InflateError> {
    bits.align();
    let header = bits.input.get(bits.position..bits.position + 4).ok_or(InflateError::Truncated)?;
    let length = u16::from_le_bytes([header[0], header[1]]);
    if length != !u16::from_le_bytes([header[2], header[3]]) {
        return Err(InflateError::Invalid("stored length"));
    }
    let start = bits.position + 4;
    let data = bits.input.get(start..start + usize::from(length)).ok_or(InflateError::Truncated)?;
    if output.len() + data.len() > limit {
        return Err(InflateError::TooLarge);
    }
    output.extend_from_slice(data);
    bits.position = start + data.len();
    Ok(())
}

fn block(
    bits: &mut Bits<'_>,
    literals: &Huffman,
    distances: &Huffman,
    output: &mut Vec<u8>,
    limit: usize,
) -> Result<(), InflateError> {
    loop {
        let symbol = literals.decode(bits)?;
        if symbol < 256 {
            if output.len() == limit {
                return Err(InflateError::TooLarge);
            }
            output.push(symbol as u8);
            continue;
        }
        if symbol == 256 {
            return Ok(());
        }
        let index = symbol - 257;
        let base = *LENGTH_BASE.get(index).ok_or(InflateError::Invalid("length symbol"))?;
        let length = usize::from(base) + bits.take(u32::from(LENGTH_EXTRA[index]))? as usize;
        let index = distances.decode(bits)?;
        let base = *DISTANCE_BASE.get(index).ok_or(InflateError::Invalid("distance symbol"))?;
        let distance = usize::from(base) + bits.take(u32::from(DISTANCE_EXTRA[index]))? as usize;
        if distance > output.len() {
            return Err(InflateError::Invalid("distance before the start"));
        }
        if output.len() + length > limit {
            return Err(InflateError::TooLarge);
        }
        let start = output.len() - distance;
        if distance >= length {
            output.extend_from_within(start..start + length);
        } else {
            for offset in 0..length {
                output.push(output[start + offset]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_and_fixed_blocks() {
        assert_eq!(inflate(&[1, 3, 0, 0xfc, 0xff, b'a', b'b', b'c', 9], 3), Ok((b"abc".to_vec(), 8)));
        // Fixed codes with an overlapping match: what zlib gives for 20 times 'a'.
        assert_eq!(inflate(&[0x4b, 0x4c, 0xc4, 0x04, 0x00], 20), Ok((vec![b'a'; 20], 5)));
    }

    #[test]
    fn dynamic_block() {
        // What zlib gives at level 9 for the bytes made below.
        let packed = "edcedb924330000050367271d964111b242e436b625a849ad2d6ff7f577f611ff7a1e70b8e657f0107224c5ccf\
             0fbe29fb09a39827bf22cd72a98ab2b23efe0e2bb0de3d2d92fa7152cda658585b57bdd0f532632d65efdec63d\
             dac605eb2ced9c411b776cbb3df7dc64925ccec2a7e571edd770371b35a7f39a80c36b7c40a4354d76e121d631\
             e8aa63189e293c7009b7171baba2c79336e452370b075670668436647f04bde0e5bd16ca708493b9cadb579b95\
             26864e3864b15a3216b5e836db127ddaffbcfd06";
        let packed: Vec<u8> = (0..packed.len() / 2)
            .map(|index| u8::from_str_radix(&packed[index * 2..index * 2 + 2], 16).unwrap_or(0))
            .collect();
        let mut plain: Vec<u8> = (0..32).collect();
        plain.extend([0; 300]);
        plain.extend((0..600u32).map(|i| ((i * i * 7 + i / 3) % 61) as u8));
        assert_eq!(inflate(&packed, plain.len()), Ok((plain.clone(), packed.len())));
        for cut in 0..packed.len() {
            assert!(inflate(&packed[..cut], plain.len()).is_err());
        }
    }

    #[test]
    fn bounds_and_damage() {
        assert_eq!(inflate(&[0x4b, 0x4c, 0xc4, 0x04, 0x00], 19), Err(InflateError::TooLarge));
        assert_eq!(inflate(&[1, 3, 0, 0xfc, 0xff, b'a', b'b', b'c'], 2), Err(InflateError::TooLarge));
        assert_eq!(inflate(&[], 1), Err(InflateError::Truncated));
        assert_eq!(inflate(&[0x4b, 0x4c], 20), Err(InflateError::Truncated));
        assert_eq!(inflate(&[7], 20), Err(InflateError::Invalid("block type")));
        assert_eq!(inflate(&[1, 3, 0, 0, 0, 1, 1, 1], 20), Err(InflateError::Invalid("stored length")));
        // A match at the very start has nothing to copy.
        assert_eq!(inflate(&[0x03, 0x02, 0x00], 20), Err(InflateError::Invalid("distance before the start")));
    }

    #[test]
    fn no_input_of_two_bytes_panics() {
        for first in 0..=255u8 {
            for second in 0..=255u8 {
                let _ = inflate(&[first, second, 0x55, 0xaa, 0x0f, 0xf0, 0x33], 4096);
            }
        }
    }
}
