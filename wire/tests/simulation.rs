//! Two sessions over a hostile transport, under a virtual clock: it splits, delays, stalls, cuts and
//! corrupts. Each run follows from one seed.
//!
//! `WRENN_SEED=123 cargo test -p wrenn-wire --test simulation` replays one run;
//! `WRENN_SIMULATIONS=100000` makes that many.

use std::collections::{BTreeMap, VecDeque};
use std::sync::LazyLock;
use wire::auth::{ITERATIONS, NONCE_LEN, Verifier};
use wire::message::{Code, Done};
use wire::session::{DEAD_AFTER_MS, Event, Limits, OpenError, Session, SessionError, StreamId};

/// Runs in `cargo test`.
const RUNS: u64 = 3000;
/// Turns of one run; each moves the clock.
const TURNS: usize = 400;
/// Turns in which what is left may come to its end.
const MOST_LAST_TURNS: usize = 20_000;
const SECRET: &[u8] = b"0123456789abcdef";
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| Verifier::new(SECRET, &[3; 16], ITERATIONS));
/// The longest message that is sent here, in bytes.
const LONGEST: u64 = 20_000;

/// xorshift64*: enough to choose by, and the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// How a half of a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Finished,
    Reset,
}

/// One direction of a stream: a running hash and count of what was sent and what came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Flow {
    bytes: u64,
    hash: u64,
    messages: u64,
    end: Option<End>,
}

