//! Carries out the steps of requests and of recurring jobs.

use super::client::overloaded;
use super::forwarded::client_address;
use super::handler::{Flow, Handler, HostCall, MessageContinuation, Request, Response, Step};
use super::limits::{FIRST_MESSAGE_MS, MAX_TASKS};
use super::server::{Server, TimerKey};
use super::task::{Task, TaskId, Wait};
use crate::hosts::error::HostError;
use crate::hosts::sessions::{self, HostEvent};
use crate::worker::{WORK_TIMEOUT, Work, database_unavailable};
use wire::websocket::Message;

impl Server {
    /// Begins a client's request.
    pub(super) fn start_request(&mut self, client: u64, handler: Handler, mut request: Request) {
        if self.is_draining
            && let Some(client) = self.clients.get_mut(&client)
        {
            client.close_after_response();
        }
        if self.tasks.len() >= MAX_TASKS {
            self.answer(client, &overloaded());
            return;
        }
        let id = self.fresh_id();
        if let Some(client) = self.clients.get_mut(&client) {
            client.task = Some(id);
        }
        self.tasks.insert(
            id,
            Task { client: Some(client), caller: None, job: None, is_new: true, wait: Wait::Nothing },
        );
        request.peer = client_address(request.peer, &request.headers, &self.context.trusted_proxies);
        let flow = handler(request, &self.context);
        self.run_task(id, flow);
    }

    /// Begins a run of a recurring job.
    pub(super) fn start_job(&mut self, index: usize) {
        if self.is_draining {
            return;
        }
        let Some(job) = self.jobs.get(index) else { return };
        let run = job.run;
        let id = self.fresh_id();
        self.tasks.insert(
            id,
            Task { client: None, caller: None, job: Some(index), is_new: true, wait: Wait::Nothing },
        );
        let flow = run(&self.context);
        self.run_task(id, flow);
    }

    /// Carries out steps until the task waits or is over.
    pub(super) fn run_task(&mut self, id: TaskId, mut flow: Flow) {
        loop {
            let Some(task) = self.tasks.get_mut(&id) else { return };
            task.wait = Wait::Nothing;
            let is_new = std::mem::replace(&mut task.is_new, false);
            let work = match flow {
                Err(response) | Ok(Step::Respond(response)) => return self.finish(id, &response),
                Ok(Step::RespondThen(response, next)) => {
                    let (client, caller) = (task.client.take(), task.caller.take());
                    if let Some(client) = client {
                        self.answer(client, &response);
                    }
                    if let Some(caller) = caller {
                        self.answer_caller(&caller, &response);
                    }
                    flow = Ok(*next);
                    continue;
                }
                Ok(Step::Host(call)) => return self.call_host(id, call),
                Ok(Step::Pause(ms, then)) => {
                    task.wait = Wait::Pause(then);
                    return self.timers.set(TimerKey::Pause(id), self.now_ms.saturating_add(ms));
                }
                Ok(Step::ReadMessage(then)) => match self.await_message(id, then) {
                    Ok(()) => return,
                    Err(response) => return self.finish(id, &response),
                },
                Ok(Step::Relay(relay)) => match self.start_relay(id, relay) {
                    Ok(()) => return,
                    Err(response) => return self.finish(id, &response),
                },
                Ok(Step::Upload(upload)) => match self.start_upload(id, upload) {
                    Ok(()) => return,
                    Err(response) => return self.finish(id, &response),
                },
                Ok(Step::Proxy(proxy)) => match self.start_proxy(id, *proxy) {
                    Ok(()) => return,
                    Err(response) => return self.finish(id, &response),
                },
                Ok(Step::Login(login)) => return self.finish_login(id, login),
                Ok(Step::Splice(target)) => return self.start_splice(id, target),
                Ok(Step::Database(work)) => Work::Database(work),
                Ok(Step::Compute(work)) => Work::Compute(work),
            };
            // Recurring jobs give way to requests, so they count as new.
            match self.workers.submit(id, work, is_new) {
                Ok(()) => {
                    task.wait = Wait::Worker;
                    let limit_ms = u64::try_from(WORK_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
                    self.timers.set(TimerKey::Worker(id), self.now_ms.saturating_add(limit_ms));
                    return;
                }
                Err(response) => flow = Err(response),
            }
        }
    }

    /// No worker has come back with a task's work: it ends without. Should the work be done after all,
    /// nothing follows from it.
    pub(super) fn on_work_timeout(&mut self, id: TaskId) {
        if matches!(self.tasks.get(&id).map(|t| &t.wait), Some(Wait::Worker)) {
            self.workers.replace_lost();
            self.run_task(id, Err(database_unavailable("it does not answer")));
        }
    }

    /// A task's pause is over.
    pub(super) fn end_pause(&mut self, id: TaskId, result: Result<(), HostError>) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if let Wait::Pause(then) = std::mem::replace(&mut task.wait, Wait::Nothing) {
            self.timers.clear(TimerKey::Pause(id));
            let flow = then(result);
            self.run_task(id, flow);
        }
    }

