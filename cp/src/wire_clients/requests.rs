//! From a wire client's request to the API's own handlers, and from their answer back: pure.
//!
//! A client of the wire protocol gets what the same request over HTTP gets: the same checks, the same
//! audit entries, the same errors.

use crate::api::{capsule_create, capsules, lifecycle};
use crate::http::handler::{Handler, Method, Request, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::net::IpAddr;
use wire::codec::DecodeError;
use wire::message::{
    CapsuleCreate, CapsuleDestroy, CapsuleGet, CapsuleInfo, CapsuleList, CapsulePause, CapsulePing,
    CapsuleResume, CapsuleState, Code, Done, Error, Forward, Health, Message,
};

/// What the messages of a stream into a capsule may be: everything of processes and files, health, metrics
/// and ports. The rest is between a host agent and its guests.
const GUEST_KINDS: [std::ops::RangeInclusive<u16>; 3] = [0x0010..=0x0011, 0x0200..=0x03ff, 0x0410..=0x04ff];

/// What a client asks for.
#[derive(Debug)]
pub enum Asked {
    /// Whether the control plane is well.
    Health,
    /// What a handler of the API answers.
    Api {
        /// The handler.
        handler: Handler,
        /// What it is given.
        request: Request,
        /// How its answer is told.
        shape: Shape,
    },
    /// That the stream goes on into a capsule.
    Forward(String),
}

/// The messages that tell a handler's success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A `CapsuleInfo`.
    Capsule,
    /// A `CapsuleInfo` each, then `Done`.
    Capsules,
    /// A `Done`.
    Done,
}

/// A message on its way: number and body.
pub type Encoded = (u16, Vec<u8>);

/// A message as a pipe takes it.
pub fn encoded<M: Message>(message: &M) -> Encoded {
    let mut body = Vec::new();
    message.encode(&mut body);
    (M::KIND, body)
}

/// Whether a client may send such a message into a capsule.
pub fn may_go_into_a_capsule(kind: u16) -> bool {
    GUEST_KINDS.iter().any(|range| range.contains(&kind))
}

/// Reads the message that opened a stream.
///
/// # Errors
/// The answer to a message that is malformed, or not for the control plane.
pub fn read(kind: u16, body: &[u8], key_id: &str, peer: IpAddr) -> Result<Asked, Error> {
    let malformed = |error: DecodeError| {
        Error::new(Code::InvalidRequest, format!("message kind {kind:#06x} is malformed: {error}"))
    };
    let request = |method, id: Option<String>, body: Value| Request {
        method,
        path: String::new(),
        query: Vec::new(),
        headers: Vec::new(),
        body: if body.is_null() { Vec::new() } else { body.to_string().into_bytes() },
        params: id.map(|id| ("id", id)).into_iter().collect(),
        peer,
        proven_key: Some(key_id.to_string()),
    };
    let api = |handler: Handler, request, shape| Ok(Asked::Api { handler, request, shape });
    match kind {
        Health::KIND => Health::decode(body).map(|_| Asked::Health).map_err(malformed),
        CapsuleCreate::KIND => {
            let order = order(&CapsuleCreate::decode(body).map_err(malformed)?)?;
            api(capsule_create::create, request(Method::Post, None, order), Shape::Capsule)
        }
        CapsuleGet::KIND => {
            let id = CapsuleGet::decode(body).map_err(malformed)?.capsule_id;
            api(capsules::get, request(Method::Get, Some(id), Value::Null), Shape::Capsule)
        }
        CapsuleDestroy::KIND => {
            let id = CapsuleDestroy::decode(body).map_err(malformed)?.capsule_id;
            api(capsules::delete, request(Method::Delete, Some(id), Value::Null), Shape::Done)
        }
        CapsulePause::KIND => {
            let id = CapsulePause::decode(body).map_err(malformed)?.capsule_id;
            api(lifecycle::pause, request(Method::Post, Some(id), Value::Null), Shape::Capsule)
        }
        CapsuleResume::KIND => {
            let id = CapsuleResume::decode(body).map_err(malformed)?.capsule_id;
            api(lifecycle::resume, request(Method::Post, Some(id), Value::Null), Shape::Capsule)
        }
        CapsulePing::KIND => {
            let id = CapsulePing::decode(body).map_err(malformed)?.capsule_id;
            api(lifecycle::ping, request(Method::Post, Some(id), Value::Null), Shape::Done)
        }
        CapsuleList::KIND => {
            CapsuleList::decode(body).map_err(malformed)?;
            api(capsules::list, request(Method::Get, None, Value::Null), Shape::Capsules)
        }
        Forward::KIND => Forward::decode(body).map(|m| Asked::Forward(m.capsule_id)).map_err(malformed),
        _ => {
            let text = format!("message kind {kind:#06x} is not one that a control plane answers");
            Err(Error::new(Code::Unimplemented, text))
        }
    }
}

