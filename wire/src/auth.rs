//! SCRAM-SHA-256 (RFC 5802, RFC 7677) and the session keys that follow from it.
//!
//! Both sides are pure: a message in, a message out. The channel binding data of the exchange is the
//! SHA-256 of everything sent before it (preamble and both `HELLO` frames), so a change to an offered
//! version or feature makes the exchange fail.

use crate::base64;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// PBKDF2 rounds for secrets that are themselves random (API keys, host and capsule secrets): the
/// least that RFC 7677 allows, since there is no dictionary to slow down.
pub const ITERATIONS: u32 = 4096;
/// The most rounds that a client lets a server ask of it. A client computes them on its event loop, and a
/// server may be a hostile guest: these are some ten milliseconds.
pub const MAX_ITERATIONS: u32 = 16_384;
/// Random bytes in a nonce, before base64.
pub const NONCE_LEN: usize = 18;
/// The longest SCRAM message accepted, in bytes.
pub const MAX_AUTH_MESSAGE: usize = 1024;
/// The longest identity, in bytes.
pub const MAX_IDENTITY: usize = 128;

/// The GS2 header: channel binding of type `wrenn-hello-sha256`, no other identity.
const GS2_HEADER: &str = "p=wrenn-hello-sha256,,";

type Key = [u8; 32];

/// HMAC-SHA-256.
pub fn hmac_sha256(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = new_mac(key);
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// A keyed HMAC-SHA-256, ready for data; its clone is cheap.
pub(crate) fn new_mac(key: &[u8]) -> Hmac<Sha256> {
    match Hmac::<Sha256>::new_from_slice(key) {
        Ok(mac) => mac,
        // HMAC takes keys of any length (RFC 2104), so the constructor has no failing case.
        Err(_) => unreachable!("HMAC accepts keys of every length"),
    }
}

/// Compares in time that depends on the lengths only.
pub fn constant_time_eq(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let difference = a.iter().zip(b).fold(0u8, |acc, (x, y)| acc | (x ^ y));
    core::hint::black_box(difference) == 0
}

/// `Hi` of RFC 5802: PBKDF2-HMAC-SHA-256 with one block of output.
pub fn salted_password(password: &[u8], salt: &[u8], iterations: u32) -> Key {
    let keyed = new_mac(password);
    let round = |data: &[&[u8]]| -> Key {
        let mut mac = keyed.clone();
        for part in data {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    };
    let mut block = round(&[salt, &1u32.to_be_bytes()]);
    let mut out = block;
    for _ in 1..iterations {
        block = round(&[&block]);
        for (o, b) in out.iter_mut().zip(block) {
            *o ^= b;
        }
    }
    out
}

/// What a server keeps of a secret. It proves a secret right but cannot be used to log in.
///
/// Its text form is PostgreSQL's and RFC 5803's:
/// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier({} rounds)", self.iterations)
    }
}

impl Verifier {
    /// Makes the verifier of `password`. `salt` is fresh random bytes, 16 or more.
    pub fn new(password: &[u8], salt: &[u8], iterations: u32) -> Verifier {
        let keys = ClientKeys::new(password, salt, iterations);
        Verifier {
            iterations,
            salt: salt.to_vec(),
            stored_key: Sha256::digest(keys.client_key).into(),
            server_key: keys.server_key,
        }
    }

    /// Reads the text form. `None` when it is not one.
    pub fn parse(text: &str) -> Option<Verifier> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (cost, keys) = rest.split_once('$')?;
        let (iterations, salt) = cost.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        let iterations = parse_iterations(iterations)?;
        let salt = base64::decode(salt).filter(|s| !s.is_empty())?;
        Some(Verifier {
            iterations,
            salt,
            stored_key: base64::decode(stored)?.try_into().ok()?,
            server_key: base64::decode(server)?.try_into().ok()?,
        })
    }

    /// The text form.
    pub fn to_text(&self) -> String {
        format!(
            "SCRAM-SHA-256${}:{}${}:{}",
            self.iterations,
            base64::encode(&self.salt),
            base64::encode(&self.stored_key),
            base64::encode(&self.server_key)
        )
    }

    /// A verifier that no secret matches, the same for the same `identity`, so that an unknown identity
    /// looks like a wrong secret. `key` is a secret of the server's own.
    pub fn decoy(key: &[u8], identity: &str) -> Verifier {
        let derive = |label: &[u8]| hmac_sha256(key, &[label, identity.as_bytes()]);
        Verifier {
            iterations: ITERATIONS,
            salt: derive(b"salt")[..16].to_vec(),
            stored_key: derive(b"stored"),
            server_key: derive(b"server"),
        }
    }
}

