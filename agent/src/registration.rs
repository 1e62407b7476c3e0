//! This host and its control plane: registration, heartbeats and the credentials that they need.
//!
//! [`Registration`] decides what to call when and is pure; [`crate::cp_client`] makes the calls, on a
//! worker.

use crate::cp_client::{self, CallError, HostFacts};
use crate::whole_file;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use wire::auth::Verifier;
use wire::config::HttpUrl;

/// The time between heartbeats.
pub const HEARTBEAT_MS: u64 = 30_000;
/// The wait after a first failed call; each further one waits twice as long, up to [`HEARTBEAT_MS`].
pub const FIRST_RETRY_MS: u64 = 1_000;
/// The wait after the control plane has rejected this host, which a person has to mend.
pub const REJECTED_RETRY_MS: u64 = 300_000;
/// The age at which the token, valid for seven days, is exchanged for a new one, in seconds.
pub const REFRESH_AGE_SEC: u64 = 3 * 24 * 3600;
/// The permissions that nobody but the owner of the credentials may have.
const OPEN_TO_OTHERS: u32 = 0o077;
/// The longest credentials file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 65_536;

/// What this host proves itself with, and proves its control plane right with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// This host's id.
    pub host_id: String,
    /// For the `X-Host-Token` header; valid for seven days.
    pub token: String,
    /// Exchanged for the next token; valid for sixty days and once.
    pub refresh_token: String,
    /// The verifier of the secret with which the control plane opens wire sessions.
    pub wire_verifier: String,
    /// When the token was given out, in seconds since the epoch.
    pub obtained_sec: u64,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("host_id", &self.host_id).finish_non_exhaustive()
    }
}

/// Why the credentials cannot be used.
#[derive(Debug)]
pub enum CredentialsError {
    /// There are none: the host is not registered.
    Missing(PathBuf),
    /// The file cannot be read or written.
    Io {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// The file is not what was saved.
    Malformed(PathBuf),
    /// Others than its owner may read or change it.
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
}

impl std::fmt::Display for CredentialsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CredentialsError::Missing(path) => write!(
                f,
                "this host is not registered ({} is not there): create a host in the control plane (POST \
                 /v1/hosts), then run `wrenn-agent --register - --address IP:PORT` with WRENN_CP_URL set and the \
                 token on standard input",
                path.display()
            ),
            CredentialsError::Io { step, path, source } => {
                write!(f, "cannot {step} {}: {source}", path.display())
            }
            CredentialsError::Malformed(path) => write!(
                f,
                "{} is damaged: delete this host in the control plane (DELETE /v1/hosts/ID), create it anew (POST \
                 /v1/hosts) and register with the token of that",
                path.display()
            ),
            CredentialsError::Open { path, mode } => write!(
                f,
                "{} has mode {mode:04o}, so that others can read or change this host's credentials: run `chmod 600 {0}`; \
                 where somebody may have read it, delete this host in the control plane and register it anew",
                path.display()
            ),
        }
    }
}

impl std::error::Error for CredentialsError {}

impl Credentials {
    /// Reads the saved credentials. Blocks.
    pub fn load(path: &Path) -> Result<Credentials, CredentialsError> {
        let io = |step, source| CredentialsError::Io { step, path: path.to_path_buf(), source };
        match fs::metadata(path) {
            Ok(m) if m.len() > MAX_FILE_BYTES => return Err(CredentialsError::Malformed(path.into())),
            Ok(m) if m.mode() & OPEN_TO_OTHERS != 0 => {
                return Err(CredentialsError::Open { path: path.into(), mode: m.mode() & 0o7777 });
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(CredentialsError::Missing(path.into()));
            }
            Err(e) => return Err(io("look at", e)),
        }
        let bytes = fs::read(path).map_err(|e| io("read", e))?;
        let read: Option<Credentials> = serde_json::from_slice(&bytes).ok();
        read.filter(|c| c.verifier().is_some()).ok_or_else(|| CredentialsError::Malformed(path.into()))
    }

