//! Configuration of the two daemons: the table of variables, the `.env` file, and checked values.
//!
//! [`Settings::read`] is a pure function over the environment's pairs and the text of an `.env` file.
//! The environment wins over the file. A `WRENN_` variable that is not in [`VARIABLES`] and a value that
//! its [`Kind`] does not accept are errors that name the variable; all of them are reported at once.
//! Other names (`PATH`, `HOME`, what else an `.env` file is used for) are left alone.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The longest `.env` file that is read, in bytes.
pub const MAX_DOT_ENV_BYTES: u64 = 65_536;
/// Permissions that an `.env` file with a secret in it may give to nobody but its owner, as a `host-token`.
const OPEN_TO_OTHERS: u32 = 0o077;
/// The longest value of a variable, in bytes.
pub const MAX_VALUE_BYTES: usize = 4096;
/// The shortest signing secret: 256 bits as hex digits are twice that, 32 random characters are enough.
pub const MIN_SECRET_BYTES: usize = 32;
/// Names that start so belong to tests and benchmarks and are left alone.
const TEST_PREFIXES: [&str; 2] = ["WRENN_TEST_", "WRENN_BENCH_"];
/// Every name that starts so is ours and must be in the table.
const OWN_PREFIX: &str = "WRENN_";

/// Which program a variable is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `wrenn-cp`.
    ControlPlane,
    /// `wrenn-agent`.
    Agent,
    /// Both daemons.
    Both,
    /// Programs that use the platform (the SDKs); known so that they may share an `.env` file.
    Client,
}

