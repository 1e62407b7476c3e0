//! One client's connection: from bytes to requests and back, with its deadlines. Knows no handlers.

use super::handler::{BodyMode, Handler, Method, Request, Response};
use super::limits::*;
use super::router::Router;
use super::{date, websocket_key};
use std::cell::Cell;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};
use wire::frame::PREAMBLE;
use wire::http1::{
    Framing, HttpError, Limits, RequestEvent, RequestHead, RequestParser, ResponseWriter, parse_query,
    percent_decode, write_continue,
};
use wire::reactor::{Socket, Transfer};
use wire::session::Session;
use wire::websocket::{Message, Role, WebSocket, accept_value, close_code};

/// What a connection tells the server.
#[derive(Debug)]
pub enum ClientEvent {
    /// A request for a handler. Nothing more is read until it is answered.
    Request(Handler, Request),
    /// Bytes of a streamed body.
    Body(Vec<u8>),
    /// The streamed body is complete.
    BodyEnd,
    /// A WebSocket's peer broke the protocol; the close frame is written.
    WebSocketFailed,
}

/// What is being read or waited for.
enum State {
    /// Nothing has come: a wire client or an HTTP one?
    First,
    /// A request's head, or the pause before it.
    Head,
    /// A request's buffered body.
    Body(Box<Incoming>),
    /// A streamed body; read only while the server asks for it.
    Stream {
        /// Whether it asks.
        wanted: bool,
        /// Whether the client waits for `100 Continue`.
        expects_continue: bool,
    },
    /// A handler is at work, or its response is being produced.
    Busy,
    /// An upgraded connection.
    WebSocket(Box<WebSocket>),
    /// A wire client.
    Wire(Box<Session>),
    /// The last response is being written, then what still comes is dropped for a while.
    Closing { left: usize },
}

/// A request whose body is not all there.
struct Incoming {
    handler: Handler,
    request: Request,
    max_body: usize,
    reserved: Reservation,
}

/// A share in the bound on all buffered bodies.
struct Reservation {
    total: Rc<Cell<usize>>,
    bytes: usize,
}

impl Reservation {
    /// Takes more; false when there is none left.
    fn grow(&mut self, bytes: usize) -> bool {
        let total = self.total.get() + bytes;
        if total > MAX_BUFFERED_BODIES {
            return false;
        }
        self.total.set(total);
        self.bytes += bytes;
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.total.set(self.total.get() - self.bytes);
    }
}

/// A connection.
pub struct Client {
    /// Its transport.
    pub socket: Socket,
    /// The task that its request, WebSocket or stream belongs to.
    pub task: Option<u64>,
    /// Messages of its WebSocket that no task has taken yet. Nothing more is read while there are any.
    pub inbox: VecDeque<Message>,
    peer: IpAddr,
    state: State,
    parser: RequestParser,
    /// Read and not parsed yet: a pipelined request, at most one read's worth.
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    bodies: Rc<Cell<usize>>,
    keep_alive: bool,
    is_head_request: bool,
    minor_version: u8,
    websocket_key: Option<String>,
    served: u32,
    /// When the present wait began: head, body, linger.
    since_ms: u64,
    /// Bytes of body since then.
    body_bytes: u64,
    /// When something was last heard from a WebSocket.
    heard_ms: u64,
    pinged: bool,
    /// When output last made progress.
    wrote_ms: u64,
    writer: Option<ResponseWriter>,
    /// The peer will send nothing more.
    input_ended: bool,
    is_broken: bool,
}

impl Client {
    /// An accepted connection. `bodies` counts the bytes of all buffered bodies.
    pub fn new(socket: Socket, peer: IpAddr, bodies: Rc<Cell<usize>>, now_ms: u64) -> Client {
        Client {
            socket,
            task: None,
            inbox: VecDeque::new(),
            peer,
            state: State::First,
            parser: RequestParser::new(Limits::default()),
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            bodies,
            keep_alive: true,
            is_head_request: false,
            minor_version: 1,
            websocket_key: None,
            served: 0,
            since_ms: now_ms,
            body_bytes: 0,
            heard_ms: now_ms,
            pinged: false,
            wrote_ms: now_ms,
            writer: None,
            input_ended: false,
            is_broken: false,
        }
    }