    /// Saves the credentials, readable by root only, whole or not at all. Blocks until they are on disk.
    pub fn save(&self, path: &Path) -> Result<(), CredentialsError> {
        let io = |step, source| CredentialsError::Io { step, path: path.to_path_buf(), source };
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| io("save", e.into()))?;
        text.push(b'\n');
        whole_file::replace(path, &text, 0o600).map_err(|e| io("save", e))
    }

    /// The control plane's verifier; `None` when it is not one.
    pub fn verifier(&self) -> Option<Verifier> {
        Verifier::parse(&self.wire_verifier)
    }
}

/// Seconds since the epoch.
pub fn now_sec() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Registers this host with a one-time token and saves what it is given. Blocks.
///
/// # Errors
/// The call fails or is refused, or the credentials cannot be saved; a text for a person.
pub fn register(
    url: &HttpUrl,
    token: &str,
    address: &str,
    facts: &HostFacts,
    path: &Path,
) -> Result<Credentials, String> {
    let credentials = cp_client::register(url, token, address, facts).map_err(|e| match e {
        CallError::Refused { status: 401, message } => format!(
            "the control plane refused the registration token: {message}; it is valid for one hour and once: \
             get a new one (POST /v1/hosts/ID/token)"
        ),
        other => format!("registering at {url}: {other}"),
    })?;
    if credentials.verifier().is_none() {
        return Err(format!(
            "registering at {url}: its answer has no usable wire_verifier; is it a wrenn-cp?"
        ));
    }
    credentials.save(path).map_err(|e| e.to_string())?;
    Ok(credentials)
}

/// What a call came to.
#[derive(Debug)]
pub enum Report {
    /// A heartbeat.
    Heartbeat(Result<(), CallError>),
    /// New credentials, already saved.
    Refreshed(Result<Credentials, CallError>),
}

/// How the control plane was found at the last call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Unknown,
    Well,
    Away,
    Rejected,
}

/// What to call and when.
#[derive(Debug)]
pub struct Registration {
    url: Option<HttpUrl>,
    path: PathBuf,
    credentials: Credentials,
    standing: Standing,
    failures: u32,
    next_ms: u64,
    under_way: bool,
    refresh_now: bool,
    verifier_changed: bool,
}

/// A call, to be made on a worker.
pub type Call = Box<dyn FnOnce() -> Report + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Heartbeat,
    Refresh,
}

impl Registration {
    /// Heartbeats to `url`, the first at once. Without a URL nothing is ever called.
    pub fn new(url: Option<HttpUrl>, path: PathBuf, credentials: Credentials) -> Registration {
        Registration {
            url,
            path,
            credentials,
            standing: Standing::Unknown,
            failures: 0,
            next_ms: 0,
            under_way: false,
            refresh_now: false,
            verifier_changed: false,
        }
    }

    /// When the next call is due; `None` while one is under way.
    pub fn next_ms(&self) -> Option<u64> {
        (self.url.is_some() && !self.under_way).then_some(self.next_ms)
    }

    /// The call that is due.
    pub fn begin(&mut self, now_ms: u64) -> Option<Call> {
        if self.next_ms()? > now_ms {
            return None;
        }
        let (url, credentials) = (self.url.clone()?, self.credentials.clone());
        self.under_way = true;
        let path = self.path.clone();
        Some(match self.choose(now_sec()) {
            Next::Heartbeat => Box::new(move || Report::Heartbeat(cp_client::heartbeat(&url, &credentials))),
            Next::Refresh => Box::new(move || Report::Refreshed(refresh(&url, &credentials, &path))),
        })
    }

    fn choose(&self, now_sec: u64) -> Next {
        let age = now_sec.saturating_sub(self.credentials.obtained_sec);
        if self.refresh_now || age >= REFRESH_AGE_SEC { Next::Refresh } else { Next::Heartbeat }
    }

