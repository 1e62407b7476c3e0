//! Vectors of the handshake: what one side is fed, and what it then sends or fails with.
//!
//! Each has the `side` that is tested, with fixed `nonce`s and `secret`; `before`, what it was fed
//! already, frame by frame; `hex`, what it is fed now (empty at the start); and `output`, all that it
//! sends then, or the `error` that ends it.

use super::schema::{from_hex, to_hex};
use serde_json::{Value, json};
use wire::auth::{AuthError, ITERATIONS, NONCE_LEN, Verifier};
use wire::frame::{FrameType, Header};
use wire::session::{Event, Limits, Session, SessionError};

const IDENTITY: &str = "key-1";
const SECRET: &[u8] = b"wrn_000102030405060708090a0b0c0d0e0f";
const CLIENT_NONCE: [u8; NONCE_LEN] = [0x11; NONCE_LEN];
const SERVER_NONCE: [u8; NONCE_LEN] = [0x22; NONCE_LEN];
const SALT: [u8; 16] = [0x33; 16];

fn side(name: &str) -> Session {
    match name {
        "client" => Session::client(IDENTITY, SECRET, "vectors/1", CLIENT_NONCE, Limits::default(), 0),
        _ => Session::server("vectors/2", SERVER_NONCE, Limits::default(), 0),
    }
}

/// Feeds `bytes`: what the side sends then, and the error that ended it, if one did.
fn feed(session: &mut Session, bytes: &[u8]) -> (Vec<u8>, Option<SessionError>) {
    session.receive(bytes, 0);
    let mut ended = None;
    while let Some(event) = session.poll_event() {
        match event {
            Event::Authenticate { identity } => {
                let verifier = (identity == IDENTITY).then(|| Verifier::new(SECRET, &SALT, ITERATIONS));
                session.provide_verifier(verifier, b"decoy key of the vectors");
            }
            Event::Closed { error } => ended = Some(error),
            _ => {}
        }
    }
    let output = session.output().to_vec();
    session.consume_output(output.len());
    (output, ended)
}

fn error_name(error: &SessionError) -> &'static str {
    match error {
        SessionError::NotWrenn => "not_wrenn",
        SessionError::NoCommonVersion => "no_common_version",
        SessionError::Header(_) => "header",
        SessionError::Payload(_) => "payload",
        SessionError::Integrity => "integrity",
        SessionError::Unexpected(_) => "unexpected",
        SessionError::ByPeer(..) => "by_peer",
        SessionError::Auth(AuthError::Malformed) => "auth_malformed",
        SessionError::Auth(AuthError::NonceMismatch) => "auth_nonce",
        SessionError::Auth(AuthError::BindingMismatch) => "auth_binding",
        SessionError::Auth(AuthError::BadIterations) => "auth_rounds",
        SessionError::Auth(AuthError::WrongSecret) => "auth_secret",
        SessionError::Auth(AuthError::ServerNotGenuine) => "auth_server",
        SessionError::Auth(AuthError::BadIdentity) => "auth_identity",
        _ => "other",
    }
}

fn vector(name: &str, tested: &str, before: &[Vec<u8>], bytes: &[u8]) -> Value {
    let mut session = side(tested);
    let mut sent = feed(&mut session, &[]).0;
    if !before.is_empty() || !bytes.is_empty() {
        sent.clear();
    }
    for earlier in before {
        feed(&mut session, earlier);
    }
    let mut v = json!({
        "name": name, "side": tested, "identity": IDENTITY, "secret": to_hex(SECRET),
        "nonce": to_hex(if tested == "client" { &CLIENT_NONCE } else { &SERVER_NONCE }),
        "program": if tested == "client" { "vectors/1" } else { "vectors/2" },
        "before": before.iter().map(|b| to_hex(b)).collect::<Vec<_>>(), "hex": to_hex(bytes),
    });
    let (output, ended) = feed(&mut session, bytes);
    sent.extend_from_slice(&output);
    match ended {
        Some(error) => v["error"] = json!(error_name(&error)),
        None => v["output"] = json!(to_hex(&sent)),
    }
    v
}

fn frame(frame_type: FrameType, payload: &[u8]) -> Vec<u8> {
    let header = Header { length: payload.len() as u32, stream: 0, frame_type, fin: false };
    [&header.encode()[..], payload].concat()
}

