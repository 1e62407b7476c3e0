//! Carries out relays and uploads: bytes between a client and a stream to a host, each side held back
//! while the other does not keep up.

use super::client::overloaded;
use super::handler::{Flow, Relay, Response, Upload, encode};
use super::limits::{MAX_HELD_FILE, OUTPUT_HIGH_WATER};
use super::multipart::{Multipart, Part};
use super::server::Server;
use super::task::{Outbox, Relaying, TaskId, Uploading, Wait};
use crate::hosts::error::HostError;
use crate::hosts::relay::Action;
use crate::hosts::sessions::{self, CallId, HostEvent, Hosts};
use wire::message::{CHANNEL_FILE, FileEntry, FileWrite, Forward, Message as _};
use wire::websocket::{Message, close_code};

/// The longest that an upload may take, in milliseconds: its file's answer comes at its end. A client
/// that stands still is given up long before.
const UPLOAD_TIMEOUT_MS: u64 = 3_600_000;
/// Permission bits of an uploaded file.
const UPLOAD_MODE: u32 = 0o644;
/// Output of a client below which credit for more is given back, in bytes.
const OUTPUT_LOW_WATER: usize = OUTPUT_HIGH_WATER / 4;

/// Sends what waits in an outbox; whether it is empty now.
pub(super) fn pump(hosts: &mut Hosts, call: CallId, outbox: &mut Outbox) -> bool {
    let mut finish = false;
    outbox.send(|channel, bytes| hosts.send_data(call, channel, bytes).ok(), || finish = true);
    if finish && let Err(error) = hosts.finish(call) {
        log::debug!("the end of a stream: {error}");
    }
    outbox.is_empty()
}

impl Server {
    pub(super) fn start_relay(&mut self, id: TaskId, relay: Relay) -> Result<(), Response> {
        let call = self.fresh_id();
        let Some(task) = self.tasks.get_mut(&id) else { return Ok(()) };
        let client_id = task.client.ok_or_else(|| Response::from(HostError::Cancelled))?;
        let Some(client) = self.clients.get_mut(&client_id) else { return Ok(()) };
        if relay.is_websocket {
            client.upgrade(self.now_ms)?;
        }
        let Relay { host_id, address, messages, half_close, timeout_ms, translator, .. } = relay;
        task.wait = Wait::Relay(Box::new(Relaying {
            call,
            translator,
            owed: 0,
            outbox: Outbox::default(),
            is_open: false,
            is_over: false,
        }));
        self.calls.insert(call, id);
        let request = sessions::Request { host_id, address, messages, half_close, timeout_ms };
        self.hosts.open(call, request, self.now_ms);
        self.ready.insert(client_id);
        Ok(())
    }

    fn relay(&mut self, id: TaskId) -> Option<&mut Relaying> {
        match &mut self.tasks.get_mut(&id)?.wait {
            Wait::Relay(relay) => Some(relay),
            _ => None,
        }
    }

    pub(super) fn on_relay_event(&mut self, id: TaskId, event: HostEvent) {
        let Some(relay) = self.relay(id) else { return };
        let mut actions = Vec::new();
        match event {
            HostEvent::Writable { .. } => relay.is_open = true,
            HostEvent::Message { call, kind, body, cost } => {
                relay.translator.message(kind, &body, &mut actions);
                self.hosts.release(call, cost);
            }
            HostEvent::Data { channel, bytes, cost, .. } => {
                relay.translator.data(channel, &bytes, &mut actions);
                relay.owed += cost;
            }
            HostEvent::Finished { .. } => {
                relay.is_over = true;
                relay.translator.finished(&mut actions);
            }
            HostEvent::Failed { error, .. } => {
                relay.is_over = true;
                relay.translator.failed(error, &mut actions);
            }
            // Neither comes on such streams.
            HostEvent::Reply { .. } | HostEvent::Reset { .. } => {}
        }
        self.act(id, actions);
    }

