//! Secrets that are random themselves: API keys, registration and refresh tokens. What is stored is
//! their SHA-256; 128 bits and more leave nothing to guess, so no slow hash is called for.

use super::random;
use sha2::{Digest, Sha256};

/// What API keys start with.
pub const API_KEY_PREFIX: &str = "wrn_";
/// Hexadecimal digits after it.
pub const API_KEY_DIGITS: usize = 32;
/// Characters of a key that are shown in lists, the prefix among them.
const SHOWN: usize = 12;

/// A new API key: `wrn_` and 32 hexadecimal digits.
pub fn new_api_key() -> String {
    format!("{API_KEY_PREFIX}{}", random::hex(&random::bytes::<{ API_KEY_DIGITS / 2 }>()))
}

/// Whether `text` has the form of an API key.
pub fn is_api_key(text: &str) -> bool {
    text.strip_prefix(API_KEY_PREFIX).is_some_and(|rest| {
        rest.len() == API_KEY_DIGITS && rest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

/// What people recognise a key by: `wrn_ab12cd34...`.
pub fn shown_prefix(key: &str) -> String {
    format!("{}...", key.get(..SHOWN).unwrap_or_default())
}

/// A new registration or refresh token: 64 hexadecimal digits.
pub fn new_token() -> String {
    random::hex(&random::bytes::<32>())
}

/// Whether `text` has the form of a registration or refresh token.
pub fn is_token(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// What is stored of a random secret. Looking it up in an index tells an attacker nothing by its time:
/// the hash of a guess cannot be steered.
pub fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_tokens_have_their_form() {
        let key = new_api_key();
        assert!(is_api_key(&key) && key.len() == 36, "{key}");
        assert_eq!(shown_prefix("wrn_ab12cd34ffffffffffffffffffffffff"), "wrn_ab12cd34...");
        assert!(is_token(&new_token()));
        for bad in
            ["", "wrn_", "wrn_AB12cd34ffffffffffffffffffffffff", "xrn_ab12cd34ffffffffffffffffffffffff"]
        {
            assert!(!is_api_key(bad), "{bad}");
        }
        assert!(!is_token(&"g".repeat(64)) && !is_token("00"));
    }

    #[test]
    fn the_hash_is_sha_256() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            random::hex(&hash("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
