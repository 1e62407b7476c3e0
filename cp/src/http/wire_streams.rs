//! Carries out what clients of the wire protocol ask: their logins, requests and streams into capsules.

use super::handler::{Flow, Response, Step, Target, WireLogin};
use super::limits::MAX_TASKS;
use super::server::Server;
use super::task::{Caller, Task, TaskId, Wait};
use crate::api::capsule_access::with_capsule_as;
use crate::api::principal::{Credential, authenticate};
use crate::hosts::error::HostError;
use crate::hosts::sessions::{self, CallId, HostEvent, Hosts};
use crate::wire_clients::requests::{self, Asked, Encoded, Shape, encoded};
use crate::wire_clients::{MAX_TEAM_CLIENTS, Spliced, StreamUse, WireClient, has_room};
use std::sync::{Arc, LazyLock};
use wire::auth::Verifier;
use wire::limiter::peer_of;
use wire::message::{Code, Error, Forward, HealthReply};
use wire::session::{Event, SendError, SessionError, StreamId};
use wire::splice::{Flow as Moved, Pipe, Sink};

/// How long a stream may take until it is open to its host, in milliseconds.
const OPEN_TIMEOUT_MS: u64 = 30_000;

/// A stream to a host, as the end of a pipe.
struct CallEnd<'a>(&'a mut Hosts, CallId);

impl Sink for CallEnd<'_> {
    fn send_message(&mut self, payload: &[u8]) -> Result<(), SendError> {
        self.0.send(self.1, payload.to_vec())
    }

    fn send_data(&mut self, channel: u8, bytes: &[u8]) -> Result<usize, SendError> {
        self.0.send_data(self.1, channel, bytes)
    }

    fn finish(&mut self) -> Result<(), SendError> {
        self.0.finish(self.1)
    }
}

impl Server {
    fn wire(&mut self, client_id: u64) -> Option<&mut WireClient> {
        self.clients.get_mut(&client_id)?.wire()
    }

    /// Deals with what a wire client's session has to tell.
    pub(super) fn serve_wire(&mut self, client_id: u64) {
        while let Some(event) = self.wire(client_id).and_then(|w| w.session.poll_event()) {
            match event {
                Event::Authenticate { identity } => self.on_login(client_id, identity),
                Event::Ready { .. } => self.on_ready(client_id),
                Event::Opened { stream, kind, body } => self.on_opened(client_id, stream, kind, &body),
                Event::Message { stream, kind, body, cost } => {
                    self.on_wire_message(client_id, stream, kind, &body, cost);
                }
                Event::Data { stream, channel, bytes, cost } => {
                    let Some(wire) = self.wire(client_id) else { return };
                    match wire.spliced(stream) {
                        Some(spliced) => spliced.inward.push_data(channel, bytes, cost),
                        None => wire.session.release(stream, cost),
                    }
                    self.pump_splice(client_id, stream);
                }
                Event::Finished { stream } => self.on_wire_finished(client_id, stream),
                Event::Reset { stream, .. } => self.abandon_stream(client_id, stream),
                Event::Writable { stream } => self.pump_splice(client_id, stream),
                Event::GoingAway { .. } => {}
                Event::Closed { error } => self.on_wire_closed(client_id, &error),
            }
        }
        let now_ms = self.now_ms;
        if let Some(key_id) = self.wire(client_id).and_then(|w| w.take_recheck(now_ms)) {
            self.start_wire_task(client_id, None, Shape::Done, move |server| {
                let context = Arc::clone(&server.context);
                Step::database(move |db| {
                    let key = Credential::ProvenKey(key_id);
                    db.read(|sql| authenticate(sql, &context, &key))?;
                    Step::respond(Response::no_content())
                })
            });
        }
        if self.is_draining
            && let Some(wire) = self.wire(client_id)
            && wire.session.stream_count() == 0
        {
            wire.session.close();
        }
    }