    pub(super) fn on_client_message(&mut self, id: TaskId, message: &Message) {
        let Some(relay) = self.relay(id) else { return };
        let mut actions = Vec::new();
        match message {
            Message::Text(text) => relay.translator.client_text(text, &mut actions),
            Message::Binary(bytes) => relay.translator.client_binary(bytes, &mut actions),
            Message::Close(..) => {}
        }
        self.act(id, actions);
    }

    /// Carries out what a translator wants.
    fn act(&mut self, id: TaskId, actions: Vec<Action>) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Wait::Relay(relay) = &mut task.wait else { return };
        let Some((client_id, client)) =
            task.client.and_then(|id| self.clients.get_mut(&id).map(|client| (id, client)))
        else {
            return;
        };
        self.ready.insert(client_id);
        let mut is_over = false;
        for action in actions {
            match action {
                Action::Head(response) => client.start_stream(&response, self.now_ms),
                Action::Body(bytes) => client.stream_body(&bytes, self.now_ms),
                Action::EndBody => {
                    client.end_stream(self.now_ms);
                    is_over = true;
                }
                Action::Respond(response) => {
                    client.respond(&response, self.now_ms);
                    is_over = true;
                }
                Action::Text(text) => {
                    if let Some(ws) = client.websocket() {
                        ws.send_text(&text);
                    }
                }
                Action::Binary(bytes) => {
                    if let Some(ws) = client.websocket() {
                        ws.send_binary(&bytes);
                    }
                }
                Action::Close(code, reason) => {
                    if let Some(ws) = client.websocket() {
                        ws.send_close(code, &reason);
                    }
                    is_over = true;
                }
                Action::Send(message) => {
                    if let Err(error) = self.hosts.send(relay.call, message) {
                        log::debug!("a message to a host was dropped: {error}");
                    }
                }
                Action::Data(channel, bytes) => relay.outbox.push(channel, bytes),
                Action::Finish => relay.outbox.finish(),
            }
        }
        if relay.is_open {
            pump(&mut self.hosts, relay.call, &mut relay.outbox);
        }
        if is_over {
            self.end_relay(id);
        } else {
            self.return_credit(client_id);
        }
    }

    /// Gives a host credit for more, once the client has taken what came.
    pub(super) fn return_credit(&mut self, client_id: u64) {
        let Some(client) = self.clients.get(&client_id) else { return };
        if client.pending_output() > OUTPUT_LOW_WATER {
            return;
        }
        let Some(id) = client.task else { return };
        let (call, owed) = match self.tasks.get_mut(&id).map(|t| &mut t.wait) {
            Some(Wait::Relay(relay)) => (relay.call, &mut relay.owed),
            Some(Wait::Proxy(proxy)) => (proxy.call, &mut proxy.owed),
            _ => return,
        };
        if *owed > 0 {
            self.hosts.release(call, std::mem::take(owed));
        }
    }

    /// Ends a relay. A WebSocket that is not closing yet is closed; a response that is not complete is
    /// cut off.
    pub(super) fn end_relay(&mut self, id: TaskId) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if let Wait::Relay(relay) = task.wait {
            self.calls.remove(&relay.call);
            self.hosts.cancel(relay.call);
        }
        let Some(client_id) = task.client else { return };
        let Some(client) = self.clients.get_mut(&client_id) else { return };
        if client.task == Some(id) {
            client.task = None;
            match client.websocket() {
                Some(ws) if !ws.is_closing() => ws.send_close(close_code::GOING_AWAY, ""),
                Some(_) => {}
                None => client.cut_off(),
            }
        }
        self.ready.insert(client_id);
    }

    pub(super) fn start_upload(&mut self, id: TaskId, upload: Upload) -> Result<(), Response> {
        let Some(multipart) = Multipart::new(&upload.content_type) else {
            return Err(Response::error(
                400,
                "invalid_request",
                "the body must be multipart/form-data with a boundary",
            ));
        };
        let Some(task) = self.tasks.get_mut(&id) else { return Ok(()) };
        let client_id = task.client.ok_or_else(|| Response::from(HostError::Cancelled))?;
        task.wait = Wait::Upload(Box::new(Uploading {
            target: upload.target,
            multipart,
            path: None,
            has_file: false,
            held: (0, self.bodies.share()),
            call: None,
            is_open: false,
            outbox: Outbox::default(),
            file_ended: false,
            is_written: false,
            body_ended: false,
            then: upload.then,
        }));
        if let Some(client) = self.clients.get_mut(&client_id) {
            client.want_body(true, self.now_ms);
        }
        self.ready.insert(client_id);
        Ok(())
    }

    fn upload_of(&mut self, client_id: u64) -> Option<(TaskId, &mut Uploading)> {
        let id = self.clients.get(&client_id)?.task?;
        match &mut self.tasks.get_mut(&id)?.wait {
            Wait::Upload(upload) => Some((id, upload)),
            _ => None,
        }
    }

    /// Bytes of a streamed body.
    pub(super) fn on_body(&mut self, client_id: u64, bytes: &[u8]) {
        if let Some(id) = self.proxy_task(client_id) {
            return self.on_proxied_bytes(id, bytes);
        }
        let Some((id, upload)) = self.upload_of(client_id) else { return };
        let parts = match upload.multipart.receive(bytes) {
            Ok(parts) => parts,
            Err(error) => {
                let response = Response::error(400, "invalid_request", &error.to_string());
                return self.end_upload(id, Err(response));
            }
        };
        for part in parts {
            let taken = match part {
                Part::Field { name, value } if name == "path" => self.on_path(id, value),
                Part::Field { .. } | Part::End => Ok(()),
                Part::FileStart => self.on_file_start(id),
                Part::FileData(bytes) => self.on_file_data(id, bytes),
                Part::FileEnd => {
                    if let Some((_, upload)) = self.upload_of(client_id) {
                        upload.file_ended = true;
                        upload.outbox.finish();
                    }
                    Ok(())
                }
            };
            if let Err(response) = taken {
                return self.end_upload(id, Err(response));
            }
        }
        self.pump_upload(id);
    }

    fn on_path(&mut self, id: TaskId, path: String) -> Result<(), Response> {
        let Some(Wait::Upload(upload)) = self.tasks.get_mut(&id).map(|t| &mut t.wait) else { return Ok(()) };
        if path.is_empty() || upload.path.is_some() {
            return Err(wrong_fields());
        }
        upload.path = Some(path);
        if upload.has_file {
            self.open_file(id);
        }
        Ok(())
    }

    fn on_file_start(&mut self, id: TaskId) -> Result<(), Response> {
        let Some(Wait::Upload(upload)) = self.tasks.get_mut(&id).map(|t| &mut t.wait) else { return Ok(()) };
        if std::mem::replace(&mut upload.has_file, true) {
            return Err(wrong_fields());
        }
        if upload.path.is_some() {
            self.open_file(id);
        }
        Ok(())
    }

    /// Bytes of the file; where its path has not come they are held, within a bound.
    fn on_file_data(&mut self, id: TaskId, bytes: Vec<u8>) -> Result<(), Response> {
        let Some(Wait::Upload(upload)) = self.tasks.get_mut(&id).map(|t| &mut t.wait) else { return Ok(()) };
        if upload.call.is_none() {
            let (held, share) = &mut upload.held;
            *held += bytes.len();
            if *held > MAX_HELD_FILE {
                let message = format!(
                    "the field path must come before the field file when the file has over {MAX_HELD_FILE} bytes"
                );
                return Err(Response::error(400, "invalid_request", &message));
            }
            if !share.grow(bytes.len()) {
                return Err(overloaded());
            }
        }
        upload.outbox.push(CHANNEL_FILE, bytes);
        Ok(())
    }

    /// Both the path and the beginning of the file are there.
    fn open_file(&mut self, id: TaskId) {
        let call = self.fresh_id();
        let Some(Wait::Upload(upload)) = self.tasks.get_mut(&id).map(|t| &mut t.wait) else { return };
        let path = upload.path.as_deref().unwrap_or_default();
        let write = FileWrite { path: path.into(), user: String::new(), mode: UPLOAD_MODE };
        let forward = Forward { capsule_id: upload.target.capsule_id.clone() };
        upload.call = Some(call);
        let request = sessions::Request {
            host_id: upload.target.host_id.clone(),
            address: upload.target.address.clone(),
            messages: vec![encode(&forward), encode(&write)],
            half_close: false,
            timeout_ms: UPLOAD_TIMEOUT_MS,
        };
        self.calls.insert(call, id);
        self.hosts.open(call, request, self.now_ms);
    }

    /// Sends on what came of the file, and lets the client send more once it has gone.
    fn pump_upload(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Wait::Upload(upload) = &mut task.wait else { return };
        let is_empty = match upload.call {
            Some(call) if upload.is_open => pump(&mut self.hosts, call, &mut upload.outbox),
            Some(_) => upload.outbox.is_empty(),
            // What is held for its path is bounded elsewhere.
            None => true,
        };
        let is_done = upload.is_written && upload.body_ended;
        if let Some(client_id) = task.client
            && let Some(client) = self.clients.get_mut(&client_id)
        {
            client.want_body(is_empty, self.now_ms);
            self.ready.insert(client_id);
        }
        if is_done {
            self.end_upload(id, Ok(()));
        }
    }

    /// A streamed body is complete.
    pub(super) fn on_body_end(&mut self, client_id: u64) {
        if let Some(id) = self.proxy_task(client_id) {
            return self.on_proxied_end(id);
        }
        let Some((id, upload)) = self.upload_of(client_id) else { return };
        upload.body_ended = true;
        if !upload.file_ended || !upload.multipart.is_complete() {
            let message = "the multipart body ended without a complete field file";
            return self.end_upload(id, Err(Response::error(400, "invalid_request", message)));
        }
        if upload.call.is_none() {
            return self.end_upload(id, Err(wrong_fields()));
        }
        self.pump_upload(id);
    }

    pub(super) fn on_upload_event(&mut self, id: TaskId, event: HostEvent) {
        let Some(Wait::Upload(upload)) = self.tasks.get_mut(&id).map(|t| &mut t.wait) else { return };
        match event {
            HostEvent::Writable { .. } => upload.is_open = true,
            HostEvent::Message { call, kind, cost, .. } => {
                upload.is_written |= kind == FileEntry::KIND;
                self.hosts.release(call, cost);
            }
            HostEvent::Data { call, cost, .. } => self.hosts.release(call, cost),
            HostEvent::Failed { error, .. } => {
                let response = Response::from(error);
                return self.end_upload(id, Err(response));
            }
            HostEvent::Finished { .. } if !upload.is_written => {
                let error = HostError::BadReply("the stream ended before the file was written".to_string());
                return self.end_upload(id, Err(error.into()));
            }
            HostEvent::Finished { .. } | HostEvent::Reply { .. } | HostEvent::Reset { .. } => {}
        }
        self.pump_upload(id);
    }

    /// Ends an upload; when that is not its good end, the file is left as it was.
    pub(super) fn end_upload(&mut self, id: TaskId, result: Result<(), Response>) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Wait::Upload(upload) = std::mem::replace(&mut task.wait, Wait::Nothing) else { return };
        if let Some(call) = upload.call {
            self.calls.remove(&call);
            self.hosts.cancel(call);
        }
        if let Some(client) = task.client.and_then(|id| self.clients.get_mut(&id)) {
            client.want_body(false, self.now_ms);
        }
        let flow: Flow = (upload.then)(result);
        self.run_task(id, flow);
    }
}

/// What an upload has to have.
fn wrong_fields() -> Response {
    let message = "the multipart body needs one field path, which is not empty, and one field file";
    Response::error(400, "invalid_request", message)
}
