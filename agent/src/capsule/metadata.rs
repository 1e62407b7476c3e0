//! A capsule's metadata service: the shell between its listener and the protocol.

use crate::net::metadata::{ConnectionId, Endpoint};
use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Registry, Token};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// Connections taken in one turn.
const ACCEPT_BUDGET: usize = 16;
/// The most bytes read from one connection in one turn; a request is at most a few KiB.
const READ_CHUNK: usize = 8 * 1024;

/// The listener in the capsule's namespace, its connections and what they are told.
pub struct MetadataService {
    listener: TcpListener,
    listener_token: Token,
    endpoint: Endpoint,
    connections: BTreeMap<Token, (ConnectionId, TcpStream)>,
}

impl MetadataService {
    /// Serves `endpoint` on a listener that is already registered under a token.
    pub fn new(listener: TcpListener, listener_token: Token, endpoint: Endpoint) -> MetadataService {
        MetadataService { listener, listener_token, endpoint, connections: BTreeMap::new() }
    }

    /// Takes waiting connections. `token` gives each a token that leads back here.
    pub fn accept(
        &mut self,
        registry: &Registry,
        now_ms: u64,
        mut token: impl FnMut() -> Token,
    ) -> Vec<Token> {
        let mut refused = Vec::new();
        for _ in 0..ACCEPT_BUDGET {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return refused,
                Err(e) => {
                    log::debug!("metadata accept: {e}");
                    continue;
                }
            };
            // Over the limit, the guest's connection is closed.
            let Some(id) = self.endpoint.accept(now_ms) else { continue };
            let token = token();
            match registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE) {
                Ok(()) => {
                    self.connections.insert(token, (id, stream));
                }
                Err(e) => {
                    log::warn!("metadata connection: {e}");
                    self.endpoint.close(id);
                    refused.push(token);
                }
            }
        }
        refused
    }

    /// A connection is ready. Returns whether it is over; its token is then free.
    pub fn serve(&mut self, token: Token, now_ms: u64) -> bool {
        let Some((id, stream)) = self.connections.get_mut(&token) else { return true };
        let over = match exchange(&mut self.endpoint, *id, stream, now_ms) {
            Ok(over) => over,
            Err(e) => {
                log::debug!("metadata connection: {e}");
                true
            }
        };
        if over {
            self.close(token);
        }
        over
    }

    fn close(&mut self, token: Token) {
        if let Some((id, _)) = self.connections.remove(&token) {
            self.endpoint.close(id);
        }
    }

    /// Whether the guest has fetched its document since the last call.
    pub fn take_fetched(&mut self) -> bool {
        self.endpoint.take_fetched()
    }

    /// When [`MetadataService::expire`] is due.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.endpoint.next_timeout_ms()
    }

    /// Closes connections that are too slow and gives their tokens.
    pub fn expire(&mut self, now_ms: u64) -> Vec<Token> {
        let expired = self.endpoint.expired(now_ms);
        let tokens = self.connections.iter().filter(|(_, c)| expired.contains(&c.0)).map(|(t, _)| *t);
        let tokens: Vec<Token> = tokens.collect();
        for token in &tokens {
            self.close(*token);
        }
        tokens
    }

    /// All tokens that lead here.
    pub fn tokens(&self) -> Vec<Token> {
        std::iter::once(self.listener_token).chain(self.connections.keys().copied()).collect()
    }
}

/// Reads and answers until nothing more can be done; true when the connection is over.
fn exchange(
    endpoint: &mut Endpoint,
    id: ConnectionId,
    stream: &mut TcpStream,
    now_ms: u64,
) -> io::Result<bool> {
    let mut buffer = [0; READ_CHUNK];
    loop {
        while !endpoint.output(id).is_empty() {
            match stream.write(endpoint.output(id)) {
                Ok(n) => endpoint.consume_output(id, n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if endpoint.finished(id) {
            return Ok(true);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(n) => endpoint.receive(id, &buffer[..n], now_ms),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
