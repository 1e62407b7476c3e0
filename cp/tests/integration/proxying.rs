//! Services in capsules by the Host header, over real connections: a client that speaks bytes, the server
//! on its database, and an agent on whose streams scripted services answer.

use crate::agent::{self, Agent};
use crate::stage::{ADMIN, Stage, json, text};
use crate::support::{Running, read_response, read_to_close, start_with};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use wire::message::{CHANNEL_PORT, Code, Done, Error, Forward, Message, PortConnect};
use wire::session::{Event, Session, StreamId};
use wrenn_cp::api;
use wrenn_cp::http::handler::Method::Post;

/// Answers with the head that it got.
const MIRROR: u16 = 80;
/// Counts a chunked body's bytes.
const COUNTER: u16 = 81;
/// Sends [`LARGE`] bytes.
const SOURCE: u16 = 82;
/// A WebSocket that echoes.
const ECHO: u16 = 83;
/// Closes without a word.
const MUTE: u16 = 84;
/// Switches protocols unasked.
const PUSHY: u16 = 85;
/// Not listened on.
const CLOSED: u16 = 9;
const LARGE: usize = 8 * 1024 * 1024;

struct Service {
    port: u16,
    got: Vec<u8>,
    left: usize,
}

fn send(session: &mut Session, stream: StreamId, bytes: &[u8]) {
    assert_eq!(session.send_data(stream, CHANNEL_PORT, bytes), Ok(bytes.len()), "it fits the window");
}

fn answer(session: &mut Session, stream: StreamId, body: &[u8]) {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    send(session, stream, &[head.as_bytes(), body].concat());
}

impl Service {
    fn data(&mut self, session: &mut Session, stream: StreamId, bytes: &[u8]) {
        let had_head = self.got.windows(4).any(|w| w == b"\r\n\r\n");
        self.got.extend_from_slice(bytes);
        let has_head = self.got.windows(4).any(|w| w == b"\r\n\r\n");
        match self.port {
            MIRROR if has_head => answer(session, stream, &self.got),
            COUNTER if self.got.ends_with(b"0\r\n\r\n") => {
                let count = self.got.iter().filter(|b| **b == b'z').count();
                answer(session, stream, count.to_string().as_bytes());
            }
            SOURCE if has_head && !had_head => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n");
                send(session, stream, head.as_bytes());
                self.left = LARGE;
                self.pour(session, stream);
            }
            ECHO | PUSHY if has_head && !had_head => send(
                session,
                stream,
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            ),
            ECHO if had_head => send(session, stream, bytes),
            MUTE => assert_eq!(session.finish(stream), Ok(())),
            _ => {}
        }
    }

    /// Sends what the stream takes of the large body.
    fn pour(&mut self, session: &mut Session, stream: StreamId) {
        while self.left > 0 {
            match session.send_data(stream, CHANNEL_PORT, &[b'x'; 4096][..self.left.min(4096)]) {
                Ok(0) | Err(_) => return,
                Ok(n) => self.left -= n,
            }
        }
    }
}

/// An agent with the services above. It counts the bytes that it has sent of large bodies.
fn services(host_id: &str, port: u16, poured: Arc<AtomicUsize>) -> Agent {
    let mut services: HashMap<StreamId, Service> = HashMap::new();
    agent::start(
        host_id,
        port,
        Box::new(move |session, event| {
            match event {
                Event::Opened { kind, .. } => assert_eq!(kind, Forward::KIND),
                Event::Message { stream, kind, body, cost } => {
                    session.release(stream, cost);
                    assert_eq!(kind, PortConnect::KIND);
                    let port = PortConnect::decode(&body).expect("a message").port;
                    if port == CLOSED {
                        let text = "nothing answers on port 9 in the capsule: ECONNREFUSED";
                        let _ = session.send_last(stream, &Error::new(Code::Unavailable, text));
                    } else {
                        services.insert(stream, Service { port, got: Vec::new(), left: 0 });
                        let _ = session.send(stream, &Done {});
                    }
                }
                Event::Data { stream, bytes, cost, .. } => {
                    session.release(stream, cost);
                    if let Some(service) = services.get_mut(&stream) {
                        service.data(session, stream, &bytes);
                        poured.store(LARGE - service.left, Ordering::Release);
                    }
                }
                Event::Writable { stream } => {
                    if let Some(service) = services.get_mut(&stream) {
                        service.pour(session, stream);
                        poured.store(LARGE - service.left, Ordering::Release);
                    }
                }
                Event::Finished { stream } => {
                    let _ = session.finish(stream);
                }
                Event::Reset { stream, .. } => {
                    services.remove(&stream);
                }
                _ => {}
            }
            true
        }),
    )
}

