//! PostgreSQL, control plane and host agent together, on loopback, with a registered host, an admin
//! user and an API key.

use crate::http::Client;
use crate::postgres::Postgres;
use crate::process::{Account, Background, Pid, random_hex, run, tail, wait_until, write_secret};
use crate::{Context, Failure, Result};
use serde_json::{Value, json};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The first user of every stack.
pub const ADMIN_EMAIL: &str = "admin@example.com";
/// Where a stack that is left running writes down its facts, secrets among them.
const SAVED: &str = "stack.json";
const START_LIMIT: Duration = Duration::from_secs(60);
/// The signal at which an agent destroys all capsules, as `wrenn-agent terminate` sends it.
const TERMINATE: i32 = libc::SIGUSR2;

/// What a stack is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where everything of the stack lives; made if need be.
    pub directory: PathBuf,
    /// The three programs.
    pub binaries: PathBuf,
    /// Kernel, initramfs and images, laid out as `WRENN_DIR` is.
    pub guest: PathBuf,
    /// The control plane's address; a free port of loopback when `None`.
    pub cp_address: Option<String>,
    /// The agent's address; a free port of loopback when `None`.
    pub agent_address: Option<String>,
}

impl Options {
    /// A stack in `directory` from the project's own `builds/`.
    pub fn new(directory: &Path) -> Options {
        let builds = project_root().join("builds");
        Options {
            directory: directory.to_path_buf(),
            guest: builds.join("guest"),
            binaries: builds,
            cp_address: None,
            agent_address: None,
        }
    }
}

/// The top of the source tree.
pub fn project_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// A running stack. Dropping it stops everything that it started.
#[derive(Debug)]
pub struct Stack {
    /// Where it lives.
    pub directory: PathBuf,
    /// The control plane's address, `ip:port`.
    pub cp_address: String,
    /// The agent's address, `ip:port`.
    pub agent_address: String,
    /// The admin's password.
    pub password: String,
    /// An API key of the admin's team.
    pub api_key: String,
    /// The registered host's id.
    pub host_id: String,
    /// The database; tests stop and start it.
    pub postgres: Postgres,
    environment: Vec<(String, String)>,
    cp: Option<Background>,
    agent: Option<Background>,
}

fn free_address() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr().context("find a free port")?.to_string())
}

/// Makes `to` hold what `from` holds, by hard links where it can.
pub fn link_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).context(to.display())?;
    for entry in fs::read_dir(from).context(format!("{}: run `make rootfs` first", from.display()))? {
        let entry = entry.context(from.display())?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type().context(from.display())?;
        if kind.is_dir() {
            link_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            let link = fs::read_link(entry.path()).context(entry.path().display())?;
            let _ = fs::remove_file(&target);
            std::os::unix::fs::symlink(link, &target).context(target.display())?;
        } else {
            let _ = fs::remove_file(&target);
            if fs::hard_link(entry.path(), &target).is_err() {
                fs::copy(entry.path(), &target).context(target.display())?;
            }
        }
    }
    Ok(())
}

impl Stack {
    /// Starts everything, up to a host that is online.
    pub fn start(options: &Options) -> Result<Stack> {
        let mut stack = Stack::start_without_host(options)?;
        stack.add_host()?;
        Ok(stack)
    }

