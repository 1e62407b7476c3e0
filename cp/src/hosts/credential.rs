//! The secret by which a control plane proves itself to a host's agent. It is derived and never stored:
//! every control plane that shares `JWT_SECRET` can reach every host, and the agent holds a verifier
//! that does not log in.

use wire::auth::hmac_sha256;

/// The identity under which a control plane authenticates to agents.
pub const IDENTITY: &str = "cp";
/// Separates this use of `JWT_SECRET` from all others.
const CONTEXT: &[u8] = b"wrenn host credential v1";

/// The secret for a host, 64 hex digits.
pub fn credential(jwt_secret: &[u8], host_id: &str) -> String {
    let key = hmac_sha256(jwt_secret, &[CONTEXT, host_id.as_bytes()]);
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differs_by_host_and_secret() {
        let a = credential(b"secret", "host-a");
        assert_eq!(a.len(), 64);
        assert_eq!(a, credential(b"secret", "host-a"));
        assert_ne!(a, credential(b"secret", "host-b"));
        assert_ne!(a, credential(b"other", "host-a"));
    }
}
