//! One request to a service and its response, sans-I/O.
//!
//! The shell says what came from either side and carries out the [`Action`]s. It holds either side back
//! while the other does not keep up: nothing gathers here.

use super::head::{ClientRequest, response_fields};
use crate::hosts::error::HostError;
use crate::http::handler::Response;
use std::io::Write;
use wire::http1::{Framing, Limits, ResponseEvent, ResponseParser};
use wire::message::Code;

/// What an exchange wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Bytes to the service.
    Send(Vec<u8>),
    /// Ends our half of the connection to the service.
    Finish,
    /// The request's body may come now.
    WantBody,
    /// The response's head.
    Head {
        /// The status.
        status: u16,
        /// Its fields, without framing and connection.
        headers: Vec<(String, String)>,
        /// How its body is delimited.
        framing: Framing,
    },
    /// Bytes of the response's body.
    Body(Vec<u8>),
    /// The response is complete.
    End,
    /// The service has switched protocols: from now on bytes go both ways as they are.
    Tunnel {
        /// The fields of its answer, without connection and upgrade.
        headers: Vec<(String, String)>,
    },
    /// Bytes to the client through the tunnel.
    TunnelBytes(Vec<u8>),
    /// The service has ended the tunnel.
    TunnelEnd,
    /// There is no response: this one instead.
    Refuse(Response),
    /// The response that was begun cannot be completed.
    CutOff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The port is being connected to.
    Connecting,
    /// The response has not begun.
    Waiting,
    /// It has.
    Responding,
    /// Protocols were switched.
    Tunnel,
    Over,
}

/// The exchange.
#[derive(Debug)]
pub struct Exchange {
    state: State,
    port: u16,
    /// The head for the service, until it is sent.
    head: Vec<u8>,
    framing: Framing,
    is_websocket: bool,
    is_head_request: bool,
    parser: ResponseParser,
}

fn gateway(status: u16, code: &str, message: &str) -> Action {
    Action::Refuse(Response::error(status, code, message))
}

impl Exchange {
    /// An exchange that waits for its connection. `authorization` as in [`ClientRequest::encode`].
    pub fn new(request: &ClientRequest, port: u16, authorization: bool) -> Exchange {
        let is_head_request = request.method == "HEAD";
        Exchange {
            state: State::Connecting,
            port,
            head: request.encode(authorization),
            framing: request.framing(),
            is_websocket: request.is_websocket(),
            is_head_request,
            parser: ResponseParser::new(Limits::default(), is_head_request),
        }
    }

    /// Whether it is a tunnel now.
    pub fn is_tunnel(&self) -> bool {
        self.state == State::Tunnel
    }

    /// The service is connected.
    pub fn connected(&mut self, actions: &mut Vec<Action>) {
        if self.state == State::Connecting {
            self.state = State::Waiting;
            actions.push(Action::Send(std::mem::take(&mut self.head)));
            actions.push(Action::WantBody);
        }
    }

    /// Bytes of the request's body, or of the tunnel.
    pub fn client_bytes(&mut self, bytes: &[u8], actions: &mut Vec<Action>) {
        let is_chunked = self.framing == Framing::Chunked && !self.is_tunnel();
        let mut out = Vec::with_capacity(bytes.len() + if is_chunked { 20 } else { 0 });
        if is_chunked {
            // Writing to a Vec does not fail.
            let _ = write!(out, "{:x}\r\n", bytes.len());
        }
        out.extend_from_slice(bytes);
        if is_chunked {
            out.extend_from_slice(b"\r\n");
        }
        actions.push(Action::Send(out));
    }

    /// The request's body is complete, or the client has ended its half of the tunnel. Only the latter
    /// ends our half: many services take the end of a connection for a client that does not wait.
    pub fn client_ended(&mut self, actions: &mut Vec<Action>) {
        if self.is_tunnel() {
            actions.push(Action::Finish);
        } else if self.framing == Framing::Chunked {
            actions.push(Action::Send(b"0\r\n\r\n".to_vec()));
        }
    }

