//! WebSocket (RFC 6455), sans-I/O, server and client side. No extensions, no subprotocols.
//!
//! [`WebSocket::receive`] takes bytes, [`WebSocket::poll_message`] gives whole messages, `send_…` make
//! frames, [`WebSocket::output`] is what to write. Pings are answered by themselves.

mod sha1;

use crate::base64;
use std::collections::VecDeque;
use std::fmt;

/// The longest control frame payload (RFC 6455 section 5.5).
const MAX_CONTROL: usize = 125;
/// The longest frame header: 2 bytes, 8 of length, 4 of mask.
const MAX_HEADER: usize = 14;
/// Pongs that may wait for the peer to read; further pings are not answered until it does.
const MAX_PENDING_PONGS_BYTES: usize = 64 * 1024;
/// RFC 6455 section 1.3.
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Close codes of RFC 6455 section 7.4.1 that are used here.
pub mod close_code {
    /// The work is done.
    pub const NORMAL: u16 = 1000;
    /// The server shuts down.
    pub const GOING_AWAY: u16 = 1001;
    /// The peer broke the protocol.
    pub const PROTOCOL: u16 = 1002;
    /// A text message is not UTF-8.
    pub const BAD_DATA: u16 = 1007;
    /// The peer did what it may not.
    pub const POLICY: u16 = 1008;
    /// A message is too long.
    pub const TOO_BIG: u16 = 1009;
    /// The server failed.
    pub const INTERNAL: u16 = 1011;
}

/// The `Sec-WebSocket-Accept` value for a client's `Sec-WebSocket-Key`. `None` when the key is not 16
/// bytes of base64.
pub fn accept_value(key: &str) -> Option<String> {
    if base64::decode(key)?.len() != 16 {
        return None;
    }
    Some(base64::encode(&sha1::digest(format!("{key}{GUID}").as_bytes())))
}

/// Which side this is: a client masks its frames, a server does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Made the request.
    Client {
        /// Starts the masks' generator; random, so that a proxy cannot be fed chosen bytes.
        mask_seed: u64,
    },
    /// Answered it.
    Server,
}

/// A whole message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Text.
    Text(String),
    /// Bytes.
    Binary(Vec<u8>),
    /// The peer closes, with its code (1005 when it gave none) and reason. The last message.
    Close(u16, String),
}

/// Why a connection ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WebSocketError {
    /// A reserved bit or opcode, a frame masked the wrong way, or a malformed control frame.
    Protocol(&'static str),
    /// Text that is not UTF-8.
    NotUtf8,
    /// A message over the limit.
    TooBig,
}

impl WebSocketError {
    /// The close code that tells it to the peer.
    pub fn close_code(self) -> u16 {
        match self {
            WebSocketError::Protocol(_) => close_code::PROTOCOL,
            WebSocketError::NotUtf8 => close_code::BAD_DATA,
            WebSocketError::TooBig => close_code::TOO_BIG,
        }
    }
}

impl fmt::Display for WebSocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WebSocketError::Protocol(what) => write!(f, "WebSocket protocol error: {what}"),
            WebSocketError::NotUtf8 => f.write_str("a text message is not UTF-8"),
            WebSocketError::TooBig => f.write_str("a message is longer than allowed"),
        }
    }
}

impl std::error::Error for WebSocketError {}

const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

/// One side of an upgraded connection.
#[derive(Debug)]
pub struct WebSocket {
    role: Role,
    max_message: usize,
    mask_state: u64,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The opcode and bytes of a message whose last fragment has not come.
    partial: Option<(u8, Vec<u8>)>,
    messages: VecDeque<Message>,
    close_sent: bool,
    close_received: bool,
    failed: Option<WebSocketError>,
}

/// A frame header.
struct Header {
    fin: bool,
    opcode: u8,
    mask: Option<[u8; 4]>,
    len: usize,
    header_len: usize,
}

impl WebSocket {
    /// A side of a connection whose handshake is done. `max_message` bounds a whole message, in bytes.
    pub fn new(role: Role, max_message: usize) -> WebSocket {
        let mask_state = match role {
            Role::Client { mask_seed } => mask_seed | 1,
            Role::Server => 0,
        };
        WebSocket {
            role,
            max_message,
            mask_state,
            input: Vec::new(),
            output: Vec::new(),
            partial: None,
            messages: VecDeque::new(),
            close_sent: false,
            close_received: false,
            failed: None,
        }
    }

