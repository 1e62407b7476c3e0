//! The sending side of a session: streams opened and ended, messages and data under credit, and the end
//! of it all.

use super::handshake::Phase;
use super::stream::{Pool, Queued, Stream, Want, charge};
use super::{
    DATA_OVERHEAD, Event, MAX_DATA, MAX_QUEUED, MAX_WINDOW, OUTPUT_HARD_LIMIT, OUTPUT_RESERVE,
    OUTPUT_SOFT_LIMIT, OpenError, SMALL_WRITE, SendError, Session, SessionError, StreamId,
};
use crate::codec::Field;
use crate::frame::{FRAME_CHARGE, FrameType, HEADER_LEN, Header, MAX_PAYLOAD};
use crate::message::{Code, Message};
use alloc::string::ToString;
use alloc::vec::Vec;

impl Session {
    /// Opens a stream with a message; `fin` ends this side's half with it.
    pub fn open<M: Message>(&mut self, message: &M, fin: bool) -> Result<StreamId, OpenError> {
        let mut payload = Vec::new();
        M::KIND.encode(&mut payload);
        message.encode(&mut payload);
        self.open_raw(payload, fin)
    }

    /// Opens a stream with a message that is already encoded (`u16` number, then body).
    pub fn open_raw(&mut self, payload: Vec<u8>, fin: bool) -> Result<StreamId, OpenError> {
        let Some(peer) = self.peer.as_ref().filter(|_| self.is_ready()) else {
            return Err(OpenError::NotReady);
        };
        if self.peer_draining || self.draining {
            return Err(OpenError::GoingAway);
        }
        if payload.len() > MAX_PAYLOAD {
            return Err(OpenError::TooLong);
        }
        if self.own_open >= peer.max_streams {
            return Err(OpenError::TooManyStreams);
        }
        let id = self.next_stream;
        self.next_stream = id.checked_add(2).ok_or(OpenError::Exhausted)?;
        let mut stream = Stream::new(peer.stream_window, self.limits.stream_window);
        stream.queued_bytes = payload.len();
        stream.finishing = fin;
        stream.queue.push_back(Queued { frame_type: FrameType::Open, payload, fin });
        self.streams.insert(id, stream);
        self.own_open += 1;
        self.queued.insert(id);
        self.unopened.insert(id);
        self.flush();
        Ok(id)
    }

    /// Sends a message. It waits inside the session for credit if it must, in order.
    pub fn send<M: Message>(&mut self, stream: StreamId, message: &M) -> Result<(), SendError> {
        self.queue_message(stream, message, false)
    }

    /// Sends a message and ends this side's half with it.
    pub fn send_last<M: Message>(&mut self, stream: StreamId, message: &M) -> Result<(), SendError> {
        self.queue_message(stream, message, true)
    }

    fn queue_message<M: Message>(
        &mut self,
        stream: StreamId,
        message: &M,
        fin: bool,
    ) -> Result<(), SendError> {
        let mut payload = Vec::new();
        M::KIND.encode(&mut payload);
        message.encode(&mut payload);
        self.send_raw(stream, payload, fin)
    }

