//! What a connection answers: whole responses, streamed ones, the upgrade to a WebSocket.

use super::{Client, State, overloaded};
use crate::http::date;
use crate::http::handler::Response;
use crate::http::limits::{LINGER_BYTES, MAX_WEBSOCKET_MESSAGE, OUTPUT_HIGH_WATER};
use std::time::{SystemTime, UNIX_EPOCH};
use wire::http1::{Framing, HttpError, ResponseWriter};
use wire::websocket::{Role, WebSocket, accept_value, close_code};

impl Client {
    pub(super) fn refuse(&mut self, error: HttpError, now_ms: u64) {
        let code = if error.status() == 413 { "payload_too_large" } else { "invalid_request" };
        self.is_head_request = false;
        self.respond_and_close(&Response::error(error.status(), code, &error.to_string()), now_ms);
    }

    pub(super) fn respond_and_close(&mut self, response: &Response, now_ms: u64) {
        self.keep_alive = false;
        self.respond(response, now_ms);
    }

    /// Ends the connection after the present request.
    pub fn close_after_response(&mut self) {
        self.keep_alive = false;
    }

    /// Answers the request. On a WebSocket an error is told by a message and a close.
    pub fn respond(&mut self, response: &Response, now_ms: u64) {
        if let State::WebSocket(ws) = &mut self.state {
            close_websocket(ws, response);
            self.wrote_ms = now_ms;
            return;
        }
        if self.writer.is_some() {
            // A streamed response is under way: all that can be told is that it is not complete.
            self.is_broken = true;
            return;
        }
        if response.body.len() > OUTPUT_HIGH_WATER {
            let share = self.output_share.get_or_insert_with(|| self.bodies.share());
            if !share.grow(response.body.len()) {
                return self.respond(&overloaded(), now_ms);
            }
        }
        let has_body = !matches!(response.status, 100..200 | 204 | 304);
        let framing = if has_body { Framing::Length(response.body.len() as u64) } else { Framing::None };
        self.start_response(response, framing, now_ms)
            .body(&mut self.output, if has_body { &response.body } else { &[] });
        self.response_done(now_ms);
    }

    /// Writes a response's head. Unless the whole request was read the connection ends with it.
    fn start_response(&mut self, response: &Response, framing: Framing, now_ms: u64) -> ResponseWriter {
        if !matches!(self.state, State::Busy) || self.input_ended {
            self.keep_alive = false;
        }
        if self.pending_output() == 0 {
            self.wrote_ms = now_ms;
        }
        self.note(response.status, now_ms);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let date = date::format(now);
        let headers = response.headers.iter().filter(|h| !h.1.bytes().any(|b| b.is_ascii_control()));
        let headers = headers.map(|h| (h.0, h.1.as_str())).chain([("date", date.as_str())]);
        ResponseWriter::start(
            &mut self.output,
            response.status,
            headers,
            framing,
            self.keep_alive,
            self.is_head_request,
        )
    }

    /// A response's status is known.
    fn note(&self, status: u16, now_ms: u64) {
        let elapsed_ms = now_ms.saturating_sub(self.asked_ms);
        log::debug!("{} {}: {status} after {elapsed_ms} ms", self.peer, self.label);
    }

    /// Begins the response of a service in a capsule. Its body follows in pieces, framed as it was unless
    /// the client's version has no such framing.
    pub fn start_proxied(
        &mut self,
        status: u16,
        headers: &[(String, String)],
        framing: Framing,
        now_ms: u64,
    ) {
        let framing = match framing {
            Framing::Chunked | Framing::UntilClose if self.minor_version == 0 => Framing::UntilClose,
            Framing::UntilClose => Framing::Chunked,
            framing => framing,
        };
        if !matches!(self.state, State::Busy) || self.input_ended || framing == Framing::UntilClose {
            self.keep_alive = false;
        }
        if self.pending_output() == 0 {
            self.wrote_ms = now_ms;
        }
        self.note(status, now_ms);
        let headers = headers.iter().map(|h| (h.0.as_str(), h.1.as_str()));
        self.writer = Some(ResponseWriter::start(
            &mut self.output,
            status,
            headers,
            framing,
            self.keep_alive,
            self.is_head_request,
        ));
    }

