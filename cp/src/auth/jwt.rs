//! JSON Web Tokens (RFC 7519) signed with HMAC-SHA-256 (RFC 7515, RFC 7518 section 3.2).
//!
//! Only what this program issues is accepted: the one header it writes, the claims it writes, both time
//! bounds. The signature is checked before anything of the token is parsed.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use wire::auth::{constant_time_eq, hmac_sha256};

/// How long a user's token is good, in seconds: 6 hours.
pub const USER_LIFETIME_SEC: u64 = 6 * 3600;
/// How long a host's token is good, in seconds: 7 days.
pub const HOST_LIFETIME_SEC: u64 = 7 * 24 * 3600;
/// How far ahead of ours the clock of another control plane that issued a token may be, in seconds.
pub const CLOCK_SKEW_SEC: u64 = 60;
/// The longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;

/// The JOSE header of every token issued, byte for byte. No other is accepted, so there is no algorithm
/// to confuse.
const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// Whose token it is. A token of one kind is never taken for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Audience {
    /// A person, logged in.
    User,
    /// A host agent.
    Host,
}

/// The claims of a user's token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserClaims {
    /// User id.
    pub sub: String,
    /// The team that the token acts for.
    pub team_id: String,
    /// Issued at, seconds since the epoch.
    pub iat: u64,
    /// Void from here on, seconds since the epoch.
    pub exp: u64,
    /// Always [`Audience::User`].
    pub aud: Audience,
}

/// The claims of a host's token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostClaims {
    /// Host id.
    pub sub: String,
    /// Which of the host's registrations and refreshes issued it.
    pub generation: i32,
    /// Issued at, seconds since the epoch.
    pub iat: u64,
    /// Void from here on, seconds since the epoch.
    pub exp: u64,
    /// Always [`Audience::Host`].
    pub aud: Audience,
}

/// What both kinds of claims have.
pub trait Claims: Serialize + DeserializeOwned {
    /// Whose tokens carry these claims.
    const AUDIENCE: Audience;
    /// Audience, issued at, void from.
    fn bounds(&self) -> (Audience, u64, u64);
}

impl Claims for UserClaims {
    const AUDIENCE: Audience = Audience::User;
    fn bounds(&self) -> (Audience, u64, u64) {
        (self.aud, self.iat, self.exp)
    }
}

impl Claims for HostClaims {
    const AUDIENCE: Audience = Audience::Host;
    fn bounds(&self) -> (Audience, u64, u64) {
        (self.aud, self.iat, self.exp)
    }
}

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JwtError {
    /// It has not the form of a token of ours.
    Malformed,
    /// It was not signed by us, or was changed.
    BadSignature,
    /// Its time is over.
    Expired,
    /// It says that it was issued in the future.
    NotYetValid,
    /// It is a token of the other kind.
    WrongAudience,
}

impl fmt::Display for JwtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            JwtError::Malformed => "the token is not one of ours",
            JwtError::BadSignature => "the token's signature is wrong",
            JwtError::Expired => "the token has expired",
            JwtError::NotYetValid => "the token is from the future: compare the machines' clocks",
            JwtError::WrongAudience => "the token is for something else",
        })
    }
}

impl std::error::Error for JwtError {}

impl UserClaims {
    /// Claims for `user_id`, acting for `team_id`, from `now_sec` on.
    pub fn new(user_id: &str, team_id: &str, now_sec: u64) -> UserClaims {
        UserClaims {
            sub: user_id.to_string(),
            team_id: team_id.to_string(),
            iat: now_sec,
            exp: now_sec.saturating_add(USER_LIFETIME_SEC),
            aud: Audience::User,
        }
    }
}

impl HostClaims {
    /// Claims for `host_id` from `now_sec` on.
    pub fn new(host_id: &str, generation: i32, now_sec: u64) -> HostClaims {
        HostClaims {
            sub: host_id.to_string(),
            generation,
            iat: now_sec,
            exp: now_sec.saturating_add(HOST_LIFETIME_SEC),
            aud: Audience::Host,
        }
    }
}

fn signature(key: &[u8], signed: &str) -> String {
    URL_SAFE_NO_PAD.encode(hmac_sha256(key, &[signed.as_bytes()]))
}

/// Signs claims.
///
/// # Errors
/// Only when the claims cannot be written as JSON, which those of this module always can.
pub fn sign<C: Claims>(key: &[u8], claims: &C) -> Result<String, serde_json::Error> {
    let payload = serde_json::to_vec(claims)?;
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(HEADER), URL_SAFE_NO_PAD.encode(payload));
    let signature = signature(key, &signed);
    Ok(format!("{signed}.{signature}"))
}