/// The body of `POST /v1/capsules` for a message. Zeros stand for the API's defaults.
fn order(message: &CapsuleCreate) -> Result<Value, Error> {
    if !message.capsule_id.is_empty() {
        let text = "capsule_id must be empty: the control plane makes the id";
        return Err(Error::new(Code::InvalidRequest, text));
    }
    if !message.environment.is_empty() {
        let text = "environment is not taken here: give it with each process";
        return Err(Error::new(Code::InvalidRequest, text));
    }
    let mut order = Map::new();
    if !message.template.is_empty() {
        order.insert("template".into(), json!(message.template));
    }
    let numbers = [
        ("vcpus", message.vcpus),
        ("memory_mb", message.memory_mb),
        ("disk_size_mb", message.disk_size_mb),
        ("timeout_sec", message.timeout_sec),
    ];
    for (name, number) in numbers {
        if number != 0 {
            order.insert(name.into(), json!(number));
        }
    }
    if message.allow_internet {
        order.insert("network".into(), json!({"allow_internet": true}));
    }
    Ok(Value::Object(order))
}

/// A capsule, as the API tells it.
#[derive(Debug, Deserialize)]
struct Shown {
    id: String,
    status: String,
    template: String,
    vcpus: u32,
    memory_mb: u32,
    disk_size_mb: u32,
    disk_used_mb: u32,
    guest_ip: String,
    host_ip: String,
    metadata: Map<String, Value>,
}

impl Shown {
    fn info(self) -> CapsuleInfo {
        CapsuleInfo {
            capsule_id: self.id,
            state: CapsuleState::from_name(&self.status).unwrap_or(CapsuleState::Error),
            template: self.template,
            vcpus: self.vcpus,
            memory_mb: self.memory_mb,
            disk_size_mb: self.disk_size_mb,
            disk_used_mb: self.disk_used_mb,
            guest_ip: self.guest_ip,
            host_ip: self.host_ip,
            metadata: self
                .metadata
                .into_iter()
                .map(|(name, value)| (name, value.as_str().map_or(value.to_string(), str::to_string)))
                .collect(),
        }
    }
}

/// The messages for a handler's answer. The last one ends the stream's half.
pub fn answer(shape: Shape, response: &Response) -> Vec<Encoded> {
    if response.status >= 400 {
        return vec![encoded(&error(response))];
    }
    let unreadable = |error: serde_json::Error| {
        vec![encoded(&Error::new(Code::Internal, format!("the answer cannot be told: {error}")))]
    };
    match shape {
        Shape::Done => vec![encoded(&Done {})],
        Shape::Capsule => match serde_json::from_slice::<Shown>(&response.body) {
            Ok(capsule) => vec![encoded(&capsule.info())],
            Err(error) => unreadable(error),
        },
        Shape::Capsules => match serde_json::from_slice::<Vec<Shown>>(&response.body) {
            Ok(capsules) => {
                let mut messages: Vec<Encoded> = capsules.into_iter().map(|c| encoded(&c.info())).collect();
                messages.push(encoded(&Done {}));
                messages
            }
            Err(error) => unreadable(error),
        },
    }
}

