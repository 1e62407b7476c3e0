//! One client's connection: from bytes to requests and back, with its deadlines. Knows no handlers.

mod respond;
mod transport;

use super::handler::{BodyMode, Handler, Method, Request, Response};
use super::limits::{MAX_REQUESTS_PER_CONNECTION, OUTPUT_HIGH_WATER, READS_PER_TURN};
use super::router::Router;
use super::websocket_key;
use crate::budget::{Budget, Share};
use crate::proxy::{Destination, begin::parameters};
use crate::wire_clients::WireClient;
use std::collections::VecDeque;
use std::net::IpAddr;
use wire::frame::PREAMBLE;
use wire::http1::{
    Framing, HttpError, Limits, RequestEvent, RequestHead, RequestParser, ResponseWriter, parse_query,
    percent_decode, write_continue,
};
use wire::reactor::{Socket, Transfer};
use wire::websocket::{Message, WebSocket};

/// What a connection tells the server.
#[derive(Debug)]
pub enum ClientEvent {
    /// A request for a handler. Nothing more is read until it is answered.
    Request(Handler, Request),
    /// Bytes of a streamed body, or of a tunnel.
    Body(Vec<u8>),
    /// The streamed body is complete, or the client has ended its half of the tunnel.
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
    /// Bytes both ways, as they are, with a service in a capsule; read only while the server asks for it.
    Tunnel {
        /// Whether it asks.
        wanted: bool,
    },
    /// A wire client.
    Wire(Box<WireClient>),
    /// The last response is being written, then what still comes is dropped for a while.
    Closing { left: usize },
}

