//! Passwords: PBKDF2-HMAC-SHA-256 (RFC 8018, section 5.2) with its cost stored beside it.

use super::random;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::fmt;
use wire::auth::{constant_time_eq, salted_password};

/// Rounds of a new password's hash: what OWASP's password storage guidance asks of
/// PBKDF2-HMAC-SHA-256. One takes about 0.2 s of one core.
pub const ROUNDS: u32 = 600_000;
/// The most rounds that a stored hash may ask for; more is a damaged row.
const MAX_ROUNDS: u32 = 10_000_000;
/// Random bytes of salt.
const SALT_BYTES: usize = 16;
/// The shortest password, in characters.
pub const MIN_CHARACTERS: usize = 8;
/// The longest password, in bytes.
pub const MAX_BYTES: usize = 1024;
/// How the stored form starts.
const SCHEME: &str = "pbkdf2-sha256";

/// A password that may not be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PasswordError {
    /// Fewer than [`MIN_CHARACTERS`].
    TooShort,
    /// More than [`MAX_BYTES`].
    TooLong,
}

impl fmt::Display for PasswordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PasswordError::TooShort => write!(f, "a password has {MIN_CHARACTERS} characters or more"),
            PasswordError::TooLong => write!(f, "a password has {MAX_BYTES} bytes or fewer"),
        }
    }
}

impl std::error::Error for PasswordError {}

/// Whether a password may be taken for an account.
///
/// # Errors
/// Why not.
pub fn check(password: &str) -> Result<(), PasswordError> {
    if password.chars().count() < MIN_CHARACTERS {
        return Err(PasswordError::TooShort);
    }
    if password.len() > MAX_BYTES {
        return Err(PasswordError::TooLong);
    }
    Ok(())
}

/// A password's hash as it is stored: `pbkdf2-sha256$<rounds>$<salt>$<hash>`, base64.
#[derive(Clone, PartialEq, Eq)]
pub struct StoredPassword {
    rounds: u32,
    salt: Vec<u8>,
    hash: [u8; 32],
}

impl fmt::Debug for StoredPassword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredPassword({} rounds)", self.rounds)
    }
}

impl StoredPassword {
    /// Hashes a password with [`ROUNDS`] and a fresh salt. Takes a fifth of a second: not on an event
    /// loop.
    pub fn new(password: &str) -> StoredPassword {
        let salt = random::bytes::<SALT_BYTES>();
        let hash = salted_password(password.as_bytes(), &salt, ROUNDS);
        StoredPassword { rounds: ROUNDS, salt: salt.to_vec(), hash }
    }

    /// Matches no password that anyone knows, and takes as long to find that out as any other.
    pub fn unknown() -> StoredPassword {
        StoredPassword { rounds: ROUNDS, salt: vec![0; SALT_BYTES], hash: random::bytes() }
    }

    /// Reads the stored form. `None` when it is not one.
    pub fn parse(text: &str) -> Option<StoredPassword> {
        let mut parts = text.split('$');
        let (scheme, rounds, salt, hash) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if scheme != SCHEME || parts.next().is_some() {
            return None;
        }
        Some(StoredPassword {
            rounds: rounds.parse().ok().filter(|r| (1..=MAX_ROUNDS).contains(r))?,
            salt: STANDARD.decode(salt).ok()?,
            hash: STANDARD.decode(hash).ok()?.try_into().ok()?,
        })
    }

    /// The stored form.
    pub fn to_text(&self) -> String {
        format!("{SCHEME}${}${}${}", self.rounds, STANDARD.encode(&self.salt), STANDARD.encode(self.hash))
    }

    /// Whether this is the hash of `password`. Takes a fifth of a second: not on an event loop.
    pub fn matches(&self, password: &str) -> bool {
        password.len() <= MAX_BYTES
            && constant_time_eq(&salted_password(password.as_bytes(), &self.salt, self.rounds), &self.hash)
    }

    /// Whether it was made with fewer rounds than new ones are: then it is made anew at the next login.
    pub fn is_outdated(&self) -> bool {
        self.rounds < ROUNDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::random::hex;

    #[test]
    fn the_function_is_that_of_rfc_7914_section_11() {
        // The first 32 of the 64 bytes given there are PBKDF2's first block.
        assert_eq!(
            hex(&salted_password(b"passwd", b"salt", 1)),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
        );
        assert_eq!(
            hex(&salted_password(b"Password", b"NaCl", 80_000)),
            "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56"
        );
    }

    #[test]
    fn the_stored_form_goes_both_ways() {
        let stored = StoredPassword { rounds: 2, salt: b"NaCl".to_vec(), hash: [0xab; 32] };
        let text = "pbkdf2-sha256$2$TmFDbA==$q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s=";
        assert_eq!(stored.to_text(), text);
        assert_eq!(StoredPassword::parse(text), Some(stored.clone()));
        assert!(stored.is_outdated() && !StoredPassword::unknown().is_outdated());
        for bad in ["", "x$2$TmFDbA==$q6s=", "pbkdf2-sha256$0$TmFDbA==$q6s=", &format!("{text}$"), "$$$"] {
            assert_eq!(StoredPassword::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_the_right_password_matches() {
        let hash = salted_password(b"correct horse", b"salt", 1000);
        let stored = StoredPassword { rounds: 1000, salt: b"salt".to_vec(), hash };
        assert!(stored.matches("correct horse"));
        assert!(!stored.matches("correct horsE") && !stored.matches(""));
        let fresh = StoredPassword::new("correct horse");
        assert!(fresh.matches("correct horse") && !fresh.matches("battery staple"));
    }

    #[test]
    fn length_is_bounded() {
        assert_eq!(check("1234567"), Err(PasswordError::TooShort));
        assert_eq!(check("pässword"), Ok(()));
        assert_eq!(check(&"x".repeat(MAX_BYTES + 1)), Err(PasswordError::TooLong));
    }
}