struct Setup {
    server: Running,
    _agent: Agent,
    stage: Stage,
    key: String,
    bearer: String,
    capsule: String,
    poured: Arc<AtomicUsize>,
}

fn setup() -> Setup {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let key = stage.api_key(&bearer);
    // The address comes before the host's id, which the agent's secret is made of.
    let address = agent::start("host-1", 0, Box::new(|_, _| true)).address;
    let host_id = stage.add_host(&bearer, &address.to_string(), 4096);
    let made = stage.request(Post, "/v1/capsules", ("x-api-key", &key), "{}");
    assert_eq!(made.status, 201, "{:?}", made.error_message());
    let poured = Arc::new(AtomicUsize::new(0));
    let agent = services(&host_id, address.port(), Arc::clone(&poured));
    let server = start_with(Arc::clone(&stage.context), api::routes(), Vec::new());
    Setup { server, _agent: agent, key, bearer, capsule: text(&json(&made)["id"]), stage, poured }
}

impl Setup {
    /// A request line and the fields that every request has.
    fn head(&self, method: &str, port: u16, target: &str) -> String {
        let Setup { key, capsule, .. } = self;
        format!("{method} {target} HTTP/1.1\r\nHost: {port}-{capsule}.example.com\r\nX-API-Key: {key}\r\n")
    }

    fn get(&self, port: u16, more: &str) -> String {
        self.server
            .exchange(format!("{}Connection: close\r\n{more}\r\n", self.head("GET", port, "/")).as_bytes())
    }
}

#[test]
fn requests_reach_the_service_on_one_kept_connection_without_the_credential() {
    let setup = setup();
    let mut client = setup.server.connect();
    for target in ["/", "/a%2Fb/../c?d=%zz&e", "*"] {
        let method = if target == "*" { "OPTIONS" } else { "PROPFIND" };
        let more = "X-Forwarded-For: 198.51.100.9\r\nCookie: a=b\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n";
        client.write_all((setup.head(method, MIRROR, target) + more).as_bytes()).expect("sent");
        let (head, body) = read_response(&mut client);
        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("connection: keep-alive"), "{head}");
        assert!(body.starts_with(&format!("{method} {target} HTTP/1.1\r\n")), "{body}");
        assert!(body.contains("x-forwarded-for: 198.51.100.9, 127.0.0.1\r\n"), "{body}");
        assert!(body.contains("cookie: a=b\r\n") && !body.contains("x-hop"), "{body}");
        assert!(!body.contains("wrn_") && !body.to_lowercase().contains("api-key"), "{body}");
    }
    // The API itself, on the same connection.
    client.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 200 "));
    // A login's token does as well, and does not go on either.
    let request = format!(
        "GET / HTTP/1.1\r\nHost: 80-{}.example.com\r\nAuthorization: {}\r\n\r\n",
        setup.capsule, setup.bearer
    );
    client.write_all(request.as_bytes()).expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 200 ") && !body.to_lowercase().contains("authorization"), "{body}");
}