    /// Takes what a call came to.
    pub fn on_report(&mut self, report: Report, now_ms: u64) {
        self.under_way = false;
        match report {
            Report::Heartbeat(Ok(())) => {
                self.failures = 0;
                self.next_ms = now_ms + HEARTBEAT_MS;
                self.stand(Standing::Well, "");
            }
            Report::Refreshed(Ok(credentials)) => {
                log::info!("the host token was renewed");
                self.verifier_changed = credentials.wire_verifier != self.credentials.wire_verifier;
                self.credentials = credentials;
                self.refresh_now = false;
                self.failures = 0;
                self.next_ms = now_ms;
            }
            // The token has expired or is not known: a fresh one, once, shows which.
            Report::Heartbeat(Err(CallError::Refused { status: 401, .. })) if !self.refresh_now => {
                self.refresh_now = true;
                self.next_ms = now_ms;
            }
            Report::Heartbeat(Err(e)) | Report::Refreshed(Err(e)) => {
                let rejected = matches!(e, CallError::Refused { status: 401 | 403 | 404, .. });
                let wait = FIRST_RETRY_MS << self.failures.min(10);
                self.failures = self.failures.saturating_add(1);
                self.next_ms = now_ms + if rejected { REJECTED_RETRY_MS } else { wait.min(HEARTBEAT_MS) };
                self.stand(if rejected { Standing::Rejected } else { Standing::Away }, &e.to_string());
            }
        }
    }

    /// The control plane's verifier where the last report has brought another one.
    pub fn take_new_verifier(&mut self) -> Option<Verifier> {
        std::mem::take(&mut self.verifier_changed).then(|| self.credentials.verifier()).flatten()
    }

    /// Says so when the standing has changed, and only then.
    fn stand(&mut self, standing: Standing, why: &str) {
        if standing == self.standing {
            return;
        }
        self.standing = standing;
        let url = self.url.as_ref().map(ToString::to_string).unwrap_or_default();
        match standing {
            Standing::Well => log::info!("heartbeats reach the control plane at {url}"),
            Standing::Away => log::warn!("the control plane at {url} is away, trying again: {why}"),
            Standing::Rejected => log::error!(
                "the control plane at {url} rejects this host: {why}; if the host was deleted, create it \
                 again and register with a new token"
            ),
            Standing::Unknown => {}
        }
    }
}