fn parse_iterations(text: &str) -> Option<u32> {
    if text.len() > 7 || text.starts_with('0') || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|n| (ITERATIONS..=MAX_ITERATIONS).contains(n))
}

struct ClientKeys {
    client_key: Key,
    server_key: Key,
}

impl ClientKeys {
    fn new(password: &[u8], salt: &[u8], iterations: u32) -> ClientKeys {
        let salted = salted_password(password, salt, iterations);
        ClientKeys {
            client_key: hmac_sha256(&salted, &[b"Client Key"]),
            server_key: hmac_sha256(&salted, &[b"Server Key"]),
        }
    }
}

/// The keys of a session's frames, one a direction.
#[derive(Clone, PartialEq, Eq)]
pub struct SessionKeys {
    /// For frames from the dialling side.
    pub client_to_server: [u8; 32],
    /// For frames to the dialling side.
    pub server_to_client: [u8; 32],
}

impl fmt::Debug for SessionKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKeys")
    }
}

fn session_keys(client_key: &Key, server_key: &Key, auth_message: &str) -> SessionKeys {
    let mut secret = [0; 64];
    secret[..32].copy_from_slice(client_key);
    secret[32..].copy_from_slice(server_key);
    let transcript: Key = Sha256::digest(auth_message.as_bytes()).into();
    let master = hmac_sha256(&secret, &[b"wrenn 1 session", &transcript]);
    SessionKeys {
        client_to_server: hmac_sha256(&master, &[b"client to server"]),
        server_to_client: hmac_sha256(&master, &[b"server to client"]),
    }
}

/// Why an exchange failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthError {
    /// A message has not the form that RFC 5802 gives it.
    Malformed,
    /// The nonce is not the one of this exchange.
    NonceMismatch,
    /// The channel binding does not match what was sent: something changed the `HELLO` frames.
    BindingMismatch,
    /// The server asks for too few or too many rounds.
    BadIterations,
    /// The secret is wrong, or the identity is not known.
    WrongSecret,
    /// The server does not know the secret either: it is not who it claims to be.
    ServerNotGenuine,
    /// The identity has characters other than `A-Z a-z 0-9 . _ -`, is empty or too long.
    BadIdentity,
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AuthError::Malformed => "an authentication message is malformed",
            AuthError::NonceMismatch => "the authentication nonce is not this exchange's",
            AuthError::BindingMismatch => "the greeting was changed on its way",
            AuthError::BadIterations => "the server asks for an unreasonable number of rounds",
            AuthError::WrongSecret => "the identity is not known or its secret is wrong",
            AuthError::ServerNotGenuine => "the server could not prove that it knows the secret",
            AuthError::BadIdentity => {
                "the identity is empty, too long or has characters that are not allowed"
            }
        })
    }
}

impl core::error::Error for AuthError {}

fn identity_is_valid(identity: &str) -> bool {
    (1..=MAX_IDENTITY).contains(&identity.len())
        && identity.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn nonce_is_valid(nonce: &str) -> bool {
    // RFC 5802: printable ASCII but the comma. At least the entropy of our own nonces is asked for.
    (24..=128).contains(&nonce.len()) && nonce.bytes().all(|b| (0x21..=0x7e).contains(&b) && b != b',')
}

fn attribute<'a>(part: Option<&'a str>, name: &str) -> Result<&'a str, AuthError> {
    part.and_then(|p| p.strip_prefix(name)).ok_or(AuthError::Malformed)
}