    fn on_login(&mut self, client_id: u64, identity: String) {
        let wait_ms = self
            .clients
            .get(&client_id)
            .map_or(0, |client| self.wire_failures.wait_ms(&peer_of(client.peer_address()), self.now_ms));
        let (count, unproven) = self
            .clients
            .values()
            .filter_map(|c| c.wire_team())
            .fold((0, 0), |n, team| (n.0 + 1, n.1 + usize::from(team.is_empty())));
        let Some(wire) = self.wire(client_id) else { return };
        if wait_ms > 0 {
            let seconds = wait_ms.div_ceil(1000);
            let text = format!("too many failed logins from this address; try again in {seconds} s");
            wire.session.refuse(Code::ResourceExhausted, &text);
        } else if !has_room(count, unproven) {
            wire.session.refuse(Code::ResourceExhausted, "too many clients are connected; try again");
        } else {
            self.start_wire_task(client_id, None, Shape::Done, |_| {
                Step::database(move |db| {
                    let login = db.read(|sql| Ok(crate::db::api_keys::wire_login(sql, &identity)?))?;
                    Ok(Step::Login(login))
                })
            });
        }
    }

    /// A worker has found, or not found, what a client is to prove.
    pub(super) fn finish_login(&mut self, id: TaskId, login: Option<WireLogin>) {
        // One key for all handshakes: an identity that is asked for twice gets the same salt.
        static DECOY_KEY: LazyLock<[u8; 32]> = LazyLock::new(crate::auth::random::bytes::<32>);
        let Some(caller) = self.tasks.remove(&id).and_then(|t| t.caller) else { return };
        let Some(wire) = self.wire(caller.client) else { return };
        let verifier = login.and_then(|login| {
            let verifier = Verifier::parse(&login.verifier);
            wire.key_id = Some(login.key_id);
            wire.team_id = login.team_id;
            verifier
        });
        wire.session.provide_verifier(verifier, DECOY_KEY.as_slice());
        self.ready.insert(caller.client);
    }

    fn on_ready(&mut self, client_id: u64) {
        let now_ms = self.now_ms;
        let Some(client) = self.clients.get_mut(&client_id) else { return };
        let address = client.peer_address();
        let Some(wire) = client.wire() else { return };
        wire.on_proven(now_ms);
        log::info!("{address}: wire client with {}", wire.key_id.as_deref().unwrap_or_default());
        let team_id = wire.team_id.clone();
        self.wire_failures.succeeded(&peer_of(address));
        let of_team = self.clients.values().filter(|c| c.wire_team() == Some(&team_id)).count();
        if of_team > MAX_TEAM_CLIENTS
            && let Some(wire) = self.wire(client_id)
        {
            let text = format!("your team has {MAX_TEAM_CLIENTS} connections already; end one of them");
            wire.session.refuse(Code::ResourceExhausted, &text);
        }
    }

    fn on_wire_closed(&mut self, client_id: u64, error: &SessionError) {
        let Some(client) = self.clients.get(&client_id) else { return };
        let address = client.peer_address();
        log::debug!("{address}: wire client: {error}");
        if matches!(error, SessionError::Auth(_)) {
            log::warn!("{address}: a wire client has failed to log in: {error}");
            self.wire_failures.failed(peer_of(address), self.now_ms);
        }
        self.abandon_wire(client_id);
    }

    fn on_opened(&mut self, client_id: u64, stream: StreamId, kind: u16, body: &[u8]) {
        let now_ms = self.now_ms;
        let Some(client) = self.clients.get_mut(&client_id) else { return };
        let peer = client.peer_address();
        let Some(wire) = client.wire() else { return };
        let key_id = wire.key_id.clone().unwrap_or_default();
        match requests::read(kind, body, &key_id, peer) {
            Ok(Asked::Health) => {
                let reply = HealthReply { version: env!("CARGO_PKG_VERSION").into(), uptime_ms: now_ms };
                self.answer_stream(client_id, stream, vec![encoded(&reply)]);
            }
            Ok(Asked::Forward(capsule_id)) => {
                wire.streams.insert(stream, StreamUse::AwaitInner(capsule_id));
            }
            Ok(Asked::Api { handler, request, shape }) => {
                self.start_wire_task(client_id, Some(stream), shape, |server| {
                    handler(request, &server.context)
                });
            }
            Err(error) => self.answer_stream(client_id, stream, vec![encoded(&error)]),
        }
    }

