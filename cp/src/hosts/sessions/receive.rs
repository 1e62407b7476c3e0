//! What comes from hosts, on its way to the calls that it is for.

use super::link::reason_of;
use super::{Call, CallId, Host, HostEvent, Hosts, MAX_ROUNDS, Mode, TimerKey};
use crate::hosts::error::HostError;
use crate::hosts::reply::Progress;
use mio::Token;
use wire::message::{Code, Error, Message};
use wire::session::{Event, OpenError, SendError, SessionError, StreamId};

impl Hosts {
    pub(super) fn drive(&mut self, token: Token, now_ms: u64) {
        for _ in 0..MAX_ROUNDS {
            let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) else { return };
            if !link.socket.is_writable() && !link.socket.is_readable() {
                break;
            }
            if let Ok(Some(error)) = link.socket.stream.take_error() {
                self.session_ended(token, &reason_of(&error), now_ms);
                return;
            }
            link.read(now_ms);
            let mut had_events = false;
            while let Some(event) =
                self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()).and_then(|l| l.session.poll_event())
            {
                had_events = true;
                self.on_event(token, event, now_ms);
            }
            self.start_waiting(token);
            let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) else { return };
            let wrote = link.flush();
            if !had_events && !wrote && !link.is_readable() {
                break;
            }
        }
        let Some(link) = self.hosts.get_mut(&token).and_then(|h| h.link.as_mut()) else { return };
        if link.is_readable() {
            self.dirty.insert(token);
        }
        self.timers.update(TimerKey::Session(token), link.session.next_timeout_ms());
    }

    pub(super) fn on_event(&mut self, token: Token, event: Event, now_ms: u64) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        match event {
            Event::Ready { peer_name, .. } => {
                log::info!("host {}: session with {peer_name} at {}", host.host_id, host.address);
                host.is_ready = true;
                host.backoff_ms = 0;
                host.failed = None;
                self.timers.clear(TimerKey::Connect(token));
            }
            Event::Message { stream, kind, body, cost } => self.on_message(token, stream, kind, body, cost),
            Event::Data { stream, channel, bytes, cost } => {
                self.on_data(token, stream, channel, bytes, cost);
            }
            Event::Finished { stream } => self.on_finished(token, stream),
            Event::Reset { stream, code, reason } => {
                let call = host.streams.remove(&stream);
                if let Some(call) = call.filter(|id| self.is_splice(*id)) {
                    self.remove(call, Code::Cancelled, "");
                    self.events.push_back(HostEvent::Reset { call, code, reason });
                } else if let Some(call) = call {
                    let error = Error::new(Code::from_number(code), reason);
                    self.end(call, Err(HostError::Remote(error)));
                }
            }
            Event::Writable { stream } => {
                if let Some(call) = host.streams.get(&stream) {
                    self.events.push_back(HostEvent::Writable { call: *call });
                }
            }
            // Agents open no streams to a control plane.
            Event::Opened { stream, .. } => {
                if let Some(link) = &mut host.link {
                    link.session.reset(
                        stream,
                        Code::Unimplemented,
                        "the control plane serves no requests here",
                    );
                }
            }
            Event::GoingAway { reason, .. } => log::info!("host {}: going away: {reason}", host.host_id),
            // The client side never gets it.
            Event::Authenticate { .. } => {}
            Event::Closed { error } => {
                let is_refused = match &error {
                    SessionError::Auth(_) => true,
                    SessionError::ByPeer(code, _) => Code::from_number(*code) == Code::Unauthenticated,
                    _ => false,
                };
                let reason = if is_refused {
                    format!("it does not accept this control plane's credential ({error}); register it anew")
                } else {
                    error.to_string()
                };
                self.session_ended(token, &reason, now_ms);
            }
        }
    }

    fn is_splice(&self, id: CallId) -> bool {
        self.calls.get(&id).is_some_and(|call| matches!(call.mode, Mode::Splice))
    }

    /// Gives the calls that wait their streams, once the session is ready.
    pub(super) fn start_waiting(&mut self, token: Token) {
        while let Some(host) = self.hosts.get_mut(&token).filter(|h| h.is_ready) {
            let Some(link) = &mut host.link else { return };
            let Some(id) = host.waiting.pop_front() else { return };
            let Some(call) = self.calls.get_mut(&id) else { continue };
            let mut messages = std::mem::take(&mut call.request.messages).into_iter();
            let count = messages.len();
            let half_close = call.request.half_close;
            let first = messages.next().unwrap_or_default();
            let opened = link.session.open_raw(first, half_close && count <= 1);
            let result = opened.map_err(|e| open_error(e, &host.address)).and_then(|stream| {
                for (i, message) in messages.enumerate() {
                    let is_last = i + 2 == count;
                    if let Err(error) = link.session.send_raw(stream, message, half_close && is_last) {
                        link.session.reset(stream, Code::Cancelled, "the request could not be sent");
                        return Err(send_error(error));
                    }
                }
                Ok(stream)
            });
            match result {
                Ok(stream) => {
                    call.stream = Some(stream);
                    host.streams.insert(stream, id);
                    if matches!(call.mode, Mode::Splice) {
                        self.timers.clear(TimerKey::Call(id));
                    }
                    if matches!(call.mode, Mode::Stream | Mode::Splice) {
                        self.events.push_back(HostEvent::Writable { call: id });
                    }
                }
                Err(error) => self.end(id, Err(error)),
            }
        }
    }

    pub(super) fn on_message(&mut self, token: Token, stream: StreamId, kind: u16, body: Vec<u8>, cost: u32) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        let Some(id) = host.streams.get(&stream).copied() else {
            release(host, stream, cost);
            return;
        };
        let Some(call) = self.calls.get_mut(&id) else { return };
        match &mut call.mode {
            Mode::Collect(collector) => {
                release(host, stream, cost);
                match collector.message(kind, body) {
                    Ok(Progress::More) => {}
                    Ok(Progress::Complete) => self.complete(id),
                    Err(error) => self.end(id, Err(error)),
                }
            }
            Mode::Splice => {
                call.owed += cost;
                self.events.push_back(HostEvent::Message { call: id, kind, body, cost });
            }
            Mode::Stream => {
                self.timers.clear(TimerKey::Call(id));
                if kind == Error::KIND {
                    release(host, stream, cost);
                    let error = match Error::decode(&body) {
                        Ok(error) => HostError::Remote(error),
                        Err(error) => HostError::BadReply(format!("Error: {error}")),
                    };
                    self.end(id, Err(error));
                } else {
                    call.owed += cost;
                    self.events.push_back(HostEvent::Message { call: id, kind, body, cost });
                }
            }
        }
    }

    pub(super) fn on_data(&mut self, token: Token, stream: StreamId, channel: u8, bytes: Vec<u8>, cost: u32) {
        let Some(host) = self.hosts.get_mut(&token) else { return };
        let call = host.streams.get(&stream).copied();
        match call.and_then(|id| self.calls.get_mut(&id).map(|c| (id, c))) {
            Some((_, Call { mode: Mode::Collect(collector), .. })) => {
                collector.data(channel, &bytes);
                release(host, stream, cost);
            }
            Some((id, call)) => {
                call.owed += cost;
                self.events.push_back(HostEvent::Data { call: id, channel, bytes, cost });
            }
            None => release(host, stream, cost),
        }
    }

    pub(super) fn on_finished(&mut self, token: Token, stream: StreamId) {
        let Some(id) = self.hosts.get(&token).and_then(|h| h.streams.get(&stream).copied()) else { return };
        match self.calls.get(&id) {
            Some(Call { mode: Mode::Collect(_), .. }) => self.complete(id),
            Some(_) => self.events.push_back(HostEvent::Finished { call: id }),
            None => {}
        }
    }
}

fn release(host: &mut Host, stream: StreamId, cost: u32) {
    if let Some(link) = &mut host.link {
        link.session.release(stream, cost);
    }
}

fn open_error(error: OpenError, address: &str) -> HostError {
    match error {
        OpenError::TooManyStreams => HostError::Busy,
        OpenError::TooLong => HostError::Remote(Error::new(Code::InvalidRequest, "the request is too long")),
        OpenError::NotReady | OpenError::GoingAway | OpenError::Exhausted => {
            HostError::Unreachable { address: address.to_string(), reason: error.to_string() }
        }
    }
}

fn send_error(error: SendError) -> HostError {
    match error {
        SendError::TooLong => HostError::Remote(Error::new(Code::InvalidRequest, "the request is too long")),
        SendError::QueueFull => HostError::Busy,
        SendError::NoStream => {
            HostError::BadReply("the stream ended before the request was sent".to_string())
        }
    }
}
