//! The daemon: one epoll loop that owns everything and hands each event to whom it concerns.

use crate::connection::{ConnectionId, Connections, Gate, StreamKey, Turn};
use crate::files::Files;
use crate::guest;
use crate::host_name;
use crate::identity::{self, Identity};
use crate::log::log;
use crate::metadata::Metadata;
use crate::ports::Ports;
use crate::process::Supervisor;
use crate::process::groups::Groups;
use crate::process::request::Defaults;
use crate::process::supervisor::Shell;
use crate::sampler::Sampler;
use crate::sys::epoll::{Epoll, Ready};
use crate::sys::{Errno, Fd, boot, clock, credentials, fd, signal, socket};
use crate::token::{Token, Way};
use crate::trust::Trust;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::SocketAddrV4;
use wire::message::{Error, FileWatch};

/// Bytes read at once from anything: two of the longest data frames.
const SCRATCH: usize = 2 * wire::session::MAX_DATA;
/// Connections accepted before others get their turn.
const MAX_ACCEPTS: usize = 16;
/// Events of one connection handled before others get their turn.
const MAX_TURNS: usize = 256;
/// How often all connections are served before the kernel is asked for news.
const MAX_PASSES: usize = 4;
/// How long envd sleeps when nothing is due.
const IDLE_MS: u64 = 3_600_000;

/// Everything that envd has.
pub struct Daemon {
    pub(crate) epoll: Epoll,
    pub(crate) connections: Connections,
    pub(crate) supervisor: Supervisor,
    pub(crate) files: Files,
    pub(crate) ports: Ports,
    pub(crate) sampler: Sampler,
    pub(crate) own_port: u16,
    pub(crate) defaults: Defaults,
    pub(crate) started_ms: u64,
    pub(crate) now_ms: u64,
    pub(crate) scratch: Vec<u8>,
    listener: Fd,
    signals: Fd,
    gate: Gate,
    pub(crate) identity: Identity,
    pub(crate) trust: Trust,
    /// Connections that have more to do than fitted in their turn.
    busy: bool,
    stopping: bool,
}

/// Why the daemon cannot start.
#[derive(Debug)]
pub struct StartError {
    /// What was tried.
    pub step: String,
    /// Why it failed.
    pub errno: Option<Errno>,
}

fn during<T>(result: Result<T, Errno>, step: &str) -> Result<T, StartError> {
    result.map_err(|errno| StartError { step: step.into(), errno: Some(errno) })
}

impl Daemon {
    /// Listens, then begins to fetch the metadata (the agent takes that as the sign that it can connect).
    pub fn start(listen: SocketAddrV4, verifier_file: Option<&str>) -> Result<Daemon, StartError> {
        during(fd::sanitize_inherited(), "open the standard streams")?;
        let signals = during(signal::block_all(), "block signals")?;
        fd::raise_limit();
        fd::clear_umask();
        boot::set_oom_score(b"-900");
        let epoll = during(Epoll::new(), "make an epoll instance")?;
        let listener = socket::listen(listen)
            .map_err(|errno| StartError { step: alloc::format!("listen on {listen}"), errno: Some(errno) })?;
        during(epoll.add(&listener, libc::EPOLLIN, Token::Listener.pack()), "watch the listening socket")?;
        during(epoll.add(&signals, libc::EPOLLIN, Token::Signals.pack()), "watch for signals")?;
        // Only in a guest is the control group file system envd's to arrange.
        let groups = if verifier_file.is_none() { Groups::arrange() } else { Groups::default() };
        let now_ms = clock::monotonic_ms();
        let (gate, identity, trust) = match verifier_file {
            Some(path) => {
                let verifier =
                    identity::read_verifier(path).map_err(|step| StartError { step, errno: None })?;
                let gate = during(identity::open_gate(verifier), "get random bytes")?;
                // No guest: its clock and random numbers are somebody else's.
                (gate, Identity::given(), Trust::Everybody)
            }
            None => (Gate::Waiting, Identity::new(now_ms), Trust::Nobody),
        };
        if let (Some(_), Ok(address)) = (verifier_file, socket::local_address(&listener)) {
            log!("listening on {address}");
        }
        Ok(Daemon {
            epoll,
            connections: Connections::default(),
            supervisor: Supervisor::new(groups),
            files: Files::default(),
            ports: Ports::default(),
            sampler: Sampler::default(),
            own_port: listen.port(),
            defaults: Defaults { is_root: credentials::effective_uid() == 0, ..Defaults::default() },
            started_ms: now_ms,
            now_ms,
            scratch: alloc::vec![0; SCRATCH],
            listener,
            signals,
            gate,
            identity,
            trust,
            busy: false,
            stopping: false,
        })
    }