/// Checks a token and gives its claims.
///
/// # Errors
/// Why it is not accepted.
pub fn verify<C: Claims>(key: &[u8], token: &str, now_sec: u64) -> Result<C, JwtError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(JwtError::Malformed);
    }
    let (signed, given) = token.rsplit_once('.').ok_or(JwtError::Malformed)?;
    let (header, payload) = signed.split_once('.').ok_or(JwtError::Malformed)?;
    // The encoded forms are compared: base64 has more than one spelling for the same bytes, and only
    // the one that we write is ours.
    if !constant_time_eq(signature(key, signed).as_bytes(), given.as_bytes()) {
        return Err(JwtError::BadSignature);
    }
    if header != URL_SAFE_NO_PAD.encode(HEADER) {
        return Err(JwtError::Malformed);
    }
    let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| JwtError::Malformed)?;
    let claims: C = serde_json::from_slice(&payload).map_err(|_| JwtError::WrongAudience)?;
    let (audience, issued, expires) = claims.bounds();
    if audience != C::AUDIENCE {
        return Err(JwtError::WrongAudience);
    }
    if expires <= now_sec {
        return Err(JwtError::Expired);
    }
    if issued > now_sec.saturating_add(CLOCK_SKEW_SEC) {
        return Err(JwtError::NotYetValid);
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
    const NOW: u64 = 1_700_000_000;

    fn user() -> UserClaims {
        UserClaims::new("usr-0000000000000000000000001", "team-0000000000000000000000001", NOW)
    }

    #[test]
    fn the_signature_is_that_of_rfc_7515_appendix_a_1() {
        let key = URL_SAFE_NO_PAD
            .decode("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
            .expect("base64url");
        let signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQo\
                      gImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
        assert_eq!(signature(&key, signed), "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
        // Genuine, but with a header that we do not write.
        let token = format!("{signed}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
        assert_eq!(verify::<UserClaims>(&key, &token, 0), Err(JwtError::Malformed));
    }

    #[test]
    fn a_token_is_good_until_it_expires() {
        let token = sign(KEY, &user()).expect("claims are JSON");
        assert_eq!(verify::<UserClaims>(KEY, &token, NOW), Ok(user()));
        assert_eq!(verify::<UserClaims>(KEY, &token, NOW + USER_LIFETIME_SEC - 1), Ok(user()));
        assert_eq!(verify::<UserClaims>(KEY, &token, NOW + USER_LIFETIME_SEC), Err(JwtError::Expired));
        assert_eq!(verify::<UserClaims>(KEY, &token, NOW - CLOCK_SKEW_SEC), Ok(user()));
        assert_eq!(verify::<UserClaims>(KEY, &token, NOW - CLOCK_SKEW_SEC - 1), Err(JwtError::NotYetValid));
    }

    #[test]
    fn every_changed_character_is_noticed() {
        let token = sign(KEY, &user()).expect("claims are JSON");
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("ASCII");
            assert!(verify::<UserClaims>(KEY, &changed, NOW).is_err(), "at {at}");
        }
        assert_eq!(verify::<UserClaims>(b"another key", &token, NOW), Err(JwtError::BadSignature));
    }

    #[test]
    fn other_algorithms_are_refused_also_when_signed() {
        for header in
            [r#"{"alg":"none"}"#, r#"{"alg":"HS512","typ":"JWT"}"#, r#"{"typ":"JWT","alg":"HS256"}"#]
        {
            let payload = serde_json::to_vec(&user()).expect("JSON");
            let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
            let unsigned = format!("{signed}.");
            assert_eq!(verify::<UserClaims>(KEY, &unsigned, NOW), Err(JwtError::BadSignature));
            let signed = format!("{signed}.{}", signature(KEY, &signed));
            assert_eq!(verify::<UserClaims>(KEY, &signed, NOW), Err(JwtError::Malformed));
        }
    }

    #[test]
    fn a_hosts_token_is_no_users_token() {
        let host = HostClaims::new("host-0000000000000000000000001", 1, NOW);
        let token = sign(KEY, &host).expect("claims are JSON");
        assert_eq!(verify::<HostClaims>(KEY, &token, NOW), Ok(host));
        assert_eq!(verify::<UserClaims>(KEY, &token, NOW), Err(JwtError::WrongAudience));
        let token = sign(KEY, &user()).expect("claims are JSON");
        assert_eq!(verify::<HostClaims>(KEY, &token, NOW), Err(JwtError::WrongAudience));
    }

    #[test]
    fn nonsense_is_refused() {
        for nonsense in ["", ".", "..", "...", "a.b.c", "eyJhbGciOiJub25lIn0..", &"x".repeat(5000)] {
            assert!(verify::<UserClaims>(KEY, nonsense, NOW).is_err(), "{nonsense}");
        }
    }
}