    /// Bytes from the service.
    pub fn service_bytes(&mut self, mut bytes: &[u8], actions: &mut Vec<Action>) {
        while !matches!(self.state, State::Over | State::Tunnel) {
            let (taken, event) = match self.parser.parse(bytes) {
                Ok(found) => found,
                Err(error) => {
                    let why =
                        format!("the service on port {} does not answer in HTTP/1.1: {error}", self.port);
                    return self.fail(gateway(502, "bad_gateway", &why), actions);
                }
            };
            bytes = &bytes[taken..];
            match event {
                None => return,
                Some(ResponseEvent::Head(head)) if head.status == 101 => {
                    let is_asked_for = self.is_websocket && head.headers.has_token("upgrade", "websocket");
                    if !is_asked_for {
                        let why = format!(
                            "the service on port {} switched protocols without being asked",
                            self.port
                        );
                        return self.fail(gateway(502, "bad_gateway", &why), actions);
                    }
                    self.state = State::Tunnel;
                    actions.push(Action::Tunnel { headers: response_fields(&head, false) });
                }
                Some(ResponseEvent::Head(head)) => {
                    self.state = State::Responding;
                    let headers = response_fields(&head, self.is_head_request);
                    actions.push(Action::Head { status: head.status, headers, framing: head.framing });
                }
                Some(ResponseEvent::Data(data)) => actions.push(Action::Body(data.to_vec())),
                Some(ResponseEvent::End) => {
                    self.state = State::Over;
                    actions.push(Action::End);
                }
            }
        }
        if self.is_tunnel() && !bytes.is_empty() {
            actions.push(Action::TunnelBytes(bytes.to_vec()));
        }
    }

    /// The service has ended its half.
    pub fn service_ended(&mut self, actions: &mut Vec<Action>) {
        match self.state {
            State::Over => {}
            State::Tunnel => {
                self.state = State::Over;
                actions.push(Action::TunnelEnd);
            }
            _ if self.parser.connection_ended().is_ok() => {
                self.state = State::Over;
                actions.push(Action::End);
            }
            _ => {
                let why = format!("the service on port {} closed the connection unanswered", self.port);
                self.fail(gateway(502, "bad_gateway", &why), actions);
            }
        }
    }

    /// The way to the service failed.
    pub fn service_failed(&mut self, error: HostError, actions: &mut Vec<Action>) {
        let is_of_service = matches!(error.remote_code(), Some(Code::Unavailable));
        let instead = match error {
            HostError::TimedOut { .. } => {
                let port = self.port;
                gateway(
                    504,
                    "gateway_timeout",
                    &format!("port {port} in the capsule does not take connections"),
                )
            }
            error if is_of_service => gateway(502, "bad_gateway", &error.to_string()),
            error => Action::Refuse(error.into()),
        };
        self.fail(instead, actions);
    }

    /// Nothing has come from either side for `after_ms`.
    pub fn timed_out(&mut self, after_ms: u64, actions: &mut Vec<Action>) {
        let (port, seconds) = (self.port, after_ms / 1000);
        let why = format!("the service on port {port} did not answer within {seconds} s");
        self.fail(gateway(504, "gateway_timeout", &why), actions);
    }