fn hello(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut payload = Vec::new();
    for part in [&[0, 1, 0, 1][..], &[0; 8], &[0, 4, 0, 0], &[0, 32, 0, 0], &[0, 0, 16, 0]] {
        payload.extend_from_slice(part);
    }
    payload.extend_from_slice(&[0, 0, 0, 1, b'x', 0, 0]);
    change(&mut payload);
    frame(FrameType::Hello, &payload)
}

pub fn vectors() -> Vec<Value> {
    // A whole handshake, recorded.
    let (mut client, mut server) = (side("client"), side("server"));
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    let mut bytes = feed(&mut client, &[]).0;
    for _ in 0..3 {
        to_server.push(bytes);
        let answer = feed(&mut server, to_server.last().expect("pushed")).0;
        bytes = feed(&mut client, &answer).0;
        to_client.push(answer);
    }
    let [start, first, proof] = &to_server[..] else { panic!("three from the client") };
    let [greeting, challenge, genuine] = &to_client[..] else { panic!("three from the server") };
    client.open(&wire::message::Health {}, true).expect("open");
    let request = feed(&mut client, &[]).0;
    let preamble = &start[..8];

    let mut all = vec![
        vector("client: preamble and HELLO", "client", &[], &[]),
        vector("client: client-first", "client", &[], greeting),
        vector("client: client-final", "client", &to_client[..1], challenge),
        vector("client: done", "client", &to_client[..2], genuine),
        vector("server: HELLO", "server", &[], start),
        vector("server: server-first", "server", &to_server[..1], first),
        vector("server: server-final", "server", &to_server[..2], proof),
        vector("server: first frame with a MAC", "server", &to_server[..], &request),
        vector(
            "server: first frame with a MAC, again",
            "server",
            &[&to_server[..], std::slice::from_ref(&request)].concat(),
            &request,
        ),
    ];
    let mut changed = request.clone();
    *changed.last_mut().expect("a MAC") ^= 1;
    all.push(vector("server: a MAC with a changed bit", "server", &to_server[..], &changed));

    for (name, bytes) in [
        ("no common version", hello(|p| p[..4].copy_from_slice(&[0, 2, 0, 3]))),
        ("a version range upside down", hello(|p| p[..4].copy_from_slice(&[0, 2, 0, 1]))),
        ("a window that is too small", hello(|p| p[12..16].copy_from_slice(&[0, 2, 0, 0x3f]))),
        ("a window that is too large", hello(|p| p[16..20].copy_from_slice(&[0x40, 0, 0, 1]))),
        ("a name that does not end", hello(|p| p[27] = 200)),
        ("a control character in the name", hello(|p| p[28] = b'\n')),
        ("a HELLO with a byte too many", hello(|p| p.push(0))),
        (
            "an unknown critical field",
            hello(|p| {
                p.pop();
                p.extend_from_slice(&[1, 0x80, 1, 0, 0, 0, 0]);
            }),
        ),
        ("a long frame", frame(FrameType::Hello, &[0; 1201])),
        ("AUTH before HELLO", frame(FrameType::Auth, b"p=wrenn-hello-sha256,,n=key-1,r=abc")),
        ("PING in the handshake", frame(FrameType::Ping, &[0; 8])),
        (
            "a frame type that is not defined",
            hello(|_| {}).iter().enumerate().map(|(i, b)| if i == 8 { 0x77 } else { *b }).collect(),
        ),
    ] {
        all.push(vector(&format!("server: {name}"), "server", &[], &[preamble, &bytes].concat()));
        all.push(vector(&format!("client: {name}"), "client", &[], &bytes));
    }
    all.push(vector("server: HTTP", "server", &[], b"GET / HTTP/1.1\r\n"));
    all.push(vector("server: a preamble with a changed line end", "server", &[], b"\0WRENN\n\n"));
    all.push(vector(
        "server: an unknown field in HELLO",
        "server",
        &[],
        &[
            preamble,
            &hello(|p| {
                p.pop();
                p.extend_from_slice(&[1, 0, 1, 0, 0, 0, 1, 9]);
            }),
        ]
        .concat(),
    ));
    all.push(vector(
        "client: a version that was not offered",
        "client",
        &[],
        &hello(|p| p[..4].copy_from_slice(&[0, 1, 0, 2])),
    ));
    all.push(vector("client: a feature that was not offered", "client", &[], &hello(|p| p[11] = 1)));

    let text = |frame: &[u8]| String::from_utf8(frame[12..].to_vec()).expect("ASCII");
    let auth = |text: &str| frame(FrameType::Auth, text.as_bytes());
    let hello_only = &to_server[..1];
    for (name, message) in [
        ("without channel binding", text(first).replace("p=wrenn-hello-sha256", "n")),
        ("with another channel binding", text(first).replace("wrenn-hello-sha256", "tls-unique")),
        ("with an authorization identity", text(first).replace(",,", ",a=root,")),
        ("with an identity that is not allowed", text(first).replace("key-1", "key=2C1")),
        ("with a short nonce", format!("p=wrenn-hello-sha256,,n={IDENTITY},r=short")),
        ("with an attribute more", format!("{},m=x", text(first))),
        ("empty", String::new()),
        ("that is too long", "x".repeat(1025)),
    ] {
        all.push(vector(&format!("server: client-first {name}"), "server", hello_only, &auth(&message)));
    }
    let unknown = auth(&text(first).replace("key-1", "key-2"));
    all.push(vector("server: an unknown identity is challenged", "server", hello_only, &unknown));
    all.push(vector(
        "server: an unknown identity fails at the proof",
        "server",
        &[start.clone(), unknown],
        proof,
    ));
    let two = &to_server[..2];
    let wrong = |from: &str, to: &str| auth(&text(proof).replacen(from, to, 1));
    let last = text(proof).rsplit(",p=").next().expect("a proof").to_string();
    for (name, bytes) in [
        ("with another binding", wrong("c=cD13cm", "c=cD13cn")),
        ("with another nonce", wrong("r=ER", "r=ES")),
        (
            "with a changed proof",
            wrong(&last, &format!("{}{}", if last.starts_with('A') { "B" } else { "A" }, &last[1..])),
        ),
        ("with a short proof", wrong(&last, "AAAA")),
        ("without a proof", auth(text(proof).rsplit_once(",p=").expect("a proof").0)),
        ("that is the client-first again", first.clone()),
    ] {
        all.push(vector(&format!("server: client-final {name}"), "server", two, &bytes));
    }
    let wrong = |from: &str, to: &str| auth(&text(challenge).replacen(from, to, 1));
    for (name, bytes) in [
        ("with too few rounds", wrong("i=4096", "i=4095")),
        ("with too many rounds", wrong("i=4096", "i=9999999")),
        ("with rounds that start with a zero", wrong("i=4096", "i=04096")),
        ("with another nonce", wrong("r=ER", "r=ES")),
        ("without a part of its own in the nonce", wrong("IiIiIiIiIiIiIiIiIiIiIiIi", "")),
        ("with an empty salt", wrong("s=MzMzMzMzMzMzMzMzMzMzMw==", "s=")),
        ("with salt that is not base64", wrong("s=MzMzMzMzMzMzMzMzMzMzMw==", "s=Mz?z")),
        ("with an attribute more", auth(&format!("{},x=y", text(challenge)))),
        ("that is the client-first reflected", first.clone()),
    ] {
        all.push(vector(&format!("client: server-first {name}"), "client", &to_client[..1], &bytes));
    }
    let lie = auth("v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");
    all.push(vector("client: server-final with a wrong signature", "client", &to_client[..2], &lie));
    all.push(vector(
        "client: server-final that is not one",
        "client",
        &to_client[..2],
        &auth("e=other-error"),
    ));
    all.push(vector(
        "client: GOAWAY in place of server-final",
        "client",
        &to_client[..2],
        &frame(FrameType::GoAway, &[0, 0, 0, 0, 0, 7, 0, 0, 0, 2, b'n', b'o']),
    ));
    all
}

/// Plays a vector.
pub fn check(vector: &Value) {
    let tested = vector["side"].as_str().expect("side");
    let mut session = side(tested);
    let before = vector["before"].as_array().expect("before");
    let bytes = from_hex(vector["hex"].as_str().expect("hex"));
    let mut output = feed(&mut session, &[]).0;
    if !before.is_empty() || !bytes.is_empty() {
        output.clear();
    }
    for earlier in before {
        let (_, ended) = feed(&mut session, &from_hex(earlier.as_str().expect("hex")));
        assert_eq!(ended, None, "{vector}");
    }
    let (more, ended) = feed(&mut session, &bytes);
    output.extend_from_slice(&more);
    match vector["error"].as_str() {
        Some(error) => assert_eq!(ended.as_ref().map(error_name), Some(error), "{vector}"),
        None => {
            assert_eq!(ended, None, "{vector}");
            assert_eq!(to_hex(&output), vector["output"].as_str().expect("output"), "{vector}");
        }
    }
}