impl Flow {
    fn data(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for b in bytes {
            self.hash = (self.hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn message(&mut self, body: &[u8]) {
        self.messages += 1;
        self.data(body);
    }
}

/// One side: its session, what it did and what it heard.
struct Side {
    session: Session,
    sent: BTreeMap<StreamId, Flow>,
    heard: BTreeMap<StreamId, Flow>,
    /// Received and not given back: a slow application.
    held: VecDeque<(StreamId, u32)>,
    /// Streams that this side may send on.
    live: Vec<StreamId>,
    wire: VecDeque<(u64, Vec<u8>)>,
    closed: Option<SessionError>,
    window: usize,
}

impl Side {
    fn new(session: Session, window: u32) -> Side {
        Side {
            session,
            sent: BTreeMap::new(),
            heard: BTreeMap::new(),
            held: VecDeque::new(),
            live: Vec::new(),
            wire: VecDeque::new(),
            closed: None,
            window: window as usize,
        }
    }

    fn poll(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Authenticate { .. } => {
                    self.session.provide_verifier(Some(VERIFIER.clone()), b"decoy");
                }
                Event::Opened { stream, body, .. } => {
                    assert!(!self.heard.contains_key(&stream), "stream {stream} opened twice");
                    self.heard.entry(stream).or_default().message(&body);
                    self.live.push(stream);
                }
                Event::Message { stream, body, cost, .. } => {
                    self.flow_in(stream).message(&body);
                    self.held.push_back((stream, cost));
                }
                Event::Data { stream, bytes, cost, .. } => {
                    assert!(!bytes.is_empty(), "empty data on {stream}");
                    self.flow_in(stream).data(&bytes);
                    self.held.push_back((stream, cost));
                }
                Event::Finished { stream } => self.flow_in(stream).end = Some(End::Finished),
                Event::Reset { stream, .. } => {
                    let flow = self.heard.entry(stream).or_default();
                    assert!(flow.end != Some(End::Reset), "stream {stream} reset twice");
                    flow.end = Some(End::Reset);
                    self.live.retain(|s| *s != stream);
                }
                Event::Closed { error } => {
                    assert_eq!(self.closed, None, "closed twice");
                    self.closed = Some(error);
                }
                Event::Ready { .. } | Event::Writable { .. } | Event::GoingAway { .. } => {}
            }
        }
    }

    fn flow_in(&mut self, stream: StreamId) -> &mut Flow {
        let flow = self.heard.entry(stream).or_default();
        assert_eq!(flow.end, None, "stream {stream} goes on after its end");
        flow
    }

    /// One thing that an application might do.
    fn act(&mut self, random: &mut Random) {
        if !self.session.is_ready() {
            return;
        }
        let size = if random.chance(20) { random.below(LONGEST) } else { random.below(200) };
        let body: Vec<u8> = (0..size).map(|i| (i ^ size) as u8).collect();
        let stream = match self.live.len() as u64 {
            0 => 0,
            n => self.live[random.below(n) as usize],
        };
        match random.below(20) {
            0..=2 => {
                let mut payload = vec![0x77, 0x01];
                payload.extend_from_slice(&body);
                let fin = random.chance(10);
                match self.session.open_raw(payload, fin) {
                    Ok(id) => {
                        let flow = self.sent.entry(id).or_default();
                        flow.message(&body);
                        match fin {
                            true => flow.end = Some(End::Finished),
                            false => self.live.push(id),
                        }
                    }
                    Err(OpenError::TooManyStreams | OpenError::GoingAway) => {}
                    Err(e) => panic!("open: {e}"),
                }
            }
            3..=5 if stream != 0 => {
                let mut payload = vec![0x77, 0x02];
                payload.extend_from_slice(&body);
                if self.session.send_raw(stream, payload, false).is_ok() {
                    self.sent.entry(stream).or_default().message(&body);
                }
            }
            6..=14 if stream != 0 && !body.is_empty() => {
                if let Ok(n) = self.session.send_data(stream, 1, &body) {
                    self.sent.entry(stream).or_default().data(&body[..n]);
                }
            }
            15 if stream != 0 => self.finish(stream),
            16 if stream != 0 && random.chance(30) => {
                self.session.reset(stream, Code::Cancelled, "enough");
                self.sent.entry(stream).or_default().end = Some(End::Reset);
                self.live.retain(|s| *s != stream);
            }
            _ => {}
        }
    }

    fn finish(&mut self, stream: StreamId) {
        if self.session.finish(stream).is_ok() {
            self.sent.entry(stream).or_default().end = Some(End::Finished);
        }
        self.live.retain(|s| *s != stream);
    }

    fn release(&mut self, n: u64) {
        for _ in 0..n {
            let Some((stream, cost)) = self.held.pop_front() else { return };
            self.session.release(stream, cost);
        }
    }

    /// Moves output into the transport, in pieces.
    fn write(&mut self, random: &mut Random, now_ms: u64, delay_ms: u64) {
        let n = self.session.output().len();
        let n = if random.chance(30) { random.below(n as u64 + 1) as usize } else { n };
        if n > 0 {
            let bytes = self.session.output()[..n].to_vec();
            self.session.consume_output(n);
            let last = self.wire.back().map_or(0, |w| w.0);
            self.wire.push_back(((now_ms + random.below(delay_ms + 1)).max(last), bytes));
        }
    }

    fn check_bounds(&self) {
        let held: u32 = self.held.iter().map(|h| h.1).sum();
        assert!(held as usize <= self.window, "{held} bytes held, over the window of {}", self.window);
        // Output, messages that wait on every stream, and at most a window received.
        let bound = 2 * 1024 * 1024 + self.window + self.session.stream_count() * 256 * 1024;
        assert!(self.session.buffered_bytes() <= bound, "{} bytes buffered", self.session.buffered_bytes());
    }
}

/// What the transport does beyond splitting and delaying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Cut(usize),
    Corrupt(usize),
    Drop(usize),
    Double(usize),
}

