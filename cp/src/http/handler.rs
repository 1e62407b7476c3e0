//! What a handler is given and what it answers: plain values and continuations.
//!
//! A handler is a function from a [`Request`] to a [`Step`]. It never waits: what takes time is a step
//! that carries its own continuation. `Database` and `Compute` steps run on a worker thread, `Respond`
//! and `Host` steps on the event loop.
//!
//! ```text
//! handler -> Database(find the capsule) -> Host(run the command) -> Database(audit) -> Respond
//! ```
//!
//! Every step is a [`Flow`], `Result<Step, Response>`, so that `?` ends a handler with an error's
//! response.

use crate::db::Database;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::IpAddr;
use std::sync::Arc;
use wire::message::Message;

pub use super::context::Context;
pub use crate::api::capsule_access::Target;
pub use crate::db::api_keys::WireLogin;
pub use crate::hosts::error::HostError;
pub use crate::hosts::relay::{Relay, Upload};
pub use crate::hosts::reply::Reply;
pub use crate::proxy::Proxy;

/// A handler: answers a request with its first step. A response given as an error ends the request.
pub type Handler = fn(Request, &Arc<Context>) -> Flow;

/// A step, or the response that ends the request early.
pub type Flow = Result<Step, Response>;

/// The method of a request. Others are answered with 501 before any handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `GET`. Handlers of it serve `HEAD` as well; the body is then left out.
    Get,
    /// `POST`.
    Post,
    /// `PUT`.
    Put,
    /// `PATCH`.
    Patch,
    /// `DELETE`.
    Delete,
}

impl Method {
    /// The method with this name, as RFC 9110 writes it.
    pub fn from_name(name: &str) -> Option<Method> {
        match name {
            "GET" | "HEAD" => Some(Method::Get),
            "POST" => Some(Method::Post),
            "PUT" => Some(Method::Put),
            "PATCH" => Some(Method::Patch),
            "DELETE" => Some(Method::Delete),
            _ => None,
        }
    }

    /// The method's name.
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }
}

/// A request whose body has come completely, unless its route streams it.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, percent-decoded, without the query.
    pub path: String,
    /// The query's pairs in order, decoded.
    pub query: Vec<(String, String)>,
    /// Header fields in order; names in lower case, values as they came, always visible ASCII or UTF-8.
    pub headers: Vec<(String, String)>,
    /// The body; empty when the route streams it.
    pub body: Vec<u8>,
    /// What stood in the route's `{…}` places, in order, percent-decoded.
    pub params: Vec<(&'static str, String)>,
    /// The address of the client, or of a proxy in front of us that is not trusted to tell it.
    pub peer: IpAddr,
    /// The id of the API key that the client has proven to hold, where it is a client of the wire protocol:
    /// its requests have no header.
    pub proven_key: Option<String>,
}

impl Request {
    /// The value of the route's `{name}`; empty when the route has no such place.
    pub fn param(&self, name: &str) -> &str {
        self.params.iter().find(|p| p.0 == name).map_or("", |p| p.1.as_str())
    }

    /// The first query parameter with this name.
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|p| p.0 == name).map(|p| p.1.as_str())
    }

    /// The first header with this name, given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|h| h.0 == name).map(|h| h.1.as_str())
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// 400 `invalid_request` that says what is wrong with it, and where.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Response> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Response::error(400, "invalid_request", &format!("the request body is not acceptable: {error}"))
        })
    }
}

