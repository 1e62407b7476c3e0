//! The wire protocol's figures, each beside its floor and its peer, in one run over loopback TCP:
//! requests a second and their p50 and p99 beside a bare length-prefixed echo and ttrpc; bulk transfer
//! beside a bare socket copy; a keystroke beside a saturated transfer; memory of an idle connection and
//! of a stream.
//!
//! The kinds of request are measured in turns, so that each sees the same machine.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use wire::auth::{ITERATIONS, NONCE_LEN, Verifier, hmac_sha256};
use wire::client::{Client, Identity, Incoming};
use wire::message::{Done, Health, HealthReply, Message};
use wire::session::{Event, Limits, Session};

/// Turns, and requests of each kind in a turn.
const TURNS: usize = 20;
const REQUESTS: usize = 1000;
/// Turns of bulk transfer, and bytes in each.
const BULK_TURNS: usize = 4;
const BULK_BYTES: usize = 256 << 20;
/// Keystrokes that are measured.
const KEYS: usize = 500;
/// Connections and streams whose memory is measured.
const CONNECTIONS: usize = 500;
const STREAMS: usize = 1000;
/// A request's and an answer's bytes, about those of `HealthReply`.
const BODY: usize = 24;
const SECRET: &[u8] = b"0123456789abcdef";

/// Counts what is allocated.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is; only a counter is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Serves each connection on a thread of its own.
fn listen(serve: fn(TcpStream) -> std::io::Result<()>) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            thread::spawn(move || serve(socket));
        }
    });
    Ok(address)
}

fn bare_echo(mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    let mut have = 0;
    loop {
        let n = socket.read(&mut buffer[have..])?;
        if n == 0 {
            return Ok(());
        }
        have += n;
        if let Some(head) = buffer[..have].first_chunk::<4>() {
            let whole = 4 + u32::from_be_bytes(*head) as usize;
            if have >= whole {
                socket.write_all(&buffer[..whole])?;
                buffer.copy_within(whole..have, 0);
                have -= whole;
            }
        }
    }
}

fn bare_sink(mut socket: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 65_536];
    let mut left = BULK_BYTES;
    while left > 0 {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        left = left.saturating_sub(n);
    }
    socket.write_all(&[1])
}

/// Answers `Health`; echoes data of one byte, takes other data, and answers a stream's end by `Done`.
fn wire_server(mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut session = Session::server("bench/1", [9; NONCE_LEN], Limits::default(), 0);
    let mut buffer = vec![0; 65_536];
    loop {
        let n = socket.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        session.receive(&buffer[..n], 0);
        while let Some(event) = session.poll_event() {
            match event {
                Event::Authenticate { .. } => {
                    let verifier = Verifier::new(SECRET, &[5; 16], ITERATIONS);
                    session.provide_verifier(Some(verifier), b"decoy");
                }
                Event::Opened { stream, kind: Health::KIND, .. } => {
                    let reply = HealthReply { version: "bench".into(), uptime_ms: 7 };
                    let _ = session.send_last(stream, &reply);
                }
                Event::Data { stream, channel, bytes, cost } => {
                    if bytes.len() == 1 {
                        let _ = session.send_data(stream, channel, &bytes);
                    }
                    session.release(stream, cost);
                }
                Event::Finished { stream } => {
                    let _ = session.send_last(stream, &Done {});
                }
                _ => {}
            }
        }
        while !session.output().is_empty() {
            let n = socket.write(session.output())?;
            session.consume_output(n);
        }
    }
}

struct TtrpcEcho;

impl ttrpc::MethodHandler for TtrpcEcho {
    fn handler(&self, context: ttrpc::TtrpcContext, request: ttrpc::Request) -> ttrpc::Result<()> {
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(ttrpc::Code::OK, String::new()));
        response.payload = request.payload;
        ttrpc::response_to_channel(context.mh.stream_id, response, context.res_tx)
    }
}

fn ttrpc_server() -> Result<(ttrpc::Server, SocketAddr)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    // Its sockets inherit this from the listener; without it, header and payload, which ttrpc writes
    // apart, wait for each other for 40 ms.
    TcpStream::from(OwnedFd::from(listener.try_clone()?)).set_nodelay(true)?;
    let mut methods: HashMap<String, Box<dyn ttrpc::MethodHandler + Send + Sync>> = HashMap::new();
    methods.insert("/bench/echo".into(), Box::new(TtrpcEcho));
    let mut server = ttrpc::Server::new().add_listener(listener.into_raw_fd())?.register_service(methods);
    server.start()?;
    Ok((server, address))
}