    /// Takes bytes from the transport. After an error a close frame is in the output and nothing more is
    /// read; write it and close the transport.
    ///
    /// # Errors
    /// What the peer did wrong; the same again for every later call.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), WebSocketError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.input.extend_from_slice(bytes);
        match self.parse() {
            Ok(()) => Ok(()),
            Err(error) => {
                self.failed = Some(error);
                self.input = Vec::new();
                self.partial = None;
                self.send_close(error.close_code(), &error.to_string());
                Err(error)
            }
        }
    }

    fn parse(&mut self) -> Result<(), WebSocketError> {
        let mut at = 0;
        while !self.close_received {
            let Some(header) = self.read_header(&self.input[at..])? else { break };
            let start = at + header.header_len;
            let Some(payload) = self.input.get(start..start + header.len) else { break };
            let mut payload = payload.to_vec();
            if let Some(mask) = header.mask {
                apply_mask(&mut payload, mask);
            }
            at = start + header.len;
            self.on_frame(&header, payload)?;
        }
        if self.close_received {
            self.input = Vec::new();
        } else {
            self.input.drain(..at);
        }
        Ok(())
    }

    /// Reads and checks a frame header; `None` when it is not all there.
    fn read_header(&self, bytes: &[u8]) -> Result<Option<Header>, WebSocketError> {
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err(WebSocketError::Protocol("a reserved bit is set"));
        }
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0f);
        let is_masked = second & 0x80 != 0;
        if is_masked != matches!(self.role, Role::Server) {
            return Err(WebSocketError::Protocol("clients mask their frames, servers do not"));
        }
        let short = u64::from(second & 0x7f);
        let (len, length_bytes) = match short {
            126 => match rest.first_chunk::<2>() {
                Some(b) => (u64::from(u16::from_be_bytes(*b)), 2),
                None => return Ok(None),
            },
            127 => match rest.first_chunk::<8>() {
                Some(b) => (u64::from_be_bytes(*b), 8),
                None => return Ok(None),
            },
            short => (short, 0),
        };
        if (length_bytes == 2 && len < 126) || (length_bytes == 8 && len <= 0xffff) {
            return Err(WebSocketError::Protocol("a length is not in its shortest form"));
        }
        match opcode {
            CONTINUATION | TEXT | BINARY => {
                let so_far = self.partial.as_ref().map_or(0, |p| p.1.len());
                if len > (self.max_message - so_far.min(self.max_message)) as u64 {
                    return Err(WebSocketError::TooBig);
                }
                if (opcode == CONTINUATION) != self.partial.is_some() {
                    return Err(WebSocketError::Protocol("fragments are out of order"));
                }
            }
            CLOSE | PING | PONG if fin && len <= MAX_CONTROL as u64 => {}
            CLOSE | PING | PONG => {
                return Err(WebSocketError::Protocol("a control frame is fragmented or too long"));
            }
            _ => return Err(WebSocketError::Protocol("an opcode is not defined")),
        }
        let mask_at = length_bytes;
        let mask = match (is_masked, rest.get(mask_at..)) {
            (false, _) => None,
            (true, Some(tail)) => match tail.first_chunk::<4>() {
                Some(mask) => Some(*mask),
                None => return Ok(None),
            },
            (true, None) => return Ok(None),
        };
        let header_len = 2 + length_bytes + if is_masked { 4 } else { 0 };
        debug_assert!(header_len <= MAX_HEADER);
        // Bounded by max_message, which is a usize, so the cast keeps the value.
        Ok(Some(Header { fin, opcode, mask, len: len as usize, header_len }))
    }

    fn on_frame(&mut self, header: &Header, payload: Vec<u8>) -> Result<(), WebSocketError> {
        match header.opcode {
            PING => {
                if self.output.len() < MAX_PENDING_PONGS_BYTES {
                    self.write_frame(PONG, &payload);
                }
                Ok(())
            }
            PONG => Ok(()),
            CLOSE => self.on_close(&payload),
            opcode => {
                let (kind, bytes) = match self.partial.take() {
                    Some((kind, mut bytes)) => {
                        bytes.extend_from_slice(&payload);
                        (kind, bytes)
                    }
                    None => (opcode, payload),
                };
                if !header.fin {
                    self.partial = Some((kind, bytes));
                    return Ok(());
                }
                let message = if kind == TEXT {
                    Message::Text(String::from_utf8(bytes).map_err(|_| WebSocketError::NotUtf8)?)
                } else {
                    Message::Binary(bytes)
                };
                self.messages.push_back(message);
                Ok(())
            }
        }
    }

    fn on_close(&mut self, payload: &[u8]) -> Result<(), WebSocketError> {
        let (code, reason) = match payload {
            [] => (1005, String::new()),
            [_] => return Err(WebSocketError::Protocol("a close code is cut short")),
            [high, low, reason @ ..] => {
                let code = u16::from_be_bytes([*high, *low]);
                // RFC 6455 section 7.4: these are never sent, those below 1000 are not used.
                if !(1000..5000).contains(&code) || [1004, 1005, 1006, 1015].contains(&code) {
                    return Err(WebSocketError::Protocol("a close code is not defined"));
                }
                (code, String::from_utf8(reason.to_vec()).map_err(|_| WebSocketError::NotUtf8)?)
            }
        };
        self.close_received = true;
        self.send_close(if code == 1005 { close_code::NORMAL } else { code }, "");
        self.messages.push_back(Message::Close(code, reason));
        Ok(())
    }

    /// The next whole message.
    pub fn poll_message(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    /// Bytes of received messages that were not polled yet.
    pub fn unpolled_bytes(&self) -> usize {
        self.messages
            .iter()
            .map(|m| match m {
                Message::Text(text) => text.len(),
                Message::Binary(bytes) => bytes.len(),
                Message::Close(..) => 0,
            })
            .sum()
    }

    /// Sends text. Nothing is sent after a close.
    pub fn send_text(&mut self, text: &str) {
        self.write_frame(TEXT, text.as_bytes());
    }

    /// Sends bytes. Nothing is sent after a close.
    pub fn send_binary(&mut self, bytes: &[u8]) {
        self.write_frame(BINARY, bytes);
    }

    /// Asks for a sign of life. At most 125 bytes are sent.
    pub fn send_ping(&mut self, bytes: &[u8]) {
        self.write_frame(PING, &bytes[..bytes.len().min(MAX_CONTROL)]);
    }

    /// Starts or completes the closing handshake. A reason over 123 bytes is cut at a character.
    pub fn send_close(&mut self, code: u16, reason: &str) {
        let mut end = reason.len().min(MAX_CONTROL - 2);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let mut payload = code.to_be_bytes().to_vec();
        payload.extend_from_slice(&reason.as_bytes()[..end]);
        self.write_frame(CLOSE, &payload);
        self.close_sent = true;
    }

    /// Whether both sides have closed, or the peer broke the protocol: once the output is written the
    /// transport is to be closed.
    pub fn is_finished(&self) -> bool {
        self.failed.is_some() || (self.close_sent && self.close_received)
    }

    /// Whether this side has closed: nothing more can be sent.
    pub fn is_closing(&self) -> bool {
        self.close_sent
    }

    /// What is to be written.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// `n` bytes of the output were written.
    pub fn consume_output(&mut self, n: usize) {
        assert!(n <= self.output.len(), "more consumed than there was");
        self.output.drain(..n);
    }

    fn write_frame(&mut self, opcode: u8, payload: &[u8]) {
        if self.close_sent {
            return;
        }
        self.output.reserve(MAX_HEADER + payload.len());
        self.output.push(0x80 | opcode);
        let mask_bit = if matches!(self.role, Role::Client { .. }) { 0x80 } else { 0 };
        match payload.len() {
            len @ 0..126 => self.output.push(mask_bit | len as u8),
            len @ 126..=0xffff => {
                self.output.push(mask_bit | 126);
                self.output.extend_from_slice(&(len as u16).to_be_bytes());
            }
            len => {
                self.output.push(mask_bit | 127);
                self.output.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
        if mask_bit == 0 {
            self.output.extend_from_slice(payload);
        } else {
            let mask = self.next_mask();
            self.output.extend_from_slice(&mask);
            let at = self.output.len();
            self.output.extend_from_slice(payload);
            apply_mask(&mut self.output[at..], mask);
        }
    }

    /// xorshift64 (Marsaglia): masks are there against confused proxies, not for secrecy.
    fn next_mask(&mut self) -> [u8; 4] {
        let mut x = self.mask_state;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.mask_state = x;
        ((x >> 32) as u32).to_be_bytes()
    }
}

fn apply_mask(bytes: &mut [u8], mask: [u8; 4]) {
    for (byte, mask) in bytes.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests;
