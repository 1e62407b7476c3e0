//! The event loop: accepts clients, carries readiness, timers, workers' results and hosts' events to
//! where they belong. What requests do is in [`super::steps`] and [`super::streams`].

use super::client::{Client, ClientEvent, overloaded};
use super::context::Context;
use super::handler::{Job, Route};
use super::limits::*;
use super::router::Router;
use super::task::{Task, TaskId, Wait};
use crate::budget::Budget;
use crate::hosts::sessions::{CallId, Hosts};
use crate::worker::{Done, Workers};
use mio::net::{TcpListener, TcpStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use wire::limiter::FailureLimiter;
use wire::reactor::mailbox::{Receiver, mailbox};
use wire::reactor::sys::signals::Signals;
use wire::reactor::{READ_CHUNK_BYTES, Socket, Timers};
use wire::session::StreamId;

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
const SIGNALS: Token = Token(2);
/// Clients' tokens are from here up to [`FIRST_HOST`]; a token is never used twice.
const FIRST_CLIENT: u64 = 16;
/// Hosts' tokens are from here up.
const FIRST_HOST: usize = 1 << 48;
/// Readiness events taken at once.
const EVENTS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TimerKey {
    /// A client's deadline.
    Client(u64),
    /// A WebSocket's message has not come.
    Message(TaskId),
    /// An exchange with a service has stood still for long.
    Proxy(TaskId),
    /// A worker has not come back with a task's work.
    Worker(TaskId),
    /// A task's pause is over.
    Pause(TaskId),
    /// A recurring job is due.
    Job(usize),
    /// The kernel may have descriptors again.
    Accept,
    /// Shutting down has taken too long.
    Shutdown,
}

/// Ends a server from another thread, as SIGTERM does.
#[derive(Debug, Clone)]
pub struct Stopper {
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
}

impl Stopper {
    /// Begins the shutdown.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            log::error!("the event loop cannot be woken: {error}");
        }
    }
}