    /// A service in a capsule has switched to the WebSocket protocol, which is not looked into.
    pub fn start_tunnel(&mut self, headers: &[(String, String)], now_ms: u64) {
        self.note(101, now_ms);
        let own = [("upgrade", "websocket"), ("connection", "Upgrade")];
        let headers = headers.iter().map(|h| (h.0.as_str(), h.1.as_str())).chain(own);
        ResponseWriter::start(&mut self.output, 101, headers, Framing::None, true, false);
        self.wrote_ms = now_ms;
        self.state = State::Tunnel { wanted: true };
    }

    /// Bytes for a tunnel's client.
    pub fn tunnel_bytes(&mut self, bytes: &[u8], now_ms: u64) {
        if self.pending_output() == 0 {
            self.wrote_ms = now_ms;
        }
        if self.is_tunnel() {
            self.output.extend_from_slice(bytes);
        }
    }

    /// A tunnel is over: the client gets what is there, then the connection ends.
    pub fn end_tunnel(&mut self, now_ms: u64) {
        if self.is_tunnel() {
            self.keep_alive = false;
            self.response_done(now_ms);
        }
    }

    fn response_done(&mut self, now_ms: u64) {
        self.task = None;
        self.since_ms = now_ms;
        self.websocket_key = None;
        self.state = if self.keep_alive { State::Head } else { State::Closing { left: LINGER_BYTES } };
    }

    /// Begins a response whose body follows in pieces.
    pub fn start_stream(&mut self, response: &Response, now_ms: u64) {
        let framing = if self.minor_version >= 1 { Framing::Chunked } else { Framing::UntilClose };
        if framing == Framing::UntilClose {
            self.keep_alive = false;
        }
        self.writer = Some(self.start_response(response, framing, now_ms));
    }

    /// A piece of a streamed response's body.
    pub fn stream_body(&mut self, bytes: &[u8], now_ms: u64) {
        if self.pending_output() == 0 {
            self.wrote_ms = now_ms;
        }
        if let Some(writer) = &self.writer {
            writer.body(&mut self.output, bytes);
        }
    }

    /// A streamed response is complete.
    pub fn end_stream(&mut self, now_ms: u64) {
        if let Some(writer) = self.writer.take() {
            writer.end(&mut self.output);
            self.response_done(now_ms);
        }
    }

    /// A response that was begun cannot be completed: the client learns it by the connection's end.
    pub fn cut_off(&mut self) {
        if self.writer.is_some() || matches!(self.state, State::Busy | State::Stream { .. }) {
            self.is_broken = true;
        }
    }

    /// Upgrades to a WebSocket.
    ///
    /// # Errors
    /// The response for a request that does not ask for it.
    pub fn upgrade(&mut self, now_ms: u64) -> Result<(), Response> {
        if self.is_websocket() {
            return Ok(());
        }
        let Some(accept) = self.websocket_key.take().and_then(|key| accept_value(&key)) else {
            return Err(Response::error(
                426,
                "invalid_request",
                "this is a WebSocket: connect with Upgrade: websocket, Sec-WebSocket-Version: 13 and a key",
            )
            .with_header("upgrade", "websocket")
            .with_header("sec-websocket-version", "13"));
        };
        let headers =
            [("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", accept.as_str())];
        ResponseWriter::start(&mut self.output, 101, headers, Framing::None, true, false);
        self.state = State::WebSocket(Box::new(WebSocket::new(Role::Server, MAX_WEBSOCKET_MESSAGE)));
        self.heard_ms = now_ms;
        self.wrote_ms = now_ms;
        Ok(())
    }

    /// The WebSocket, if it is one.
    pub fn websocket(&mut self) -> Option<&mut WebSocket> {
        match &mut self.state {
            State::WebSocket(ws) => Some(ws),
            _ => None,
        }
    }
}

/// Ends a WebSocket with what a response says.
fn close_websocket(ws: &mut WebSocket, response: &Response) {
    if response.status < 400 {
        ws.send_close(close_code::NORMAL, "");
        return;
    }
    let message = response.error_message().unwrap_or_else(|| "the request failed".to_string());
    let event = serde_json::json!({"type": "error", "data": message, "fatal": true});
    ws.send_text(&event.to_string());
    let code = if response.status < 500 { close_code::POLICY } else { close_code::INTERNAL };
    ws.send_close(code, &message);
}
