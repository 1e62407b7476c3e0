//! The kernel's random numbers.

use wire::reactor::sys::random;

/// `N` random bytes.
///
/// # Panics
/// When the kernel has no random numbers: a program that goes on without them gives its secrets away.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut buffer = [0; N];
    if let Err(error) = random::fill(&mut buffer) {
        panic!("getrandom(2): {error}; the kernel gives no random numbers, which everything here needs");
    }
    buffer
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_differ_and_hex_is_lower_case() {
        assert_ne!(bytes::<16>(), bytes::<16>());
        assert_eq!(hex(&[0x00, 0x9f, 0xa0, 0xff]), "009fa0ff");
    }
}