    /// Ends a task with its response.
    fn finish(&mut self, id: TaskId, response: &Response) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if let Some(client) = task.client {
            self.answer(client, response);
        }
        if let Some(caller) = &task.caller {
            return self.answer_caller(caller, response);
        }
        let is_failed = response.status >= 400;
        if let Some((index, job)) = task.job.and_then(|index| Some((index, self.jobs.get(index)?))) {
            if is_failed {
                log::warn!("{}: {}", job.name, describe(response));
            }
            self.timers.set(TimerKey::Job(index), self.now_ms + job.every_ms);
        } else if task.client.is_none() && is_failed {
            log::warn!("work without a client ended with {}", describe(response));
        }
    }

    /// Gives a client its response.
    pub(super) fn answer(&mut self, id: u64, response: &Response) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.task = None;
            client.respond(response, self.now_ms);
            self.ready.insert(id);
        }
    }

    fn call_host(&mut self, id: TaskId, call: HostCall) {
        let call_id = self.fresh_id();
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let HostCall {
            host_id,
            address,
            messages,
            half_close,
            last_kinds,
            max_data_bytes,
            timeout_ms,
            is_detached,
            then,
        } = call;
        task.wait = Wait::Host { call: call_id, is_detached, then };
        self.calls.insert(call_id, id);
        let request = sessions::Request { host_id, address, messages, half_close, timeout_ms };
        self.hosts.call(call_id, request, last_kinds, max_data_bytes, self.now_ms);
    }

    /// Takes what came of a call or stream.
    pub(super) fn on_host_event(&mut self, event: HostEvent) {
        match event {
            HostEvent::Reply { call, result } => {
                let Some(id) = self.calls.remove(&call) else { return };
                let Some(task) = self.tasks.get_mut(&id) else { return };
                if let Wait::Host { then, .. } = std::mem::replace(&mut task.wait, Wait::Nothing) {
                    let flow = then(result);
                    self.run_task(id, flow);
                }
            }
            HostEvent::Message { call, .. }
            | HostEvent::Data { call, .. }
            | HostEvent::Finished { call }
            | HostEvent::Failed { call, .. }
            | HostEvent::Reset { call, .. }
            | HostEvent::Writable { call } => {
                let Some(id) = self.calls.get(&call).copied() else {
                    // The task is over; the session has reset the stream already.
                    return;
                };
                match self.tasks.get(&id).map(|t| &t.wait) {
                    Some(Wait::Upload(_)) => self.on_upload_event(id, event),
                    Some(Wait::Proxy(_)) => self.on_proxy_event(id, event),
                    Some(Wait::Splice(_)) => self.on_splice_event(id, event),
                    _ => self.on_relay_event(id, event),
                }
            }
        }
    }

    fn await_message(&mut self, id: TaskId, then: MessageContinuation) -> Result<(), Response> {
        let Some(task) = self.tasks.get_mut(&id) else { return Ok(()) };
        let Some(client_id) = task.client else { return Err(Response::from(HostError::Cancelled)) };
        let Some(client) = self.clients.get_mut(&client_id) else { return Ok(()) };
        client.upgrade(self.now_ms)?;
        task.wait = Wait::Message(then);
        self.timers.set(TimerKey::Message(id), self.now_ms + FIRST_MESSAGE_MS);
        self.ready.insert(client_id);
        Ok(())
    }

    pub(super) fn on_message_timeout(&mut self, id: TaskId) {
        if matches!(self.tasks.get(&id).map(|t| &t.wait), Some(Wait::Message(_))) {
            let seconds = FIRST_MESSAGE_MS / 1000;
            let message = format!("no message came within {seconds} s");
            self.run_task(id, Err(Response::error(408, "invalid_request", &message)));
        }
    }

    /// Hands a WebSocket's messages to its task, as far as that takes them.
    pub(super) fn take_messages(&mut self, client_id: u64) {
        while let Some(client) = self.clients.get_mut(&client_id) {
            if matches!(client.inbox.front(), Some(Message::Close(..))) {
                client.inbox.clear();
                return self.detach(client_id);
            }
            let Some(id) = client.task else {
                // It is being closed: nobody is there for what still comes.
                client.inbox.clear();
                return;
            };
            let Some(task) = self.tasks.get_mut(&id) else { return };
            match &task.wait {
                Wait::Relay(relay) if relay.outbox.is_empty() && relay.is_open => {
                    let Some(message) = client.inbox.pop_front() else { return };
                    self.on_client_message(id, &message);
                }
                Wait::Message(_) => {
                    let Some(message) = client.inbox.pop_front() else { return };
                    self.timers.clear(TimerKey::Message(id));
                    let Wait::Message(then) = std::mem::replace(&mut task.wait, Wait::Nothing) else {
                        return;
                    };
                    let flow = match message {
                        Message::Text(text) => then(text),
                        Message::Binary(_) | Message::Close(..) => Err(Response::error(
                            400,
                            "invalid_request",
                            "the first message of this WebSocket is JSON, as text",
                        )),
                    };
                    self.run_task(id, flow);
                }
                _ => return,
            }
        }
    }

    /// The client has gone away, or takes no more: its task goes on without it, or ends.
    pub(super) fn detach(&mut self, client_id: u64) {
        let Some(client) = self.clients.get_mut(&client_id) else { return };
        let Some(id) = client.task else { return };
        // A client that has only ended its direction may still read a response that a worker makes.
        let may_read = !client.is_over() && !client.is_websocket();
        let Some(task) = self.tasks.get_mut(&id) else {
            client.task = None;
            return;
        };
        match &task.wait {
            Wait::Host { is_detached: false, call, .. } => {
                let call = *call;
                self.calls.remove(&call);
                self.hosts.cancel(call);
                if !may_read {
                    task.client = None;
                    client.task = None;
                }
                if let Wait::Host { then, .. } = std::mem::replace(&mut task.wait, Wait::Nothing) {
                    let flow = then(Err(HostError::Cancelled));
                    self.run_task(id, flow);
                }
            }
            Wait::Relay(_) => self.end_relay(id),
            Wait::Proxy(_) => self.end_proxy(id),
            Wait::Upload(_) => {
                let gone = Response::from(HostError::Cancelled);
                self.end_upload(id, Err(gone));
            }
            Wait::Pause(_) => {
                if !may_read {
                    task.client = None;
                    client.task = None;
                }
                self.end_pause(id, Err(HostError::Cancelled));
            }
            Wait::Message(_) => {
                self.timers.clear(TimerKey::Message(id));
                client.task = None;
                self.tasks.remove(&id);
            }
            Wait::Nothing | Wait::Worker | Wait::Splice(_) | Wait::Host { .. } => {
                if !may_read {
                    task.client = None;
                    client.task = None;
                }
            }
        }
    }

    /// Whether a client is not to be read from now, because what it sent before is not dealt with.
    pub(super) fn holds_back(&self, client_id: u64) -> bool {
        let Some(client) = self.clients.get(&client_id) else { return false };
        if !client.is_websocket() {
            return false;
        }
        if !client.inbox.is_empty() {
            return true;
        }
        match client.task.and_then(|id| self.tasks.get(&id)).map(|t| &t.wait) {
            Some(Wait::Relay(relay)) => !relay.outbox.is_empty() || !relay.is_open,
            // The close of the peer has to be seen.
            Some(_) | None => false,
        }
    }
}

/// A response, for the log.
fn describe(response: &Response) -> String {
    format!("{}: {}", response.status, response.error_message().unwrap_or_default())
}