/// What a variable's value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `:PORT` (all addresses) or `IP:PORT`.
    ListenAddress,
    /// An absolute path.
    AbsolutePath,
    /// `http://HOST[:PORT]`, nothing after it but a slash.
    HttpUrl,
    /// A PostgreSQL connection string or URL. Holds a password.
    PostgresUrl,
    /// At least [`MIN_SECRET_BYTES`] bytes. Never shown.
    Secret,
    /// A word that is checked where it is used. Never shown.
    Token,
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`.
    LogLevel,
    /// A whole number in a range.
    Number {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// `FIRST-LAST`, both in a range and FIRST not over LAST.
    Range {
        /// The least first.
        min: u32,
        /// The greatest last.
        max: u32,
    },
    /// `true` or `false`.
    Boolean,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// IP addresses, separated by commas.
    IpList,
    /// An IPv4 address.
    Ipv4,
    /// A DNS domain.
    Domain,
}

impl Kind {
    /// What the variable accepts, for a person.
    pub fn accepts(self) -> String {
        match self {
            Kind::ListenAddress => "IP:PORT, or :PORT for all addresses, such as :8000".into(),
            Kind::AbsolutePath => "an absolute path".into(),
            Kind::HttpUrl => "http://HOST[:PORT] without a path (put TLS into a proxy in front)".into(),
            Kind::PostgresUrl => "postgres://USER[:PASSWORD]@HOST[:PORT]/DATABASE or KEY=VALUE pairs".into(),
            Kind::Secret => {
                format!("at least {MIN_SECRET_BYTES} random characters, such as from `openssl rand -hex 32`")
            }
            Kind::Token => "the token as it was given out".into(),
            Kind::LogLevel => "off, error, warn, info, debug or trace".into(),
            Kind::Number { min, max } => format!("a whole number from {min} to {max}"),
            Kind::Range { min, max } => format!("FIRST-LAST, whole numbers from {min} to {max}"),
            Kind::Boolean => "true or false".into(),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Ipv4 => "an IPv4 address".into(),
            Kind::Domain => "a DNS domain such as capsules.example.com".into(),
            Kind::IpList => "IP addresses, separated by commas".into(),
        }
    }

    /// Whether a value may not be shown in messages.
    pub fn is_secret(self) -> bool {
        matches!(self, Kind::PostgresUrl | Kind::Secret | Kind::Token)
    }

    fn check(self, value: &str) -> bool {
        match self {
            Kind::ListenAddress => parse_listen_address(value).is_some(),
            Kind::AbsolutePath => Path::new(value).is_absolute(),
            Kind::HttpUrl => HttpUrl::parse(value).is_some(),
            Kind::PostgresUrl => {
                let url = ["postgres://", "postgresql://"].iter().find_map(|p| value.strip_prefix(p));
                url.map_or_else(|| value.contains('='), |rest| !rest.is_empty())
            }
            Kind::Secret => value.len() >= MIN_SECRET_BYTES,
            Kind::Token => !value.is_empty() && value.bytes().all(|b| b.is_ascii_graphic()),
            Kind::LogLevel => ["off", "error", "warn", "info", "debug", "trace"].contains(&value),
            Kind::Number { min, max } => parse_digits::<u64>(value).is_some_and(|n| (min..=max).contains(&n)),
            Kind::Range { min, max } => {
                parse_range(value).is_some_and(|(first, last)| min <= first && first <= last && last <= max)
            }
            Kind::Boolean => matches!(value, "true" | "false"),
            Kind::Choice(words) => words.contains(&value),
            Kind::Ipv4 => value.parse::<Ipv4Addr>().is_ok(),
            Kind::Domain => is_host_name(value) && value.parse::<IpAddr>().is_err(),
            Kind::IpList => parse_ip_list(value).is_some(),
        }
    }
}

/// IP addresses, separated by commas. An IPv4 address in IPv6's form is the IPv4 address.
pub fn parse_ip_list(text: &str) -> Option<Vec<IpAddr>> {
    text.split(',').map(|item| item.trim().parse::<IpAddr>().ok().map(|a| a.to_canonical())).collect()
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Who reads it.
    pub program: Program,
    /// What its value must be.
    pub kind: Kind,
    /// Its value when it is not set.
    pub default: Option<&'static str>,
    /// What it is for, for `--help` and the README.
    pub purpose: &'static str,
}

const fn variable(
    name: &'static str,
    program: Program,
    kind: Kind,
    default: Option<&'static str>,
    purpose: &'static str,
) -> Variable {
    Variable { name, program, kind, default, purpose }
}

/// Every variable that there is.
pub const VARIABLES: &[Variable] = &[
    variable("DATABASE_URL", Program::ControlPlane, Kind::PostgresUrl, None, "the PostgreSQL database"),
    variable(
        "JWT_SECRET",
        Program::ControlPlane,
        Kind::Secret,
        None,
        "signs logins and derives host credentials; the same for every control plane of one database",
    ),
    variable(
        "WRENN_CP_LISTEN_ADDR",
        Program::ControlPlane,
        Kind::ListenAddress,
        Some(":8000"),
        "where the control plane serves its HTTP API",
    ),
    variable(
        "WRENN_PROXY_DOMAIN",
        Program::ControlPlane,
        Kind::Domain,
        None,
        "the domain of services in capsules, PORT-CAPSULE.DOMAIN; without it, any domain is taken",
    ),
    variable(
        "WRENN_TRUSTED_PROXIES",
        Program::ControlPlane,
        Kind::IpList,
        None,
        "the proxies whose X-Forwarded-For says whom a request comes from",
    ),
    variable(
        "WRENN_DATABASE_CONNECTIONS",
        Program::ControlPlane,
        Kind::Number { min: 1, max: 64 },
        Some("4"),
        "worker threads of the control plane, each with its own database connection",
    ),
    variable(
        "WRENN_HOST_LISTEN_ADDR",
        Program::Agent,
        Kind::ListenAddress,
        Some(":50051"),
        "where the host agent takes the control plane's sessions",
    ),
    variable(
        "WRENN_DIR",
        Program::Agent,
        Kind::AbsolutePath,
        Some("/var/lib/wrenn"),
        "the host's data: kernels, images, capsules, snapshots and the host token",
    ),
    variable(
        "WRENN_CP_URL",
        Program::Agent,
        Kind::HttpUrl,
        None,
        "the control plane's address, for registration and heartbeats",
    ),
    variable(
        "WRENN_REGISTRATION_TOKEN",
        Program::Agent,
        Kind::Token,
        None,
        "the one-time registration token, instead of --register",
    ),
    variable(
        "WRENN_VMM",
        Program::Agent,
        Kind::Choice(&["auto", "qemu", "firecracker"]),
        Some("auto"),
        "what capsules run in; auto is Firecracker where one is installed and KVM works, else QEMU",
    ),
    variable(
        "WRENN_FIRECRACKER_BIN",
        Program::Agent,
        Kind::AbsolutePath,
        None,
        "the Firecracker program; without it, firecracker of /usr/local/bin or /usr/bin",
    ),
    variable(
        "WRENN_JAILER_BIN",
        Program::Agent,
        Kind::AbsolutePath,
        None,
        "Firecracker's jailer; without it, jailer beside Firecracker, in /usr/local/bin or /usr/bin",
    ),
    variable(
        "WRENN_FIRECRACKER_UNJAILED",
        Program::Agent,
        Kind::Boolean,
        Some("false"),
        "whether Firecracker may run without its jailer, which is less safe",
    ),
    variable(
        "WRENN_QEMU_BIN",
        Program::Agent,
        Kind::AbsolutePath,
        None,
        "the QEMU program; without it, qemu-system-x86_64 of the PATH",
    ),
    variable(
        "WRENN_SLOTS",
        Program::Agent,
        Kind::Range { min: 1, max: 65_534 },
        Some("1-65534"),
        "the network slots that this agent uses; several agents on one machine need disjoint ranges",
    ),
    variable(
        "WRENN_GUEST_DNS",
        Program::Agent,
        Kind::Ipv4,
        None,
        "the name server of capsules with internet access; without it, the host's first that is public",
    ),
    variable(
        "WRENN_VCPU_OVERCOMMIT",
        Program::Agent,
        Kind::Number { min: 1, max: 64 },
        Some("8"),
        "how many virtual CPUs are promised to capsules for each core of the host",
    ),
    variable(
        "WRENN_DISK_OVERCOMMIT",
        Program::Agent,
        Kind::Number { min: 1, max: 1000 },
        Some("8"),
        "how many times over free disk space is promised to capsules",
    ),
    variable(
        "WRENN_DISK_BYTES_PER_SEC",
        Program::Agent,
        Kind::Number { min: 0, max: 1_000_000_000_000 },
        Some("0"),
        "how many bytes a second a capsule may read from and write to its disk; 0 for as many as there are",
    ),
    variable(
        "WRENN_DISK_OPS_PER_SEC",
        Program::Agent,
        Kind::Number { min: 0, max: 1_000_000_000 },
        Some("0"),
        "how many requests a second a capsule may make to its disk; 0 for as many as there are",
    ),
    variable(
        "WRENN_HIBERNATE_AFTER_SEC",
        Program::Agent,
        Kind::Number { min: 0, max: 31_536_000 },
        Some("0"),
        "after how many seconds a paused capsule's memory is compressed on disk (zstd); 0 for never",
    ),
    variable(
        "WRENN_MAX_RUN_SEC",
        Program::Agent,
        Kind::Number { min: 0, max: 31_536_000 },
        Some("0"),
        "after how many seconds a capsule that runs is paused, used or not; 0 for never",
    ),
    variable("LOG_LEVEL", Program::Both, Kind::LogLevel, Some("info"), "how much is logged to stderr"),
    variable("WRENN_API_KEY", Program::Client, Kind::Token, None, "a client's API key"),
    variable("WRENN_TOKEN", Program::Client, Kind::Token, None, "a client's login token"),
    variable("WRENN_BASE_URL", Program::Client, Kind::Token, None, "the API address that a client uses"),
    variable("WRENN_DOMAIN", Program::Client, Kind::Domain, None, "the domain of capsules' services"),
];

/// Something wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigError {
    /// A `WRENN_` variable that no program has.
    Unknown {
        /// Its name.
        name: String,
        /// The known name most like it.
        similar: &'static str,
    },
    /// A value that its variable does not accept.
    Malformed {
        /// The variable.
        name: &'static str,
        /// The value, unless it is secret.
        value: Option<String>,
        /// What it accepts.
        accepts: String,
    },
    /// A variable without a default that is not set.
    Missing {
        /// The variable.
        name: &'static str,
        /// What it accepts.
        accepts: String,
    },
    /// A line of the `.env` file that is not `NAME=VALUE`.
    BadLine {
        /// Its number, from 1.
        line: usize,
    },
    /// The `.env` file is there but cannot be read.
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The `.env` file has a secret, and others than its owner may read or change it.
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// The variable.
        name: &'static str,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Unknown { name, similar } => {
                write!(f, "{name} is not a variable of Wrenn; did you mean {similar}? Unset or rename it")
            }
            ConfigError::Malformed { name, value: Some(value), accepts } => {
                write!(f, "{name} is {value:?}, but accepts {accepts}")
            }
            ConfigError::Malformed { name, value: None, accepts } => {
                write!(f, "{name} has a value that it does not accept; it accepts {accepts}")
            }
            ConfigError::Missing { name, accepts } => {
                write!(f, "{name} is not set; set it in the environment or in .env to {accepts}")
            }
            ConfigError::BadLine { line } => {
                write!(
                    f,
                    "line {line} of the .env file is not NAME=VALUE; quote values with spaces at an end"
                )
            }
            ConfigError::Unreadable { path, reason } => {
                write!(f, "{} cannot be read: {reason}", path.display())
            }
            ConfigError::Open { path, mode, name } => write!(
                f,
                "{} has mode {mode:04o}, so that others can read or change {name}: run `chmod 600 {0}`, and where \
                 somebody may have read it, put a new value there",
                path.display()
            ),
        }
    }
}

impl std::error::Error for ConfigError {}

/// The checked values of one program's variables.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    values: BTreeMap<&'static str, String>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.values.iter().map(|(name, value)| {
            let secret = find(name).is_none_or(|v| v.kind.is_secret());
            (name, if secret { "(not shown)" } else { value.as_str() })
        });
        f.debug_map().entries(shown).finish()
    }
}

impl Settings {
    /// Reads `program`'s settings from the environment's pairs and an `.env` file's text. An empty value
    /// is as good as none.
    ///
    /// # Errors
    /// Everything that is wrong, in the order of the names.
    pub fn read(
        program: Program,
        environment: impl IntoIterator<Item = (String, String)>,
        dot_env: &str,
    ) -> Result<Settings, Vec<ConfigError>> {
        let mut errors = Vec::new();
        let mut given = BTreeMap::new();
        match parse_dot_env(dot_env) {
            Ok(pairs) => given.extend(pairs),
            Err(error) => errors.push(error),
        }
        given.extend(environment);
        for name in given.keys().filter(|n| n.starts_with(OWN_PREFIX) && find(n).is_none()) {
            if !TEST_PREFIXES.iter().any(|p| name.starts_with(p)) {
                errors.push(ConfigError::Unknown { name: name.clone(), similar: most_similar(name) });
            }
        }
        let mut values = BTreeMap::new();
        for row in VARIABLES.iter().filter(|v| v.program == program || v.program == Program::Both) {
            let value = given.get(row.name).map(String::as_str).filter(|v| !v.is_empty()).or(row.default);
            match value {
                Some(value) if value.len() <= MAX_VALUE_BYTES && row.kind.check(value) => {
                    values.insert(row.name, value.to_string());
                }
                Some(value) => errors.push(ConfigError::Malformed {
                    name: row.name,
                    value: (!row.kind.is_secret()).then(|| value.chars().take(80).collect()),
                    accepts: row.kind.accepts(),
                }),
                None => {}
            }
        }
        if errors.is_empty() { Ok(Settings { values }) } else { Err(errors) }
    }

    /// [`Settings::read`] of this process's environment and the `.env` file at `path`, which may be
    /// missing. With a secret in it, it has to be its owner's alone.
    pub fn load(program: Program, path: &Path) -> Result<Settings, Vec<ConfigError>> {
        let unreadable =
            |reason: String| Err(vec![ConfigError::Unreadable { path: path.to_path_buf(), reason }]);
        let mut mode = 0;
        let text = match std::fs::metadata(path) {
            Ok(m) if m.len() > MAX_DOT_ENV_BYTES => {
                return unreadable(format!("it is longer than {MAX_DOT_ENV_BYTES} bytes"));
            }
            Ok(m) => match std::fs::read_to_string(path) {
                Ok(text) => {
                    mode = m.mode() & 0o7777;
                    text
                }
                Err(e) => return unreadable(e.to_string()),
            },
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return unreadable(e.to_string()),
        };
        // A variable that is not UTF-8 cannot be one of ours with a good value: its lossy form is refused
        // where it matters and ignored where it does not.
        let environment = std::env::vars_os()
            .map(|(n, v)| (n.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()));
        let settings = Settings::read(program, environment, &text);
        let open = (mode & OPEN_TO_OTHERS != 0).then(|| secret_in(&text)).flatten();
        let Some(name) = open else { return settings };
        let mut errors = settings.err().unwrap_or_default();
        errors.push(ConfigError::Open { path: path.to_path_buf(), mode, name });
        Err(errors)
    }

    /// The value of a variable, if it is set or has a default.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The value of a variable that must be set.
    ///
    /// # Errors
    /// [`ConfigError::Missing`].
    pub fn require(&self, name: &'static str) -> Result<&str, ConfigError> {
        self.get(name).ok_or_else(|| ConfigError::Missing {
            name,
            accepts: find(name).map_or_else(|| "a value".into(), |v| v.kind.accepts()),
        })
    }

    /// The value of a [`Kind::ListenAddress`].
    pub fn listen_address(&self, name: &'static str) -> Result<SocketAddr, ConfigError> {
        self.typed(name, parse_listen_address)
    }

    /// The value of a [`Kind::AbsolutePath`].
    pub fn path(&self, name: &'static str) -> Result<PathBuf, ConfigError> {
        self.typed(name, |v| Some(PathBuf::from(v)))
    }

    /// The value of a [`Kind::HttpUrl`].
    pub fn http_url(&self, name: &'static str) -> Result<HttpUrl, ConfigError> {
        self.typed(name, HttpUrl::parse)
    }

    /// The value of a [`Kind::Number`].
    pub fn number(&self, name: &'static str) -> Result<u64, ConfigError> {
        self.typed(name, parse_digits)
    }

    /// The value of a [`Kind::Range`].
    pub fn range(&self, name: &'static str) -> Result<(u32, u32), ConfigError> {
        self.typed(name, parse_range)
    }

    /// The value of a [`Kind::Ipv4`].
    pub fn ipv4(&self, name: &'static str) -> Result<Ipv4Addr, ConfigError> {
        self.typed(name, |v| v.parse().ok())
    }

    /// The value of a [`Kind::Boolean`].
    pub fn boolean(&self, name: &'static str) -> Result<bool, ConfigError> {
        self.typed(name, |v| v.parse().ok())
    }

    fn typed<T>(&self, name: &'static str, parse: impl Fn(&str) -> Option<T>) -> Result<T, ConfigError> {
        let value = self.require(name)?;
        parse(value).ok_or_else(|| ConfigError::Malformed {
            name,
            value: None,
            accepts: find(name).map_or_else(|| "another value".into(), |v| v.kind.accepts()),
        })
    }
}

/// The variables of a program as lines for its `--help`.
pub fn help(program: Program) -> String {
    let mut out = String::new();
    for row in VARIABLES.iter().filter(|v| v.program == program || v.program == Program::Both) {
        let default = row.default.map(|d| format!(" [default: {d}]")).unwrap_or_default();
        out.push_str(&format!(
            "  {}{default}\n      {}; accepts {}\n",
            row.name,
            row.purpose,
            row.kind.accepts()
        ));
    }
    out
}

/// Where an HTTP service is: `http://HOST[:PORT]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpUrl {
    /// A DNS name or an IP address, IPv6 without its brackets.
    pub host: String,
    /// The TCP port, 80 when none was given.
    pub port: u16,
}