fn binding_text(binding: &[u8; 32]) -> String {
    let mut data = GS2_HEADER.as_bytes().to_vec();
    data.extend_from_slice(binding);
    base64::encode(&data)
}

/// The client's side: [`ClientExchange::start`], then [`ClientExchange::answer`] to the server's first
/// message, then [`ClientExchange::finish`] with its last.
pub struct ClientExchange {
    password: Vec<u8>,
    binding: [u8; 32],
    nonce: String,
    first_bare: String,
    pending: Option<(Key, SessionKeys)>,
}

impl ClientExchange {
    /// Starts: the exchange and the client-first-message.
    pub fn start(
        identity: &str,
        password: &[u8],
        nonce: [u8; NONCE_LEN],
        binding: [u8; 32],
    ) -> Result<(ClientExchange, String), AuthError> {
        if !identity_is_valid(identity) {
            return Err(AuthError::BadIdentity);
        }
        let nonce = base64::encode(&nonce);
        let first_bare = format!("n={identity},r={nonce}");
        let message = format!("{GS2_HEADER}{first_bare}");
        let exchange =
            ClientExchange { password: password.to_vec(), binding, nonce, first_bare, pending: None };
        Ok((exchange, message))
    }

    /// Takes the server-first-message and gives the client-final-message.
    pub fn answer(&mut self, server_first: &str) -> Result<String, AuthError> {
        let mut parts = server_first.split(',');
        let nonce = attribute(parts.next(), "r=")?;
        let salt = base64::decode(attribute(parts.next(), "s=")?).ok_or(AuthError::Malformed)?;
        let iterations = attribute(parts.next(), "i=")?;
        if parts.next().is_some() || salt.is_empty() || !nonce_is_valid(nonce) {
            return Err(AuthError::Malformed);
        }
        if !nonce.starts_with(&self.nonce) || nonce.len() < self.nonce.len() + 24 {
            return Err(AuthError::NonceMismatch);
        }
        let iterations = parse_iterations(iterations).ok_or(AuthError::BadIterations)?;
        let keys = ClientKeys::new(&self.password, &salt, iterations);
        let without_proof = format!("c={},r={nonce}", binding_text(&self.binding));
        let auth_message = format!("{},{server_first},{without_proof}", self.first_bare);
        let stored_key: Key = Sha256::digest(keys.client_key).into();
        let signature = hmac_sha256(&stored_key, &[auth_message.as_bytes()]);
        let mut proof = keys.client_key;
        for (p, s) in proof.iter_mut().zip(signature) {
            *p ^= s;
        }
        let expected = hmac_sha256(&keys.server_key, &[auth_message.as_bytes()]);
        let session = session_keys(&keys.client_key, &keys.server_key, &auth_message);
        self.pending = Some((expected, session));
        Ok(format!("{without_proof},p={}", base64::encode(&proof)))
    }

    /// Takes the server-final-message: the session's keys when the server is genuine.
    pub fn finish(&mut self, server_final: &str) -> Result<SessionKeys, AuthError> {
        let (expected, session) = self.pending.take().ok_or(AuthError::Malformed)?;
        let signature =
            server_final.strip_prefix("v=").and_then(base64::decode).ok_or(AuthError::Malformed)?;
        if !constant_time_eq(&signature, &expected) {
            return Err(AuthError::ServerNotGenuine);
        }
        Ok(session)
    }
}

/// The server's side: [`ServerExchange::start`] with the client's first message, a verifier looked up
/// by [`ServerExchange::identity`], [`ServerExchange::challenge`], then [`ServerExchange::finish`].
pub struct ServerExchange {
    identity: String,
    first_bare: String,
    client_nonce: String,
    binding: [u8; 32],
    challenged: Option<(Verifier, String, String)>,
}