/// An error response as an `Error` message.
pub fn error(response: &Response) -> Error {
    let body: Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let code = match (response.status, body["error"]["code"].as_str().unwrap_or_default()) {
        (401, _) => Code::Unauthenticated,
        (403, _) => Code::PermissionDenied,
        (404, _) => Code::NotFound,
        (409, "invalid_state") => Code::InvalidState,
        (409, _) => Code::AlreadyExists,
        (413 | 429, _) | (503, "overloaded") => Code::ResourceExhausted,
        (503, _) => Code::Unavailable,
        (400..=499, _) => Code::InvalidRequest,
        _ => Code::Internal,
    };
    Error::new(code, body["error"]["message"].as_str().unwrap_or("the request failed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use wire::message::{GuestInit, GuestPrepareSnapshot, HostStatus, PortConnect, ProcessStart, expect};

    const PEER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn ask<M: Message>(message: &M) -> Result<Asked, Error> {
        let (kind, body) = encoded(message);
        read(kind, &body, "key-1", PEER)
    }

    #[test]
    fn requests_become_those_of_the_api() {
        let create = CapsuleCreate { template: "minimal".into(), memory_mb: 256, ..CapsuleCreate::default() };
        let Ok(Asked::Api { request, shape, .. }) = ask(&create) else { panic!("an API request") };
        assert_eq!(request.body, br#"{"memory_mb":256,"template":"minimal"}"#);
        assert_eq!((shape, request.proven_key.as_deref()), (Shape::Capsule, Some("key-1")));
        let Ok(Asked::Api { request, shape, .. }) = ask(&CapsuleDestroy { capsule_id: "cl-1".into() }) else {
            panic!("an API request")
        };
        assert_eq!((request.param("id"), shape), ("cl-1", Shape::Done));
        assert!(
            matches!(ask(&Forward { capsule_id: "cl-1".into() }), Ok(Asked::Forward(id)) if id == "cl-1")
        );
        assert!(matches!(ask(&Health {}), Ok(Asked::Health)));
    }

    #[test]
    fn what_is_not_for_clients_is_refused() {
        let refused = |result: Result<Asked, Error>| result.map(|_| ()).map_err(|e| e.code());
        assert_eq!(refused(ask(&HostStatus {})), Err(Code::Unimplemented));
        assert_eq!(refused(ask(&ProcessStart::default())), Err(Code::Unimplemented));
        assert_eq!(refused(read(Forward::KIND, b"\0", "key-1", PEER)), Err(Code::InvalidRequest));
        let own_id = CapsuleCreate { capsule_id: "cl-mine".into(), ..CapsuleCreate::default() };
        assert_eq!(refused(ask(&own_id)), Err(Code::InvalidRequest));
        for kind in [GuestInit::KIND, GuestPrepareSnapshot::KIND, Forward::KIND, CapsuleCreate::KIND, 0xffff]
        {
            assert!(!may_go_into_a_capsule(kind), "{kind:#06x}");
        }
        for kind in [ProcessStart::KIND, PortConnect::KIND, Health::KIND, wire::message::FileRead::KIND] {
            assert!(may_go_into_a_capsule(kind), "{kind:#06x}");
        }
    }

    #[test]
    fn answers_become_messages() {
        let shown = r#"{"id":"cl-1","status":"running","template":"minimal","vcpus":1,"memory_mb":256,
            "disk_size_mb":10240,"disk_used_mb":3,"timeout_sec":0,"guest_ip":"169.254.0.21",
            "host_ip":"10.11.0.1","metadata":{"a":"b"},"created_at":"x"}"#;
        let response = Response { status: 201, headers: Vec::new(), body: shown.into() };
        let messages = answer(Shape::Capsule, &response);
        let info: CapsuleInfo = expect(messages[0].0, &messages[0].1).expect("CapsuleInfo");
        assert_eq!((info.capsule_id.as_str(), info.state), ("cl-1", CapsuleState::Running));
        assert_eq!(info.metadata, [("a".to_string(), "b".to_string())]);
        let list = Response { status: 200, headers: Vec::new(), body: format!("[{shown},{shown}]").into() };
        let kinds: Vec<u16> = answer(Shape::Capsules, &list).iter().map(|m| m.0).collect();
        assert_eq!(kinds, [CapsuleInfo::KIND, CapsuleInfo::KIND, Done::KIND]);
        assert_eq!(answer(Shape::Done, &Response::no_content())[0].0, Done::KIND);
        for (status, code, expected) in [
            (404, "not_found", Code::NotFound),
            (409, "invalid_state", Code::InvalidState),
            (409, "conflict", Code::AlreadyExists),
            (400, "invalid_request", Code::InvalidRequest),
            (401, "unauthorized", Code::Unauthenticated),
            (503, "overloaded", Code::ResourceExhausted),
            (503, "host_unavailable", Code::Unavailable),
            (502, "agent_error", Code::Internal),
        ] {
            let told = error(&Response::error(status, code, "why"));
            assert_eq!((told.code(), told.text.as_str()), (expected, "why"), "{status} {code}");
        }
    }
}