    /// Sends a message that is already encoded (`u16` number, then body).
    pub fn send_raw(&mut self, stream: StreamId, payload: Vec<u8>, fin: bool) -> Result<(), SendError> {
        let s = self.streams.get_mut(&stream).filter(|s| !s.finishing).ok_or(SendError::NoStream)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(SendError::TooLong);
        }
        if s.queued_bytes + payload.len() > MAX_QUEUED {
            return Err(SendError::QueueFull);
        }
        s.queued_bytes += payload.len();
        s.finishing = fin;
        s.queue.push_back(Queued { frame_type: FrameType::Message, payload, fin });
        self.queued.insert(stream);
        self.flush();
        Ok(())
    }

    /// Sends bytes on a channel: as many as credit and room allow, which is the number returned. When
    /// that is less than all, [`Event::Writable`] tells when to go on.
    pub fn send_data(&mut self, stream: StreamId, channel: u8, bytes: &[u8]) -> Result<usize, SendError> {
        let limit =
            if bytes.len() <= SMALL_WRITE { OUTPUT_SOFT_LIMIT + OUTPUT_RESERVE } else { OUTPUT_SOFT_LIMIT };
        let mut taken = 0;
        while taken < bytes.len() {
            let room = limit.saturating_sub(self.pending_output());
            let pool = self.send_pool();
            let s = self.streams.get_mut(&stream).filter(|s| !s.finishing).ok_or(SendError::NoStream)?;
            // Credit is at most MAX_WINDOW, so it fits.
            let credit = s.allowance(pool).saturating_sub(DATA_OVERHEAD) as usize;
            let n = (bytes.len() - taken).min(MAX_DATA).min(room).min(credit);
            if n == 0 || !s.queue.is_empty() {
                if s.send_credit <= DATA_OVERHEAD || !s.queue.is_empty() {
                    s.want = Want::Credit;
                } else {
                    self.line_up(stream);
                }
                break;
            }
            let cost = n as u64 + DATA_OVERHEAD;
            s.send_credit -= cost;
            self.send_credit -= cost;
            self.write_frame(FrameType::Data, stream, false, &[&[channel], &bytes[taken..taken + n]]);
            taken += n;
        }
        Ok(taken)
    }

    /// Ends this side's half, after everything sent before.
    pub fn finish(&mut self, stream: StreamId) -> Result<(), SendError> {
        let s = self.streams.get_mut(&stream).filter(|s| !s.finishing).ok_or(SendError::NoStream)?;
        s.finishing = true;
        match s.queue.back_mut() {
            Some(last) => last.fin = true,
            None => {
                s.fin_sent = true;
                self.write_frame(FrameType::Data, stream, true, &[]);
                self.forget_if_done(stream);
            }
        }
        Ok(())
    }

    /// Ends a stream at once, both halves. Events of it that were not polled yet are dropped. Does
    /// nothing when the stream has ended already.
    pub fn reset(&mut self, stream: StreamId, code: Code, reason: &str) {
        let Some(s) = self.streams.get(&stream) else { return };
        if !s.is_unopened() {
            let payload = crate::frame::encode_reset(code as u16, reason);
            self.write_frame(FrameType::Reset, stream, false, &[&payload]);
        }
        self.forget(stream);
        let mut returned = 0;
        self.events.retain(|event| match event {
            Event::Message { stream: id, cost, .. } | Event::Data { stream: id, cost, .. }
                if *id == stream =>
            {
                returned += cost;
                false
            }
            Event::Opened { stream: id, body, .. } if *id == stream => {
                returned += body.len() as u32 + 2 + FRAME_CHARGE;
                false
            }
            Event::Finished { stream: id } if *id == stream => false,
            _ => true,
        });
        self.release(0, returned);
        // Its OPEN may have held back those of others.
        self.flush();
    }

    /// Gives back the credit of an event that is dealt with. `stream` may have ended meanwhile; 0 gives
    /// back the connection's credit only.
    pub fn release(&mut self, stream: StreamId, cost: u32) {
        if self.is_closed() {
            return;
        }
        self.unreturned += u64::from(cost);
        let window = self.limits.connection_window;
        let pool = Pool { left: self.recv_left, window: u64::from(window) };
        if pool.is_due(self.unreturned, window) {
            let amount = core::mem::take(&mut self.unreturned);
            self.recv_left += amount;
            self.write_credit(0, amount);
        }
        let Some(s) = self.streams.get_mut(&stream).filter(|s| !s.fin_received) else { return };
        s.unreturned += u64::from(cost);
        if pool.is_due(s.unreturned, self.limits.stream_window) {
            let amount = core::mem::take(&mut s.unreturned);
            s.recv_left += amount;
            self.write_credit(stream, amount);
        }
    }

    /// Gives back whatever is owed. The connection's credit has just become scarce for the peer, which from
    /// here on lets a stream hold little: what a stream was owed before could hold back its last message
    /// for ever, if nothing more of it is dealt with.
    pub(super) fn return_all(&mut self) {
        let owed: Vec<(StreamId, u64)> = self
            .streams
            .iter_mut()
            .filter(|(_, s)| s.unreturned > 0 && !s.fin_received)
            .map(|(id, s)| {
                s.recv_left += s.unreturned;
                (*id, core::mem::take(&mut s.unreturned))
            })
            .collect();
        for (stream, amount) in owed {
            self.write_credit(stream, amount);
        }
        if self.unreturned > 0 {
            let amount = core::mem::take(&mut self.unreturned);
            self.recv_left += amount;
            self.write_credit(0, amount);
        }
    }

    pub(super) fn write_credit(&mut self, stream: StreamId, amount: u64) {
        // A window is at most MAX_WINDOW, and no more than a window is ever given back at once.
        let amount = u32::try_from(amount).unwrap_or(MAX_WINDOW);
        self.write_frame(FrameType::Credit, stream, false, &[&amount.to_be_bytes()]);
    }

    /// Takes no new streams from the peer and opens none; those open go on.
    pub fn drain(&mut self, reason: &str) {
        if self.is_ready() && !self.draining {
            self.draining = true;
            self.write_go_away(Code::ShuttingDown, reason);
        }
    }

    /// Ends the session from this side.
    pub fn close(&mut self) {
        self.fail(SessionError::Local);
    }

    /// Ends the session and tells the peer why: a server that has no room, or a client that has failed too
    /// often.
    pub fn refuse(&mut self, code: Code, reason: &str) {
        if !self.is_closed() {
            self.write_go_away(code, reason);
            self.end(SessionError::Local);
        }
    }

    pub(super) fn write_go_away(&mut self, code: Code, reason: &str) {
        let mut payload = Vec::new();
        self.last_peer_stream.encode(&mut payload);
        payload.extend_from_slice(&crate::frame::encode_reset(code as u16, reason));
        self.write_frame(FrameType::GoAway, 0, false, &[&payload]);
    }

    /// Ends the session and tells the peer why.
    pub(super) fn fail(&mut self, error: SessionError) {
        if self.is_closed() {
            return;
        }
        if error != SessionError::NotWrenn {
            self.write_go_away(error.code(), &error.to_string());
        }
        self.end(error);
    }

    /// Ends the session without a word.
    pub(super) fn end(&mut self, error: SessionError) {
        if self.is_closed() {
            return;
        }
        self.phase = Phase::Closed;
        self.streams.clear();
        self.queued.clear();
        self.unopened.clear();
        self.line.clear();
        self.input = Vec::new();
        self.client_secret = None;
        self.events.push_back(Event::Closed { error });
    }

    /// Sends what waits, as far as credit and room allow: one message of each stream after the other,
    /// beginning after the stream that was served last. Streams are opened in the order of their
    /// numbers, so the first `OPEN` that has to wait holds back those after it.
    pub(super) fn flush(&mut self) {
        while !self.queued.is_empty() {
            let turns: Vec<StreamId> =
                self.queued.range(self.served..).chain(self.queued.range(..self.served)).copied().collect();
            let mut moved = false;
            for id in turns {
                if self.pending_output() >= OUTPUT_SOFT_LIMIT + OUTPUT_RESERVE {
                    return;
                }
                if self.flush_one(id) {
                    moved = true;
                    self.served = id.saturating_add(1);
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Sends the first message that waits on a stream, if it may go now.
    fn flush_one(&mut self, id: StreamId) -> bool {
        let next_open = self.unopened.first().copied();
        let pool = self.send_pool();
        let Some(s) = self.streams.get_mut(&id) else { return false };
        let Some(front) = s.queue.front() else { return false };
        let is_open = front.frame_type == FrameType::Open;
        let cost = charge(front.payload.len(), front.frame_type);
        if is_open && next_open != Some(id) {
            return false;
        }
        let allowed = if is_open { cost <= pool.left } else { s.allows_message(cost, pool) };
        if !allowed {
            return false;
        }
        let Some(item) = s.queue.pop_front() else { return false };
        s.queued_bytes -= item.payload.len();
        self.send_credit -= cost;
        if is_open {
            self.unopened.remove(&id);
            self.last_opened = id;
        } else {
            s.send_credit -= cost;
        }
        s.fin_sent |= item.fin;
        let is_empty = s.queue.is_empty();
        let goes_on = is_empty && s.want == Want::Credit && s.send_credit > DATA_OVERHEAD;
        self.write_frame(item.frame_type, id, item.fin, &[&item.payload]);
        if is_empty {
            self.queued.remove(&id);
            if goes_on {
                self.line_up(id);
            }
            self.forget_if_done(id);
        }
        true
    }

    pub(super) fn write_frame(
        &mut self,
        frame_type: FrameType,
        stream: StreamId,
        fin: bool,
        payload: &[&[u8]],
    ) {
        let length: usize = payload.iter().map(|p| p.len()).sum();
        assert!(length <= MAX_PAYLOAD, "a frame is made only of checked lengths");
        if self.pending_output() > OUTPUT_HARD_LIMIT {
            self.end(SessionError::PeerDoesNotRead);
            return;
        }
        let header = Header { length: length as u32, stream, frame_type, fin }.encode();
        self.output.reserve(HEADER_LEN + length + crate::frame::MAC_LEN);
        self.output.extend_from_slice(&header);
        for part in payload {
            self.output.extend_from_slice(part);
        }
        if let Some(mac) = &mut self.send_mac {
            let frame = &self.output[self.output.len() - HEADER_LEN - length..];
            let tag = mac.next(frame);
            self.output.extend_from_slice(&tag);
        }
    }
}
