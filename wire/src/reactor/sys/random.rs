//! Random numbers from the kernel: getrandom(2).

use std::io;

/// Fills `buffer` from the kernel's random number generator, waiting at most for its first seeding.
///
/// # Errors
/// The errno of getrandom(2).
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        // SAFETY: the pointer and the length describe `rest`, which is writable and outlives the call.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match super::check(got as i64) {
            Ok(count) => filled += count as usize,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_draws_differ() {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        assert!(super::fill(&mut a).is_ok() && super::fill(&mut b).is_ok());
        assert_ne!(a, b);
    }
}