fn refresh(url: &HttpUrl, credentials: &Credentials, path: &Path) -> Result<Credentials, CallError> {
    // Where there is no room for these there is none for new ones, and the refresh token, good for once, would be
    // used up for nothing: on a full disk the host would lose its registration.
    credentials.save(path).map_err(|e| CallError::Local(e.to_string()))?;
    let fresh = cp_client::refresh(url, credentials)?;
    if let Err(e) = fresh.save(path) {
        log::error!("{e}; until the token is renewed again, a restarted agent has to be registered anew");
    }
    Ok(fresh)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::auth::ITERATIONS;

    fn credentials() -> Credentials {
        Credentials {
            host_id: "host-1".into(),
            token: "jwt".into(),
            refresh_token: "refresh".into(),
            wire_verifier: Verifier::new(b"secret", &[1; 16], ITERATIONS).to_text(),
            obtained_sec: now_sec(),
        }
    }

    fn registration() -> Registration {
        Registration::new(HttpUrl::parse("http://cp:8000"), PathBuf::from("/nowhere"), credentials())
    }

    fn refused(status: u16) -> CallError {
        CallError::Refused { status, message: "no".into() }
    }

    #[test]
    fn heartbeats_come_every_thirty_seconds() {
        let mut registration = registration();
        assert_eq!(registration.next_ms(), Some(0));
        assert!(registration.begin(0).is_some());
        assert_eq!(registration.next_ms(), None);
        assert!(registration.begin(99_999).is_none(), "one at a time");
        registration.on_report(Report::Heartbeat(Ok(())), 500);
        assert_eq!(registration.next_ms(), Some(30_500));
        assert!(registration.begin(30_499).is_none());
    }

    #[test]
    fn a_control_plane_that_is_away_is_tried_again_ever_slower() {
        let mut registration = registration();
        let mut waits = Vec::new();
        for _ in 0..7 {
            registration.on_report(Report::Heartbeat(Err(CallError::Local("refused".into()))), 0);
            waits.extend(registration.next_ms());
        }
        assert_eq!(waits, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        assert_eq!(registration.standing, Standing::Away);
        registration.on_report(Report::Heartbeat(Ok(())), 0);
        assert_eq!((registration.standing, registration.failures), (Standing::Well, 0));
    }

    #[test]
    fn an_expired_token_is_renewed_once_and_a_rejection_is_left_to_a_person() {
        let mut registration = registration();
        assert_eq!(registration.choose(now_sec()), Next::Heartbeat);
        registration.on_report(Report::Heartbeat(Err(refused(401))), 10);
        assert_eq!(registration.next_ms(), Some(10));
        assert_eq!(registration.choose(now_sec()), Next::Refresh);
        registration.on_report(Report::Refreshed(Err(refused(401))), 20);
        assert_eq!(registration.next_ms(), Some(20 + REJECTED_RETRY_MS));
        assert_eq!(registration.standing, Standing::Rejected);
        let mut fresh = credentials();
        fresh.wire_verifier = Verifier::new(b"other", &[1; 16], ITERATIONS).to_text();
        registration.on_report(Report::Refreshed(Ok(fresh)), 30);
        assert_eq!(registration.choose(now_sec()), Next::Heartbeat);
        assert!(registration.take_new_verifier().is_some());
        assert!(registration.take_new_verifier().is_none());
    }

    #[test]
    fn a_token_that_could_not_be_saved_is_not_used_up() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listening");
        listener.set_nonblocking(true).expect("set");
        let address = listener.local_addr().expect("bound");
        let url = HttpUrl::parse(&format!("http://{address}")).expect("a URL");
        // As on a full disk.
        let refused = refresh(&url, &credentials(), Path::new("/nowhere/at/all/host-token"));
        assert!(matches!(refused, Err(CallError::Local(_))), "{refused:?}");
        assert_eq!(
            listener.accept().map(drop).map_err(|e| e.kind()),
            Err(io::ErrorKind::WouldBlock),
            "the control plane was asked"
        );
    }

    #[test]
    fn an_old_token_is_renewed_in_time() {
        let registration = registration();
        assert_eq!(registration.choose(now_sec() + REFRESH_AGE_SEC), Next::Refresh);
    }

    #[test]
    fn without_a_control_plane_nothing_is_called() {
        let mut registration = Registration::new(None, PathBuf::new(), credentials());
        assert_eq!(registration.next_ms(), None);
        assert!(registration.begin(0).is_none());
    }

    #[test]
    fn credentials_are_saved_for_root_only_and_never_shown() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("wrenn-host-token-{}", std::process::id()));
        assert!(matches!(Credentials::load(&path), Err(CredentialsError::Missing(_))));
        credentials().save(&path).expect("saved");
        credentials().save(&path).expect("saved again");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let loaded = Credentials::load(&path).expect("loaded");
        assert_eq!(loaded.token, "jwt");
        assert!(!format!("{loaded:?}").contains("jwt"));
        for bad in ["", "{}", "{\"host_id\":1}"] {
            fs::write(&path, bad).expect("written");
            assert!(matches!(Credentials::load(&path), Err(CredentialsError::Malformed(_))), "{bad:?}");
        }
        for mode in [0o644, 0o640, 0o602] {
            credentials().save(&path).expect("saved");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
            let error = Credentials::load(&path).expect_err("open to others");
            assert!(error.to_string().contains(&format!("chmod 600 {}", path.display())), "{error}");
        }
        fs::remove_file(&path).expect("removed");
    }
}