    fn on_wire_message(&mut self, client_id: u64, stream: StreamId, kind: u16, body: &[u8], cost: u32) {
        let Some(wire) = self.wire(client_id) else { return };
        let is_splice =
            matches!(wire.streams.get(&stream), Some(StreamUse::AwaitInner(_) | StreamUse::Spliced(_)));
        if !is_splice {
            // A request is one message; what follows it is of no use.
            return wire.session.release(stream, cost);
        }
        if !requests::may_go_into_a_capsule(kind) {
            wire.session.release(stream, cost);
            let text = format!("message kind {kind:#06x} is not one that a client may send into a capsule");
            let refusal = Error::new(Code::PermissionDenied, text);
            self.drop_stream(client_id, stream);
            return self.answer_stream(client_id, stream, vec![encoded(&refusal)]);
        }
        if let Some(StreamUse::AwaitInner(capsule_id)) = wire.streams.get(&stream) {
            let (capsule_id, key_id) = (capsule_id.clone(), wire.key_id.clone().unwrap_or_default());
            self.start_wire_task(client_id, Some(stream), Shape::Done, move |server| {
                let credential = Credential::ProvenKey(key_id);
                with_capsule_as(credential, &capsule_id, &server.context, |target| Ok(Step::Splice(target)))
            });
        }
        match self.wire(client_id).and_then(|w| w.spliced(stream)) {
            Some(spliced) => spliced.inward.push_message(kind, body, cost),
            // There was no room for it.
            None => {
                if let Some(wire) = self.wire(client_id) {
                    wire.session.release(stream, cost);
                }
            }
        }
        self.pump_splice(client_id, stream);
    }

    fn on_wire_finished(&mut self, client_id: u64, stream: StreamId) {
        let Some(wire) = self.wire(client_id) else { return };
        match wire.streams.get_mut(&stream) {
            Some(StreamUse::Spliced(spliced)) => {
                spliced.inward.push_end();
                self.pump_splice(client_id, stream);
            }
            Some(StreamUse::AwaitInner(_)) => {
                let text = "a Forward message has to be followed by a message for the capsule";
                let error = Error::new(Code::InvalidRequest, text);
                self.answer_stream(client_id, stream, vec![encoded(&error)]);
            }
            Some(StreamUse::Answered) => {
                wire.streams.remove(&stream);
            }
            // The answer is still to come on the other half.
            Some(StreamUse::Asked(_) | StreamUse::Answering(_)) | None => {}
        }
    }

    /// Begins work for a client: for one of its streams, or for its login.
    fn start_wire_task(
        &mut self,
        client_id: u64,
        stream: Option<StreamId>,
        shape: Shape,
        first: impl FnOnce(&Server) -> Flow,
    ) {
        let caller = Caller { client: client_id, stream, shape };
        if self.tasks.len() >= MAX_TASKS {
            return self.answer_caller(&caller, &super::client::overloaded());
        }
        let id = self.fresh_id();
        if let (Some(stream), Some(wire)) = (stream, self.wire(client_id)) {
            let stream_use = match wire.streams.remove(&stream) {
                Some(StreamUse::AwaitInner(_)) => StreamUse::Spliced(Box::new(Spliced {
                    task: id,
                    call: None,
                    is_open: false,
                    inward: Pipe::default(),
                    outward: Pipe::default(),
                })),
                _ => StreamUse::Asked(id),
            };
            wire.streams.insert(stream, stream_use);
        }
        let task = Task { client: None, caller: Some(caller), job: None, is_new: true, wait: Wait::Nothing };
        self.tasks.insert(id, task);
        let flow = first(self);
        self.run_task(id, flow);
    }