#[test]
fn strangers_closed_ports_and_ambiguous_requests_are_refused() {
    let mut setup = setup();
    let status = |answer: &str| answer.split(' ').nth(1).unwrap_or_default().to_string();
    let host = format!("Host: 80-{}.example.com\r\n", setup.capsule);
    let anonymous =
        setup.server.exchange(format!("GET / HTTP/1.1\r\n{host}Connection: close\r\n\r\n").as_bytes());
    assert_eq!(status(&anonymous), "401", "{anonymous}");
    let wrong = setup.key.replace(|c: char| c.is_ascii_digit(), "f");
    let request = format!("GET / HTTP/1.1\r\n{host}X-API-Key: {wrong}\r\nConnection: close\r\n\r\n");
    assert_eq!(status(&setup.server.exchange(request.as_bytes())), "401");
    let other = setup.stage.person("other@example.com");
    let other_key = setup.stage.api_key(&other);
    let mine = std::mem::replace(&mut setup.key, other_key);
    assert_eq!(status(&setup.get(MIRROR, "")), "404", "another team's capsule");
    setup.key = mine;
    let closed = setup.get(CLOSED, "");
    assert!(status(&closed) == "502" && closed.contains("nothing answers on port 9"), "{closed}");
    for port in [MUTE, PUSHY] {
        let answer = setup.get(port, "");
        assert!(status(&answer) == "502" && answer.contains("bad_gateway"), "{answer}");
    }
    for smuggled in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 3\r\nContent-Length: 4\r\n",
        "Content-Length: +3\r\n",
        "X: y\r\n Content-Length: 3\r\n",
        "Transfer-Encoding : chunked\r\n",
    ] {
        let answer = setup.get(MIRROR, smuggled);
        assert_eq!(status(&answer), "400", "{smuggled}: {answer}");
    }
    assert_eq!(status(&setup.get(MIRROR, &format!("X: {}\r\n", "y".repeat(40_000)))), "431");
}

#[test]
fn bodies_stream_both_ways_and_who_does_not_read_stops_the_service() {
    let setup = setup();
    let mut client = setup.server.connect();
    let more = "Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n";
    client.write_all((setup.head("POST", COUNTER, "/") + more).as_bytes()).expect("sent");
    let (interim, _) = read_response(&mut client);
    assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
    let chunk = [b"10000\r\n".as_slice(), &[b'z'; 65_536], b"\r\n"].concat();
    for _ in 0..32 {
        client.write_all(&chunk).expect("sent");
    }
    client.write_all(b"0\r\n\r\n").expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.contains("connection: keep-alive"), "{head}");
    // The request's head has a few of them as well.
    let count: usize = body.parse().expect("a number");
    assert!((32 * 65_536..32 * 65_536 + 100).contains(&count), "{count}");
    client.write_all((setup.head("GET", SOURCE, "/") + "\r\n").as_bytes()).expect("sent");
    let wait = |steady: &mut usize| loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = setup.poured.load(Ordering::Acquire);
        if now == *steady {
            break now;
        }
        *steady = now;
    };
    let poured = wait(&mut 1);
    assert!(poured < LARGE, "all {poured} bytes are somewhere in between");
    let mut left = LARGE;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).expect("a head");
        head.push(byte[0]);
    }
    let mut buffer = vec![0; 65_536];
    while left > 0 {
        let most = left.min(buffer.len());
        let n = client.read(&mut buffer[..most]).expect("more");
        assert!(n > 0 && buffer[..n].iter().all(|b| *b == b'x'));
        left -= n;
    }
    client.write_all((setup.head("GET", MIRROR, "/") + "\r\n").as_bytes()).expect("sent");
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 200 "));
}

#[test]
fn a_websocket_is_a_tunnel_to_the_service() {
    let setup = setup();
    let mut client = setup.server.connect();
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    client.write_all((setup.head("GET", ECHO, "/ws") + upgrade).as_bytes()).expect("sent");
    let (head, _) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: websocket\r\n"), "{head}");
    assert!(head.contains("connection: Upgrade\r\n"), "{head}");
    for size in [1, 100, 20_000] {
        let sent: Vec<u8> = (0..size).map(|i| i as u8).collect();
        client.write_all(&sent).expect("sent");
        let mut got = vec![0; size];
        client.read_exact(&mut got).expect("the echo");
        assert_eq!(got, sent);
    }
    client.write_all(b"last").expect("sent");
    client.shutdown(std::net::Shutdown::Write).expect("half closed");
    assert_eq!(read_to_close(&mut client), "last");
}
