//! A private PostgreSQL for one test run: its own data directory under `/tmp`, a Unix socket only. It is
//! stopped and removed when the run ends, however that comes about: a shell waits for the end of a pipe
//! that this process holds.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const START_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// Runs the server until its standard input ends, then stops it and removes its directory.
const KEEPER: &str = r#"
directory=$1; shift
"$@" </dev/null >"$directory/log" 2>&1 &
server=$!
read -r _
kill -INT "$server"
wait "$server"
rm -rf "$directory"
"#;

struct Server {
    directory: PathBuf,
    /// Ends with the pipe to it.
    _keeper: Child,
}

fn binaries() -> PathBuf {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin"))))
        .filter(|(_, path)| path.join("initdb").exists())
        .collect();
    found.sort();
    found.pop().expect("PostgreSQL is not installed: apt-get install postgresql").1
}

/// The ids of the account that PostgreSQL runs as, when this process is root: it refuses to be root.
fn account() -> Option<(u32, u32)> {
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let line = passwd.lines().find(|l| l.starts_with("postgres:")).expect("an account called postgres");
    let number = |n| line.split(':').nth(n).and_then(|f| f.parse().ok()).expect("a number in /etc/passwd");
    Some((number(2), number(3)))
}

fn command(program: &Path) -> Command {
    match account() {
        Some((uid, gid)) => {
            let mut command = Command::new("setpriv");
            command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".into()]);
            command.arg(program);
            command
        }
        None => Command::new(program),
    }
}

fn start(name: &str) -> Server {
    let directory = PathBuf::from(format!("/tmp/wrenn-cp-test-{}{name}", std::process::id()));
    fs::DirBuilder::new().mode(0o700).create(&directory).expect("make the directory");
    if let Some((uid, gid)) = account() {
        chown(&directory, Some(uid), Some(gid)).expect("chown");
    }
    let data = directory.join("data");
    let output = command(&binaries().join("initdb"))
        .args(["--username=wrenn", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"])
        .arg("--pgdata")
        .arg(&data)
        .current_dir("/")
        .output()
        .expect("initdb");
    assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    let server = command(&binaries().join("postgres"));
    let mut keeper = Command::new("/bin/sh");
    keeper.args(["-c", KEEPER, "keeper"]).arg(&directory).arg(server.get_program()).args(server.get_args());
    keeper.arg("-D").arg(&data).arg("-k").arg(&directory);
    keeper.args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200"]);
    keeper.current_dir("/").stdin(Stdio::piped());
    let keeper = keeper.spawn().expect("start PostgreSQL");
    let deadline = Instant::now() + START_LIMIT;
    let is_ready = || {
        let pid = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
        pid.contains("ready")
    };
    while !is_ready() {
        assert!(Instant::now() < deadline, "PostgreSQL does not start: see {}/log", directory.display());
        std::thread::sleep(POLL);
    }
    Server { directory, _keeper: keeper }
}

fn url(directory: &Path, name: &str) -> String {
    format!("postgresql://wrenn@{}/{name}", directory.display().to_string().replace('/', "%2F"))
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| start(""))
}

fn create(template: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let directory = &server().directory;
    let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let mut client = client(&url(directory, "postgres"));
    let statement = format!("create database {name} template {template}");
    let deadline = Instant::now() + START_LIMIT;
    // A database can be copied only once the connection of whoever filled it is really gone.
    while let Err(error) = client.batch_execute(&statement) {
        assert!(Instant::now() < deadline, "{statement}: {error}");
        std::thread::sleep(POLL);
    }
    name
}

/// The URL of a new, empty database.
pub fn new_database() -> String {
    url(&server().directory, &create("template0"))
}

/// The URL of a new database that holds what `fill` put into the first one.
pub fn new_filled_database(fill: impl FnOnce(&str)) -> String {
    static FILLED: OnceLock<String> = OnceLock::new();
    let template = FILLED.get_or_init(|| {
        let name = create("template0");
        fill(&url(&server().directory, &name));
        name
    });
    url(&server().directory, &create(template))
}

/// A plain client, for what tests do behind the program's back.
pub fn client(url: &str) -> postgres::Client {
    postgres::Client::connect(url, postgres::NoTls).expect("connect")
}

/// A server of its own for a test that does something to it: its URL and its first process.
pub fn own_server() -> (String, i32) {
    static OWN: OnceLock<Server> = OnceLock::new();
    let directory = &OWN.get_or_init(|| start("-own")).directory;
    let pid = fs::read_to_string(directory.join("data/postmaster.pid")).expect("a running server");
    let pid = pid.lines().next().and_then(|line| line.parse().ok()).expect("a process id");
    (url(directory, "postgres"), pid)
}
