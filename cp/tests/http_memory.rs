//! What a client can make the server hold. By itself, because it looks at the process's memory.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{read_response, resident_kib, start};
use wrenn_cp::http::context::Context;
use wrenn_cp::http::handler::Method::Get;
use wrenn_cp::http::handler::{Flow, Request, Response, Route, Step};
use wrenn_cp::http::limits::{MAX_BUFFERED_BODIES, MAX_CONNECTIONS};

fn hello(_: Request, _: &Arc<Context>) -> Flow {
    Step::respond(Response::json(200, "hello"))
}

/// A response that a slow client leaves with the server.
fn large(_: Request, _: &Arc<Context>) -> Flow {
    Step::respond(Response { status: 200, headers: Vec::new(), body: vec![b'x'; LARGE] })
}

const LARGE: usize = 16 * 1024 * 1024;

static ROUTES: &[Route] = &[Route::new(Get, "/hello", hello), Route::new(Get, "/large", large)];

/// One at a time: they all look at the same memory.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_header_of_ten_megabytes_is_refused_in_bounded_memory() {
    let _alone = ALONE.lock();
    let server = start(ROUTES, Vec::new());
    let before = resident_kib();
    for _ in 0..3 {
        let mut request = b"GET /hello HTTP/1.1\r\nHost: x\r\nA: ".to_vec();
        request.resize(10_000_000, b'a');
        let answer = server.exchange(&request);
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(answer.contains("connection: close"));
    }
    // Three of the client's own buffers, and no more.
    assert!(resident_kib() < before + 40_000, "{before} -> {} KiB", resident_kib());
}

#[test]
fn requests_without_end_from_a_client_that_reads_nothing_are_bounded() {
    let _alone = ALONE.lock();
    let server = start(ROUTES, Vec::new());
    let before = resident_kib();
    let mut client = server.connect();
    client.set_write_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let requests = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    let mut sent = 0;
    while client.write_all(&requests).is_ok() {
        sent += 1;
        assert!(sent < 10_000, "a client that reads nothing is served without end");
    }
    assert!(resident_kib() < before + 20_000, "{before} -> {} KiB", resident_kib());
}

#[test]
fn idle_connections_make_room_for_new_ones() {
    let _alone = ALONE.lock();
    wire::reactor::sys::resources::raise_open_files().expect("a limit");
    let server = start(ROUTES, Vec::new());
    let before = resident_kib();
    let crowd: Vec<TcpStream> = (0..3000).map(|_| server.connect()).collect();
    let mut client = server.connect();
    client.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    assert_eq!(read_response(&mut client).1, "\"hello\"");
    assert!(resident_kib() < before + 20_000, "{before} -> {} KiB", resident_kib());
    drop(crowd);
}

#[test]
fn requests_that_hardly_come_in_make_room_too() {
    let _alone = ALONE.lock();
    wire::reactor::sys::resources::raise_open_files().expect("a limit");
    let server = start(ROUTES, Vec::new());
    let crowd: Vec<TcpStream> = (0..MAX_CONNECTIONS + 100)
        .map(|n| {
            let mut client = server.connect();
            let _ = client.write_all(b"G");
            // No faster than they are accepted, so that the first is not given up when the last comes.
            std::thread::sleep(Duration::from_millis(u64::from(n % 64 == 0)));
            client
        })
        .collect();
    for _ in 0..3 {
        let mut client = server.connect();
        client.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
        assert_eq!(read_response(&mut client).1, "\"hello\"");
    }
    drop(crowd);
}

#[test]
fn responses_that_nobody_reads_are_bounded_together() {
    let _alone = ALONE.lock();
    let server = start(ROUTES, Vec::new());
    let before = resident_kib();
    let ask = || {
        let mut client = server.connect();
        client.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
        let mut status = [0; 12];
        client.read_exact(&mut status).expect("an answer");
        (client, status)
    };
    let fit = MAX_BUFFERED_BODIES / LARGE;
    let crowd: Vec<_> = (0..3 * fit).map(|_| ask()).collect();
    let served = crowd.iter().filter(|(_, status)| status == b"HTTP/1.1 200").count();
    let refused = crowd.iter().filter(|(_, status)| status == b"HTTP/1.1 503").count();
    assert_eq!((served, refused), (fit, 2 * fit));
    // One response is there twice while it is made.
    let bound_kib = ((MAX_BUFFERED_BODIES + 3 * LARGE) / 1024) as u64;
    assert!(resident_kib() < before + bound_kib, "{before} -> {} KiB", resident_kib());
    drop(crowd);
    // That they have gone is seen in the next turns of the loop.
    assert!((0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        &ask().1 == b"HTTP/1.1 200"
    }));
}
