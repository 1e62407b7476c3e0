//! The kernel's random numbers.

use std::io;

/// Fills `buffer`, at most 256 bytes, from `getrandom(2)`.
///
/// The kernel never gives fewer than asked for below that size once its pool is seeded, and waits for
/// the pool at boot; so this fails only on kernels older than 3.17, and nothing can be done without
/// random numbers.
///
/// # Errors
/// The errno of `getrandom(2)`.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    assert!(buffer.len() <= 256, "getrandom(2) may give less than asked for above 256 bytes");
    loop {
        // SAFETY: the pointer and the length are those of one exclusively borrowed slice.
        let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if usize::try_from(got) == Ok(buffer.len()) {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// `N` random bytes, 256 at most.
///
/// # Panics
/// When the kernel has no random numbers: a program that goes on without them gives its secrets away.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut buffer = [0; N];
    if let Err(error) = fill(&mut buffer) {
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
