//! A host agent of scripted behaviour, over a real loopback connection and the real wire session.

use mio::net::TcpStream as MioStream;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use wire::auth::{NONCE_LEN, Verifier};
use wire::reactor::{Link, Socket};
use wire::session::{Event, Limits, Session};
use wrenn_cp::hosts::credential::credential;

/// What the agent does with an event of its session. False cuts the connection.
pub type Script = Box<dyn FnMut(&mut Session, Event) -> bool + Send>;

/// A running agent; ends when dropped.
pub struct Agent {
    /// Where it listens.
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts an agent for this host on a free port, or on a given one.
pub fn start(host_id: &str, port: u16, mut script: Script) -> Agent {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a port");
    let address = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("non-blocking");
    let secret = credential(crate::support::SECRET, host_id);
    let verifier = Verifier::new(secret.as_bytes(), b"0123456789abcdef", 4096);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let began = Instant::now();
        let mut links: Vec<Link> = Vec::new();
        while !stopped.load(Ordering::Acquire) {
            let now = began.elapsed().as_millis() as u64;
            if let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).expect("non-blocking");
                let session = Session::server("agent/test", [9; NONCE_LEN], Limits::default(), now);
                links.push(Link::new(Socket::new(MioStream::from_std(stream)), session));
            }
            links.retain_mut(|link| {
                link.socket.on_ready(true, true);
                link.read(now);
                while let Some(event) = link.session.poll_event() {
                    match event {
                        Event::Authenticate { .. } => {
                            link.session.provide_verifier(Some(verifier.clone()), b"decoy");
                        }
                        event => {
                            if !script(&mut link.session, event) {
                                return false;
                            }
                        }
                    }
                }
                link.flush();
                !link.session.is_closed()
            });
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    Agent { address, stop, thread: Some(thread) }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
