//! The receiving side of a session: from bytes to events.

use super::handshake::{self, Hello, MAX_HANDSHAKE_PAYLOAD, Phase, VERSION};
use super::mac::FrameMac;
use super::stream::{Stream, Want, charge};
use super::{Event, MAX_WINDOW, Session, SessionError, StreamId};
use crate::auth::{AuthError, MAX_AUTH_MESSAGE, ServerExchange, SessionKeys};
use crate::codec::{DecodeError, Field, Reader};
use crate::frame::{FrameType, HEADER_LEN, Header, MAC_LEN, MAX_PAYLOAD, PREAMBLE, decode_reset};
use crate::message::Code;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use sha2::{Digest, Sha256};

impl Session {
    /// Parses what is buffered.
    pub(super) fn parse_input(&mut self) {
        let mut input = core::mem::take(&mut self.input);
        let used = self.parse(&input);
        if !self.is_closed() {
            input.drain(..used);
            self.input = input;
        }
    }

    /// Gives the frame that is buffered in part what it lacks, and handles it. Returns the rest of the
    /// bytes, which need not be copied then.
    pub(super) fn complete_frame<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        while self.is_ready() && !self.input.is_empty() && !bytes.is_empty() {
            let whole = match self.input.first_chunk::<HEADER_LEN>() {
                Some([a, b, c, d, ..]) => {
                    // A length that is too long is refused with the header.
                    let length = (u32::from_be_bytes([*a, *b, *c, *d]) as usize).min(MAX_PAYLOAD);
                    HEADER_LEN + length + MAC_LEN
                }
                None => HEADER_LEN,
            };
            // At least one, for what the handshake has left unhandled.
            let lacks = whole.saturating_sub(self.input.len()).max(1);
            let (now, later) = bytes.split_at(lacks.min(bytes.len()));
            self.input.extend_from_slice(now);
            self.parse_input();
            bytes = later;
        }
        bytes
    }

    /// Handles every whole frame in `bytes` and returns how many bytes they took.
    pub(super) fn parse(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            match self.phase {
                Phase::Closed => return bytes.len(),
                // The exchange goes on when the application has answered.
                Phase::AwaitVerifier(_) => return at,
                Phase::AwaitPreamble => {
                    let have = &bytes[at..bytes.len().min(at + PREAMBLE.len())];
                    if !PREAMBLE.starts_with(have) {
                        self.fail(SessionError::NotWrenn);
                        return bytes.len();
                    }
                    if have.len() < PREAMBLE.len() {
                        return at;
                    }
                    at += PREAMBLE.len();
                    let mut hash = Sha256::new();
                    hash.update(PREAMBLE);
                    self.phase = Phase::AwaitHello(hash);
                }
                _ => match self.parse_frame(&bytes[at..]) {
                    Ok(0) => return at,
                    Ok(used) => at += used,
                    Err(error) => {
                        self.fail(error);
                        return bytes.len();
                    }
                },
            }
        }
    }

    /// Handles one frame and returns its length, or 0 when it is not all there.
    fn parse_frame(&mut self, bytes: &[u8]) -> Result<usize, SessionError> {
        let Some(head) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(0) };
        let header = Header::decode(head).map_err(SessionError::Header)?;
        let length = header.length as usize;
        if !self.is_ready() && length > MAX_HANDSHAKE_PAYLOAD {
            return Err(SessionError::Unexpected("long frame before the handshake is done"));
        }
        let tag_len = if self.recv_mac.is_some() { MAC_LEN } else { 0 };
        let Some(frame) = bytes.get(..HEADER_LEN + length) else { return Ok(0) };
        let Some(tag) = bytes.get(HEADER_LEN + length..HEADER_LEN + length + tag_len) else { return Ok(0) };
        if let Some(mac) = &mut self.recv_mac
            && !mac.verify_next(frame, tag)
        {
            return Err(SessionError::Integrity);
        }
        let payload = &frame[HEADER_LEN..];
        if self.is_ready() {
            self.on_frame(header, payload)?;
        } else {
            self.on_handshake_frame(header, payload)?;
        }
        Ok(HEADER_LEN + length + tag_len)
    }

    fn on_handshake_frame(&mut self, header: Header, payload: &[u8]) -> Result<(), SessionError> {
        if header.frame_type == FrameType::GoAway {
            return self.on_go_away(payload);
        }
        let phase = core::mem::replace(&mut self.phase, Phase::Closed);
        // Put back so that a failure below is told to the peer like any other.
        self.phase = Phase::AwaitPreamble;
        match (phase, header.frame_type) {
            (Phase::AwaitHello(hash), FrameType::Hello) => self.on_hello(hash, header, payload),
            (Phase::AwaitClientFirst(binding), FrameType::Auth) => {
                let exchange =
                    ServerExchange::start(auth_text(payload)?, binding).map_err(SessionError::Auth)?;
                let identity = exchange.identity().to_string();
                self.phase = Phase::AwaitVerifier(exchange);
                self.events.push_back(Event::Authenticate { identity });
                Ok(())
            }
            (Phase::AwaitProof(mut exchange), FrameType::Auth) => {
                let (last, keys) = exchange.finish(auth_text(payload)?).map_err(SessionError::Auth)?;
                self.identity = exchange.identity().to_string();
                self.write_frame(FrameType::Auth, 0, false, &[last.as_bytes()]);
                self.become_ready(&keys);
                Ok(())
            }
            (Phase::AwaitChallenge(mut exchange), FrameType::Auth) => {
                let answer = exchange.answer(auth_text(payload)?).map_err(SessionError::Auth)?;
                self.write_frame(FrameType::Auth, 0, false, &[answer.as_bytes()]);
                self.phase = Phase::AwaitServerFinal(exchange);
                Ok(())
            }
            (Phase::AwaitServerFinal(mut exchange), FrameType::Auth) => {
                let keys = exchange.finish(auth_text(payload)?).map_err(SessionError::Auth)?;
                self.become_ready(&keys);
                Ok(())
            }
            _ => Err(SessionError::Unexpected("frame in the handshake")),
        }
    }

    fn on_hello(&mut self, hash: Sha256, header: Header, payload: &[u8]) -> Result<(), SessionError> {
        let hello = Hello::decode(payload).map_err(SessionError::Payload)?;
        if !(hello.min_version..=hello.max_version).contains(&VERSION) {
            return Err(SessionError::NoCommonVersion);
        }
        self.send_credit = u64::from(hello.connection_window);
        if self.is_client {
            // A server names the one version it chose, and only features that were offered: none.
            if hello.min_version != hello.max_version || hello.features != 0 {
                return Err(SessionError::Unexpected("choice of version or features"));
            }
            self.peer = Some(hello);
            let binding = handshake::binding(hash, &[&header.encode(), payload]);
            self.start_exchange(binding);
        } else {
            self.peer = Some(hello);
            let mut hash = hash;
            hash.update(header.encode());
            hash.update(payload);
            let own = self.hello(VERSION, VERSION, 0).encode();
            let at = self.output.len();
            self.write_frame(FrameType::Hello, 0, false, &[&own]);
            let binding = handshake::binding(hash, &[&self.output[at..]]);
            self.phase = Phase::AwaitClientFirst(binding);
        }
        Ok(())
    }

    fn become_ready(&mut self, keys: &SessionKeys) {
        let (send, recv) = if self.is_client {
            (&keys.client_to_server, &keys.server_to_client)
        } else {
            (&keys.server_to_client, &keys.client_to_server)
        };
        self.send_mac = Some(FrameMac::new(send));
        self.recv_mac = Some(FrameMac::new(recv));
        self.phase = Phase::Open;
        let peer_name = self.peer.as_ref().map_or_else(String::new, |p| p.name.clone());
        self.events.push_back(Event::Ready { identity: self.identity.clone(), peer_name });
    }

    fn on_frame(&mut self, header: Header, payload: &[u8]) -> Result<(), SessionError> {
        match header.frame_type {
            FrameType::Open | FrameType::Message | FrameType::Data => self.on_stream_frame(header, payload),
            FrameType::Credit => self.on_credit(header.stream, payload),
            FrameType::Reset => self.on_reset(header.stream, payload),
            FrameType::Ping => {
                let token: [u8; 8] =
                    payload.try_into().map_err(|_| SessionError::Payload(DecodeError::UnexpectedEnd))?;
                self.write_frame(FrameType::Pong, 0, false, &[&token]);
                Ok(())
            }
            FrameType::Pong if payload.len() == 8 => Ok(()),
            FrameType::Pong => Err(SessionError::Payload(DecodeError::UnexpectedEnd)),
            FrameType::GoAway => self.on_go_away(payload),
            FrameType::Hello | FrameType::Auth => Err(SessionError::Unexpected("second handshake")),
        }
    }

    fn on_stream_frame(&mut self, header: Header, payload: &[u8]) -> Result<(), SessionError> {
        let id = header.stream;
        let cost = charge(payload.len(), header.frame_type);
        if payload.is_empty() && !(header.frame_type == FrameType::Data && header.fin) {
            return Err(SessionError::Unexpected("empty frame"));
        }
        let left = self.recv_left.checked_sub(cost).ok_or(SessionError::CreditExceeded)?;
        let half = u64::from(self.limits.connection_window) / 2;
        let was_plenty = core::mem::replace(&mut self.recv_left, left) >= half;
        if was_plenty && left < half {
            self.return_all();
        }
        // Bounded by MAX_PAYLOAD + FRAME_CHARGE.
        let cost = cost as u32;
        if header.frame_type == FrameType::Open {
            return self.on_open(header, payload, cost);
        }
        if !self.was_opened(id) {
            return Err(SessionError::Unexpected("frame on a stream that was never opened"));
        }
        let Some(s) = self.streams.get_mut(&id) else {
            // It was under way when this side reset the stream.
            self.release(0, cost);
            return Ok(());
        };
        if s.fin_received {
            return Err(SessionError::Unexpected("frame on a stream whose half has ended"));
        }
        s.recv_left = s.recv_left.checked_sub(u64::from(cost)).ok_or(SessionError::CreditExceeded)?;
        if header.frame_type == FrameType::Message {
            let (kind, body) = split_message(payload)?;
            self.events.push_back(Event::Message { stream: id, kind, body, cost });
        } else if let Some((channel, bytes)) = payload.split_first() {
            if bytes.is_empty() {
                return Err(SessionError::Unexpected("empty frame"));
            }
            let (channel, bytes) = (*channel, bytes.to_vec());
            self.events.push_back(Event::Data { stream: id, channel, bytes, cost });
        }
        self.on_fin(header);
        Ok(())
    }

    fn on_fin(&mut self, header: Header) {
        if let Some(s) = self.streams.get_mut(&header.stream).filter(|_| header.fin) {
            s.fin_received = true;
            self.events.push_back(Event::Finished { stream: header.stream });
            self.forget_if_done(header.stream);
        }
    }

    fn on_open(&mut self, header: Header, payload: &[u8], cost: u32) -> Result<(), SessionError> {
        let id = header.stream;
        if self.is_own(id) || id <= self.last_peer_stream {
            return Err(SessionError::Unexpected("stream number"));
        }
        let (kind, body) = split_message(payload)?;
        self.last_peer_stream = id;
        if self.peer_open >= self.limits.max_streams {
            return Err(SessionError::TooManyStreams);
        }
        if self.draining {
            self.release(0, cost);
            let payload =
                crate::frame::encode_reset(Code::ShuttingDown as u16, "shutting down: try elsewhere");
            self.write_frame(FrameType::Reset, id, false, &[&payload]);
            return Ok(());
        }
        let send_window = self.peer.as_ref().map_or(0, |p| p.stream_window);
        self.streams.insert(id, Stream::new(send_window, self.limits.stream_window));
        self.peer_open += 1;
        self.events.push_back(Event::Opened { stream: id, kind, body });
        self.on_fin(header);
        Ok(())
    }

    fn on_credit(&mut self, id: StreamId, payload: &[u8]) -> Result<(), SessionError> {
        let amount: [u8; 4] =
            payload.try_into().map_err(|_| SessionError::Payload(DecodeError::UnexpectedEnd))?;
        let amount = u64::from(u32::from_be_bytes(amount));
        if id != 0 && !self.was_opened(id) {
            return Err(SessionError::Unexpected("credit for a stream that was never opened"));
        }
        let total = if id == 0 {
            self.send_credit += amount;
            self.send_credit
        } else if let Some(s) = self.streams.get_mut(&id) {
            s.send_credit += amount;
            let total = s.send_credit;
            if s.want == Want::Credit && s.queue.is_empty() && total > super::DATA_OVERHEAD {
                self.line_up(id);
            }
            total
        } else {
            // It crossed the end of the stream.
            0
        };
        if amount == 0 || total > u64::from(MAX_WINDOW) {
            return Err(SessionError::Unexpected("amount of credit"));
        }
        self.flush();
        Ok(())
    }

    fn on_reset(&mut self, id: StreamId, payload: &[u8]) -> Result<(), SessionError> {
        let (code, reason) = decode_reset(payload).map_err(SessionError::Payload)?;
        if !self.was_opened(id) {
            return Err(SessionError::Unexpected("reset of a stream that was never opened"));
        }
        if self.streams.contains_key(&id) {
            self.forget(id);
            self.events.push_back(Event::Reset { stream: id, code, reason });
            self.flush();
        }
        Ok(())
    }

    fn on_go_away(&mut self, payload: &[u8]) -> Result<(), SessionError> {
        let mut r = Reader::new(payload);
        let last = u32::decode(&mut r).map_err(SessionError::Payload)?;
        let (code, reason) = decode_reset(r.take_rest()).map_err(SessionError::Payload)?;
        if !self.is_ready() || Code::from_number(code) != Code::ShuttingDown {
            self.end(SessionError::ByPeer(code, reason));
            return Ok(());
        }
        self.peer_draining = true;
        let refused: Vec<StreamId> =
            self.streams.keys().copied().filter(|id| self.is_own(*id) && *id > last).collect();
        for stream in refused {
            self.forget(stream);
            self.events.push_back(Event::Reset { stream, code, reason: reason.clone() });
        }
        self.events.push_back(Event::GoingAway { code, reason });
        Ok(())
    }
}

fn auth_text(payload: &[u8]) -> Result<&str, SessionError> {
    if payload.len() > MAX_AUTH_MESSAGE {
        return Err(SessionError::Auth(AuthError::Malformed));
    }
    core::str::from_utf8(payload).map_err(|_| SessionError::Auth(AuthError::Malformed))
}

fn split_message(payload: &[u8]) -> Result<(u16, Vec<u8>), SessionError> {
    const { assert!(MAX_PAYLOAD > 2) };
    match payload.split_first_chunk::<2>() {
        Some((kind, body)) => Ok((u16::from_be_bytes(*kind), body.to_vec())),
        None => Err(SessionError::Payload(DecodeError::UnexpectedEnd)),
    }
}
