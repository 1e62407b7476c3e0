//! Making sessions, and what their end means for the calls on them.

use super::{CONNECT_TIMEOUT_MS, CallId, FIRST_BACKOFF_MS, Hosts, MAX_BACKOFF_MS, TimerKey};
use crate::auth::random;
use crate::hosts::credential;
use crate::hosts::error::HostError;
use mio::net::TcpStream;
use mio::{Interest, Token};
use std::io;
use std::net::SocketAddr;
use wire::reactor::{Link, Socket};
use wire::session::{Limits, Session};

impl Hosts {
    pub(super) fn dial(&mut self, token: Token, now_ms: u64) -> Result<(), String> {
        let Some(host) = self.hosts.get_mut(&token) else { return Ok(()) };
        let address: SocketAddr =
            host.address.parse().map_err(|_| "its address is not IP:PORT".to_string())?;
        let mut stream = TcpStream::connect(address).map_err(|e| reason_of(&e))?;
        self.registry
            .register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)
            .map_err(|e| reason_of(&e))?;
        let secret = credential::credential(&self.jwt_secret, &host.host_id);
        let session = Session::client(
            credential::IDENTITY,
            secret.as_bytes(),
            concat!("wrenn-cp/", env!("CARGO_PKG_VERSION")),
            random::bytes(),
            Limits::default(),
            now_ms,
        );
        host.link = Some(Link::new(Socket::connecting(stream), session));
        host.is_ready = false;
        self.timers.set(TimerKey::Connect(token), now_ms + CONNECT_TIMEOUT_MS);
        log::debug!("host {}: dialling {address}", host.host_id);
        Ok(())
    }

    /// The session, or the attempt to make one, is over: every call on it fails.
    pub(super) fn session_ended(&mut self, token: Token, reason: &str, now_ms: u64) {
        let Some(host) = self.hosts.get_mut(&token).filter(|h| h.link.is_some()) else { return };
        log::warn!("host {}: no session with {}: {reason}", host.host_id, host.address);
        if host.is_ready {
            // A session that worked may be dialled again at once.
            self.drop_link(token);
            self.fail_calls(token, reason);
        } else {
            self.drop_link(token);
            self.attempt_failed(token, reason, now_ms);
        }
    }

    pub(super) fn attempt_failed(&mut self, token: Token, reason: &str, now_ms: u64) {
        if let Some(host) = self.hosts.get_mut(&token) {
            host.backoff_ms = (host.backoff_ms * 2).clamp(FIRST_BACKOFF_MS, MAX_BACKOFF_MS);
            host.failed = Some((now_ms + host.backoff_ms, reason.to_string()));
        }
        self.fail_calls(token, reason);
    }

    /// Fails every call of a host that has no session.
    pub(super) fn fail_calls(&mut self, token: Token, reason: &str) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        let address = host.address.clone();
        let waiting: Vec<CallId> = host.waiting.drain(..).collect();
        let under_way: Vec<CallId> = host.streams.drain().map(|s| s.1).collect();
        for call in waiting {
            let (address, reason) = (address.clone(), reason.to_string());
            self.end(call, Err(HostError::Unreachable { address, reason }));
        }
        for call in under_way {
            let (address, reason) = (address.clone(), reason.to_string());
            self.end(call, Err(HostError::Lost { address, reason }));
        }
    }

    pub(super) fn close_session(&mut self, token: Token, reason: &str) {
        if let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) {
            link.session.close();
            link.flush();
        }
        self.drop_link(token);
        self.fail_calls(token, reason);
    }

    pub(super) fn drop_link(&mut self, token: Token) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        host.is_ready = false;
        if let Some(mut link) = host.link.take() {
            // The peer is told why, if it can still be.
            link.flush();
            if let Err(error) = self.registry.deregister(link.stream_mut()) {
                log::debug!("deregister: {error}");
            }
        }
        for key in [TimerKey::Session(token), TimerKey::Connect(token), TimerKey::Idle(token)] {
            self.timers.clear(key);
        }
    }
}

pub(super) fn reason_of(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused; is wrenn-agent running there?".to_string(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "no route to it".to_string(),
        _ => error.to_string(),
    }
}
