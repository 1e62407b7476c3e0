//! A server on loopback with handlers of its own, and a client that speaks bytes.

#![allow(dead_code)]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use wrenn_cp::http::context::Context;
use wrenn_cp::http::handler::{Job, Route};
use wrenn_cp::http::server::{Server, Stopper};

/// The secret that tests derive host credentials from.
pub const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

/// A running server; ends when dropped.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    stopper: Stopper,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// Starts a server with these routes.
pub fn start(routes: &'static [Route], jobs: Vec<Job>) -> Running {
    let context = Context {
        jwt_secret: SECRET.to_vec(),
        database_url: "postgresql://nobody@%2Fnonexistent/none".to_string(),
        proxy_domain: None,
        trusted_proxies: Vec::new(),
        version: "test",
    };
    start_with(Arc::new(context), routes.to_vec(), jobs)
}

/// Starts a server with this context.
pub fn start_with(context: Arc<Context>, routes: Vec<Route>, jobs: Vec<Job>) -> Running {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut server = Server::bind(([127, 0, 0, 1], 0).into(), 2, context, &routes, jobs, None)?;
        let _ = sender.send((server.address(), server.stopper()));
        server.run()
    });
    let (address, stopper) = receiver.recv_timeout(Duration::from_secs(5)).expect("the server starts");
    Running { address, stopper, thread: Some(thread) }
}

impl Running {
    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        stream
    }

    /// Begins the shutdown and waits for its end.
    pub fn stop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic").expect("no error");
        }
    }

    /// Begins the shutdown.
    pub fn begin_stop(&self) {
        self.stopper.stop();
    }

    /// Sends bytes on a fresh connection, ends nothing, and reads until the server closes.
    pub fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(bytes);
        read_to_close(&mut stream)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Everything up to the connection's end.
pub fn read_to_close(stream: &mut TcpStream) -> String {
    let mut out = Vec::new();
    let _ = stream.read_to_end(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// One response with a Content-Length: its head and body.
pub fn read_response(stream: &mut TcpStream) -> (String, String) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            other => panic!("{other:?} within {:?}", String::from_utf8_lossy(&head)),
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let length = head
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "))
        .map_or(0, |l| l.trim().parse::<usize>().expect("a length"));
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("the whole body");
    (head, String::from_utf8_lossy(&body).into_owned())
}

/// The peak and present resident memory of this process, in KiB.
pub fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}