/// A request whose body is not all there.
struct Incoming {
    handler: Handler,
    request: Request,
    max_body: usize,
    share: Share,
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
    bodies: Budget,
    /// What of it `output` has taken.
    output_share: Option<Share>,
    keep_alive: bool,
    is_head_request: bool,
    minor_version: u8,
    websocket_key: Option<String>,
    served: u32,
    /// The present request, for the log: method and path. The query may hold secrets.
    label: String,
    /// When its head was complete.
    asked_ms: u64,
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
    /// An accepted connection. `bodies` bounds the bytes of all buffered bodies.
    pub fn new(socket: Socket, peer: IpAddr, bodies: &Budget, now_ms: u64) -> Client {
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
            bodies: bodies.clone(),
            output_share: None,
            keep_alive: true,
            is_head_request: false,
            minor_version: 1,
            websocket_key: None,
            served: 0,
            label: String::new(),
            asked_ms: now_ms,
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
                State::Wire(wire) => wire.session.is_closed() && wire.session.output().is_empty(),
                State::First | State::Head | State::Body(_) => written && self.input_ended,
                State::Stream { .. } | State::Busy | State::Tunnel { .. } => false,
            }
    }

    /// Whether nobody would miss it: it is between two requests.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::First | State::Head)
            && self.parser.is_idle()
            && self.input.is_empty()
            && self.pending_output() == 0
    }

    /// Whether there is no whole request on it, and no answer under way.
    pub fn awaits_head(&self) -> bool {
        matches!(self.state, State::First | State::Head) && self.pending_output() == 0
    }

    /// Whether the peer has ended its direction or the connection is broken.
    pub fn is_gone(&self) -> bool {
        (self.input_ended && !self.is_tunnel()) || self.is_broken
    }

    /// Whether bytes go through it as they are.
    fn is_tunnel(&self) -> bool {
        matches!(self.state, State::Tunnel { .. })
    }

    /// Whether a WebSocket is open on it.
    pub fn is_websocket(&self) -> bool {
        matches!(self.state, State::WebSocket(_))
    }

    /// Whether it is a wire client's.
    pub fn is_wire(&self) -> bool {
        matches!(self.state, State::Wire(_))
    }

    /// The team of a wire client's proven key; empty while none is proven, `None` for other connections.
    pub fn wire_team(&self) -> Option<&str> {
        match &self.state {
            State::Wire(wire) if wire.is_proven => Some(&wire.team_id),
            State::Wire(_) => Some(""),
            _ => None,
        }
    }

    /// The wire client, if it is one.
    pub fn wire(&mut self) -> Option<&mut WireClient> {
        match &mut self.state {
            State::Wire(wire) => Some(wire),
            _ => None,
        }
    }

    /// The address of its other end.
    pub fn peer_address(&self) -> IpAddr {
        self.peer
    }

    /// Bytes that wait to be written.
    pub fn pending_output(&self) -> usize {
        let inner = match &self.state {
            State::WebSocket(ws) => ws.output().len(),
            State::Wire(wire) => wire.session.output().len(),
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
            State::Tunnel { wanted } => *wanted && !self.input_ended,
            State::WebSocket(ws) => self.pending_output() < OUTPUT_HIGH_WATER && !ws.is_finished(),
            // Who does not read its responses gets no further requests served.
            State::First | State::Head | State::Body(_) => self.pending_output() < OUTPUT_HIGH_WATER,
            State::Wire(_) | State::Closing { .. } => true,
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
                    if self.is_tunnel() {
                        events.push(ClientEvent::BodyEnd);
                    }
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

    /// It is not read from now, so its silence says nothing.
    pub fn touch(&mut self, now_ms: u64) {
        self.heard_ms = now_ms;
        self.pinged = false;
    }

    /// The peer sends nothing more.
    fn on_input_ended(&mut self) {
        self.input_ended = true;
        match &mut self.state {
            State::Stream { .. } => self.is_broken = true,
            State::Wire(wire) => wire.session.transport_closed(),
            _ => {}
        }
    }

    /// The poll says that the peer has ended its direction, or both.
    pub fn on_hang_up(&mut self, is_held: bool, is_both: bool) {
        // Bytes that came before are still in the kernel's buffer, so the end of input is found by
        // reading, except where nothing is read now.
        // A tunnel's other half may go on, and what came before its end is read when it is asked for.
        if !self.is_tunnel() && (is_held || !self.takes_input()) {
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
                        self.state =
                            State::Wire(Box::new(WireClient::new(crate::auth::random::bytes(), now_ms)));
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
                State::Tunnel { .. } => {
                    events.push(ClientEvent::Body(bytes.to_vec()));
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
                State::Wire(wire) => {
                    wire.session.receive(bytes, now_ms);
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
                        } else if !incoming.share.grow(data.len()) {
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
        self.label = format!("{} {path}", head.method);
        self.asked_ms = now_ms;
        if let Some(to) = router.destination(head.headers.get("host").unwrap_or_default()) {
            return self.on_proxied_head(head, to, events);
        }
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
            proven_key: None,
        };
        if found.route.body == BodyMode::Streamed {
            self.state = State::Stream { wanted: false, expects_continue: head.expects_continue };
            events.push(ClientEvent::Request(found.route.handler, request));
            return;
        }
        if head.expects_continue {
            write_continue(&mut self.output);
        }
        let share = self.bodies.share();
        let handler = found.route.handler;
        self.state = State::Body(Box::new(Incoming { handler, request, max_body, share }));
    }

    /// A request for a service in a capsule: its body, if there is one, is streamed.
    fn on_proxied_head(&mut self, head: RequestHead, to: Destination, events: &mut Vec<ClientEvent>) {
        self.websocket_key = None;
        if matches!(head.framing, Framing::None | Framing::Length(0)) {
            // Its end is there already; nothing else would ask the parser for it.
            let _ = self.parser.parse(&[]);
            self.state = State::Busy;
        } else {
            self.state = State::Stream { wanted: false, expects_continue: head.expects_continue };
        }
        let request = Request {
            method: Method::from_name(&head.method).unwrap_or(Method::Get),
            path: head.target.split('?').next().unwrap_or_default().to_string(),
            query: Vec::new(),
            params: parameters(to, &head.method, &head.target),
            headers: head.headers.into_fields(),
            body: Vec::new(),
            peer: self.peer,
            proven_key: None,
        };
        events.push(ClientEvent::Request(crate::proxy::begin, request));
    }

    /// The server can take more of a streamed body, or of a tunnel, or not.
    pub fn want_body(&mut self, is_wanted: bool, now_ms: u64) {
        if let State::Tunnel { wanted } = &mut self.state {
            *wanted = is_wanted;
        }
        if let State::Stream { wanted, expects_continue } = &mut self.state {
            if is_wanted && !*wanted {
                self.since_ms = now_ms;
            }
            *wanted = is_wanted;
            // Within a response that has begun it would be taken for a part of it.
            if is_wanted && self.writer.is_none() && std::mem::take(expects_continue) {
                write_continue(&mut self.output);
            }
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