impl HttpUrl {
    /// Reads `http://HOST[:PORT][/]`.
    pub fn parse(text: &str) -> Option<HttpUrl> {
        let rest = text.strip_prefix("http://")?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
            let (host, rest) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        } else {
            match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            }
        };
        if !host.contains(':') && !is_host_name(host) {
            return None;
        }
        let port = port.map_or(Some(80), parse_digits)?;
        (port != 0).then(|| HttpUrl { host: host.to_string(), port })
    }

    /// The value of the `Host` header.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == 80 { host } else { format!("{host}:{}", self.port) }
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority())
    }
}

/// A secret that an `.env` file gives, whichever program it is for.
fn secret_in(dot_env: &str) -> Option<&'static str> {
    let pairs = parse_dot_env(dot_env).ok()?;
    let given = pairs.iter().filter(|(_, value)| !value.is_empty());
    given.filter_map(|(name, _)| find(name)).find(|row| row.kind.is_secret()).map(|row| row.name)
}

fn find(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|v| v.name == name)
}

/// `IP:PORT`, or `:PORT` for every address of the machine (IPv6's wildcard would refuse IPv4 where
/// `bindv6only` is set, so it is IPv4's).
fn parse_listen_address(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix(':') {
        Some(port) => Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, parse_digits(port)?))),
        None => text.parse().ok(),
    }
}

