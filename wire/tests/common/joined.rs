//! Two sessions joined in memory, with what each sent kept, and one bit changed on the way where asked.
#![allow(dead_code)] // Each test program uses its own part.

use wire::auth::{ITERATIONS, NONCE_LEN, Verifier};
use wire::frame::{HEADER_LEN, Header, MAC_LEN, PREAMBLE};
use wire::session::{Event, Limits, Session};

pub const SECRET: &[u8] = b"0123456789abcdef";

pub struct Joined {
    pub client: Session,
    pub server: Session,
    pub client_events: Vec<Event>,
    pub server_events: Vec<Event>,
    pub client_sent: Vec<u8>,
    pub server_sent: Vec<u8>,
    /// Towards the server or not, the byte of all sent that way, the bit.
    pub flip: Option<(bool, usize, u8)>,
    /// Whether the server knows the identity.
    pub knows: bool,
    /// Whether the server's application answers at all.
    pub answers: bool,
}

impl Joined {
    pub fn new(secret: &[u8], nonce: u8) -> Joined {
        Joined {
            client: Session::client("agent", secret, "test/1", [nonce; NONCE_LEN], Limits::default(), 0),
            server: Session::server("test/2", [nonce ^ 0x80; NONCE_LEN], Limits::default(), 0),
            client_events: Vec::new(),
            server_events: Vec::new(),
            client_sent: Vec::new(),
            server_sent: Vec::new(),
            flip: None,
            knows: true,
            answers: true,
        }
    }

    /// Takes both sides' events.
    pub fn poll(&mut self) {
        while let Some(event) = self.client.poll_event() {
            self.client_events.push(event);
        }
        while let Some(event) = self.server.poll_event() {
            if matches!(event, Event::Authenticate { .. }) && self.answers {
                let verifier = self.knows.then(|| Verifier::new(SECRET, &[3; 16], ITERATIONS));
                self.server.provide_verifier(verifier, b"decoy");
            }
            self.server_events.push(event);
        }
    }

    /// Moves bytes until nothing moves any more.
    pub fn run(&mut self) {
        for _ in 0..1000 {
            let mut moved = false;
            for to_server in [true, false] {
                let (from, to, sent) = match to_server {
                    true => (&mut self.client, &mut self.server, &mut self.client_sent),
                    false => (&mut self.server, &mut self.client, &mut self.server_sent),
                };
                let mut bytes = from.output().to_vec();
                from.consume_output(bytes.len());
                let start = sent.len();
                sent.extend_from_slice(&bytes);
                if let Some((way, byte, bit)) = self.flip
                    && way == to_server
                    && (start..start + bytes.len()).contains(&byte)
                {
                    bytes[byte - start] ^= 1 << bit;
                }
                moved |= !bytes.is_empty();
                to.receive(&bytes, 0);
                self.poll();
            }
            if !moved {
                return;
            }
        }
        panic!("the two never come to rest");
    }
}

/// What a side sent, as its preamble (if it is the client) and frames. MACs begin after its handshake:
/// the client's has three frames, the server's as well.
pub fn frames(sent: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut rest = sent;
    if let Some(after) = rest.strip_prefix(&PREAMBLE) {
        all.push(PREAMBLE.to_vec());
        rest = after;
    }
    let mut count = 0;
    while let Some(head) = rest.first_chunk::<HEADER_LEN>() {
        let header = Header::decode(head).expect("a frame of the session's own");
        count += 1;
        let mac = if count > 3 { MAC_LEN } else { 0 };
        let (frame, after) = rest.split_at(HEADER_LEN + header.length as usize + mac);
        all.push(frame.to_vec());
        rest = after;
    }
    all
}
