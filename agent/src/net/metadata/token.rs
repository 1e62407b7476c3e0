//! Session tokens: random, few, and valid for as long as was asked for.

use std::collections::VecDeque;
use std::io;
use wire::reactor::sys::random;

/// The shortest life of a token, in seconds.
pub const MIN_TTL_SEC: u32 = 1;
/// The longest life of a token, in seconds: six hours, as Firecracker and EC2 have it.
pub const MAX_TTL_SEC: u32 = 21_600;

/// Tokens that are valid at once. A guest that asks for more loses its oldest.
const MAX_TOKENS: usize = 64;
const TOKEN_BYTES: usize = 24;

/// The tokens given out, oldest first.
#[derive(Debug, Default)]
pub struct Tokens(VecDeque<Token>);

struct Token {
    text: String,
    expires_ms: u64,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("expires_ms", &self.expires_ms).finish_non_exhaustive()
    }
}

impl Tokens {
    /// A new token, in hexadecimal.
    pub fn issue(&mut self, ttl_sec: u32, now_ms: u64) -> io::Result<String> {
        let mut bytes = [0; TOKEN_BYTES];
        random::fill(&mut bytes)?;
        let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        self.0.retain(|t| t.expires_ms > now_ms);
        if self.0.len() >= MAX_TOKENS {
            self.0.pop_front();
        }
        self.0.push_back(Token { text: text.clone(), expires_ms: now_ms + u64::from(ttl_sec) * 1_000 });
        Ok(text)
    }

    /// Whether `text` is a token that has not expired. Takes as long for a near miss as for a far one.
    pub fn is_valid(&self, text: &str, now_ms: u64) -> bool {
        self.0.iter().filter(|t| t.expires_ms > now_ms).fold(false, |found, t| found | same(&t.text, text))
    }
}

fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lives_as_long_as_was_asked_for() -> io::Result<()> {
        let mut tokens = Tokens::default();
        let token = tokens.issue(2, 10_000)?;
        assert_eq!(token.len(), 2 * TOKEN_BYTES);
        assert!(tokens.is_valid(&token, 10_000));
        assert!(tokens.is_valid(&token, 11_999));
        assert!(!tokens.is_valid(&token, 12_000));
        assert!(!tokens.is_valid("", 10_000));
        assert!(!tokens.is_valid(&token[1..], 10_000));
        Ok(())
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many() -> io::Result<()> {
        let mut tokens = Tokens::default();
        let first = tokens.issue(100, 0)?;
        let second = tokens.issue(100, 0)?;
        for _ in 0..MAX_TOKENS - 1 {
            tokens.issue(100, 0)?;
        }
        assert!(!tokens.is_valid(&first, 0));
        assert!(tokens.is_valid(&second, 0));
        assert!(!format!("{tokens:?}").contains(&second));
        Ok(())
    }
}