    /// Serves until it is asked to end.
    pub fn run(&mut self) -> Result<(), Errno> {
        while !self.stopping {
            self.now_ms = clock::monotonic_ms();
            self.handle_timeouts();
            self.serve_connections();
            let count = self.epoll.wait(self.timeout_ms())?;
            self.now_ms = clock::monotonic_ms();
            for index in 0..count {
                let ready = self.epoll.ready(index);
                self.dispatch(ready);
            }
        }
        self.supervisor.kill_all();
        self.connections.close_all();
        self.serve_connections();
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        if self.busy {
            return 0;
        }
        let due = [
            self.connections.next_timeout_ms(),
            self.supervisor.next_timeout_ms(),
            self.identity.next_timeout_ms(),
            Some(self.sampler.next_timeout_ms()),
        ];
        let wait = due.into_iter().flatten().min().map_or(IDLE_MS, |at| at.saturating_sub(self.now_ms));
        wait.min(IDLE_MS) as i32
    }

    fn handle_timeouts(&mut self) {
        self.connections.handle_timeouts(self.now_ms);
        self.with_supervisor(Supervisor::handle_timeouts);
        self.identity.handle_timeout(&self.epoll, self.now_ms);
        self.sampler.handle_timeout(self.now_ms, self.own_port, &mut self.connections);
        if self.identity.has_given_up() && matches!(self.gate, Gate::Waiting) {
            self.set_gate(Gate::Shut);
        }
    }