/// Digits only: `FromStr` of integers takes a plus sign too.
fn parse_digits<T: FromStr>(text: &str) -> Option<T> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

fn parse_range(text: &str) -> Option<(u32, u32)> {
    let (first, last) = text.split_once('-')?;
    Some((parse_digits(first)?, parse_digits(last)?))
}

/// RFC 1123 host names: labels of letters, digits and inner hyphens.
fn is_host_name(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// The lines of an `.env` file: `NAME=VALUE`, `export` before it, `#` comments, and values in single or
/// double quotes, taken as they are. No expansion and no escapes: what is there is the value.
fn parse_dot_env(text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    let mut pairs = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = ConfigError::BadLine { line: index + 1 };
        let line = line.strip_prefix("export ").unwrap_or(line);
        let Some((name, value)) = line.split_once('=') else { return Err(bad) };
        let (name, value) = (name.trim_end(), value.trim());
        let named = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !named {
            return Err(bad);
        }
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let value = match quote {
            Some(q) => {
                let Some((inside, after)) = value[1..].split_once(q) else { return Err(bad) };
                let after = after.trim_start();
                if !after.is_empty() && !after.starts_with('#') {
                    return Err(bad);
                }
                inside
            }
            None => value.split_once(" #").map_or(value, |(before, _)| before.trim_end()),
        };
        pairs.push((name.to_string(), value.to_string()));
    }
    Ok(pairs)
}