/// A complete response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status, 200 to 599.
    pub status: u16,
    /// Header fields besides those that the server writes itself (length, connection, date).
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// A JSON body.
    pub fn json<T: Serialize + ?Sized>(status: u16, value: &T) -> Response {
        match serde_json::to_vec(value) {
            Ok(body) => {
                Response { status, headers: vec![("content-type", "application/json".to_string())], body }
            }
            // Only a map with keys that are not strings, or an own Serialize, can fail.
            Err(error) => {
                Response::error(500, "internal_error", &format!("the answer cannot be written: {error}"))
            }
        }
    }

    /// 204 without a body.
    pub fn no_content() -> Response {
        Response { status: 204, headers: Vec::new(), body: Vec::new() }
    }

    /// The API's error form: `{"error":{"code","message"}}`.
    pub fn error(status: u16, code: &str, message: &str) -> Response {
        Response::json(status, &serde_json::json!({"error": {"code": code, "message": message}}))
    }

    /// The API's error form with further fields in the `error` object. `fields` is a JSON object.
    pub fn error_with(status: u16, code: &str, message: &str, fields: serde_json::Value) -> Response {
        let mut error = serde_json::json!({"code": code, "message": message});
        if let (Some(error), serde_json::Value::Object(fields)) = (error.as_object_mut(), fields) {
            error.extend(fields);
        }
        Response::json(status, &serde_json::json!({ "error": error }))
    }

    /// Adds a header field. A value with control characters is left out by the server.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Response {
        self.headers.push((name, value.into()));
        self
    }

    /// The message of a response in the API's error form.
    pub fn error_message(&self) -> Option<String> {
        let value: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        value.get("error")?.get("message")?.as_str().map(str::to_string)
    }
}

/// What a `Database` step does, on a worker thread.
pub type DatabaseWork = Box<dyn FnOnce(&mut Database) -> Flow + Send>;
/// What a `Compute` step does, on a worker thread.
pub type ComputeWork = Box<dyn FnOnce() -> Flow + Send>;
/// What follows a call to a host, on the event loop.
pub type HostContinuation = Box<dyn FnOnce(Result<Reply, HostError>) -> Flow + Send>;
/// What follows a pause, on the event loop; [`HostError::Cancelled`] when the client has gone away in it.
pub type PauseContinuation = Box<dyn FnOnce(Result<(), HostError>) -> Flow + Send>;
/// What follows a WebSocket message, on the event loop.
pub type MessageContinuation = Box<dyn FnOnce(String) -> Flow + Send>;

/// What happens next with a request.
pub enum Step {
    /// The answer.
    Respond(Response),
    /// The answer, and work that goes on after it without a client. What that ends with is logged when
    /// it is an error.
    RespondThen(Response, Box<Step>),
    /// Work with a database connection. When there is none the request ends with 503
    /// `database_unavailable`.
    Database(DatabaseWork),
    /// Work that takes more than a millisecond (password hashing).
    Compute(ComputeWork),
    /// A call to a host's agent.
    Host(HostCall),
    /// So many milliseconds without anything.
    Pause(u64, PauseContinuation),
    /// Accepts the WebSocket upgrade, waits for the client's (next) text message and goes on with it.
    /// From then on a `Respond` with an error status is told as an error message and a close.
    ReadMessage(MessageContinuation),
    /// Joins the client's WebSocket, or the response's body, with a stream to a host.
    Relay(Relay),
    /// Sends the request's streamed multipart body into a file in a capsule.
    Upload(Upload),
    /// Joins the client with a service in a capsule.
    Proxy(Box<Proxy>),
    /// What a client of the wire protocol is to prove; `None` when there is no such key.
    Login(Option<WireLogin>),
    /// Joins the stream of a client of the wire protocol with one to a host.
    Splice(Target),
}

impl Step {
    /// A `Database` step.
    pub fn database(work: impl FnOnce(&mut Database) -> Flow + Send + 'static) -> Flow {
        Ok(Step::Database(Box::new(work)))
    }

    /// A `Compute` step.
    pub fn compute(work: impl FnOnce() -> Flow + Send + 'static) -> Flow {
        Ok(Step::Compute(Box::new(work)))
    }

    /// The answer.
    pub fn respond(response: Response) -> Flow {
        Ok(Step::Respond(response))
    }

    /// A `ReadMessage` step.
    pub fn read_message(then: impl FnOnce(String) -> Flow + Send + 'static) -> Flow {
        Ok(Step::ReadMessage(Box::new(then)))
    }
}

