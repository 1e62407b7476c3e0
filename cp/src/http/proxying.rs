//! Carries out exchanges with services in capsules: bytes between a client and a stream to a port, each
//! side held back while the other does not keep up.

use super::handler::{Response, encode};
use super::limits::{PROXY_CONNECT_MS, PROXY_SILENCE_MS};
use super::server::{Server, TimerKey};
use super::streams::pump;
use super::task::{Outbox, Proxying, TaskId, Wait};
use crate::hosts::error::HostError;
use crate::hosts::sessions::{self, HostEvent};
use crate::proxy::Proxy;
use crate::proxy::exchange::Action;
use wire::message::{CHANNEL_PORT, Done, Forward, Message as _, PortConnect};

impl Server {
    pub(super) fn start_proxy(&mut self, id: TaskId, proxy: Proxy) -> Result<(), Response> {
        let call = self.fresh_id();
        let Some(task) = self.tasks.get_mut(&id) else { return Ok(()) };
        let client_id = task.client.ok_or_else(|| Response::from(HostError::Cancelled))?;
        let Proxy { target, port, exchange } = proxy;
        task.wait = Wait::Proxy(Box::new(Proxying {
            call,
            exchange,
            owed: 0,
            outbox: Outbox::default(),
            is_connected: false,
        }));
        self.calls.insert(call, id);
        let request = sessions::Request {
            messages: vec![encode(&Forward { capsule_id: target.capsule_id }), encode(&PortConnect { port })],
            host_id: target.host_id,
            address: target.address,
            half_close: false,
            timeout_ms: PROXY_CONNECT_MS,
        };
        self.hosts.open(call, request, self.now_ms);
        self.ready.insert(client_id);
        Ok(())
    }

    /// The task of a client that is joined with a service.
    pub(super) fn proxy_task(&self, client_id: u64) -> Option<TaskId> {
        let id = self.clients.get(&client_id)?.task?;
        matches!(self.tasks.get(&id)?.wait, Wait::Proxy(_)).then_some(id)
    }

    fn proxy_of(&mut self, id: TaskId) -> Option<&mut Proxying> {
        match &mut self.tasks.get_mut(&id)?.wait {
            Wait::Proxy(proxy) => Some(proxy),
            _ => None,
        }
    }

    pub(super) fn on_proxy_event(&mut self, id: TaskId, event: HostEvent) {
        let Some(proxy) = self.proxy_of(id) else { return };
        let mut actions = Vec::new();
        match event {
            HostEvent::Message { call, kind, cost, .. } => {
                if kind == Done::KIND {
                    proxy.is_connected = true;
                    proxy.exchange.connected(&mut actions);
                }
                self.hosts.release(call, cost);
            }
            HostEvent::Data { channel, bytes, cost, .. } => {
                proxy.owed += cost;
                if channel == CHANNEL_PORT {
                    proxy.exchange.service_bytes(&bytes, &mut actions);
                }
            }
            HostEvent::Finished { .. } => proxy.exchange.service_ended(&mut actions),
            HostEvent::Failed { error, .. } => proxy.exchange.service_failed(error, &mut actions),
            HostEvent::Writable { .. } | HostEvent::Reply { .. } | HostEvent::Reset { .. } => {}
        }
        self.carry_out(id, actions);
    }

    /// Bytes of a request's body, or of a tunnel.
    pub(super) fn on_proxied_bytes(&mut self, id: TaskId, bytes: &[u8]) {
        let Some(proxy) = self.proxy_of(id) else { return };
        let mut actions = Vec::new();
        proxy.exchange.client_bytes(bytes, &mut actions);
        self.carry_out(id, actions);
    }

    /// A request's body is complete, or the client has ended its half of a tunnel.
    pub(super) fn on_proxied_end(&mut self, id: TaskId) {
        let Some(proxy) = self.proxy_of(id) else { return };
        let mut actions = Vec::new();
        proxy.exchange.client_ended(&mut actions);
        self.carry_out(id, actions);
    }

    pub(super) fn on_proxy_silence(&mut self, id: TaskId) {
        let Some(proxy) = self.proxy_of(id) else { return };
        let mut actions = Vec::new();
        proxy.exchange.timed_out(PROXY_SILENCE_MS, &mut actions);
        self.carry_out(id, actions);
    }

    /// Carries out what an exchange wants.
    fn carry_out(&mut self, id: TaskId, actions: Vec<Action>) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Wait::Proxy(proxy) = &mut task.wait else { return };
        let Some((client_id, client)) =
            task.client.and_then(|id| self.clients.get_mut(&id).map(|client| (id, client)))
        else {
            return;
        };
        self.ready.insert(client_id);
        let mut is_over = false;
        for action in actions {
            match action {
                Action::Send(bytes) => proxy.outbox.push(CHANNEL_PORT, bytes),
                Action::Finish => proxy.outbox.finish(),
                // Said below.
                Action::WantBody => {}
                Action::Head { status, headers, framing } => {
                    client.start_proxied(status, &headers, framing, self.now_ms);
                }
                Action::Body(bytes) => client.stream_body(&bytes, self.now_ms),
                Action::End => {
                    client.end_stream(self.now_ms);
                    is_over = true;
                }
                Action::Tunnel { headers } => client.start_tunnel(&headers, self.now_ms),
                Action::TunnelBytes(bytes) => client.tunnel_bytes(&bytes, self.now_ms),
                Action::TunnelEnd => {
                    client.end_tunnel(self.now_ms);
                    is_over = true;
                }
                Action::Refuse(response) => {
                    client.respond(&response, self.now_ms);
                    is_over = true;
                }
                Action::CutOff => {
                    client.cut_off();
                    is_over = true;
                }
            }
        }
        if is_over {
            return self.end_proxy(id);
        }
        if proxy.is_connected {
            let is_empty = pump(&mut self.hosts, proxy.call, &mut proxy.outbox);
            client.want_body(is_empty, self.now_ms);
            self.timers.set(TimerKey::Proxy(id), self.now_ms + PROXY_SILENCE_MS);
        }
        self.return_credit(client_id);
    }

    /// Ends an exchange; a response that is not complete is cut off.
    pub(super) fn end_proxy(&mut self, id: TaskId) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if let Wait::Proxy(proxy) = task.wait {
            self.calls.remove(&proxy.call);
            self.hosts.cancel(proxy.call);
        }
        self.timers.clear(TimerKey::Proxy(id));
        let Some(client_id) = task.client else { return };
        if let Some(client) = self.clients.get_mut(&client_id)
            && client.task == Some(id)
        {
            client.task = None;
            client.end_tunnel(self.now_ms);
            client.cut_off();
        }
        self.ready.insert(client_id);
    }
}