    /// Lends the supervisor what it works with.
    pub(crate) fn with_supervisor<T>(
        &mut self,
        work: impl FnOnce(&mut Supervisor, &mut Shell<'_>) -> T,
    ) -> T {
        let mut shell = Shell {
            epoll: &self.epoll,
            connections: &mut self.connections,
            scratch: &mut self.scratch,
            now_ms: self.now_ms,
        };
        work(&mut self.supervisor, &mut shell)
    }

    /// Starts to watch files for a stream.
    pub(crate) fn watch(&mut self, key: StreamKey, message: &FileWatch) -> Result<(), Error> {
        let mut shell = Shell {
            epoll: &self.epoll,
            connections: &mut self.connections,
            scratch: &mut self.scratch,
            now_ms: self.now_ms,
        };
        self.files.watch(key, message, &self.defaults, &mut shell)
    }

    /// Lends the ports what they work with.
    pub(crate) fn with_ports(&mut self, work: impl FnOnce(&mut Ports, &mut Shell<'_>)) {
        let mut shell = Shell {
            epoll: &self.epoll,
            connections: &mut self.connections,
            scratch: &mut self.scratch,
            now_ms: self.now_ms,
        };
        work(&mut self.ports, &mut shell);
    }

    fn dispatch(&mut self, ready: Ready) {
        let Some(token) = Token::unpack(ready.token) else { return };
        match token {
            Token::Listener => self.accept(),
            Token::Signals => self.on_signals(),
            Token::Metadata => {
                let metadata = self.identity.on_ready(&self.epoll, &mut self.scratch, self.now_ms);
                if let Some(metadata) = metadata {
                    self.on_metadata(metadata);
                }
            }
            Token::Connection(id) => {
                if ready.events & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0 {
                    self.connections.receive(id, &mut self.scratch, self.now_ms);
                }
            }
            Token::Process(id, Way::Report) => self.with_supervisor(|s, shell| s.on_report(id, shell)),
            Token::Process(id, Way::Input) => self.with_supervisor(|s, shell| s.write_input(id, shell)),
            Token::Process(id, Way::Output(index)) => {
                self.with_supervisor(|s, shell| s.on_output(id, usize::from(index), shell));
            }
            // Being awake is all that it takes.
            Token::Watch => {}
            Token::Port(id) => self.with_ports(|p, shell| p.go_on(id, shell)),
            Token::LeftOver(number) => self.supervisor.on_left_over(number, &mut self.scratch),
        }
    }

    fn accept(&mut self) {
        for _ in 0..MAX_ACCEPTS {
            let Ok(fd) = socket::accept(&self.listener) else { return };
            match self.connections.admit(fd, self.now_ms) {
                Ok((id, evicted)) => {
                    if let Some(old) = evicted {
                        self.drop_connection(old);
                    }
                    let token = Token::Connection(id).pack();
                    let watched = self.connections.fd(id).map(|fd| self.epoll.add(fd, libc::EPOLLIN, token));
                    if !matches!(watched, Some(Ok(()))) {
                        self.drop_connection(id);
                    }
                }
                // Dropped: the agent tries again, by when the kernel has random numbers.
                Err(e) => log!("no session yet: cannot get random bytes: {e}"),
            }
        }
    }

    fn on_signals(&mut self) {
        while let Some(number) = signal::next(&self.signals) {
            if number == libc::SIGCHLD {
                for (pid, exit) in self.with_supervisor(Supervisor::on_child_ended) {
                    self.files.on_helper_ended(pid, exit, &mut self.connections);
                }
            } else {
                self.stopping = true;
            }
        }
    }

    fn on_metadata(&mut self, metadata: Metadata) {
        identity::write_identity_files(&metadata);
        let identity = guest::identity_environment(&metadata);
        let before = core::mem::replace(&mut self.defaults.identity, identity);
        if !before.is_empty() && before != self.defaults.identity {
            // A copy of the guest that this was, made without it being asked.
            self.trust = Trust::Nobody;
            self.connections.keep_only(None);
            let old = before.into_iter().next().map(|(_, id)| id).unwrap_or_default();
            host_name::follow(&old, metadata.instance_id.as_bytes());
        }
        let gate = match metadata.verifier.map(identity::open_gate) {
            Some(Ok(gate)) => gate,
            Some(Err(e)) => {
                log!("nobody is let in: cannot get random bytes: {e}");
                Gate::Shut
            }
            None => {
                log!("nobody is let in: the metadata has no accessTokenHash");
                Gate::Shut
            }
        };
        self.set_gate(gate);
    }

    fn set_gate(&mut self, gate: Gate) {
        self.gate = gate;
        self.connections.gate_moved(&self.gate);
    }

    /// Handles every connection's events, lets jobs on files make a step, and writes what there is to
    /// write. What one connection's events make another send is written in the next pass.
    fn serve_connections(&mut self) {
        self.busy = false;
        for _ in 0..MAX_PASSES {
            for id in self.connections.ids() {
                self.serve(id);
            }
            self.supervisor.go_on_listing(&mut self.connections);
            if self.files.has_jobs() {
                self.busy |= self.files.work(&mut self.connections, &mut self.scratch);
            }
            if !self.connections.needs_turn() {
                return;
            }
        }
        self.busy = true;
    }

    fn serve(&mut self, id: ConnectionId) {
        for _ in 0..MAX_TURNS {
            match self.connections.turn(id) {
                Turn::Event(event) => self.on_event(id, event),
                Turn::Idle { watch_changed } => {
                    if let (Some(writable), Some(fd)) = (watch_changed, self.connections.fd(id)) {
                        let events = if writable { libc::EPOLLIN | libc::EPOLLOUT } else { libc::EPOLLIN };
                        if self.epoll.modify(fd, events, Token::Connection(id).pack()).is_err() {
                            self.drop_connection(id);
                        }
                    }
                    return;
                }
                Turn::Over => {
                    self.drop_connection(id);
                    return;
                }
            }
        }
        self.busy = true;
    }

    /// Answers to who asks to be let in.
    pub(crate) fn authenticate(&mut self, id: ConnectionId, identity: &str) {
        if !self.identity.is_fresh(self.now_ms) {
            self.gate = Gate::Waiting;
        }
        self.connections.authenticate(id, identity, &self.gate);
    }

    fn drop_connection(&mut self, id: ConnectionId) {
        for (key, task) in self.connections.remove(id) {
            self.on_stream_gone(key, task);
        }
    }
}