    /// Tells a client what its request has come to.
    pub(super) fn answer_caller(&mut self, caller: &Caller, response: &Response) {
        match caller.stream {
            Some(stream) => {
                if let Some(wire) = self.wire(caller.client) {
                    wire.unsplice(stream);
                }
                self.answer_stream(caller.client, stream, requests::answer(caller.shape, response));
            }
            // A login that could not be looked up, or a key that was looked up again.
            None => {
                let now_ms = self.now_ms;
                if let Some(wire) = self.wire(caller.client) {
                    let error = (response.status >= 400).then(|| requests::error(response));
                    wire.on_rechecked(error, now_ms);
                }
                self.ready.insert(caller.client);
            }
        }
    }

    /// Sends the last messages of a stream.
    fn answer_stream(&mut self, client_id: u64, stream: StreamId, messages: Vec<Encoded>) {
        let Some(wire) = self.wire(client_id) else { return };
        if !wire.session.has_stream(stream) {
            wire.streams.remove(&stream);
            return;
        }
        let mut pipe = Pipe::default();
        for (kind, body) in messages {
            pipe.push_message(kind, &body, 0);
        }
        pipe.push_end();
        wire.streams.insert(stream, StreamUse::Answering(pipe));
        self.pump_splice(client_id, stream);
    }

    /// The capsule is found: its stream is opened, and what the client has sent so far goes into it.
    pub(super) fn start_splice(&mut self, id: TaskId, target: Target) {
        let call = self.fresh_id();
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Some((client_id, stream)) = task.caller.as_ref().and_then(|c| Some((c.client, c.stream?))) else {
            self.tasks.remove(&id);
            return;
        };
        task.wait = Wait::Splice(call);
        let Some(spliced) = self.wire(client_id).and_then(|w| w.spliced(stream)) else {
            self.tasks.remove(&id);
            return;
        };
        spliced.call = Some(call);
        self.calls.insert(call, id);
        let forward = Forward { capsule_id: target.capsule_id };
        let request = sessions::Request {
            host_id: target.host_id,
            address: target.address,
            messages: vec![super::handler::encode(&forward)],
            half_close: false,
            timeout_ms: OPEN_TIMEOUT_MS,
        };
        self.hosts.splice(call, request, self.now_ms);
    }

    /// Takes what came from a host for a client's stream.
    pub(super) fn on_splice_event(&mut self, id: TaskId, event: HostEvent) {
        let caller = self.tasks.get(&id).and_then(|t| t.caller.as_ref());
        let Some((client_id, stream)) = caller.and_then(|c| Some((c.client, c.stream?))) else { return };
        let Some(spliced) = self.wire(client_id).and_then(|w| w.spliced(stream)) else { return };
        match event {
            HostEvent::Writable { .. } => spliced.is_open = true,
            HostEvent::Message { kind, body, cost, .. } => spliced.outward.push_message(kind, &body, cost),
            HostEvent::Data { channel, bytes, cost, .. } => spliced.outward.push_data(channel, bytes, cost),
            HostEvent::Finished { .. } => spliced.outward.push_end(),
            HostEvent::Failed { error, .. } => return self.fail_splice(client_id, stream, error),
            HostEvent::Reset { call, code, reason } => {
                if let Some(wire) = self.wire(client_id) {
                    wire.reset(stream, code, &reason);
                }
                self.stalled.remove(&(client_id, stream));
                self.ready.insert(client_id);
                return self.end_splice(&id, Some(call));
            }
            HostEvent::Reply { .. } => {}
        }
        self.pump_splice(client_id, stream);
    }

    /// The host's side is over: what it sent before still goes to the client, then why.
    fn fail_splice(&mut self, client_id: u64, stream: StreamId, error: HostError) {
        let Some(wire) = self.wire(client_id) else { return };
        let Some(spliced) = wire.unsplice(stream) else { return };
        let told = match error {
            HostError::Remote(error) => error,
            other => requests::error(&Response::from(other)),
        };
        let mut pipe = spliced.outward;
        let (kind, body) = encoded(&told);
        pipe.push_message(kind, &body, 0);
        pipe.push_end();
        wire.streams.insert(stream, StreamUse::Answering(pipe));
        self.end_splice(&spliced.task, spliced.call);
        self.pump_splice(client_id, stream);
    }