    /// Starts PostgreSQL and the control plane, makes the admin and an API key.
    pub fn start_without_host(options: &Options) -> Result<Stack> {
        let directory = options.directory.clone();
        fs::create_dir_all(directory.join("bin")).context(directory.display())?;
        // Copies, so that the unprivileged control plane can run from a clone in a private directory.
        for name in ["wrenn-cp", "wrenn-agent"] {
            let from = options.binaries.join(name);
            let to = directory.join("bin").join(name);
            let _ = fs::remove_file(&to);
            fs::copy(&from, &to).context(format!("{}: run `make build` first", from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).context(to.display())?;
        }
        link_tree(&options.guest.join("kernels"), &directory.join("data/kernels"))?;
        link_tree(&options.guest.join("images"), &directory.join("data/images"))?;

        let cp_address = options.cp_address.clone().map_or_else(free_address, Ok)?;
        let agent_address = options.agent_address.clone().map_or_else(free_address, Ok)?;
        for address in [&cp_address, &agent_address] {
            TcpListener::bind(address)
                .context(format!("{address} is taken: stop what listens there, or name another address"))?;
        }
        let postgres = Postgres::start(&directory.join("postgres"))?;
        let environment = vec![
            ("DATABASE_URL".into(), postgres.url()?),
            ("JWT_SECRET".into(), random_hex(32)?),
            ("WRENN_CP_LISTEN_ADDR".into(), cp_address.clone()),
            ("WRENN_HOST_LISTEN_ADDR".into(), agent_address.clone()),
            ("WRENN_CP_URL".into(), format!("http://{cp_address}")),
            ("WRENN_DIR".into(), directory.join("data").display().to_string()),
            ("LOG_LEVEL".into(), std::env::var("LOG_LEVEL").unwrap_or_else(|_| "info".into())),
        ];
        let mut stack = Stack {
            directory,
            cp_address,
            agent_address,
            password: random_hex(12)?,
            api_key: String::new(),
            host_id: String::new(),
            postgres,
            environment,
            cp: None,
            agent: None,
        };
        run(&mut stack.command("wrenn-cp", &["migrate"]), None).context("wrenn-cp migrate")?;
        let create = ["user", "create", "--email", ADMIN_EMAIL, "--admin", "--password-stdin"];
        run(&mut stack.command("wrenn-cp", &create), Some(&format!("{}\n", stack.password)))
            .context("wrenn-cp user create")?;
        stack.start_cp()?;
        let key = stack.admin()?.post("/v1/api-keys", &json!({"name": "stack"}))?;
        stack.api_key = key.json()["key"].as_str().unwrap_or_default().to_string();
        if key.status != 201 || stack.api_key.is_empty() {
            return Err(Failure(format!("no API key: {} {}", key.status, key.error_message())));
        }
        Ok(stack)
    }

    /// A command with the environment that the program gets in this stack.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.directory.join("bin").join(program));
        command.args(arguments).env_clear().current_dir("/");
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        // The agent must not see the database's password, nor the key that makes tokens.
        let secret = ["DATABASE_URL", "JWT_SECRET"];
        command.envs(
            self.environment
                .iter()
                .filter(|(n, _)| program == "wrenn-cp" || !secret.contains(&n.as_str()))
                .cloned(),
        );
        command.envs(std::env::var("WRENN_QEMU_BIN").map(|v| ("WRENN_QEMU_BIN", v)));
        command
    }

    /// Where a program's output goes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    /// The agent's data directory.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Starts the control plane, as an unprivileged account where the stack runs as root.
    pub fn start_cp(&mut self) -> Result<()> {
        // SAFETY: geteuid(2) takes nothing and cannot fail.
        let is_root = unsafe { libc::geteuid() } == 0;
        let account = if is_root { Some(Account::named("nobody")?) } else { None };
        let log = self.log("cp");
        let mut cp = Background::start(self.command("wrenn-cp", &["serve"]), account, &log, None)?;
        let client = self.anonymous();
        wait_until("the control plane's start", START_LIMIT, || {
            cp.has_ended() || client.get("/health").is_ok_and(|a| a.status == 200)
        })?;
        if cp.has_ended() {
            return Err(Failure(format!("the control plane ended; its log:\n{}", tail(&log))));
        }
        self.cp = Some(cp);
        Ok(())
    }

    /// Creates the host's record and registers the agent with its token.
    pub fn register_host(&mut self) -> Result<()> {
        let created = self.admin()?.post("/v1/hosts", &json!({"type": "regular", "provider": "local"}))?;
        let body = created.json();
        let token = body["registration_token"].as_str().unwrap_or_default().to_string();
        if created.status != 201 || token.is_empty() {
            return Err(Failure(format!("no host: {} {}", created.status, created.error_message())));
        }
        self.host_id = body["host"]["id"].as_str().unwrap_or_default().to_string();
        let arguments = ["--register", "-", "--address", &self.agent_address.clone(), "--register-only"];
        run(&mut self.command("wrenn-agent", &arguments), Some(&format!("{token}\n")))
            .context("wrenn-agent --register")?;
        Ok(())
    }

    /// Registers this machine, starts the agent and waits until the host is online.
    pub fn add_host(&mut self) -> Result<()> {
        self.register_host()?;
        self.start_agent()?;
        let admin = self.admin()?;
        let path = format!("/v1/hosts/{}", self.host_id);
        let mut has_ended = false;
        // A host is "online" from its registration on; a heartbeat says that its agent serves.
        wait_until("the agent's first heartbeat", START_LIMIT, || {
            has_ended = self.agent.as_mut().is_none_or(Background::has_ended);
            has_ended || admin.get(&path).is_ok_and(|a| a.json()["last_heartbeat_at"].is_string())
        })
        .and(if has_ended { Err(Failure("the agent ended".into())) } else { Ok(()) })
        .map_err(|e| Failure(format!("{e}; the agent's log ends:\n{}", tail(&self.log("agent")))))
    }

    /// Starts the agent.
    pub fn start_agent(&mut self) -> Result<()> {
        let log = self.log("agent");
        self.agent = Some(Background::start(self.command("wrenn-agent", &[]), None, &log, None)?);
        Ok(())
    }

    /// Stops the control plane.
    pub fn stop_cp(&mut self) -> Result<()> {
        self.cp.take().map_or(Ok(()), |mut cp| cp.end(libc::SIGTERM)).context("stop the control plane")
    }