impl ServerExchange {
    /// Takes the client-first-message.
    pub fn start(client_first: &str, binding: [u8; 32]) -> Result<ServerExchange, AuthError> {
        let bare = client_first.strip_prefix(GS2_HEADER).ok_or(AuthError::Malformed)?;
        let mut parts = bare.split(',');
        let identity = attribute(parts.next(), "n=")?;
        let nonce = attribute(parts.next(), "r=")?;
        if parts.next().is_some() || !nonce_is_valid(nonce) {
            return Err(AuthError::Malformed);
        }
        if !identity_is_valid(identity) {
            return Err(AuthError::BadIdentity);
        }
        Ok(ServerExchange {
            identity: identity.to_string(),
            first_bare: bare.to_string(),
            client_nonce: nonce.to_string(),
            binding,
            challenged: None,
        })
    }

    /// Who the client says it is. Not proven until [`ServerExchange::finish`].
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Gives the server-first-message for a verifier (a [`Verifier::decoy`] where none is known).
    pub fn challenge(&mut self, verifier: Verifier, nonce: [u8; NONCE_LEN]) -> String {
        let nonce = format!("{}{}", self.client_nonce, base64::encode(&nonce));
        let message = format!("r={nonce},s={},i={}", base64::encode(&verifier.salt), verifier.iterations);
        self.challenged = Some((verifier, nonce, message.clone()));
        message
    }