/// One request to a host's agent, and what follows.
///
/// `then` is called exactly once: with the reply, or with why there is none. When the client goes away
/// first the stream is reset and `then` gets [`HostError::Cancelled`], unless the call is
/// [detached](HostCall::detached).
pub struct HostCall {
    /// The host's id.
    pub host_id: String,
    /// Where its agent listens, `IP:PORT`.
    pub address: String,
    /// Encoded messages, sent in order; the first one opens the stream.
    pub messages: Vec<Vec<u8>>,
    /// Whether our half of the stream ends after them.
    pub half_close: bool,
    /// Kinds of message that complete the reply. The end of the peer's half completes it as well.
    pub last_kinds: Vec<u16>,
    /// How many bytes of DATA the reply may hold, all channels together; what is more is dropped and
    /// told in the reply.
    pub max_data_bytes: usize,
    /// How long all of it may take, connecting included.
    pub timeout_ms: u64,
    /// Whether it goes on when the client goes away.
    pub is_detached: bool,
    /// What follows.
    pub then: HostContinuation,
}

/// Bytes of DATA that a reply holds unless the caller says otherwise.
pub const DEFAULT_REPLY_DATA_BYTES: usize = 8 * 1024 * 1024;

impl HostCall {
    /// A call of one message to the agent itself. `timeout_ms` covers all of it.
    pub fn new<M: Message>(host_id: &str, address: &str, message: &M, timeout_ms: u64) -> HostCall {
        HostCall {
            host_id: host_id.to_string(),
            address: address.to_string(),
            messages: vec![encode(message)],
            half_close: true,
            last_kinds: Vec::new(),
            max_data_bytes: DEFAULT_REPLY_DATA_BYTES,
            timeout_ms,
            is_detached: false,
            then: Box::new(|_| Ok(Step::Respond(Response::no_content()))),
        }
    }

    /// A call of one message to the guest daemon of a capsule on the host.
    pub fn forward<M: Message>(
        host_id: &str,
        address: &str,
        capsule_id: &str,
        message: &M,
        timeout_ms: u64,
    ) -> HostCall {
        let forward = wire::message::Forward { capsule_id: capsule_id.to_string() };
        let mut call = HostCall::new(host_id, address, &forward, timeout_ms);
        call.messages.push(encode(message));
        call
    }

    /// The reply is complete with a message of this kind.
    pub fn until<M: Message>(mut self) -> HostCall {
        self.last_kinds.push(M::KIND);
        self
    }

    /// Our half stays open, so that the process's stdin is not ended.
    pub fn keep_open(mut self) -> HostCall {
        self.half_close = false;
        self
    }

    /// How many bytes of DATA the reply may hold.
    pub fn max_data_bytes(mut self, bytes: usize) -> HostCall {
        self.max_data_bytes = bytes;
        self
    }

    /// The call goes on when the client goes away.
    pub fn detached(mut self) -> HostCall {
        self.is_detached = true;
        self
    }

    /// What follows, as the step that a handler returns.
    pub fn then(mut self, then: impl FnOnce(Result<Reply, HostError>) -> Flow + Send + 'static) -> Flow {
        self.then = Box::new(then);
        Ok(Step::Host(self))
    }
}

/// A message as a stream carries it: number, then body.
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    let mut bytes = M::KIND.to_be_bytes().to_vec();
    message.encode(&mut bytes);
    bytes
}

/// How a route takes its request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyMode {
    /// Completely, up to this many bytes, before the handler is called; 413 when it is longer.
    Buffered(usize),
    /// The handler is called with the headers; a `Step::Upload` takes the body as it comes.
    Streamed,
}

/// The longest buffered body of a route that does not say otherwise, in bytes.
pub const DEFAULT_MAX_BODY_BYTES: usize = 1024 * 1024;

/// One row of the routing table.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path; a segment `{name}` takes any one segment that is not empty.
    pub path: &'static str,
    /// How the body is taken.
    pub body: BodyMode,
    /// What answers.
    pub handler: Handler,
}

impl Route {
    /// A route with a buffered body of the default limit.
    pub const fn new(method: Method, path: &'static str, handler: Handler) -> Route {
        Route { method, path, body: BodyMode::Buffered(DEFAULT_MAX_BODY_BYTES), handler }
    }

    /// The same with a different way to take the body.
    pub const fn with_body(mut self, body: BodyMode) -> Route {
        self.body = body;
        self
    }
}

/// Work that recurs without a client: sweeps, the reconciler.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// For logs.
    pub name: &'static str,
    /// Milliseconds from the end of one run to the start of the next.
    pub every_ms: u64,
    /// Its first step. What it ends with is logged when it is an error.
    pub run: fn(&Arc<Context>) -> Flow,
}
