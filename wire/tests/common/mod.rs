//! A blocking server for the tests: one thread a connection, echoing what it is sent.
#![allow(dead_code)] // Each test program uses its own part.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use wire::auth::{ITERATIONS, NONCE_LEN, Verifier};
use wire::message::{Code, Done, Error, Forward, Health, HealthReply, Message};
use wire::session::{Event, Limits, Session, StreamId};

pub const SECRET: &[u8] = b"wrn_0123456789abcdef0123456789abcdef";

/// Serves on a free loopback port: `Health` is answered, data is echoed on its channel, FIN by FIN;
/// `Forward` is answered like a missing capsule.
pub fn serve(limits: Limits) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            thread::spawn(move || connection(socket, limits));
        }
    });
    address
}

/// Echo state of one stream: bytes that wait for credit.
#[derive(Default)]
struct Echo {
    waiting: std::collections::VecDeque<(u8, Vec<u8>, u32)>,
    finished: bool,
}

pub fn connection(mut socket: TcpStream, limits: Limits) {
    let _ = socket.set_nodelay(true);
    let mut session = Session::server("echo/1", [9; NONCE_LEN], limits, 0);
    let mut echoes: std::collections::BTreeMap<StreamId, Echo> = Default::default();
    let mut buffer = vec![0; 65_536];
    loop {
        while let Some(event) = session.poll_event() {
            on_event(&mut session, &mut echoes, event);
        }
        if !session.output().is_empty() {
            let Ok(n) = socket.write(session.output()) else { return };
            session.consume_output(n);
            continue;
        }
        if session.is_closed() {
            return;
        }
        match socket.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(n) => session.receive(&buffer[..n], 0),
        }
    }
}

fn on_event(session: &mut Session, echoes: &mut std::collections::BTreeMap<StreamId, Echo>, event: Event) {
    match event {
        Event::Authenticate { identity } => {
            let verifier = (identity == "key").then(|| Verifier::new(SECRET, &[5; 16], ITERATIONS));
            session.provide_verifier(verifier, b"decoy");
        }
        Event::Opened { stream, kind: Health::KIND, .. } => {
            let _ = session.send_last(stream, &HealthReply { version: "echo".into(), uptime_ms: 7 });
        }
        Event::Opened { stream, kind: Forward::KIND, .. } => {
            let _ = session.send_last(stream, &Error::new(Code::NotFound, "no such capsule"));
        }
        Event::Opened { stream, kind: Done::KIND, .. } => {
            echoes.insert(stream, Echo::default());
        }
        Event::Opened { stream, .. } => session.reset(stream, Code::Unimplemented, "echo only"),
        Event::Message { stream, kind, body, cost } => {
            let mut payload = kind.to_be_bytes().to_vec();
            payload.extend_from_slice(&body);
            let _ = session.send_raw(stream, payload, false);
            session.release(stream, cost);
        }
        Event::Data { stream, channel, bytes, cost } => {
            let Some(echo) = echoes.get_mut(&stream) else { return session.release(stream, cost) };
            echo.waiting.push_back((channel, bytes, cost));
            push(session, echoes, stream);
        }
        Event::Finished { stream } => {
            if let Some(echo) = echoes.get_mut(&stream) {
                echo.finished = true;
            }
            push(session, echoes, stream);
        }
        Event::Writable { stream } => push(session, echoes, stream),
        Event::Reset { stream, .. } => {
            echoes.remove(&stream);
        }
        Event::Ready { .. } | Event::GoingAway { .. } | Event::Closed { .. } => {}
    }
}

fn push(session: &mut Session, echoes: &mut std::collections::BTreeMap<StreamId, Echo>, stream: StreamId) {
    let Some(echo) = echoes.get_mut(&stream) else { return };
    while let Some((channel, bytes, cost)) = echo.waiting.front_mut() {
        let n = session.send_data(stream, *channel, bytes).unwrap_or(bytes.len());
        bytes.drain(..n);
        if !bytes.is_empty() {
            return;
        }
        let cost = *cost;
        echo.waiting.pop_front();
        session.release(stream, cost);
    }
    if echo.finished {
        let _ = session.finish(stream);
        echoes.remove(&stream);
    }
}