    /// Takes the client-final-message: the server-final-message and the session's keys when the
    /// client's proof is right.
    pub fn finish(&mut self, client_final: &str) -> Result<(String, SessionKeys), AuthError> {
        let (verifier, nonce, server_first) = self.challenged.take().ok_or(AuthError::Malformed)?;
        let (without_proof, proof) = client_final.rsplit_once(",p=").ok_or(AuthError::Malformed)?;
        let mut parts = without_proof.split(',');
        let binding = attribute(parts.next(), "c=")?;
        let their_nonce = attribute(parts.next(), "r=")?;
        if parts.next().is_some() {
            return Err(AuthError::Malformed);
        }
        if binding != binding_text(&self.binding) {
            return Err(AuthError::BindingMismatch);
        }
        if their_nonce != nonce {
            return Err(AuthError::NonceMismatch);
        }
        let proof: Key = base64::decode(proof).and_then(|p| p.try_into().ok()).ok_or(AuthError::Malformed)?;
        let auth_message = format!("{},{server_first},{without_proof}", self.first_bare);
        let signature = hmac_sha256(&verifier.stored_key, &[auth_message.as_bytes()]);
        let mut client_key = proof;
        for (k, s) in client_key.iter_mut().zip(signature) {
            *k ^= s;
        }
        let stored: Key = Sha256::digest(client_key).into();
        if !constant_time_eq(&stored, &verifier.stored_key) {
            return Err(AuthError::WrongSecret);
        }
        let server_signature = hmac_sha256(&verifier.server_key, &[auth_message.as_bytes()]);
        let session = session_keys(&client_key, &verifier.server_key, &auth_message);
        Ok((format!("v={}", base64::encode(&server_signature)), session))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINDING: [u8; 32] = [7; 32];

    fn run(password: &[u8], verifier: &Verifier) -> Result<(SessionKeys, SessionKeys), AuthError> {
        let (mut client, first) = ClientExchange::start("agent", password, [1; NONCE_LEN], BINDING)?;
        let mut server = ServerExchange::start(&first, BINDING)?;
        assert_eq!(server.identity(), "agent");
        let challenge = server.challenge(verifier.clone(), [2; NONCE_LEN]);
        let (last, server_keys) = server.finish(&client.answer(&challenge)?)?;
        Ok((client.finish(&last)?, server_keys))
    }

    #[test]
    fn salted_password_is_pbkdf2_of_rfc_7914_section_11() {
        let out = salted_password(b"passwd", b"salt", 1);
        assert_eq!(out[..8], [0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f]);
        let out = salted_password(b"Password", b"NaCl", 80_000);
        assert_eq!(out[..8], [0x4d, 0xdc, 0xd8, 0xf6, 0x0b, 0x98, 0xbe, 0x21]);
    }

    #[test]
    fn proof_and_signature_are_those_of_rfc_7677_section_3() {
        // The RFC's exchange has no channel binding, so its own messages are put through the formulas.
        let salt = base64::decode("W22ZaJ0SNY7soEsUEjb6gQ==").expect("base64");
        let keys = ClientKeys::new(b"pencil", &salt, 4096);
        let auth_message = "n=user,r=rOprNGfwEbeRWgbNEkqO,\
            r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,\
            c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let stored: Key = Sha256::digest(keys.client_key).into();
        let signature = hmac_sha256(&stored, &[auth_message.as_bytes()]);
        let proof: Vec<u8> = keys.client_key.iter().zip(signature).map(|(k, s)| k ^ s).collect();
        assert_eq!(base64::encode(&proof), "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
        let server = hmac_sha256(&keys.server_key, &[auth_message.as_bytes()]);
        assert_eq!(base64::encode(&server), "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    #[test]
    fn both_sides_come_to_the_same_keys() {
        let verifier = Verifier::new(b"secret", &[9; 16], ITERATIONS);
        let verifier = Verifier::parse(&verifier.to_text()).expect("own text");
        let (client, server) = run(b"secret", &verifier).expect("right secret");
        assert_eq!(client, server);
        assert_ne!(client.client_to_server, client.server_to_client);
    }

    #[test]
    fn a_wrong_secret_and_an_unknown_identity_fail_alike() {
        let verifier = Verifier::new(b"secret", &[9; 16], ITERATIONS);
        assert_eq!(run(b"guess", &verifier), Err(AuthError::WrongSecret));
        let decoy = Verifier::decoy(b"server's own", "agent");
        assert_eq!(run(b"secret", &decoy), Err(AuthError::WrongSecret));
        assert_eq!(decoy, Verifier::decoy(b"server's own", "agent"));
    }

    #[test]
    fn a_changed_greeting_fails() {
        let verifier = Verifier::new(b"secret", &[9; 16], ITERATIONS);
        let (mut client, first) =
            ClientExchange::start("agent", b"secret", [1; NONCE_LEN], BINDING).expect("start");
        let mut server = ServerExchange::start(&first, [8; 32]).expect("first");
        let challenge = server.challenge(verifier, [2; NONCE_LEN]);
        let last = client.answer(&challenge).expect("answer");
        assert_eq!(server.finish(&last), Err(AuthError::BindingMismatch));
    }

    #[test]
    fn a_server_that_does_not_know_the_secret_is_found_out() {
        let (mut client, _) =
            ClientExchange::start("agent", b"secret", [1; NONCE_LEN], BINDING).expect("start");
        let nonce = format!("{}{}", base64::encode(&[1; NONCE_LEN]), base64::encode(&[2; NONCE_LEN]));
        client.answer(&format!("r={nonce},s=AAAA,i=4096")).expect("answer");
        let lie = format!("v={}", base64::encode(&[0; 32]));
        assert_eq!(client.finish(&lie), Err(AuthError::ServerNotGenuine));
    }

    #[test]
    fn malformed_messages_are_refused() {
        for bad in ["", "n,,n=a,r=x", "p=tls-unique,,n=a,r=x", "p=wrenn-hello-sha256,,n=a", "x"] {
            assert!(ServerExchange::start(bad, BINDING).is_err(), "{bad:?}");
        }
        let nonce = base64::encode(&[1; NONCE_LEN]);
        for identity in ["", "a b", "a,b", "é"] {
            let first = format!("{GS2_HEADER}n={identity},r={nonce}");
            assert!(ServerExchange::start(&first, BINDING).is_err(), "{identity:?}");
        }
        for (bad, error) in [
            (format!("r={nonce}{nonce},s=AAAA,i=1"), AuthError::BadIterations),
            (format!("r={nonce}{nonce},s=AAAA,i=99999999"), AuthError::BadIterations),
            (format!("r={nonce},s=AAAA,i=4096"), AuthError::NonceMismatch),
            (format!("r={nonce}{nonce},s=,i=4096"), AuthError::Malformed),
            (format!("r={nonce}{nonce},s=AAAA,i=4096,x=1"), AuthError::Malformed),
        ] {
            let (mut client, _) =
                ClientExchange::start("agent", b"secret", [1; NONCE_LEN], BINDING).expect("start");
            assert_eq!(client.answer(&bad), Err(error), "{bad}");
        }
    }
}