fn connect_wire(address: SocketAddr) -> Result<Client> {
    let identity = Identity { name: "bench", secret: SECRET, program: "bench/1" };
    Ok(Client::connect(address, identity, Duration::from_secs(60))?)
}

/// The sample below which `percent` of all lie, in microseconds.
fn percentile_us(samples: &mut [Duration], percent: usize) -> f64 {
    samples.sort_unstable();
    samples[samples.len() * percent / 100].as_secs_f64() * 1e6
}

/// One kind of request.
struct Kind<'a> {
    name: &'static str,
    request: Box<dyn FnMut() -> Result<()> + 'a>,
    samples: Vec<Duration>,
}

fn requests() -> Result<()> {
    let mut bare = TcpStream::connect(listen(bare_echo)?)?;
    bare.set_nodelay(true)?;
    let mut client = connect_wire(listen(wire_server)?)?;
    let (_server, address) = ttrpc_server()?;
    let socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let ttrpc_client = ttrpc::Client::new(socket.into_raw_fd())?;
    let body = vec![7; BODY];
    let mut framed = (BODY as u32).to_be_bytes().to_vec();
    framed.extend_from_slice(&body);
    let mut back = vec![0; framed.len()];

    let mut kinds = [
        Kind {
            name: "bare echo",
            request: Box::new(|| {
                bare.write_all(&framed)?;
                bare.read_exact(&mut back)?;
                Ok(())
            }),
            samples: Vec::new(),
        },
        Kind {
            name: "wire",
            request: Box::new(|| {
                let reply: HealthReply = client.request(&Health {})?;
                assert_eq!(reply.uptime_ms, 7);
                Ok(())
            }),
            samples: Vec::new(),
        },
        Kind {
            name: "ttrpc",
            request: Box::new(|| {
                let mut request = ttrpc::Request::new();
                request.service = "bench".into();
                request.method = "echo".into();
                request.payload = body.clone();
                request.timeout_nano = 5_000_000_000;
                let response = ttrpc_client.request(request)?;
                assert_eq!(response.payload.len(), BODY);
                Ok(())
            }),
            samples: Vec::new(),
        },
    ];
    for turn in 0..=TURNS {
        for kind in &mut kinds {
            for _ in 0..REQUESTS {
                let start = Instant::now();
                (kind.request)()?;
                // The first turn warms up.
                if turn > 0 {
                    kind.samples.push(start.elapsed());
                }
            }
        }
    }
    let mut floor = None;
    for kind in &mut kinds {
        let total: Duration = kind.samples.iter().sum();
        let (p50, p99) = (percentile_us(&mut kind.samples, 50), percentile_us(&mut kind.samples, 99));
        let floor = *floor.get_or_insert(p50);
        println!(
            "request, {:10} {:8.0}/s  p50 {p50:6.1} us  p99 {p99:6.1} us  p50 {:.2} x bare",
            kind.name,
            kind.samples.len() as f64 / total.as_secs_f64(),
            p50 / floor
        );
    }
    Ok(())
}

fn bulk() -> Result<()> {
    let block = vec![7u8; 1 << 20];
    let (bare_address, wire_address) = (listen(bare_sink)?, listen(wire_server)?);
    let (mut bare, mut wire) = (Duration::MAX, Duration::MAX);
    for _ in 0..BULK_TURNS {
        let mut socket = TcpStream::connect(bare_address)?;
        let start = Instant::now();
        for _ in 0..BULK_BYTES / block.len() {
            socket.write_all(&block)?;
        }
        socket.read_exact(&mut [0])?;
        bare = bare.min(start.elapsed());

        let mut client = connect_wire(wire_address)?;
        let start = Instant::now();
        let stream = client.open(&Done {}, false)?;
        for _ in 0..BULK_BYTES / block.len() {
            client.send_data(stream, 4, &block)?;
        }
        client.finish(stream)?;
        client.next_message::<Done>(stream)?;
        wire = wire.min(start.elapsed());
    }
    let rate = |time: Duration| BULK_BYTES as f64 / 1e6 / time.as_secs_f64();
    println!("bulk, bare socket copy {:7.0} MB/s", rate(bare));
    println!("bulk, wire with MAC    {:7.0} MB/s  {:.2} x bare", rate(wire), rate(wire) / rate(bare));

    // What the MAC alone allows one core: each byte is hashed once by each side.
    let start = Instant::now();
    let mut last = 0;
    for _ in 0..BULK_BYTES / 32_768 {
        last ^= std::hint::black_box(hmac_sha256(SECRET, &[&block[..32_768]]))[0];
    }
    std::hint::black_box(last);
    println!("the MAC alone, a core  {:7.0} MB/s", rate(start.elapsed()));
    Ok(())
}

