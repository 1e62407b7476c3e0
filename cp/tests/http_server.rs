//! The HTTP server over real loopback connections: what clients do right, slowly, too much and wrong.

mod support;

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::{SECRET, read_response, read_to_close, start, start_with};
use wrenn_cp::http::context::Context;
use wrenn_cp::http::handler::Method::{Get, Post};
use wrenn_cp::http::handler::{BodyMode, Flow, Job, Request, Response, Route, Step};

fn hello(request: Request, _: &Arc<Context>) -> Flow {
    let name = request.query("name").unwrap_or("world").to_string();
    Step::respond(Response::json(200, &format!("hello {name}")))
}

fn echo(request: Request, _: &Arc<Context>) -> Flow {
    Step::respond(Response { status: 200, headers: Vec::new(), body: request.body })
}

fn large(_: Request, _: &Arc<Context>) -> Flow {
    Step::respond(Response { status: 200, headers: Vec::new(), body: vec![b'x'; 8 * 1024 * 1024] })
}

fn slow(_: Request, _: &Arc<Context>) -> Flow {
    Step::compute(|| {
        std::thread::sleep(Duration::from_millis(300));
        Step::respond(Response::json(200, "slow"))
    })
}

fn needs_database(_: Request, _: &Arc<Context>) -> Flow {
    Step::database(|_| Step::respond(Response::no_content()))
}

fn bad(request: Request, _: &Arc<Context>) -> Flow {
    let number: u32 = request.json()?;
    Step::respond(Response::json(200, &number))
}

fn peer(request: Request, _: &Arc<Context>) -> Flow {
    Step::respond(Response::json(200, &request.peer.to_string()))
}

static ROUTES: &[Route] = &[
    Route::new(Get, "/hello", hello),
    Route::new(Post, "/echo", echo).with_body(BodyMode::Buffered(1000)),
    Route::new(Get, "/large", large),
    Route::new(Get, "/slow", slow),
    Route::new(Get, "/database", needs_database),
    Route::new(Post, "/bad", bad),
];

#[test]
fn only_a_trusted_proxy_says_whom_a_request_comes_from() {
    let asked = |trusted: &[&str]| {
        let context = Context {
            jwt_secret: SECRET.to_vec(),
            database_url: "postgresql://nobody@%2Fnonexistent/none".to_string(),
            proxy_domain: None,
            trusted_proxies: trusted.iter().map(|t| t.parse().expect("an address")).collect(),
            version: "test",
        };
        let server = start_with(Arc::new(context), vec![Route::new(Get, "/peer", peer)], Vec::new());
        server.exchange(
            "GET /peer HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For: \
             198.51.100.7, 10.0.0.9\r\nConnection: close\r\n\r\n"
                .as_bytes(),
        )
    };
    for (trusted, told) in [
        (&[][..], "127.0.0.1"),
        (&["10.0.0.9"], "127.0.0.1"),
        (&["127.0.0.1"], "10.0.0.9"),
        (&["127.0.0.1", "10.0.0.9"], "198.51.100.7"),
    ] {
        let answer = asked(trusted);
        assert!(answer.ends_with(&format!("\"{told}\"")), "{trusted:?}: {answer}");
    }
}

#[test]
fn keep_alive_and_pipelined_requests_are_answered_in_order() {
    let server = start(ROUTES, Vec::new());
    let mut stream = server.connect();
    let one = "GET /hello?name=a HTTP/1.1\r\nHost: x\r\n\r\n";
    let requests = [
        one,
        "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\n",
        "GET /nope HTTP/1.1\r\nHost: x\r\n\r\n",
        "HEAD /hello HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ];
    stream.write_all(requests.concat().as_bytes()).expect("sent");
    let bodies: Vec<String> = (0..5).map(|_| read_response(&mut stream).1).collect();
    assert_eq!(bodies[..4], ["\"hello a\"", "\"slow\"", "abc", "def"]);
    assert!(bodies[4].contains("not_found"));
    // The head's length is that of the body that is left out, so what follows is read as it comes.
    let rest = read_to_close(&mut stream);
    assert_eq!(rest.matches("HTTP/1.1 200").count(), 2, "{rest}");
    assert_eq!(rest.matches("hello world").count(), 1, "{rest}");
    assert!(rest.contains("connection: close"));
}

#[test]
fn a_request_in_single_bytes_and_an_http_1_0_client() {
    let server = start(ROUTES, Vec::new());
    let mut stream = server.connect();
    for byte in b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi" {
        stream.write_all(&[*byte]).expect("sent");
    }
    assert_eq!(read_response(&mut stream).1, "hi");
    let answer = server.exchange(b"GET /hello HTTP/1.0\r\n\r\n");
    assert!(answer.contains("connection: close") && answer.ends_with("\"hello world\""), "{answer}");
}

#[test]
fn a_client_that_ends_its_direction_still_gets_its_answer() {
    let server = start(ROUTES, Vec::new());
    let mut stream = server.connect();
    stream.write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    stream.shutdown(Shutdown::Write).expect("half-closed");
    assert!(read_to_close(&mut stream).ends_with("\"slow\""));
}