fn deliver(from: &mut Side, to: &mut Side, random: &mut Random, now_ms: u64, fault: &mut Fault, turn: usize) {
    while from.wire.front().is_some_and(|w| w.0 <= now_ms) {
        let Some((at, mut bytes)) = from.wire.pop_front() else { return };
        let cut = if random.chance(50) { 1 + random.below(bytes.len() as u64) as usize } else { bytes.len() };
        let rest = bytes.split_off(cut.min(bytes.len()));
        if !rest.is_empty() {
            from.wire.push_front((at, rest));
        }
        match *fault {
            Fault::Corrupt(t) if turn >= t => {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random.below(8);
                *fault = Fault::None;
            }
            Fault::Drop(t) if turn >= t => {
                *fault = Fault::None;
                continue;
            }
            Fault::Double(t) if turn >= t => {
                to.session.receive(&bytes, now_ms);
                *fault = Fault::None;
            }
            _ => {}
        }
        to.session.receive(&bytes, now_ms);
        to.poll();
    }
}

/// What came on a stream is a beginning of what was sent on it, the whole when the half ended well.
/// On a transport that was tampered with, everything before the damage must still be so.
fn check_flows(sender: &Side, receiver: &Side) {
    for (id, heard) in &receiver.heard {
        let Some(sent) = sender.sent.get(id) else {
            let bare_end = Flow { end: heard.end, ..Flow::default() };
            assert_eq!(*heard, bare_end, "stream {id}: something came that was never sent");
            continue;
        };
        assert!(
            heard.bytes <= sent.bytes && heard.messages <= sent.messages,
            "stream {id}: {heard:?} of {sent:?}"
        );
        if heard.end == Some(End::Finished) {
            assert_eq!(heard, sent, "stream {id} ended well with other content");
        }
    }
}

/// Both ends agree how each stream ended, and what was on it.
fn check_ends(sender: &Side, receiver: &Side, drained: bool) {
    for (id, sent) in &sender.sent {
        let was_reset_by_receiver = receiver.sent.get(id).is_some_and(|f| f.end == Some(End::Reset));
        let heard = receiver.heard.get(id).cloned().unwrap_or_default();
        let is_reset_to_sender = sender.heard.get(id).is_some_and(|f| f.end == Some(End::Reset));
        // A side that drains refuses streams without its application.
        assert!(!is_reset_to_sender || was_reset_by_receiver || drained, "stream {id}: reset by nobody");
        match sent.end {
            _ if was_reset_by_receiver || is_reset_to_sender => {}
            Some(End::Finished) if heard.end == Some(End::Reset) => {
                // The sender reset it after its half had ended.
                panic!("stream {id}: ended well at one side, reset at the other");
            }
            Some(End::Finished) => assert_eq!(heard, *sent, "stream {id}"),
            // A stream that was reset before its OPEN went out was never heard of.
            Some(End::Reset) if receiver.heard.contains_key(id) => {
                assert_eq!(heard.end, Some(End::Reset), "stream {id}")
            }
            Some(End::Reset) => {}
            None => panic!("stream {id} never ended: {sent:?}"),
        }
    }
}