    fn fail(&mut self, instead: Action, actions: &mut Vec<Action>) {
        actions.push(match self.state {
            State::Connecting | State::Waiting => instead,
            State::Responding => Action::CutOff,
            State::Tunnel => Action::TunnelEnd,
            State::Over => return,
        });
        self.state = State::Over;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::message::Error;

    fn exchange(method: &str, headers: &[(&str, &str)]) -> Exchange {
        let request = ClientRequest {
            method: method.into(),
            target: "/".into(),
            headers: headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(),
            peer: "::1".into(),
        };
        Exchange::new(&request, 80, true)
    }

    fn answered(exchange: &mut Exchange, pieces: &[&[u8]]) -> Vec<Action> {
        let mut actions = Vec::new();
        exchange.connected(&mut actions);
        assert!(matches!(actions.as_slice(), [Action::Send(_), Action::WantBody]), "{actions:?}");
        actions.clear();
        for piece in pieces {
            exchange.service_bytes(piece, &mut actions);
        }
        actions
    }

    fn status(actions: &[Action]) -> Option<u16> {
        match actions.last() {
            Some(Action::Refuse(response)) => Some(response.status),
            _ => None,
        }
    }

    #[test]
    fn a_response_is_handed_on_whatever_pieces_it_comes_in() {
        let text = b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n\
            3\r\nabc\r\n0\r\n\r\nrest";
        for size in [1, 7, text.len()] {
            let pieces: Vec<&[u8]> = text.chunks(size).collect();
            let actions = answered(&mut exchange("GET", &[]), &pieces);
            let headers = vec![("a".to_string(), "b".to_string())];
            assert_eq!(actions[0], Action::Head { status: 200, headers, framing: Framing::Chunked });
            assert_eq!(actions.last(), Some(&Action::End));
            let body: Vec<u8> = actions
                .iter()
                .filter_map(|a| if let Action::Body(b) = a { Some(b.clone()) } else { None })
                .flatten()
                .collect();
            assert_eq!(body, b"abc", "pieces of {size}");
        }
    }

    #[test]
    fn a_response_without_a_length_ends_with_the_connection() {
        let mut exchange = exchange("GET", &[]);
        let mut actions = answered(&mut exchange, &[b"HTTP/1.0 200 OK\r\n\r\nabc"]);
        assert!(matches!(&actions[0], Action::Head { framing: Framing::UntilClose, .. }));
        exchange.service_ended(&mut actions);
        assert_eq!(actions[1..], [Action::Body(b"abc".to_vec()), Action::End]);
        let mut head = self::exchange("HEAD", &[]);
        let actions = answered(&mut head, &[b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"]);
        assert!(matches!(&actions[..], [Action::Head { framing: Framing::None, .. }, Action::End]));
    }

    #[test]
    fn bodies_are_framed_anew_and_do_not_end_the_connection() {
        let mut actions = Vec::new();
        let mut chunked = exchange("POST", &[("transfer-encoding", "chunked")]);
        chunked.client_bytes(b"hello", &mut actions);
        chunked.client_ended(&mut actions);
        assert_eq!(actions, [Action::Send(b"5\r\nhello\r\n".to_vec()), Action::Send(b"0\r\n\r\n".to_vec())]);
        actions.clear();
        let mut counted = exchange("POST", &[("content-length", "5")]);
        counted.client_bytes(b"hello", &mut actions);
        counted.client_ended(&mut actions);
        assert_eq!(actions, [Action::Send(b"hello".to_vec())]);
    }

    #[test]
    fn a_websocket_becomes_a_tunnel_and_nothing_else_does() {
        let asks = [("connection", "Upgrade"), ("upgrade", "websocket")];
        let answer =
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nK: v\r\n\r\n\x81\x01a";
        let mut tunnel = exchange("GET", &asks);
        let mut actions = answered(&mut tunnel, &[answer]);
        let headers = vec![("k".to_string(), "v".to_string())];
        assert_eq!(actions, [Action::Tunnel { headers }, Action::TunnelBytes(b"\x81\x01a".to_vec())]);
        actions.clear();
        tunnel.client_bytes(b"x", &mut actions);
        tunnel.client_ended(&mut actions);
        tunnel.service_ended(&mut actions);
        assert_eq!(actions, [Action::Send(b"x".to_vec()), Action::Finish, Action::TunnelEnd]);
        assert_eq!(status(&answered(&mut exchange("GET", &[]), &[answer])), Some(502));
        let refused =
            answered(&mut exchange("GET", &asks), &[b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"]);
        assert!(matches!(&refused[..], [Action::Head { status: 403, .. }, Action::End]));
    }

    #[test]
    fn failures_are_502_504_or_a_cut_response() {
        let failed = |error| {
            let mut actions = Vec::new();
            exchange("GET", &[]).service_failed(error, &mut actions);
            status(&actions)
        };
        let refused = HostError::Remote(Error::new(Code::Unavailable, "nothing answers on port 80"));
        assert_eq!(failed(refused), Some(502));
        assert_eq!(failed(HostError::TimedOut { after_ms: 1 }), Some(504));
        assert_eq!(failed(HostError::Busy), Some(503));
        let mut actions = Vec::new();
        let mut silent = exchange("GET", &[]);
        silent.connected(&mut actions);
        silent.timed_out(1000, &mut actions);
        assert_eq!(status(&actions), Some(504));
        assert_eq!(status(&answered(&mut exchange("GET", &[]), &[b"SSH-2.0-x\r\n\r\n"])), Some(502));
        let smuggling = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(status(&answered(&mut exchange("GET", &[]), &[smuggling])), Some(502));
        let mut cut = exchange("GET", &[]);
        let mut actions = answered(&mut cut, &[b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"]);
        cut.service_ended(&mut actions);
        assert_eq!(actions.last(), Some(&Action::CutOff));
    }
}