/// The known name that takes the fewest edits to come to from `name`.
fn most_similar(name: &str) -> &'static str {
    let best = VARIABLES.iter().min_by_key(|v| edits(name.as_bytes(), v.name.as_bytes()));
    best.map_or("another", |v| v.name)
}

/// Levenshtein's distance.
fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().take(MAX_VALUE_BYTES).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(program: Program, pairs: &[(&str, &str)], file: &str) -> Result<Settings, Vec<ConfigError>> {
        Settings::read(program, pairs.iter().map(|(n, v)| (n.to_string(), v.to_string())), file)
    }

    #[test]
    fn a_file_with_a_secret_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("wrenn-dot-env-{}", std::process::id()));
        let open = |text: &str, mode: u32| {
            std::fs::write(&path, text).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("its mode");
            let result =
                [Program::ControlPlane, Program::Agent].map(|program| Settings::load(program, &path));
            result.map(|loaded| match loaded {
                Ok(_) => None,
                Err(errors) => errors.into_iter().find(|e| matches!(e, ConfigError::Open { .. })),
            })
        };
        let secret = format!("LOG_LEVEL=info\nJWT_SECRET={}\n", "x".repeat(MIN_SECRET_BYTES));
        let database = "DATABASE_URL=postgres://u:p@h/d\n".to_string();
        for (text, name) in [(&secret, "JWT_SECRET"), (&database, "DATABASE_URL")] {
            for mode in [0o644, 0o640, 0o604, 0o620, 0o602, 0o666] {
                let expected = ConfigError::Open { path: path.clone(), mode, name };
                assert_eq!(open(text, mode), [Some(expected.clone()), Some(expected)], "{mode:o}");
            }
            assert_eq!(open(text, 0o600), [None, None]);
            assert_eq!(open(text, 0o400), [None, None]);
        }
        // Nothing in it is secret.
        assert_eq!(open("LOG_LEVEL=info\nJWT_SECRET=\n# JWT_SECRET=x\n", 0o644), [None, None]);
        // Whatever else is wrong is told with it.
        std::fs::write(&path, format!("{secret}LOG_LEVEL=loud\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("its mode");
        let errors = Settings::load(Program::Agent, &path).expect_err("both");
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(errors.len(), 2, "{errors:?}");
        let text = errors[1].to_string();
        assert!(text.contains("mode 0644") && text.contains("chmod 600") && !text.contains("xxx"), "{text}");
    }

    #[test]
    fn every_variable_is_in_the_table_of_the_readme_and_in_the_example() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let read = |name: &str| std::fs::read_to_string(root.join(name)).expect("a file of the repository");
        let (readme, example) = (read("README.md"), read(".env.example"));
        for row in VARIABLES.iter().filter(|v| v.program != Program::Client) {
            let program = match row.program {
                Program::ControlPlane => "cp",
                Program::Agent => "agent",
                _ => "both",
            };
            let start = format!("| `{}` | {program} | ", row.name);
            let line = readme.lines().find(|line| line.starts_with(&start));
            let line = line.unwrap_or_else(|| panic!("README.md has no line {start:?}"));
            if let Some(default) = row.default {
                assert!(line[start.len()..].starts_with(&format!("`{default}` | ")), "{line}");
            }
            let is_there = |line: &str| {
                line.trim_start_matches("# ").strip_prefix(row.name).is_some_and(|rest| rest.starts_with('='))
            };
            assert!(example.lines().any(is_there), ".env.example has no line for {}", row.name);
        }
        let commented_in = example.lines().filter(|line| !line.starts_with('#'));
        let with_secret = commented_in.map(|line| match line {
            "JWT_SECRET=" => "JWT_SECRET=0123456789abcdef0123456789abcdef",
            other => other,
        });
        let text = with_secret.collect::<Vec<_>>().join("\n");
        for program in [Program::ControlPlane, Program::Agent] {
            Settings::read(program, [], &text).expect("the example is one");
        }
    }

    #[test]
    fn defaults_hold_where_nothing_is_set() {
        let settings = read(Program::Agent, &[("PATH", "/bin"), ("WRENN_CP_URL", "")], "").expect("defaults");
        assert_eq!(
            settings.listen_address("WRENN_HOST_LISTEN_ADDR").expect("address").to_string(),
            "0.0.0.0:50051"
        );
        assert_eq!(settings.path("WRENN_DIR").expect("path"), Path::new("/var/lib/wrenn"));
        assert_eq!(settings.range("WRENN_SLOTS").expect("range"), (1, 65_534));
        assert_eq!(settings.get("WRENN_CP_URL"), None);
        let missing = settings.http_url("WRENN_CP_URL").expect_err("not set");
        assert!(missing.to_string().starts_with("WRENN_CP_URL is not set"), "{missing}");
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let file = "WRENN_DIR=/a\nLOG_LEVEL=debug\n";
        let settings = read(Program::Agent, &[("WRENN_DIR", "/b")], file).expect("good");
        assert_eq!((settings.get("WRENN_DIR"), settings.get("LOG_LEVEL")), (Some("/b"), Some("debug")));
    }

    #[test]
    fn one_file_serves_both_programs() {
        let file = "DATABASE_URL=postgres://w@localhost/w\nJWT_SECRET=short\nWRENN_CP_URL=http://cp:8000\n";
        assert!(read(Program::Agent, &[], file).is_ok());
        let errors = read(Program::ControlPlane, &[], file).expect_err("short secret");
        assert_eq!(errors.len(), 1);
        let text = errors[0].to_string();
        assert!(text.starts_with("JWT_SECRET ") && !text.contains("short"), "{text}");
    }

    #[test]
    fn unknown_names_of_ours_are_refused_and_others_left_alone() {
        let pairs = [("WRENN_LISTEN", "x"), ("WRENN_TEST_DIR", "/t"), ("OTHER", "y"), ("WRENN_API_KEY", "k")];
        let errors = read(Program::Agent, &pairs, "WRENN_DIRR=/x").expect_err("two unknown");
        let names: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(names[0].contains("WRENN_DIRR") && names[0].contains("WRENN_DIR?"), "{names:?}");
        assert!(names[1].contains("WRENN_LISTEN"), "{names:?}");
    }

    #[test]
    fn every_kind_takes_and_refuses() {
        let number = Kind::Number { min: 1, max: 64 };
        let range = Kind::Range { min: 1, max: 65_534 };
        for (kind, good, bad) in [
            (Kind::ListenAddress, ":0", "50051"),
            (Kind::ListenAddress, "127.0.0.1:8000", "localhost:8000"),
            (Kind::ListenAddress, "[::1]:8000", ":65536"),
            (Kind::ListenAddress, ":8000", ":+80"),
            (Kind::AbsolutePath, "/var/lib/wrenn", "var/lib"),
            (Kind::HttpUrl, "http://cp.example.com/", "https://cp.example.com"),
            (Kind::HttpUrl, "http://10.0.0.1:8000", "http://10.0.0.1:8000/v1"),
            (Kind::HttpUrl, "http://[::1]:8000", "http://[::1:8000"),
            (Kind::HttpUrl, "http://localhost", "http://user@localhost"),
            (Kind::HttpUrl, "http://a:1", "http://a:0"),
            (Kind::PostgresUrl, "postgres://w:p@localhost/w", "mysql://localhost"),
            (Kind::PostgresUrl, "host=/run user=w", "postgres://"),
            (Kind::Secret, "0123456789abcdef0123456789abcdef", "0123456789abcdef"),
            (Kind::Token, "abc", "a b"),
            (Kind::LogLevel, "info", "INFO!"),
            (number, "64", "65"),
            (number, "1", "-1"),
            (range, "1-10", "10-1"),
            (range, "5-5", "0-5"),
            (range, "1-65534", "1-65535"),
            (Kind::Boolean, "true", "yes"),
            (Kind::Choice(&["auto", "qemu"]), "qemu", "xen"),
            (Kind::Ipv4, "9.9.9.9", "9.9.9"),
            (Kind::IpList, "127.0.0.1", "127.0.0.1:80"),
            (Kind::IpList, "10.0.0.1, 2001:db8::1", "10.0.0.1,"),
            (Kind::IpList, "::ffff:10.0.0.1", "10.0.0.0/8"),
            (Kind::Domain, "capsules.example.com", "10.0.0.1"),
            (Kind::Domain, "a", "a..b"),
        ] {
            assert!(kind.check(good), "{kind:?} should take {good:?}");
            assert!(!kind.check(bad), "{kind:?} should refuse {bad:?}");
        }
    }

    #[test]
    fn the_table_is_sound() {
        for (index, row) in VARIABLES.iter().enumerate() {
            assert!(row.default.is_none_or(|d| row.kind.check(d)), "{}", row.name);
            assert!(VARIABLES[..index].iter().all(|v| v.name != row.name), "{} twice", row.name);
        }
        assert!(help(Program::Agent).contains("WRENN_DIR [default: /var/lib/wrenn]"));
        assert!(!help(Program::Agent).contains("JWT_SECRET"));
    }

    #[test]
    fn dot_env_lines() {
        let text = "# note\n\nexport A=1\nB = two words  # note\nC=\"q # not a note\" # note\nD='x'\nE=\n";
        let pairs = parse_dot_env(text).expect("good");
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("A", "1"), ("B", "two words"), ("C", "q # not a note"), ("D", "x"), ("E", "")]);
        for bad in ["A", "=x", "1A=x", "A B=x", "A=\"x", "A='x' y"] {
            assert_eq!(parse_dot_env(&format!("X=1\n{bad}")), Err(ConfigError::BadLine { line: 2 }), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let secret = "0123456789abcdef0123456789abcdef";
        let settings = read(Program::ControlPlane, &[("JWT_SECRET", secret)], "").expect("good");
        assert_eq!(settings.require("JWT_SECRET"), Ok(secret));
        assert!(!format!("{settings:?}").contains(secret));
    }

    #[test]
    fn http_urls_are_written_as_they_are_read() {
        for text in ["http://cp", "http://cp:8000", "http://[::1]:8000", "http://10.0.0.1"] {
            assert_eq!(HttpUrl::parse(text).expect(text).to_string(), text);
        }
    }
}