/// One run; returns how many bytes came through.
fn run(seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let windows = [131_136, 140_000, 262_144, 1 << 20];
    let limits = |random: &mut Random| Limits {
        stream_window: windows[random.below(4) as usize],
        connection_window: windows[random.below(4) as usize],
        max_streams: 1 + random.below(12) as u32,
    };
    let (a, b) = (limits(&mut random), limits(&mut random));
    let mut client =
        Side::new(Session::client("agent", SECRET, "sim/1", [1; NONCE_LEN], a, 0), a.connection_window);
    let mut server = Side::new(Session::server("sim/2", [2; NONCE_LEN], b, 0), b.connection_window);
    let turn_of_fault = random.below(TURNS as u64) as usize;
    let mut fault = match random.below(10) {
        0 => Fault::Cut(turn_of_fault),
        1 => Fault::Corrupt(turn_of_fault),
        2 => Fault::Drop(turn_of_fault),
        3 => Fault::Double(turn_of_fault),
        _ => Fault::None,
    };
    let planned = fault;
    let delay_ms = [0, 3, 40, 400][random.below(4) as usize];
    let laziness = random.below(90);
    let mut drained = false;
    let mut now_ms = 0;
    for turn in 0..TURNS {
        now_ms += random.below(50);
        for side in [&mut client, &mut server] {
            side.poll();
            if side.closed.is_none() {
                side.act(&mut random);
            }
            if !random.chance(laziness) {
                let n = random.below(6);
                side.release(n);
            }
            side.poll();
            if side.session.next_timeout_ms().is_some_and(|t| t <= now_ms) {
                side.session.handle_timeout(now_ms);
            }
            side.write(&mut random, now_ms, delay_ms);
            side.check_bounds();
        }
        if !drained && turn > TURNS / 2 && random.chance(1) && server.session.is_ready() {
            drained = true;
            server.session.drain("restart");
        }
        if fault == Fault::Cut(turn) {
            client.wire.clear();
            server.wire.clear();
            client.session.transport_closed();
            server.session.transport_closed();
        }
        // Both directions are damaged alike.
        deliver(&mut client, &mut server, &mut random, now_ms, &mut fault, turn);
        deliver(&mut server, &mut client, &mut random, now_ms, &mut fault, turn);
        check_flows(&client, &server);
        check_flows(&server, &client);
    }
    // Everything is let go and brought to its end.
    fault = Fault::None;
    for _ in 0..MOST_LAST_TURNS {
        now_ms += 1 + delay_ms;
        let mut moved = false;
        for side in [&mut client, &mut server] {
            side.poll();
            let n = side.held.len() as u64;
            side.release(n);
            for stream in std::mem::take(&mut side.live) {
                side.finish(stream);
                moved = true;
            }
            moved |= !side.session.output().is_empty() || !side.wire.is_empty() || n > 0;
            side.write(&mut random, now_ms, 0);
        }
        deliver(&mut client, &mut server, &mut random, now_ms, &mut fault, 0);
        deliver(&mut server, &mut client, &mut random, now_ms, &mut fault, 0);
        if !moved {
            break;
        }
    }
    client.poll();
    server.poll();
    let unhurt = planned == Fault::None;
    if unhurt {
        assert_eq!((&client.closed, &server.closed), (&None, &None));
        assert!(client.session.is_ready() && server.session.is_ready());
        let left = (client.session.stream_count(), server.session.stream_count());
        assert_eq!(left, (0, 0), "streams that never ended");
        assert_eq!((client.session.buffered_bytes(), server.session.buffered_bytes()), (0, 0));
        check_ends(&client, &server, drained);
        check_ends(&server, &client, drained);
        // All credit came back: new streams work.
        if !drained {
            let id = client.session.open(&Done {}, false).expect("open");
            assert_eq!(client.session.send_data(id, 1, &[1; 30_000]), Ok(30_000));
        }
    } else {
        // Whoever is still waiting finds out by silence.
        now_ms += DEAD_AFTER_MS;
        for side in [&mut client, &mut server] {
            side.session.handle_timeout(now_ms);
            side.poll();
            assert!(side.closed.is_some(), "{planned:?} went unnoticed");
        }
    }
    check_flows(&client, &server);
    check_flows(&server, &client);
    client.heard.values().chain(server.heard.values()).map(|f| f.bytes).sum()
}

#[test]
fn streams_stay_whole_over_a_hostile_transport() {
    if let Ok(seed) = std::env::var("WRENN_SEED") {
        run(seed.parse().expect("WRENN_SEED is a number"));
        return;
    }
    let runs = std::env::var("WRENN_SIMULATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(RUNS);
    let mut bytes = 0;
    for seed in 0..runs {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(n) => bytes += n,
            Err(panic) => {
                eprintln!("replay with: WRENN_SEED={seed} cargo test -p wrenn-wire --test simulation");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{runs} runs, {bytes} bytes came through");
    assert!(bytes > runs * 50_000, "the runs hardly moved anything: {bytes} bytes in {runs} runs");
}
