//! A connection's writing, its deadlines and its end.

use super::{Client, State};
use crate::http::handler::Response;
use crate::http::limits::{
    BODY_GRACE_MS, HEAD_TIMEOUT_MS, IDLE_TIMEOUT_MS, LINGER_MS, MIN_BODY_RATE, OUTPUT_HIGH_WATER,
    UPLOAD_STALL_MS, WEBSOCKET_DEAD_MS, WEBSOCKET_PING_MS, WRITE_STALL_MS,
};
use wire::reactor::Transfer;
use wire::websocket::close_code;

impl Client {
    /// Writes what waits, as far as it goes. Returns whether any went.
    pub fn flush(&mut self, now_ms: u64) -> bool {
        let mut wrote = false;
        while self.socket.is_writable() && !self.is_broken {
            let from_buffer = self.sent < self.output.len();
            let bytes: &[u8] = match &self.state {
                _ if from_buffer => &self.output[self.sent..],
                State::WebSocket(ws) => ws.output(),
                State::Wire(wire) => wire.session.output(),
                _ => &[],
            };
            if bytes.is_empty() {
                break;
            }
            match self.socket.write(bytes) {
                Transfer::Done(n) => {
                    wrote = true;
                    self.wrote_ms = now_ms;
                    match &mut self.state {
                        _ if from_buffer => self.sent += n,
                        State::WebSocket(ws) => ws.consume_output(n),
                        State::Wire(wire) => wire.session.consume_output(n),
                        _ => {}
                    }
                    if self.sent == self.output.len() {
                        self.output = Vec::new();
                        self.output_share = None;
                        self.sent = 0;
                    }
                }
                Transfer::Blocked => break,
                Transfer::Ended | Transfer::Broken(_) => self.is_broken = true,
            }
        }
        if matches!(self.state, State::Closing { .. }) && self.pending_output() == 0 && !self.is_broken {
            // The client sees the end of the response; what it still sends is read and dropped.
            if self.socket.stream.shutdown(std::net::Shutdown::Write).is_err() {
                self.is_broken = true;
            }
        }
        wrote
    }

    /// When [`Client::on_deadline`] is due.
    pub fn deadline_ms(&self) -> Option<u64> {
        let state = match &self.state {
            State::First => Some(self.since_ms + HEAD_TIMEOUT_MS),
            State::Head if self.is_idle() && self.served > 0 => Some(self.since_ms + IDLE_TIMEOUT_MS),
            // Nothing is read until the client has read more.
            State::Head if self.pending_output() >= OUTPUT_HIGH_WATER => None,
            State::Head => Some(self.since_ms + HEAD_TIMEOUT_MS),
            State::Body(_) => Some(self.since_ms + BODY_GRACE_MS + self.body_bytes / MIN_BODY_RATE),
            State::Stream { wanted: true, .. } => Some(self.since_ms + UPLOAD_STALL_MS),
            // Whoever has its task watches it.
            State::Stream { .. } | State::Busy | State::Tunnel { .. } => None,
            State::WebSocket(ws) if ws.is_closing() => Some(self.wrote_ms + LINGER_MS),
            State::WebSocket(_) if self.pinged => Some(self.heard_ms + WEBSOCKET_DEAD_MS),
            State::WebSocket(_) => Some(self.heard_ms + WEBSOCKET_PING_MS),
            State::Wire(wire) => wire.next_timeout_ms(),
            State::Closing { .. } if self.pending_output() > 0 => None,
            State::Closing { .. } => Some(self.wrote_ms.max(self.since_ms) + LINGER_MS),
        };
        let write = (self.pending_output() > 0).then_some(self.wrote_ms + WRITE_STALL_MS);
        match (state, write) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Does what is due at `now_ms`.
    pub fn on_deadline(&mut self, now_ms: u64) {
        if self.deadline_ms().is_none_or(|at| at > now_ms) {
            return;
        }
        if self.pending_output() > 0 && now_ms >= self.wrote_ms + WRITE_STALL_MS {
            self.is_broken = true;
            return;
        }
        match &mut self.state {
            State::Head if !self.parser.is_idle() => self.time_out(now_ms),
            State::Body(_) | State::Stream { .. } => self.time_out(now_ms),
            State::First | State::Head | State::Closing { .. } => self.is_broken = true,
            State::WebSocket(ws) => {
                if ws.is_closing() || now_ms >= self.heard_ms + WEBSOCKET_DEAD_MS {
                    self.is_broken = true;
                } else {
                    ws.send_ping(b"");
                    self.pinged = true;
                }
            }
            State::Wire(wire) => wire.session.handle_timeout(now_ms),
            State::Busy | State::Tunnel { .. } => {}
        }
    }

    fn time_out(&mut self, now_ms: u64) {
        let response = Response::error(408, "invalid_request", "the request took too long to arrive");
        self.respond_and_close(&response, now_ms);
    }

    /// The program ends: an idle connection is closed, others end with their response.
    pub fn drain(&mut self) {
        self.keep_alive = false;
        let is_idle = self.is_idle();
        match &mut self.state {
            State::WebSocket(ws) => {
                ws.send_close(close_code::GOING_AWAY, "the control plane is being shut down")
            }
            State::Wire(wire) if wire.session.is_ready() => {
                wire.session.drain("the control plane is being shut down");
            }
            State::Wire(wire) => wire.session.close(),
            _ if is_idle => self.is_broken = true,
            _ => {}
        }
    }
}