    /// Whether the connection is over and to be dropped.
    pub fn is_over(&self) -> bool {
        let written = self.pending_output() == 0;
        self.is_broken
            || match &self.state {
                State::Closing { left } => written && (self.input_ended || *left == 0),
                State::WebSocket(ws) => written && (ws.is_finished() || self.input_ended),
                State::Wire(session) => session.is_closed() && session.output().is_empty(),
                State::First | State::Head | State::Body(_) => written && self.input_ended,
                State::Stream { .. } | State::Busy => false,
            }
    }

    /// Whether nobody would miss it: it is between two requests.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::First | State::Head)
            && self.parser.is_idle()
            && self.input.is_empty()
            && self.pending_output() == 0
    }

    /// Whether the peer has ended its direction or the connection is broken.
    pub fn is_gone(&self) -> bool {
        self.input_ended || self.is_broken
    }

    /// Whether a WebSocket is open on it.
    pub fn is_websocket(&self) -> bool {
        matches!(self.state, State::WebSocket(_))
    }

    /// Bytes that wait to be written.
    pub fn pending_output(&self) -> usize {
        let inner = match &self.state {
            State::WebSocket(ws) => ws.output().len(),
            State::Wire(session) => session.output().len(),
            _ => 0,
        };
        self.output.len() - self.sent + inner
    }

    /// Whether the state takes bytes now. While a handler works nothing is read: the kernel's buffer
    /// and then the client's own hold what is pipelined.
    fn takes_input(&self) -> bool {
        match &self.state {
            State::Busy => false,
            State::Stream { wanted, .. } => *wanted,
            State::WebSocket(ws) => self.pending_output() < OUTPUT_HIGH_WATER && !ws.is_finished(),
            _ => true,
        }
    }

    /// Reads and parses, up to [`READS_PER_TURN`]. `hold` stops reading from a WebSocket.
    pub fn read(&mut self, buffer: &mut [u8], now_ms: u64, router: &Router, hold: bool) -> Vec<ClientEvent> {
        let mut events = Vec::new();
        for _ in 0..READS_PER_TURN {
            if hold || self.is_broken || !events.is_empty() || !self.inbox.is_empty() || !self.takes_input() {
                break;
            }
            if !self.input.is_empty() {
                let input = std::mem::take(&mut self.input);
                self.receive(&input, now_ms, router, &mut events);
                continue;
            }
            match self.socket.read(buffer) {
                Transfer::Done(n) => {
                    self.heard_ms = now_ms;
                    self.pinged = false;
                    self.receive(&buffer[..n], now_ms, router, &mut events);
                }
                Transfer::Blocked => break,
                Transfer::Ended => {
                    self.on_input_ended();
                    break;
                }
                Transfer::Broken(_) => {
                    self.is_broken = true;
                    break;
                }
            }
        }
        events
    }

    /// Whether a further [`Client::read`] may bring something without another word from the poll.
    pub fn has_input(&self) -> bool {
        !self.is_broken && self.takes_input() && (!self.input.is_empty() || self.socket.is_readable())
    }

    /// The peer sends nothing more.
    fn on_input_ended(&mut self) {
        self.input_ended = true;
        match &mut self.state {
            State::Stream { .. } => self.is_broken = true,
            State::Wire(session) => session.transport_closed(),
            _ => {}
        }
    }

    /// The poll says that the peer has ended its direction, or both.
    pub fn on_hang_up(&mut self, is_both: bool) {
        // Bytes that came before are still in the kernel's buffer, so the end of input is found by
        // reading, except where nothing is read now.
        if !self.takes_input() {
            self.input_ended = true;
            self.keep_alive = false;
        }
        if is_both {
            self.is_broken = true;
        }
    }

    fn receive(&mut self, mut bytes: &[u8], now_ms: u64, router: &Router, events: &mut Vec<ClientEvent>) {
        // A parser may have something to say without further bytes: that a request has no body.
        let mut may_have_more = true;
        while !bytes.is_empty() || may_have_more {
            may_have_more = false;
            let taken = match &mut self.state {
                State::First if bytes.is_empty() => 0,
                State::First => {
                    if bytes[0] == PREAMBLE[0] {
                        self.state = State::Wire(Box::new(Session::server(
                            concat!("wrenn-cp/", env!("CARGO_PKG_VERSION")),
                            crate::auth::random::bytes(),
                            wire::session::Limits::default(),
                            now_ms,
                        )));
                    } else {
                        self.state = State::Head;
                        self.since_ms = now_ms;
                    }
                    0
                }
                State::Head | State::Body(_) | State::Stream { wanted: true, .. } => {
                    match self.parse(bytes, now_ms, router, events) {
                        Ok((taken, more)) => {
                            may_have_more = more;
                            taken
                        }
                        Err(error) => {
                            self.refuse(error, now_ms);
                            bytes.len()
                        }
                    }
                }
                State::Busy | State::Stream { .. } => {
                    self.input.extend_from_slice(bytes);
                    bytes.len()
                }
                State::WebSocket(ws) => {
                    let failed = ws.receive(bytes).is_err();
                    while let Some(message) = ws.poll_message() {
                        self.inbox.push_back(message);
                    }
                    if failed {
                        events.push(ClientEvent::WebSocketFailed);
                    }
                    bytes.len()
                }
                State::Wire(session) => {
                    session.receive(bytes, now_ms);
                    serve_wire(session);
                    bytes.len()
                }
                State::Closing { left } => {
                    *left = left.saturating_sub(bytes.len());
                    bytes.len()
                }
            };
            bytes = &bytes[taken..];
        }
    }

    fn parse(
        &mut self,
        bytes: &[u8],
        now_ms: u64,
        router: &Router,
        events: &mut Vec<ClientEvent>,
    ) -> Result<(usize, bool), HttpError> {
        if self.parser.is_idle() && matches!(self.state, State::Head) {
            self.since_ms = now_ms;
        }
        let (taken, event) = self.parser.parse(bytes)?;
        let more = event.is_some();
        match event {
            None => {}
            Some(RequestEvent::Head(head)) => self.on_head(head, now_ms, router, events),
            Some(RequestEvent::Data(data)) => {
                self.body_bytes += data.len() as u64;
                match &mut self.state {
                    State::Body(incoming) => {
                        if incoming.request.body.len() + data.len() > incoming.max_body {
                            let response = too_large(incoming.max_body);
                            self.respond_and_close(&response, now_ms);
                        } else if !incoming.reserved.grow(data.len()) {
                            self.respond_and_close(&overloaded(), now_ms);
                        } else {
                            incoming.request.body.extend_from_slice(data);
                        }
                    }
                    _ => {
                        self.since_ms = now_ms;
                        events.push(ClientEvent::Body(data.to_vec()));
                    }
                }
            }
            Some(RequestEvent::End) => match std::mem::replace(&mut self.state, State::Busy) {
                State::Body(incoming) => {
                    events.push(ClientEvent::Request(incoming.handler, incoming.request));
                }
                State::Stream { .. } => events.push(ClientEvent::BodyEnd),
                // A response that went out before the body has changed the state.
                other => self.state = other,
            },
        }
        Ok((taken, more))
    }

    fn on_head(&mut self, head: RequestHead, now_ms: u64, router: &Router, events: &mut Vec<ClientEvent>) {
        self.served += 1;
        self.since_ms = now_ms;
        self.body_bytes = 0;
        self.keep_alive = head.keep_alive && self.served < MAX_REQUESTS_PER_CONNECTION;
        self.minor_version = head.minor_version;
        self.is_head_request = head.method == "HEAD";
        self.websocket_key = websocket_key(&head);
        let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
        let found = router.find(&head.method, path).and_then(|found| {
            let query = parse_query(query).ok_or_else(|| {
                Response::error(400, "invalid_request", "the query has an escape that cannot be decoded")
            })?;
            let max_body = match found.route.body {
                BodyMode::Buffered(max) => max,
                BodyMode::Streamed => usize::MAX,
            };
            match head.framing {
                Framing::Length(length) if length > max_body as u64 => Err(too_large(max_body)),
                _ => Ok((found, query, max_body)),
            }
        });
        let (found, query, max_body) = match found {
            Ok(found) => found,
            // Small bodies of refused requests are not worth reading, and large ones even less.
            Err(response) if head.framing == Framing::None => {
                self.state = State::Busy;
                self.respond(&response, now_ms);
                return;
            }
            Err(response) => {
                self.respond_and_close(&response, now_ms);
                return;
            }
        };
        let request = Request {
            method: Method::from_name(&head.method).unwrap_or(Method::Get),
            path: percent_decode(path).unwrap_or_default(),
            query,
            headers: head.headers.into_fields(),
            body: Vec::new(),
            params: found.params,
            peer: self.peer,
        };
        if found.route.body == BodyMode::Streamed {
            self.state = State::Stream { wanted: false, expects_continue: head.expects_continue };
            events.push(ClientEvent::Request(found.route.handler, request));
            return;
        }
        if head.expects_continue {
            write_continue(&mut self.output);
        }
        let reserved = Reservation { total: Rc::clone(&self.bodies), bytes: 0 };
        let handler = found.route.handler;
        self.state = State::Body(Box::new(Incoming { handler, request, max_body, reserved }));
    }

    /// The server can take more of a streamed body, or not.
    pub fn want_body(&mut self, is_wanted: bool, now_ms: u64) {
        if let State::Stream { wanted, expects_continue } = &mut self.state {
            if is_wanted && !*wanted {
                self.since_ms = now_ms;
            }
            *wanted = is_wanted;
            if is_wanted && std::mem::take(expects_continue) {
                write_continue(&mut self.output);
            }
        }
    }

    fn refuse(&mut self, error: HttpError, now_ms: u64) {
        let code = if error.status() == 413 { "payload_too_large" } else { "invalid_request" };
        self.is_head_request = false;
        self.respond_and_close(&Response::error(error.status(), code, &error.to_string()), now_ms);
    }

    fn respond_and_close(&mut self, response: &Response, now_ms: u64) {
        self.keep_alive = false;
        self.respond(response, now_ms);
    }

    /// Ends the connection after the present request.
    pub fn close_after_response(&mut self) {
        self.keep_alive = false;
    }

    /// Answers the request. On a WebSocket an error is told by a message and a close.
    pub fn respond(&mut self, response: &Response, now_ms: u64) {
        if let State::WebSocket(ws) = &mut self.state {
            close_websocket(ws, response);
            self.wrote_ms = now_ms;
            return;
        }
        if self.writer.is_some() {
            // A streamed response is under way: all that can be told is that it is not complete.
            self.is_broken = true;
            return;
        }
        let has_body = !matches!(response.status, 100..200 | 204 | 304);
        let framing = if has_body { Framing::Length(response.body.len() as u64) } else { Framing::None };
        self.start_response(response, framing, now_ms)
            .body(&mut self.output, if has_body { &response.body } else { &[] });
        self.response_done(now_ms);
    }

    /// Writes a response's head. Unless the whole request was read the connection ends with it.
    fn start_response(&mut self, response: &Response, framing: Framing, now_ms: u64) -> ResponseWriter {
        if !matches!(self.state, State::Busy) || self.input_ended {
            self.keep_alive = false;
        }
        if self.pending_output() == 0 {
            self.wrote_ms = now_ms;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let date = date::format(now);
        let headers = response.headers.iter().filter(|h| !h.1.bytes().any(|b| b.is_ascii_control()));
        let headers = headers.map(|h| (h.0, h.1.as_str())).chain([("date", date.as_str())]);
        ResponseWriter::start(
            &mut self.output,
            response.status,
            headers,
            framing,
            self.keep_alive,
            self.is_head_request,
        )
    }

    fn response_done(&mut self, now_ms: u64) {
        self.task = None;
        self.since_ms = now_ms;
        self.websocket_key = None;
        self.state = if self.keep_alive { State::Head } else { State::Closing { left: LINGER_BYTES } };
    }

    /// Begins a response whose body follows in pieces.
    pub fn start_stream(&mut self, response: &Response, now_ms: u64) {
        let framing = if self.minor_version >= 1 { Framing::Chunked } else { Framing::UntilClose };
        if framing == Framing::UntilClose {
            self.keep_alive = false;
        }
        self.writer = Some(self.start_response(response, framing, now_ms));
    }

    /// A piece of a streamed response's body.
    pub fn stream_body(&mut self, bytes: &[u8], now_ms: u64) {
        if self.pending_output() == 0 {
            self.wrote_ms = now_ms;
        }
        if let Some(writer) = &self.writer {
            writer.body(&mut self.output, bytes);
        }
    }

    /// A streamed response is complete.
    pub fn end_stream(&mut self, now_ms: u64) {
        if let Some(writer) = self.writer.take() {
            writer.end(&mut self.output);
            self.response_done(now_ms);
        }
    }

    /// A response that was begun cannot be completed: the client learns it by the connection's end.
    pub fn cut_off(&mut self) {
        if self.writer.is_some() || matches!(self.state, State::Busy | State::Stream { .. }) {
            self.is_broken = true;
        }
    }

    /// Upgrades to a WebSocket.
    ///
    /// # Errors
    /// The response for a request that does not ask for it.
    pub fn upgrade(&mut self, now_ms: u64) -> Result<(), Response> {
        if self.is_websocket() {
            return Ok(());
        }
        let Some(accept) = self.websocket_key.take().and_then(|key| accept_value(&key)) else {
            return Err(Response::error(
                426,
                "invalid_request",
                "this is a WebSocket: connect with Upgrade: websocket, Sec-WebSocket-Version: 13 and a key",
            )
            .with_header("upgrade", "websocket")
            .with_header("sec-websocket-version", "13"));
        };
        let headers =
            [("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", accept.as_str())];
        ResponseWriter::start(&mut self.output, 101, headers, Framing::None, true, false);
        self.state = State::WebSocket(Box::new(WebSocket::new(Role::Server, MAX_WEBSOCKET_MESSAGE)));
        self.heard_ms = now_ms;
        self.wrote_ms = now_ms;
        Ok(())
    }

    /// The WebSocket, if it is one.
    pub fn websocket(&mut self) -> Option<&mut WebSocket> {
        match &mut self.state {
            State::WebSocket(ws) => Some(ws),
            _ => None,
        }
    }

    /// Writes what waits, as far as it goes. Returns whether any went.
    pub fn flush(&mut self, now_ms: u64) -> bool {
        let mut wrote = false;
        while self.socket.is_writable() && !self.is_broken {
            let from_buffer = self.sent < self.output.len();
            let bytes: &[u8] = match &self.state {
                _ if from_buffer => &self.output[self.sent..],
                State::WebSocket(ws) => ws.output(),
                State::Wire(session) => session.output(),
                _ => &[],
            };
            if bytes.is_empty() {
                break;
            }
            match self.socket.write(bytes) {
                Transfer::Done(n) => {
                    wrote = true;
                    self.wrote_ms = now_ms;
                    match &mut self.state {
                        _ if from_buffer => self.sent += n,
                        State::WebSocket(ws) => ws.consume_output(n),
                        State::Wire(session) => session.consume_output(n),
                        _ => {}
                    }
                    if self.sent == self.output.len() {
                        self.output = Vec::new();
                        self.sent = 0;
                    }
                }
                Transfer::Blocked => break,
                Transfer::Ended | Transfer::Broken(_) => self.is_broken = true,
            }
        }
        if matches!(self.state, State::Closing { .. }) && self.pending_output() == 0 && !self.is_broken {
            // The client sees the end of the response; what it still sends is read and dropped.
            if self.socket.stream.shutdown(std::net::Shutdown::Write).is_err() {
                self.is_broken = true;
            }
        }
        wrote
    }

    /// When [`Client::on_deadline`] is due.
    pub fn deadline_ms(&self) -> Option<u64> {
        let state = match &self.state {
            State::First => Some(self.since_ms + HEAD_TIMEOUT_MS),
            State::Head if self.is_idle() && self.served > 0 => Some(self.since_ms + IDLE_TIMEOUT_MS),
            State::Head => Some(self.since_ms + HEAD_TIMEOUT_MS),
            State::Body(_) => Some(self.since_ms + BODY_GRACE_MS + self.body_bytes / MIN_BODY_RATE),
            State::Stream { wanted: true, .. } => Some(self.since_ms + UPLOAD_STALL_MS),
            State::Stream { .. } | State::Busy => None,
            State::WebSocket(ws) if ws.is_closing() => Some(self.wrote_ms + LINGER_MS),
            State::WebSocket(_) if self.pinged => Some(self.heard_ms + WEBSOCKET_DEAD_MS),
            State::WebSocket(_) => Some(self.heard_ms + WEBSOCKET_PING_MS),
            State::Wire(session) => session.next_timeout_ms(),
            State::Closing { .. } => {
                Some(self.since_ms + LINGER_MS + WRITE_STALL_MS * u64::from(self.pending_output() > 0))
            }
        };
        let write = (self.pending_output() > 0).then_some(self.wrote_ms + WRITE_STALL_MS);
        match (state, write) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Does what is due at `now_ms`.
    pub fn on_deadline(&mut self, now_ms: u64) {
        if self.deadline_ms().is_none_or(|at| at > now_ms) {
            return;
        }
        if self.pending_output() > 0 && now_ms >= self.wrote_ms + WRITE_STALL_MS {
            self.is_broken = true;
            return;
        }
        match &mut self.state {
            State::Head if !self.parser.is_idle() => self.time_out(now_ms),
            State::Body(_) | State::Stream { .. } => self.time_out(now_ms),
            State::First | State::Head | State::Closing { .. } => self.is_broken = true,
            State::WebSocket(ws) => {
                if ws.is_closing() || now_ms >= self.heard_ms + WEBSOCKET_DEAD_MS {
                    self.is_broken = true;
                } else {
                    ws.send_ping(b"");
                    self.pinged = true;
                }
            }
            State::Wire(session) => session.handle_timeout(now_ms),
            State::Busy => {}
        }
    }

    fn time_out(&mut self, now_ms: u64) {
        let response = Response::error(408, "invalid_request", "the request took too long to arrive");
        self.respond_and_close(&response, now_ms);
    }

    /// The program ends: an idle connection is closed, others end with their response.
    pub fn drain(&mut self) {
        self.keep_alive = false;
        let is_idle = self.is_idle();
        match &mut self.state {
            State::WebSocket(ws) => {
                ws.send_close(close_code::GOING_AWAY, "the control plane is being shut down")
            }
            State::Wire(session) => session.close(),
            _ if is_idle => self.is_broken = true,
            _ => {}
        }
    }
}

/// Ends a WebSocket with what a response says.
fn close_websocket(ws: &mut WebSocket, response: &Response) {
    if response.status < 400 {
        ws.send_close(close_code::NORMAL, "");
        return;
    }
    let message = response.error_message().unwrap_or_else(|| "the request failed".to_string());
    let event = serde_json::json!({"type": "error", "data": message, "fatal": true});
    ws.send_text(&event.to_string());
    let code = if response.status < 500 { close_code::POLICY } else { close_code::INTERNAL };
    ws.send_close(code, &message);
}

/// A wire client on the public port. No identity is known to it, so that every handshake ends as it does
/// with a wrong secret.
fn serve_wire(session: &mut Session) {
    while let Some(event) = session.poll_event() {
        if let wire::session::Event::Authenticate { .. } = event {
            session.provide_verifier(None, &crate::auth::random::bytes::<32>());
        }
    }
}

fn too_large(max: usize) -> Response {
    Response::error(413, "payload_too_large", &format!("the request body may have at most {max} bytes here"))
}

/// The answer when a bound on everything is reached.
pub fn overloaded() -> Response {
    Response::error(503, "overloaded", "the control plane has too much to do; try again in a moment")
        .with_header("retry-after", "1")
}
