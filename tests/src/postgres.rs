//! A private PostgreSQL: its own data directory, a Unix socket only, a password.

use crate::process::{Account, Background, Pid, random_hex, run, wait_until, write_secret};
use crate::{Context, Failure, Result};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const START_LIMIT: Duration = Duration::from_secs(60);

/// A PostgreSQL of our own.
#[derive(Debug)]
pub struct Postgres {
    directory: PathBuf,
    bin: PathBuf,
    account: Option<Account>,
    server: Option<Background>,
}

fn binaries() -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|e| {
            let path = e.ok()?.path();
            let version = path.file_name()?.to_str()?.parse().ok()?;
            path.join("bin/initdb").exists().then(|| (version, path.join("bin")))
        })
        .collect();
    found.sort();
    found.pop().map(|f| f.1).ok_or_else(|| {
        Failure(
            "PostgreSQL is not installed: run rootfs/install-prerequisites.sh, or apt-get install postgresql"
                .into(),
        )
    })
}

impl Postgres {
    /// Makes the data directory under `directory`, or takes the one that is there, and starts the server.
    pub fn start(directory: &Path) -> Result<Postgres> {
        // SAFETY: geteuid(2) takes nothing and cannot fail.
        let is_root = unsafe { libc::geteuid() } == 0;
        // PostgreSQL refuses to run as root.
        let account = if is_root { Some(Account::named("postgres")?) } else { None };
        let mut postgres =
            Postgres { directory: directory.to_path_buf(), bin: binaries()?, account, server: None };
        fs::create_dir_all(directory).context(directory.display())?;
        let password_file = directory.join("password");
        let fresh = !directory.join("data/PG_VERSION").exists();
        if fresh {
            let password = random_hex(16)?;
            write_secret(&password_file, &password)?;
            postgres.own(directory)?;
            postgres.own(&password_file)?;
            let mut initdb = postgres.command("initdb");
            initdb
                .args(["--username=wrenn", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"])
                .arg(format!("--pwfile={}", password_file.display()))
                .arg("--pgdata")
                .arg(directory.join("data"));
            run(&mut initdb, None).context("make the database")?;
        }
        postgres.launch()?;
        if fresh {
            let mut createdb = postgres.command("createdb");
            createdb
                .env("PGPASSWORD", postgres.password()?)
                .arg("--host")
                .arg(directory)
                .args(["--username=wrenn", "wrenn"]);
            run(&mut createdb, None).context("create the database")?;
        }
        Ok(postgres)
    }

    /// The database in `directory` that an earlier run left running.
    pub fn attach(directory: &Path) -> Result<Postgres> {
        Ok(Postgres { directory: directory.to_path_buf(), bin: binaries()?, account: None, server: None })
    }

    fn own(&self, path: &Path) -> Result<()> {
        if let Some(account) = self.account {
            std::os::unix::fs::chown(path, Some(account.uid), Some(account.gid)).context(path.display())?;
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(self.bin.join(program));
        command.current_dir("/");
        if let Some(account) = self.account {
            command.gid(account.gid).uid(account.uid);
        }
        command
    }

    /// Starts the server on the data that is there; returns when it takes connections.
    pub fn launch(&mut self) -> Result<()> {
        let mut command = Command::new(self.bin.join("postgres"));
        command
            .current_dir("/")
            .arg("-D")
            .arg(self.directory.join("data"))
            .arg("-k")
            .arg(&self.directory)
            .args(["-c", "listen_addresses=", "-c", "unix_socket_permissions=0777"])
            .args(["-c", "max_connections=50", "-c", "log_min_messages=warning"]);
        let log = self.directory.join("postgres.log");
        let mut server = Background::start(command, self.account, &log, None)?;
        let socket = self.directory.join(".s.PGSQL.5432");
        let ready = self.directory.join("data/postmaster.pid");
        wait_until("PostgreSQL's start", START_LIMIT, || {
            let state = fs::read_to_string(&ready).unwrap_or_default();
            server.has_ended() || (state.contains("ready") && UnixStream::connect(&socket).is_ok())
        })?;
        if server.has_ended() {
            return Err(Failure(format!("PostgreSQL ended; its log:\n{}", crate::process::tail(&log))));
        }
        self.server = Some(server);
        Ok(())
    }

    /// Stops the server at once (SIGINT: connections are cut, the data is whole).
    pub fn stop(&mut self) -> Result<()> {
        match self.server.take() {
            Some(mut server) => server.end(libc::SIGINT).context("stop PostgreSQL"),
            None => Ok(()),
        }
    }

    /// The server's process, when it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.server.as_ref().map(|s| s.pid)
    }

    fn password(&self) -> Result<String> {
        fs::read_to_string(self.directory.join("password")).context("the database's password file")
    }

    /// The URL for `DATABASE_URL`: through the Unix socket. It holds the password.
    pub fn url(&self) -> Result<String> {
        let host = self.directory.display().to_string().replace('/', "%2F");
        Ok(format!("postgresql://wrenn:{}@{host}/wrenn", self.password()?))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("{e}");
        }
    }
}
