//! What every handler can reach besides its request: the settings, and nothing that changes.

use std::fmt;
use std::net::IpAddr;

/// Settings that handlers read. Shared by the event loop and all workers, never changed after start.
pub struct Context {
    /// Signs logins and derives host credentials (`JWT_SECRET`).
    pub jwt_secret: Vec<u8>,
    /// The PostgreSQL database (`DATABASE_URL`); holds a password.
    pub database_url: String,
    /// The domain under which services in capsules are reached (`WRENN_PROXY_DOMAIN`); without one, every.
    pub proxy_domain: Option<String>,
    /// The proxies whose `X-Forwarded-For` counts (`WRENN_TRUSTED_PROXIES`).
    pub trusted_proxies: Vec<IpAddr>,
    /// This program's version.
    pub version: &'static str,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The secrets are left out on purpose.
        f.debug_struct("Context").field("version", &self.version).finish_non_exhaustive()
    }
}