    fn end_splice(&mut self, task: &TaskId, call: Option<CallId>) {
        self.tasks.remove(task);
        if let Some(call) = call {
            self.calls.remove(&call);
            self.hosts.cancel(call);
        }
    }

    /// Moves what a client's stream holds, both ways.
    pub(super) fn pump_splice(&mut self, client_id: u64, stream: StreamId) {
        let Some(wire) = self.clients.get_mut(&client_id).and_then(|c| c.wire()) else { return };
        self.ready.insert(client_id);
        let (inward, outward) = match wire.streams.get_mut(&stream) {
            Some(StreamUse::Spliced(spliced)) => {
                let mut inward = Moved::Idle;
                if let Some(call) = spliced.call.filter(|_| spliced.is_open) {
                    let (moved, spent) = spliced.inward.pump(&mut CallEnd(&mut self.hosts, call));
                    wire.session.release(stream, spent);
                    inward = moved;
                }
                let (outward, spent) = spliced.outward.pump(&mut (&mut wire.session, stream));
                if let Some(call) = spliced.call {
                    self.hosts.release(call, spent);
                }
                (inward, outward)
            }
            Some(StreamUse::Answering(pipe)) => (Moved::Ended, pipe.pump(&mut (&mut wire.session, stream)).0),
            _ => return,
        };
        match (inward, outward) {
            // The client's stream is gone, and its reset is on the way to us or was dealt with.
            (_, Moved::Broken) => self.abandon_stream(client_id, stream),
            (Moved::Ended, Moved::Ended) => self.on_both_ended(client_id, stream),
            (Moved::Stalled, _) | (_, Moved::Stalled) => {
                self.stalled.insert((client_id, stream));
            }
            // A host's stream that is gone is told by an event of its own.
            _ => {}
        }
    }

    fn on_both_ended(&mut self, client_id: u64, stream: StreamId) {
        let Some(wire) = self.wire(client_id) else { return };
        let was = wire.streams.remove(&stream);
        if wire.session.has_stream(stream) {
            wire.streams.insert(stream, StreamUse::Answered);
        }
        if let Some(StreamUse::Spliced(spliced)) = was {
            self.end_splice(&spliced.task, spliced.call);
        }
    }

    /// Tries again what the receiving side had no room for.
    pub(super) fn pump_stalled(&mut self) {
        for (client_id, stream) in std::mem::take(&mut self.stalled) {
            self.pump_splice(client_id, stream);
        }
    }

    /// Ends what a stream stands for, on our side and in the capsule.
    fn drop_stream(&mut self, client_id: u64, stream: StreamId) {
        let Some(wire) = self.wire(client_id) else { return };
        if let Some(spliced) = wire.unsplice(stream) {
            match spliced.call {
                Some(_) => self.end_splice(&spliced.task, spliced.call),
                None => self.abandon_task(spliced.task),
            }
        } else if let Some(StreamUse::Asked(task)) = wire.streams.remove(&stream) {
            self.abandon_task(task);
        }
    }

    /// The client has ended a stream at once.
    fn abandon_stream(&mut self, client_id: u64, stream: StreamId) {
        self.drop_stream(client_id, stream);
        self.stalled.remove(&(client_id, stream));
    }

    /// The connection is over: everything that was for it ends.
    pub(super) fn abandon_wire(&mut self, client_id: u64) {
        let Some(wire) = self.wire(client_id) else { return };
        let streams: Vec<StreamId> = wire.streams.keys().copied().collect();
        for stream in streams {
            self.abandon_stream(client_id, stream);
        }
    }

    /// Nobody waits for a task any more: it is ended where it may be, else it goes on without a caller.
    fn abandon_task(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.caller = None;
        if let Wait::Host { is_detached: false, call, .. } = &task.wait {
            let call = *call;
            self.calls.remove(&call);
            self.hosts.cancel(call);
            if let Wait::Host { then, .. } = std::mem::replace(&mut task.wait, Wait::Nothing) {
                let flow = then(Err(HostError::Cancelled));
                self.run_task(id, flow);
            }
        }
    }
}