#[test]
fn bodies_over_the_limit_are_refused_before_they_are_read() {
    let server = start(ROUTES, Vec::new());
    let answer = server.exchange(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("payload_too_large"), "{answer}");
    let mut chunked = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..3 {
        chunked.extend_from_slice(b"190\r\n");
        chunked.extend_from_slice(&[b'a'; 400]);
        chunked.extend_from_slice(b"\r\n");
    }
    let answer = server.exchange(&chunked);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let expecting = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\nExpect: 100-continue\r\n\r\n";
    let answer = server.exchange(expecting);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[test]
fn a_client_that_waits_is_told_to_continue() {
    let server = start(ROUTES, Vec::new());
    let mut stream = server.connect();
    let head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(head).expect("sent");
    let (interim, _) = read_response(&mut stream);
    assert_eq!(interim, "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"ok").expect("sent");
    assert_eq!(read_response(&mut stream).1, "ok");
}

#[test]
fn garbage_and_smuggling_attempts_are_refused_and_the_connection_closed() {
    let server = start(ROUTES, Vec::new());
    for (bytes, status) in [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".as_slice(), "400"),
        (b"hello\r\n\r\n", "400"),
        (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", "505"),
        (b"GET /hello HTTP/1.1\r\n\r\n", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        (b"BREW /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "501"),
        (b"POST /bad HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{x", "400"),
    ] {
        let answer = server.exchange(bytes);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:?}: {answer}");
        assert!(answer.contains("{\"error\":{\"code\":\"invalid_request\""), "{answer}");
    }
    // What looks like a wire client is taken for one, and refused by that protocol.
    let answer = server.exchange(b"\0nonsense that is not a frame");
    assert!(!answer.contains("HTTP"), "{answer}");
    assert_eq!(read_response_of(&server), "\"hello world\"");
}

fn read_response_of(server: &support::Running) -> String {
    let mut stream = server.connect();
    stream.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    read_response(&mut stream).1
}

#[test]
fn a_slow_loris_is_cut_off_while_others_are_served() {
    let server = start(ROUTES, Vec::new());
    let mut lorises: Vec<_> = (0..50).map(|_| server.connect()).collect();
    for loris in &mut lorises {
        loris.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n").expect("sent");
    }
    let began = Instant::now();
    let mut silent = server.connect();
    while began.elapsed() < Duration::from_secs(9) {
        for loris in &mut lorises {
            loris.write_all(b"A: b\r\n").expect("the server still listens");
        }
        let asked = Instant::now();
        assert_eq!(read_response_of(&server), "\"hello world\"");
        assert!(asked.elapsed() < Duration::from_secs(1));
        std::thread::sleep(Duration::from_millis(500));
    }
    for loris in &mut lorises {
        assert!(read_to_close(loris).starts_with("HTTP/1.1 408 "));
    }
    assert_eq!(read_to_close(&mut silent), "");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let server = start(ROUTES, Vec::new());
    let mut lazy: Vec<_> = (0..4).map(|_| server.connect()).collect();
    for stream in &mut lazy {
        stream.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(read_response_of(&server), "\"hello world\"");
    for stream in &mut lazy {
        assert_eq!(read_response(stream).1.len(), 8 * 1024 * 1024);
    }
}

#[test]
fn without_a_database_the_answer_is_503_and_quick() {
    let server = start(ROUTES, Vec::new());
    let began = Instant::now();
    let answer = server.exchange(b"GET /database HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("database_unavailable"), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn clients_that_vanish_leave_nothing() {
    let server = start(ROUTES, Vec::new());
    for _ in 0..50 {
        let mut stream = server.connect();
        stream.write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
        drop(stream);
        let mut stream = server.connect();
        stream.write_all(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc").expect("sent");
        drop(stream);
    }
    assert_eq!(read_response_of(&server), "\"hello world\"");
}

#[test]
fn a_shutdown_finishes_what_is_under_way_and_takes_no_more() {
    let mut server = start(ROUTES, Vec::new());
    let mut busy = server.connect();
    let mut idle = server.connect();
    idle.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    read_response(&mut idle);
    busy.write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    std::thread::sleep(Duration::from_millis(100));
    server.begin_stop();
    assert_eq!(read_to_close(&mut idle), "");
    assert!(read_to_close(&mut busy).ends_with("\"slow\""));
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(std::net::TcpStream::connect(server.address).is_err());
}

static RUNS: AtomicUsize = AtomicUsize::new(0);

fn job(_: &Arc<Context>) -> Flow {
    RUNS.fetch_add(1, Ordering::Relaxed);
    Step::compute(|| Step::respond(Response::no_content()))
}

#[test]
fn jobs_recur() {
    let _server = start(ROUTES, vec![Job { name: "test", every_ms: 20, run: job }]);
    let began = Instant::now();
    while RUNS.load(Ordering::Relaxed) < 3 && began.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(RUNS.load(Ordering::Relaxed) >= 3);
}
