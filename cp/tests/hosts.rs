//! Calls, relays and uploads to a scripted agent, from an HTTP client's point of view.

#[path = "support/agent.rs"]
mod agent;
mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{SECRET, read_response, read_to_close, start};
use wire::message::{
    CHANNEL_FILE, CHANNEL_STDERR, CHANNEL_STDOUT, Code, Done, Error, FileEntry, FileRead, FileWrite, Forward,
    Message, ProcessExited, ProcessSignal, ProcessStart, ProcessStarted,
};
use wire::session::{Event, Session, StreamId};
use wire::websocket::{Message as WsMessage, Role, WebSocket};
use wrenn_cp::api::Target;
use wrenn_cp::hosts::translators::{Download, ProcessOutput};
use wrenn_cp::http::context::Context;
use wrenn_cp::http::handler::Method::{Get, Post};
use wrenn_cp::http::handler::{BodyMode, Flow, HostCall, Relay, Request, Response, Route, Step, Upload};
use wrenn_cp::http::limits::MAX_HELD_FILE;

const CAPSULE: &str = "cl-1";

/// The agent's address and the host's name come in the query, as no database is here.
fn target(request: &Request) -> Target {
    Target {
        host_id: request.query("host").unwrap_or("host-1").to_string(),
        address: request.query("agent").unwrap_or_default().to_string(),
        capsule_id: CAPSULE.to_string(),
    }
}

fn exec(request: Request, _: &Arc<Context>) -> Flow {
    let target = target(&request);
    let timeout_ms = request.query("timeout_ms").and_then(|t| t.parse().ok()).unwrap_or(5_000);
    let start = ProcessStart { argv: vec!["true".into()], ..Default::default() };
    HostCall::forward(&target.host_id, &target.address, CAPSULE, &start, timeout_ms)
        .until::<ProcessExited>()
        .max_data_bytes(1000)
        .then(|result| {
            let reply = result?;
            let exited: ProcessExited = reply.message()?;
            let (out, err) = (reply.channel(CHANNEL_STDOUT).len(), reply.channel(CHANNEL_STDERR).len());
            let body = format!("{} {out} {err} {}", exited.exit_code, reply.dropped_bytes);
            Step::respond(Response::json(200, &body))
        })
}

fn stream(request: Request, _: &Arc<Context>) -> Flow {
    let target = target(&request);
    Step::read_message(move |text| {
        let start = ProcessStart { argv: vec![text.into()], ..Default::default() };
        Relay::websocket(&target, &start, 5_000, ProcessOutput::default())
    })
}

fn read(request: Request, _: &Arc<Context>) -> Flow {
    Relay::download(&target(&request), &FileRead::default(), 5_000, Download::default())
}

fn write(request: Request, _: &Arc<Context>) -> Flow {
    Ok(Step::Upload(Upload {
        target: target(&request),
        content_type: request.header("content-type").unwrap_or_default().to_string(),
        then: Box::new(|result| {
            result?;
            Step::respond(Response::no_content())
        }),
    }))
}

static ROUTES: &[Route] = &[
    Route::new(Get, "/exec", exec),
    Route::new(Get, "/stream", stream),
    Route::new(Get, "/read", read),
    Route::new(Post, "/write", write).with_body(BodyMode::Streamed),
];

fn get(agent: &agent::Agent, path: &str, more: &str) -> Vec<u8> {
    format!("GET {path}?agent={}{more} HTTP/1.1\r\nHost: x\r\n\r\n", agent.address).into_bytes()
}

/// An agent that answers every process with output and its end, two bytes of stderr and `size` of
/// stdout.
fn answering(size: usize) -> agent::Script {
    Box::new(move |session, event| {
        match event {
            Event::Opened { kind, .. } => assert_eq!(kind, Forward::KIND),
            Event::Message { stream, kind, cost, .. } => {
                session.release(stream, cost);
                assert_eq!(kind, ProcessStart::KIND);
                let _ = session.send(stream, &ProcessStarted { pid: 5, tag: String::new() });
                let _ = session.send_data(stream, CHANNEL_STDERR, b"no");
                let _ = session.send_data(stream, CHANNEL_STDOUT, &vec![b'x'; size]);
                let _ = session.send_last(stream, &ProcessExited { exit_code: 3, ..Default::default() });
            }
            _ => {}
        }
        true
    })
}

