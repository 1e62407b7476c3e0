//! A database that takes connections and says nothing.

use crate::postgres::own_server;
use crate::support::{Running, SECRET, read_response, start_with};
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wrenn_cp::api;
use wrenn_cp::db::{Database, migrate};
use wrenn_cp::http::context::Context;
use wrenn_cp::worker::WORK_TIMEOUT;

/// Every process of a server, stopped; they go on when this is dropped.
struct Frozen(Vec<i32>);

impl Frozen {
    fn new(first: i32) -> Frozen {
        let children = fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?;
            (parent == first.to_string()).then_some(pid)
        });
        let all = Frozen([first].into_iter().chain(children).collect());
        all.signal(libc::SIGSTOP);
        all
    }

    fn signal(&self, signal: i32) {
        for pid in &self.0 {
            // SAFETY: kill(2) touches no memory of this process.
            unsafe { libc::kill(*pid, signal) };
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.signal(libc::SIGCONT);
    }
}

const REQUEST: &[u8] = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n";

fn ask(server: &Running) -> TcpStream {
    let mut client = server.connect();
    client.write_all(REQUEST).expect("sent");
    client
}

fn health(server: &Running) -> (String, Duration) {
    let began = Instant::now();
    let (head, body) = read_response(&mut ask(server));
    let status = head.split(' ').nth(1).unwrap_or_default().to_string();
    assert!(status == "200" || body.contains("database_unavailable"), "{head}{body}");
    (status, began.elapsed())
}

#[test]
fn a_frozen_database_holds_nobody_up_for_long_and_is_found_again() {
    let (url, first) = own_server();
    migrate::run(&mut Database::connect(&url).expect("connect")).expect("migrate");
    let context = Context {
        jwt_secret: SECRET.to_vec(),
        database_url: url,
        proxy_domain: None,
        trusted_proxies: Vec::new(),
        version: "test",
    };
    let server = start_with(Arc::new(context), api::routes(), Vec::new());
    assert_eq!(health(&server).0, "200");
    let frozen = Frozen::new(first);
    let began = Instant::now();
    // More than there are threads: some of them wait for one.
    let mut waiting: Vec<TcpStream> = (0..6).map(|_| ask(&server)).collect();
    for client in &mut waiting {
        let (head, body) = read_response(client);
        assert!(head.starts_with("HTTP/1.1 503 ") && body.contains("database_unavailable"), "{head}{body}");
        assert!(began.elapsed() < WORK_TIMEOUT + Duration::from_secs(2), "{:?}", began.elapsed());
    }
    // One finds out whether it answers again; nobody else waits.
    let mut probe = ask(&server);
    std::thread::sleep(Duration::from_millis(100));
    for _ in 0..5 {
        let (status, took) = health(&server);
        assert!(status == "503" && took < Duration::from_secs(1), "{status} after {took:?}");
    }
    drop(frozen);
    assert!(read_response(&mut probe).0.starts_with("HTTP/1.1 200 "), "what waited goes on");
    let deadline = Instant::now() + Duration::from_secs(10);
    while health(&server).0 != "200" {
        assert!(Instant::now() < deadline, "it was not found again");
        std::thread::sleep(Duration::from_millis(100));
    }
    for _ in 0..10 {
        assert_eq!(health(&server).0, "200");
    }
}