/// The control plane's event loop and all that it owns.
pub struct Server {
    poll: Poll,
    listener: Option<TcpListener>,
    address: SocketAddr,
    signals: Option<Signals>,
    stopper: Stopper,
    pub(super) context: Arc<Context>,
    pub(super) router: Router,
    pub(super) jobs: Vec<Job>,
    pub(super) clients: HashMap<u64, Client>,
    pub(super) tasks: HashMap<TaskId, Task>,
    pub(super) calls: HashMap<CallId, TaskId>,
    pub(super) timers: Timers<TimerKey>,
    /// Clients that have something to do.
    pub(super) ready: BTreeSet<u64>,
    pub(super) workers: Workers,
    results: Receiver<Done>,
    pub(super) hosts: Hosts,
    /// Failed logins of wire clients, by address.
    pub(super) wire_failures: FailureLimiter<IpAddr>,
    /// Streams of wire clients whose receiving side had no room.
    pub(super) stalled: BTreeSet<(u64, StreamId)>,
    pub(super) bodies: Budget,
    buffer: Vec<u8>,
    next_id: u64,
    started: Instant,
    pub(super) now_ms: u64,
    pub(super) is_draining: bool,
    is_over: bool,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens and starts `workers` threads. With `signals` the loop ends on the first one.
    ///
    /// # Errors
    /// When the address is taken or the kernel has no resources.
    pub fn bind(
        address: SocketAddr,
        workers: usize,
        context: Arc<Context>,
        routes: &[Route],
        jobs: Vec<Job>,
        signals: Option<Signals>,
    ) -> io::Result<Server> {
        let poll = Poll::new()?;
        let mut listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        if let Some(signals) = &signals {
            poll.registry().register(&mut SourceFd(&signals.fd()), SIGNALS, Interest::READABLE)?;
        }
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let (sender, results) = mailbox(Arc::clone(&waker));
        let workers = Workers::start(workers, &context.database_url, &sender)?;
        let hosts = Hosts::new(poll.registry().try_clone()?, FIRST_HOST, &context.jwt_secret);
        let mut timers = Timers::default();
        for (i, job) in jobs.iter().enumerate() {
            timers.set(TimerKey::Job(i), job.every_ms);
        }
        Ok(Server {
            poll,
            listener: Some(listener),
            address,
            signals,
            stopper: Stopper { stop: Arc::default(), waker },
            router: Router::new(routes).with_proxy_domain(context.proxy_domain.clone()),
            context,
            jobs,
            clients: HashMap::new(),
            tasks: HashMap::new(),
            calls: HashMap::new(),
            timers,
            ready: BTreeSet::new(),
            workers,
            results,
            hosts,
            wire_failures: FailureLimiter::new(),
            stalled: BTreeSet::new(),
            bodies: Budget::new(MAX_BUFFERED_BODIES),
            buffer: vec![0; READ_CHUNK_BYTES],
            next_id: FIRST_CLIENT,
            started: Instant::now(),
            now_ms: 0,
            is_draining: false,
            is_over: false,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends it from another thread.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// A number that was not used before: for a client, a task or a call.
    pub(super) fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Serves until it is told to end, then finishes what is under way, within a bound.
    ///
    /// # Errors
    /// When the kernel's poll fails.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        let mut has_more = false;
        while !self.is_over {
            self.poll_events(&mut events, has_more)?;
            self.tick();
            for event in &events {
                match event.token() {
                    LISTENER => self.accept(),
                    WAKER => {}
                    SIGNALS => {
                        if self.signals.as_ref().is_some_and(any_signal) {
                            self.stopper.stop.store(true, Ordering::Release);
                        }
                    }
                    token if self.hosts.owns(token) => {
                        let readable = event.is_readable() || event.is_read_closed() || event.is_error();
                        let writable = event.is_writable() || event.is_write_closed() || event.is_error();
                        self.hosts.on_ready(token, readable, writable);
                    }
                    token => self.on_client_ready(token.0 as u64, event),
                }
            }
            if self.stopper.stop.swap(false, Ordering::AcqRel) {
                self.drain();
            }
            while let Some(done) = self.results.try_receive() {
                self.timers.clear(TimerKey::Worker(done.task));
                self.run_task(done.task, done.flow);
            }
            while let Some(key) = self.timers.pop_due(self.now_ms) {
                self.on_timer(key);
            }
            self.hosts.handle_timeouts(self.now_ms);
            has_more = self.hosts.turn(self.now_ms);
            while let Some(event) = self.hosts.poll_event() {
                self.on_host_event(event);
            }
            self.pump_stalled();
            for client in std::mem::take(&mut self.ready) {
                self.drive(client);
            }
            // What the clients said goes to the hosts in the same turn.
            has_more |= self.hosts.turn(self.now_ms);
            if self.is_draining && self.clients.is_empty() && self.tasks.is_empty() {
                self.is_over = true;
            }
        }
        self.hosts.close();
        self.workers.close();
        Ok(())
    }

    fn tick(&mut self) {
        self.now_ms = self.started.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    }

    fn poll_events(&mut self, events: &mut Events, has_more: bool) -> io::Result<()> {
        let next = match (self.timers.next_ms(), self.hosts.next_timeout_ms()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let has_more = has_more || !self.ready.is_empty() || self.hosts.has_events();
        let timeout = if has_more {
            Some(Duration::ZERO)
        } else {
            self.tick();
            // One more, because the clock's fraction was cut off.
            next.map(|at| Duration::from_millis(at.saturating_sub(self.now_ms) + 1))
        };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            result => result,
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, peer)) => self.on_accepted(stream, peer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The client has given up meanwhile, or the kernel had no memory for it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Most likely there is no descriptor left; it may be otherwise in a moment.
                    log::warn!("accept: {error}");
                    self.timers.set(TimerKey::Accept, self.now_ms + ACCEPT_PAUSE_MS);
                    return;
                }
            }
        }
        // The poll tells of new connections only: those that wait are taken in the next turn.
        self.timers.set(TimerKey::Accept, self.now_ms + 1);
    }

    fn on_accepted(&mut self, stream: TcpStream, peer: SocketAddr) {
        if self.clients.len() >= MAX_CONNECTIONS && !self.make_room() {
            refuse(stream);
            return;
        }
        let id = self.fresh_id();
        let mut client = Client::new(Socket::new(stream), peer.ip(), &self.bodies, self.now_ms);
        let token = Token(id as usize);
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut client.socket.stream, token, interest) {
            log::error!("a connection cannot be watched: {error}");
            return;
        }
        self.clients.insert(id, client);
        self.ready.insert(id);
    }

    /// Closes the connection that has been idle for longest, else the one whose request has been coming in
    /// for longest, to make room: many that send nothing or hardly anything keep nobody out. False when
    /// there is none.
    fn make_room(&mut self) -> bool {
        let asking = self.clients.iter().filter(|(_, c)| c.awaits_head());
        let first = asking.min_by_key(|(_, c)| (!c.is_idle(), c.deadline_ms()));
        let Some(id) = first.map(|(id, _)| *id) else { return false };
        self.remove_client(id);
        true
    }

    fn on_client_ready(&mut self, id: u64, event: &mio::event::Event) {
        let is_held = self.holds_back(id);
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.socket.on_ready(event.is_readable(), event.is_writable());
        if event.is_read_closed() || event.is_error() {
            client.on_hang_up(is_held, event.is_write_closed() || event.is_error());
        }
        self.ready.insert(id);
    }

    /// Reads, handles and writes for one client.
    fn drive(&mut self, id: u64) {
        let hold = self.holds_back(id);
        let Some(client) = self.clients.get_mut(&id) else { return };
        let mut buffer = std::mem::take(&mut self.buffer);
        let events = client.read(&mut buffer, self.now_ms, &self.router, hold);
        self.buffer = buffer;
        for event in events {
            match event {
                ClientEvent::Request(handler, request) => self.start_request(id, handler, request),
                ClientEvent::Body(bytes) => self.on_body(id, &bytes),
                ClientEvent::BodyEnd => self.on_body_end(id),
                ClientEvent::WebSocketFailed => self.detach(id),
            }
        }
        self.take_messages(id);
        for _ in 0..WIRE_ROUNDS {
            self.serve_wire(id);
            let Some(client) = self.clients.get_mut(&id) else { return };
            // Room that was made may let a wire client's streams go on.
            if !client.flush(self.now_ms) || !client.is_wire() {
                break;
            }
        }
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.is_gone() {
            self.detach(id);
        }
        self.return_credit(id);
        let hold = self.holds_back(id);
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.is_over() {
            self.remove_client(id);
            return;
        }
        if hold {
            client.touch(self.now_ms);
        } else if client.has_input() {
            self.ready.insert(id);
        }
        let deadline = client.deadline_ms();
        self.timers.update(TimerKey::Client(id), deadline);
    }

    pub(super) fn remove_client(&mut self, id: u64) {
        self.detach(id);
        self.abandon_wire(id);
        if let Some(mut client) = self.clients.remove(&id)
            && let Err(error) = self.poll.registry().deregister(&mut client.socket.stream)
        {
            log::debug!("deregister: {error}");
        }
        self.ready.remove(&id);
        self.timers.clear(TimerKey::Client(id));
    }

    fn on_timer(&mut self, key: TimerKey) {
        match key {
            TimerKey::Client(id) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.on_deadline(self.now_ms);
                    self.ready.insert(id);
                }
            }
            TimerKey::Message(task) => self.on_message_timeout(task),
            TimerKey::Proxy(task) => self.on_proxy_silence(task),
            TimerKey::Worker(task) => self.on_work_timeout(task),
            TimerKey::Pause(task) => self.end_pause(task, Ok(())),
            TimerKey::Job(index) => self.start_job(index),
            TimerKey::Accept => self.accept(),
            TimerKey::Shutdown => {
                log::warn!(
                    "shutting down with {} connections and {} requests under way",
                    self.clients.len(),
                    self.tasks.len()
                );
                self.is_over = true;
            }
        }
    }

    /// Takes no more connections and requests; what is under way goes on for a while.
    fn drain(&mut self) {
        if self.is_draining {
            return;
        }
        log::info!("shutting down: finishing {} requests", self.tasks.len());
        self.is_draining = true;
        if let Some(mut listener) = self.listener.take()
            && let Err(error) = self.poll.registry().deregister(&mut listener)
        {
            log::debug!("deregister: {error}");
        }
        self.timers.set(TimerKey::Shutdown, self.now_ms + SHUTDOWN_MS);
        for (id, client) in &mut self.clients {
            client.drain();
            self.ready.insert(*id);
        }
        let relays: Vec<TaskId> =
            self.tasks.iter().filter(|t| matches!(t.1.wait, Wait::Relay(_))).map(|t| *t.0).collect();
        for task in relays {
            self.end_relay(task);
        }
        let tunnels: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|t| matches!(&t.1.wait, Wait::Proxy(proxy) if proxy.exchange.is_tunnel()))
            .map(|t| *t.0)
            .collect();
        for task in tunnels {
            self.end_proxy(task);
        }
    }
}

/// Tells a client that there is no room, without keeping it.
fn refuse(stream: TcpStream) {
    let mut client =
        Client::new(Socket::new(stream), SocketAddr::from(([0, 0, 0, 0], 0)).ip(), &Budget::new(0), 0);
    client.close_after_response();
    client.respond(&overloaded(), 0);
    client.flush(0);
}

/// Takes every signal that waits; whether there was one.
fn any_signal(signals: &Signals) -> bool {
    let mut any = false;
    while let Ok(Some(_)) = signals.next() {
        any = true;
    }
    any
}