/// One byte there and back while the same connection carries as much bulk data as it takes.
fn keystrokes() -> Result<()> {
    let mut client = connect_wire(listen(wire_server)?)?;
    let keys = client.open(&Done {}, false)?;
    let file = client.open(&Done {}, false)?;
    let block = vec![7u8; 200 * 1024];
    for busy in [false, true] {
        let mut samples = Vec::with_capacity(KEYS);
        for _ in 0..KEYS {
            if busy {
                client.send_data(file, 4, &block)?;
            }
            let start = Instant::now();
            client.send_data(keys, 3, b"k")?;
            match client.next(keys)? {
                Incoming::Data { channel: 3, .. } => samples.push(start.elapsed()),
                other => return Err(format!("a key came back as {other:?}").into()),
            }
        }
        let (p50, p99) = (percentile_us(&mut samples, 50), percentile_us(&mut samples, 99));
        let what = if busy { "behind bulk data" } else { "alone" };
        println!("keystroke, {what:17} p50 {p50:6.1} us  p99 {p99:6.1} us");
    }
    Ok(())
}

/// Moves bytes between two sessions until nothing moves.
fn settle(client: &mut Session, server: &mut Session, verifier: &Verifier) {
    loop {
        let mut moved = false;
        for to_server in [true, false] {
            let (from, to) = match to_server {
                true => (&mut *client, &mut *server),
                false => (&mut *server, &mut *client),
            };
            let bytes = from.output().to_vec();
            from.consume_output(bytes.len());
            to.receive(&bytes, 0);
            moved |= !bytes.is_empty();
            while let Some(event) = to.poll_event() {
                if matches!(event, Event::Authenticate { .. }) {
                    to.provide_verifier(Some(verifier.clone()), b"decoy");
                }
                moved = true;
            }
        }
        if !moved {
            return;
        }
    }
}

fn memory() {
    let verifier = Verifier::new(SECRET, &[5; 16], ITERATIONS);
    let limits = Limits { max_streams: STREAMS as u32, ..Limits::default() };
    let mut pairs = Vec::with_capacity(CONNECTIONS);
    let before = ALLOCATED.load(Ordering::Relaxed);
    for _ in 0..CONNECTIONS {
        let mut client = Session::client("bench", SECRET, "bench/1", [1; NONCE_LEN], limits, 0);
        let mut server = Session::server("bench/2", [2; NONCE_LEN], limits, 0);
        settle(&mut client, &mut server, &verifier);
        pairs.push((client, server));
    }
    // The vector's own room was there before, and holds the sessions themselves.
    let heap = ALLOCATED.load(Ordering::Relaxed).saturating_sub(before);
    let each = heap / CONNECTIONS / 2 + size_of::<Session>();
    println!("memory of an idle connection's session, one side: {each} bytes");
    let Some((client, server)) = pairs.first_mut() else { return };
    let before = ALLOCATED.load(Ordering::Relaxed);
    for _ in 0..STREAMS {
        if client.open(&Done {}, false).is_err() {
            break;
        }
        settle(client, server, &verifier);
    }
    let streams = client.stream_count().max(1);
    let each = ALLOCATED.load(Ordering::Relaxed).saturating_sub(before) / streams / 2;
    println!("memory of an open stream, one side, of {streams}: {each} bytes");
}

fn main() -> Result<()> {
    requests()?;
    bulk()?;
    keystrokes()?;
    memory();
    Ok(())
}