    /// Ends the agent by a signal.
    pub fn stop_agent(&mut self, signal: i32) -> Result<()> {
        self.agent.take().map_or(Ok(()), |mut agent| agent.end(signal)).context("stop the agent")
    }

    /// The processes of the control plane and the agent.
    pub fn pids(&self) -> (Option<Pid>, Option<Pid>) {
        (self.cp.as_ref().map(|p| p.pid), self.agent.as_ref().map(|p| p.pid))
    }

    /// Requests without credentials.
    pub fn anonymous(&self) -> Client {
        Client::new(&self.cp_address)
    }

    /// Requests as the admin, with a fresh token.
    pub fn admin(&self) -> Result<Client> {
        let login = json!({"email": ADMIN_EMAIL, "password": self.password});
        let answer = self.anonymous().post("/v1/auth/login", &login)?;
        match answer.json()["token"].as_str() {
            Some(token) if answer.status == 200 => {
                Ok(self.anonymous().with_header("Authorization", &format!("Bearer {token}")))
            }
            _ => Err(Failure(format!("login: {} {}", answer.status, answer.error_message()))),
        }
    }

    /// Requests with the API key.
    pub fn client(&self) -> Client {
        self.anonymous().with_header("X-API-Key", &self.api_key)
    }

    /// Has every capsule of this stack destroyed and the agent ended, whether one serves or not.
    pub fn terminate(&mut self) -> Result<()> {
        if !self.data().join("host-token").exists() {
            return Ok(());
        }
        // A child that has ended is only gone once it is waited for.
        let agent = self.agent.take();
        let ended =
            agent.map_or(Ok(()), |mut agent| if agent.has_ended() { Ok(()) } else { agent.end(TERMINATE) });
        let done =
            run(&mut self.command("wrenn-agent", &["terminate"]), None).context("wrenn-agent terminate");
        ended.and(done.map(drop))
    }

    /// Stops everything, the agent first with its capsules.
    pub fn stop(&mut self) -> Result<()> {
        let agent = self.terminate();
        let cp = self.stop_cp();
        let postgres = self.postgres.stop();
        agent.and(cp).and(postgres)
    }

    /// Leaves everything running and writes down what [`Stack::attach`] needs.
    pub fn leave_running(self) -> Result<()> {
        let (cp, agent) = self.pids();
        for (name, pid) in [("postgres", self.postgres.pid()), ("cp", cp), ("agent", agent)] {
            if let Some(pid) = pid {
                pid.save(&self.directory.join(format!("{name}.pid")))?;
            }
        }
        let saved = json!({
            "cp_address": self.cp_address,
            "agent_address": self.agent_address,
            "api_key": self.api_key,
            "email": ADMIN_EMAIL,
            "password": self.password,
            "host_id": self.host_id,
            "environment": self.environment,
        });
        write_secret(&self.directory.join(SAVED), &format!("{saved:#}\n"))?;
        // The processes live on; their guards must not run.
        std::mem::forget(self);
        Ok(())
    }

    /// The stack that an earlier run left in `directory`, if there is one. Dropping it stops nothing
    /// but what is started from here on.
    pub fn attach(directory: &Path) -> Result<Option<Stack>> {
        let Ok(text) = fs::read(directory.join(SAVED)) else { return Ok(None) };
        let saved: Value = serde_json::from_slice(&text).context(directory.join(SAVED).display())?;
        let text = |name: &str| saved[name].as_str().unwrap_or_default().to_string();
        let pair = |v: &Value| Some((v[0].as_str()?.to_string(), v[1].as_str()?.to_string()));
        Ok(Some(Stack {
            directory: directory.to_path_buf(),
            cp_address: text("cp_address"),
            agent_address: text("agent_address"),
            password: text("password"),
            api_key: text("api_key"),
            host_id: text("host_id"),
            postgres: Postgres::attach(&directory.join("postgres"))?,
            environment: saved["environment"].as_array().into_iter().flatten().filter_map(pair).collect(),
            cp: None,
            agent: None,
        }))
    }

    /// Whether a program that an earlier run left is still there.
    pub fn left_running(&self, name: &str) -> bool {
        Pid::load(&self.directory.join(format!("{name}.pid"))).is_some_and(|p| p.is_alive())
    }

    /// Ends what an earlier run left, the agent first, and removes the directory.
    pub fn stop_and_remove(self) -> Result<()> {
        for (name, signal) in [("agent", TERMINATE), ("cp", libc::SIGTERM), ("postgres", libc::SIGINT)] {
            if let Some(pid) = Pid::load(&self.directory.join(format!("{name}.pid"))) {
                pid.end(signal).context(format!("stop {name}"))?;
            }
            if name == "agent" && self.data().join("host-token").exists() {
                // One that was killed has left its capsules running.
                run(&mut self.command("wrenn-agent", &["terminate"]), None)?;
            }
        }
        fs::remove_dir_all(&self.directory).context(self.directory.display())
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            eprintln!("{e}");
        }
    }
}