#[test]
fn a_call_gathers_output_within_its_bound() {
    let server = start(ROUTES, Vec::new());
    let agent = agent::start("host-1", 0, answering(5000));
    let mut client = server.connect();
    for _ in 0..3 {
        client.write_all(&get(&agent, "/exec", "")).expect("sent");
        assert_eq!(read_response(&mut client).1, "\"3 998 2 4002\"");
    }
}

#[test]
fn an_agent_that_is_not_there_is_a_quick_503_and_is_found_when_it_comes() {
    let server = start(ROUTES, Vec::new());
    let address = agent::start("host-1", 0, answering(1)).address;
    let mut client = server.connect();
    let request = format!("GET /exec?agent={address} HTTP/1.1\r\nHost: x\r\n\r\n");
    for _ in 0..3 {
        let began = Instant::now();
        client.write_all(request.as_bytes()).expect("sent");
        let (head, body) = read_response(&mut client);
        assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
        assert!(body.contains("host_unavailable") && body.contains("refused"), "{body}");
        assert!(began.elapsed() < Duration::from_secs(1));
    }
    let _agent = agent::start("host-1", address.port(), answering(1));
    let began = Instant::now();
    loop {
        client.write_all(request.as_bytes()).expect("sent");
        let (head, _) = read_response(&mut client);
        if head.starts_with("HTTP/1.1 200 ") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{head}");
        std::thread::sleep(Duration::from_millis(100));
    }
    client.write_all(b"GET /exec?agent=nonsense&host=other HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    assert!(read_response(&mut client).1.contains("not IP:PORT"));
}

#[test]
fn a_wrong_credential_is_told_as_such() {
    let server = start(ROUTES, Vec::new());
    let agent = agent::start("host-other", 0, answering(1));
    let mut client = server.connect();
    client.write_all(&get(&agent, "/exec", "")).expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 503 ") && body.contains("credential"), "{body}");
    assert!(!body.contains(&String::from_utf8_lossy(SECRET).into_owned()));
}

#[test]
fn a_connection_lost_within_a_call_is_an_error_at_once() {
    let server = start(ROUTES, Vec::new());
    let agent = agent::start("host-1", 0, Box::new(|_, event| !matches!(event, Event::Opened { .. })));
    let mut client = server.connect();
    let began = Instant::now();
    client.write_all(&get(&agent, "/exec", "")).expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 503 ") && body.contains("was lost"), "{body}");
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_silent_agent_is_timed_out_and_an_error_is_told() {
    let server = start(ROUTES, Vec::new());
    let silent = agent::start("host-1", 0, Box::new(|_, _| true));
    let mut client = server.connect();
    client.write_all(&get(&silent, "/exec", "&timeout_ms=200")).expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 502 ") && body.contains("within 0.2 s"), "{body}");
    let failing = agent::start(
        "host-2",
        0,
        Box::new(|session, event| {
            if let Event::Message { stream, .. } = event {
                let error = Error::new(Code::NotFound, "there is no such capsule");
                let _ = session.send_last(stream, &error);
            }
            true
        }),
    );
    client.write_all(&get(&failing, "/exec", "&host=host-2")).expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 404 ") && body.contains("there is no such capsule"), "{body}");
}

#[test]
fn a_client_that_goes_away_resets_its_stream() {
    let server = start(ROUTES, Vec::new());
    let (opened, reset) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (o, r) = (Arc::clone(&opened), Arc::clone(&reset));
    let agent = agent::start(
        "host-1",
        0,
        Box::new(move |_, event| {
            match event {
                Event::Opened { .. } => o.fetch_add(1, Ordering::SeqCst),
                Event::Reset { .. } => r.fetch_add(1, Ordering::SeqCst),
                _ => 0,
            };
            true
        }),
    );
    let wait = |counter: &AtomicUsize, n| {
        let began = Instant::now();
        while counter.load(Ordering::SeqCst) < n {
            assert!(began.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let mut client = server.connect();
    client.write_all(&get(&agent, "/exec", "")).expect("sent");
    wait(&opened, 1);
    drop(client);
    wait(&reset, 1);
    let mut ws = Ws::connect(&server, &agent);
    ws.send("cat");
    wait(&opened, 2);
    drop(ws);
    wait(&reset, 2);
}

/// A WebSocket client.
struct Ws {
    stream: TcpStream,
    codec: WebSocket,
}

impl Ws {
    fn connect(server: &support::Running, agent: &agent::Agent) -> Ws {
        let mut stream = server.connect();
        let request = format!(
            "GET /stream?agent={} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            agent.address
        );
        stream.write_all(request.as_bytes()).expect("sent");
        let (head, _) = read_response(&mut stream);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Ws { stream, codec: WebSocket::new(Role::Client { mask_seed: 7 }, 1 << 24) }
    }

    fn flush(&mut self) {
        let output = self.codec.output().to_vec();
        self.codec.consume_output(output.len());
        self.stream.write_all(&output).expect("sent");
    }

    fn send(&mut self, text: &str) {
        self.codec.send_text(text);
        self.flush();
    }

    fn next(&mut self) -> WsMessage {
        let mut buffer = [0; 65_536];
        loop {
            if let Some(message) = self.codec.poll_message() {
                return message;
            }
            let n = self.stream.read(&mut buffer).expect("bytes in time");
            assert!(n > 0, "the server closed without a close message");
            self.codec.receive(&buffer[..n]).expect("well-formed frames");
        }
    }

    fn next_text(&mut self) -> String {
        match self.next() {
            WsMessage::Text(text) => text,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_websocket_streams_a_process_and_stops_it() {
    let server = start(ROUTES, Vec::new());
    let agent = agent::start(
        "host-1",
        0,
        Box::new(|session, event| {
            match event {
                Event::Message { stream, kind: ProcessStart::KIND, body, cost } => {
                    session.release(stream, cost);
                    let start = ProcessStart::decode(&body).expect("well-formed");
                    assert_eq!(start.argv[0].0, b"cat");
                    let _ = session.send(stream, &ProcessStarted { pid: 5, tag: String::new() });
                }
                Event::Data { stream, bytes, cost, .. } => {
                    session.release(stream, cost);
                    let _ = session.send_data(stream, CHANNEL_STDOUT, &bytes);
                }
                Event::Message { stream, kind: ProcessSignal::KIND, body, cost } => {
                    session.release(stream, cost);
                    let signal = ProcessSignal::decode(&body).expect("well-formed").signal;
                    let _ = session.send_last(stream, &ProcessExited { signal, ..Default::default() });
                }
                _ => {}
            }
            true
        }),
    );
    let mut ws = Ws::connect(&server, &agent);
    // The second message comes while the first is still being dealt with.
    ws.codec.send_text("cat");
    ws.codec.send_text(r#"{"type":"stdin","data":"echo"}"#);
    ws.flush();
    assert_eq!(ws.next_text(), r#"{"pid":5,"type":"start"}"#);
    assert_eq!(ws.next_text(), r#"{"data":"echo","type":"stdout"}"#);
    ws.send(r#"{"type":"stop"}"#);
    assert_eq!(ws.next_text(), r#"{"exit_code":143,"type":"exit"}"#);
    assert_eq!(ws.next(), WsMessage::Close(1000, String::new()));
    ws.flush();
    assert_eq!(read_to_close(&mut ws.stream), "");
}

#[test]
fn a_websocket_to_an_agent_that_is_not_there_says_why() {
    let server = start(ROUTES, Vec::new());
    let agent = agent::start("host-1", 0, answering(1));
    let mut ws = Ws::connect(&server, &agent);
    drop(agent);
    ws.send("cat");
    let text = ws.next_text();
    assert!(text.contains("error") && text.contains("refused"), "{text}");
    assert!(matches!(ws.next(), WsMessage::Close(1011, _)));
    // Without an upgrade it is not a WebSocket.
    let answer = server.exchange(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 426 "), "{answer}");
}

/// Sends a file of `size` bytes on every request, as credit allows; tells the most that it has sent.
fn file_server(size: usize, sent: Arc<AtomicUsize>) -> agent::Script {
    let mut at: Option<(StreamId, usize)> = None;
    fn pump(session: &mut Session, at: &mut Option<(StreamId, usize)>, size: usize, sent: &AtomicUsize) {
        let Some((stream, done)) = at else { return };
        while *done < size {
            let piece: Vec<u8> = (*done..size.min(*done + 1000)).map(|i| (i / 1000) as u8).collect();
            let Ok(taken) = session.send_data(*stream, CHANNEL_FILE, &piece) else { return };
            *done += taken;
            sent.store(*done, Ordering::SeqCst);
            if taken < piece.len() {
                return;
            }
        }
        let _ = session.send_last(*stream, &Done {});
        *at = None;
    }
    Box::new(move |session, event| {
        match event {
            Event::Message { stream, kind: FileRead::KIND, cost, .. } => {
                session.release(stream, cost);
                let _ = session.send(stream, &FileEntry { size: size as u64, ..Default::default() });
                at = Some((stream, 0));
                pump(session, &mut at, size, &sent);
            }
            Event::Writable { .. } => pump(session, &mut at, size, &sent),
            _ => {}
        }
        true
    })
}

#[test]
fn a_download_waits_for_a_slow_reader_and_is_whole() {
    const SIZE: usize = 24_000_000;
    let server = start(ROUTES, Vec::new());
    let sent = Arc::new(AtomicUsize::new(0));
    let agent = agent::start("host-1", 0, file_server(SIZE, Arc::clone(&sent)));
    let mut client = server.connect();
    client.write_all(&get(&agent, "/read", "")).expect("sent");
    std::thread::sleep(Duration::from_millis(700));
    // What is under way is in windows and socket buffers, which the kernel grows to some MB.
    let under_way = sent.load(Ordering::SeqCst);
    assert!(under_way < SIZE / 2, "{under_way} bytes were sent to nobody");
    let (head, _) = read_response(&mut client);
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    let mut body = Vec::new();
    loop {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\r\n") {
            client.read_exact(&mut byte).expect("a chunk's size");
            line.push(byte[0]);
        }
        let size = usize::from_str_radix(String::from_utf8_lossy(&line).trim(), 16).expect("a size");
        let mut chunk = vec![0; size + 2];
        client.read_exact(&mut chunk).expect("a chunk");
        if size == 0 {
            break;
        }
        body.extend_from_slice(&chunk[..size]);
    }
    assert_eq!(body.len(), SIZE);
    assert!(body.chunks(1000).enumerate().all(|(i, piece)| piece.iter().all(|b| *b == i as u8)));
    // The connection goes on.
    client.write_all(b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 404 "));
}

/// Takes a file: slowly when `hold` is set, and tells what it got.
fn file_taker(got: Arc<Mutex<Vec<u8>>>, hold: Arc<AtomicUsize>) -> agent::Script {
    let mut owed: Vec<(StreamId, u32)> = Vec::new();
    Box::new(move |session, event| {
        match event {
            Event::Message { stream, kind: FileWrite::KIND, body, cost } => {
                session.release(stream, cost);
                assert_eq!(FileWrite::decode(&body).expect("well-formed").path.0, b"/tmp/f");
            }
            Event::Data { stream, channel, bytes, cost } => {
                assert_eq!(channel, CHANNEL_FILE);
                got.lock().expect("no panic").extend_from_slice(&bytes);
                owed.push((stream, cost));
            }
            Event::Finished { stream } => {
                let _ = session.send_last(stream, &FileEntry::default());
            }
            _ => {}
        }
        if hold.load(Ordering::SeqCst) == 0 {
            for (stream, cost) in owed.drain(..) {
                session.release(stream, cost);
            }
        }
        true
    })
}

#[test]
fn an_upload_streams_into_the_file() {
    const SIZE: usize = 6_000_000;
    let server = start(ROUTES, Vec::new());
    let (got, hold) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let agent = agent::start("host-1", 0, file_taker(Arc::clone(&got), hold));
    let file: Vec<u8> = (0..SIZE).map(|i| (i / 7) as u8).collect();
    let mut body = b"--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/tmp/f\r\n--b\r\n".to_vec();
    body.extend_from_slice(b"Content-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n");
    body.extend_from_slice(&file);
    body.extend_from_slice(b"\r\n--b--\r\n");
    let mut client = server.connect();
    let head = |length| {
        format!(
            "POST /write?agent={} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n\
             Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n",
            agent.address
        )
    };
    client.write_all(head(body.len()).as_bytes()).expect("sent");
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 100 "));
    client.write_all(&body).expect("sent");
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 204 "));
    assert!(*got.lock().expect("no panic") == file);
    // A body without a file is refused, also on the same connection.
    let empty = b"--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/tmp/f\r\n--b--\r\n";
    client.write_all(head(empty.len()).as_bytes()).expect("sent");
    assert!(read_response(&mut client).0.starts_with("HTTP/1.1 100 "));
    client.write_all(empty).expect("sent");
    let (head, body) = read_response(&mut client);
    assert!(head.starts_with("HTTP/1.1 400 ") && body.contains("field file"), "{body}");
}

#[test]
fn a_path_may_come_after_a_small_file() {
    let server = start(ROUTES, Vec::new());
    let path = "--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/tmp/f\r\n";
    let small: Vec<u8> = (0..MAX_HELD_FILE).map(|i| (i / 7) as u8).collect();
    let large = vec![b'x'; MAX_HELD_FILE + 1];
    let upload = |parts: &[&[u8]]| {
        let got = Arc::new(Mutex::new(Vec::new()));
        let hold = Arc::new(AtomicUsize::new(0));
        let agent = agent::start("host-1", 0, file_taker(Arc::clone(&got), hold));
        let mut body = parts.concat();
        body.extend_from_slice(b"--b--\r\n");
        let head = format!(
            "POST /write?agent={} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            agent.address,
            body.len()
        );
        let mut client = server.connect();
        client.write_all(head.as_bytes()).expect("sent");
        // It may be refused before all of it was sent.
        let _ = client.write_all(&body);
        let (head, body) = read_response(&mut client);
        let got = got.lock().expect("no panic").clone();
        (head.split(' ').nth(1).unwrap_or_default().to_string(), body, got)
    };
    let file_head = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";
    let file = |content: &[u8]| [&file_head[..], content, b"\r\n"].concat();
    let (status, body, got) = upload(&[&file(&small), path.as_bytes()]);
    assert_eq!(status, "204", "{body}");
    assert!(got == small, "{} bytes came", got.len());
    let (status, _, got) = upload(&[&file(b""), path.as_bytes()]);
    assert_eq!((status.as_str(), got.len()), ("204", 0));
    let (status, body, got) = upload(&[&file(&large), path.as_bytes()]);
    assert_eq!((status.as_str(), got.len()), ("400", 0));
    assert!(body.contains("path must come before"), "{body}");
    let (status, _, got) = upload(&[path.as_bytes(), &file(&large)]);
    assert_eq!((status.as_str(), got.len()), ("204", large.len()));
    for wrong in [
        vec![file(b"x")],
        vec![file(b"x"), file(b"y"), path.as_bytes().to_vec()],
        vec![path.as_bytes().to_vec(), path.as_bytes().to_vec(), file(b"x")],
    ] {
        let parts: Vec<&[u8]> = wrong.iter().map(Vec::as_slice).collect();
        let (status, body, got) = upload(&parts);
        assert_eq!((status.as_str(), got.len()), ("400", 0), "{body}");
        assert!(body.contains("one field path"), "{body}");
    }
}

#[test]
fn an_upload_that_is_cut_off_does_not_end_its_file() {
    let server = start(ROUTES, Vec::new());
    let (finished, reset) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (f, r) = (Arc::clone(&finished), Arc::clone(&reset));
    let agent = agent::start(
        "host-1",
        0,
        Box::new(move |_, event| {
            match event {
                Event::Finished { .. } => f.fetch_add(1, Ordering::SeqCst),
                Event::Reset { .. } => r.fetch_add(1, Ordering::SeqCst),
                _ => 0,
            };
            true
        }),
    );
    let mut client = server.connect();
    let head = format!(
        "POST /write?agent={} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n\
         Content-Length: 1000000\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/f\r\n--b\r\n\
         Content-Disposition: form-data; name=\"file\"\r\n\r\nsome bytes",
        agent.address
    );
    client.write_all(head.as_bytes()).expect("sent");
    std::thread::sleep(Duration::from_millis(200));
    drop(client);
    let began = Instant::now();
    while reset.load(Ordering::SeqCst) == 0 {
        assert!(began.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(finished.load(Ordering::SeqCst), 0);
}

#[test]
fn downloads_that_are_cut_off_cost_the_session_no_credit() {
    let server = start(ROUTES, Vec::new());
    let agent = agent::start("host-1", 0, file_server(1_000_000, Arc::default()));
    // Each leaves up to a window of 256 KiB unread, of the session's 2 MiB.
    for _ in 0..30 {
        let mut client = server.connect();
        client.write_all(&get(&agent, "/read", "")).expect("sent");
        let mut some = [0; 100];
        client.read_exact(&mut some).expect("the beginning");
    }
    let mut client = server.connect();
    client.write_all(&get(&agent, "/read", "")).expect("sent");
    client.write_all(b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
    let mut all = Vec::new();
    client.read_to_end(&mut all).expect("all of it in time");
    assert!(all.len() > 1_000_000, "{} bytes", all.len());
}
