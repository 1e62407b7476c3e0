//! What of a head goes on to the other side, and what is this hop's own (RFC 9110 section 7.6.1).

use wire::http1::{Framing, Headers, ResponseHead};

/// Fields that are for one hop, or that this program writes itself.
const OWN_FIELDS: [&str; 13] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-api-key",
];

/// A request as it came from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientRequest {
    /// The method.
    pub method: String,
    /// Path and query as they came.
    pub target: String,
    /// The fields, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The client's address.
    pub peer: String,
}

impl ClientRequest {
    fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|h| h.0 == name).map(|h| h.1.as_str())
    }

    fn has_token(&self, name: &str, token: &str) -> bool {
        self.headers.iter().any(|h| h.0 == name && tokens(&h.1).any(|t| t.eq_ignore_ascii_case(token)))
    }

    /// How the body is delimited; the parser has refused what is ambiguous.
    pub fn framing(&self) -> Framing {
        if self.get("transfer-encoding").is_some() {
            return Framing::Chunked;
        }
        match self.get("content-length").and_then(|n| n.parse().ok()) {
            Some(length) => Framing::Length(length),
            None => Framing::None,
        }
    }

    /// Whether the client asks for a WebSocket. Other protocols are not switched to: what is spoken in
    /// them would be out of sight.
    pub fn is_websocket(&self) -> bool {
        self.method == "GET"
            && self.has_token("connection", "upgrade")
            && self.get("upgrade").is_some_and(|u| u.trim().eq_ignore_ascii_case("websocket"))
            && matches!(self.framing(), Framing::None)
    }

    /// The head that the service gets. Without `authorization` the field of that name is left out: it was
    /// the credential.
    pub fn encode(&self, authorization: bool) -> Vec<u8> {
        let mut out = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        let mut field = |name: &str, value: &str| {
            out.push_str(name);
            out.push_str(": ");
            out.push_str(value);
            out.push_str("\r\n");
        };
        let host = self.get("host").unwrap_or_default();
        field("host", host);
        let named: Vec<&str> =
            self.headers.iter().filter(|h| h.0 == "connection").flat_map(|h| tokens(&h.1)).collect();
        let is_own = |name: &str| {
            OWN_FIELDS.contains(&name)
                || name.starts_with("x-forwarded-")
                || named.iter().any(|n| n.eq_ignore_ascii_case(name))
                || (name == "authorization" && !authorization)
        };
        for (name, value) in self.headers.iter().filter(|h| !is_own(&h.0)) {
            field(name, value);
        }
        // What proxies in front of us have said of the client comes first.
        let before = self.headers.iter().filter(|h| h.0 == "x-forwarded-for").map(|h| h.1.as_str());
        let chain: Vec<&str> = before.chain([self.peer.as_str()]).filter(|v| !v.is_empty()).collect();
        field("x-forwarded-for", &chain.join(", "));
        field("x-forwarded-host", self.get("x-forwarded-host").unwrap_or(host));
        field("x-forwarded-proto", self.get("x-forwarded-proto").unwrap_or("http"));
        match self.framing() {
            Framing::Length(length) => field("content-length", &length.to_string()),
            Framing::Chunked => field("transfer-encoding", "chunked"),
            Framing::None | Framing::UntilClose => {}
        }
        if self.is_websocket() {
            field("upgrade", "websocket");
            field("connection", "Upgrade");
        } else {
            field("connection", "close");
        }
        out.push_str("\r\n");
        out.into_bytes()
    }
}

fn tokens(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim)
}

/// The fields of the service's response that go on to the client.
pub fn response_fields(head: &ResponseHead, is_head_request: bool) -> Vec<(String, String)> {
    let is_own =
        |headers: &Headers, name: &str| OWN_FIELDS.contains(&name) || headers.has_token("connection", name);
    let mut fields: Vec<(String, String)> = head
        .headers
        .iter()
        .filter(|(name, _)| !is_own(&head.headers, name))
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect();
    // It says there how long a body would be that is not sent.
    if (is_head_request || head.status == 304)
        && let Some(length) = head.headers.get("content-length")
    {
        fields.push(("content-length".to_string(), length.to_string()));
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::http1::{Limits, ResponseEvent, ResponseParser};

    fn request(method: &str, headers: &[(&str, &str)]) -> ClientRequest {
        ClientRequest {
            method: method.into(),
            target: "/a%2fb?c=d".into(),
            headers: headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect(),
            peer: "192.0.2.7".into(),
        }
    }

    #[test]
    fn a_request_goes_on_without_the_credential_and_what_is_for_one_hop() {
        let request = request(
            "POST",
            &[
                ("host", "80-cl-x.example.com"),
                ("x-api-key", "wrn_secret"),
                ("connection", "close, X-Mine"),
                ("x-mine", "1"),
                ("te", "trailers"),
                ("expect", "100-continue"),
                ("proxy-authorization", "Basic eA=="),
                ("authorization", "Bearer for the service"),
                ("x-forwarded-for", "198.51.100.1"),
                ("upgrade", "h2c"),
                ("cookie", "a=b"),
                ("cookie", "c=d"),
                ("transfer-encoding", "chunked"),
            ],
        );
        let expected = "POST /a%2fb?c=d HTTP/1.1\r\nhost: 80-cl-x.example.com\r\n\
            authorization: Bearer for the service\r\ncookie: a=b\r\ncookie: c=d\r\n\
            x-forwarded-for: 198.51.100.1, 192.0.2.7\r\nx-forwarded-host: 80-cl-x.example.com\r\n\
            x-forwarded-proto: http\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
        assert_eq!(String::from_utf8(request.encode(true)), Ok(expected.to_string()));
        assert!(!String::from_utf8_lossy(&request.encode(false)).contains("for the service"));
        assert!(!request.is_websocket());
    }

    #[test]
    fn only_a_websocket_is_switched_to() {
        let upgrade = |method, protocol, more: &[(&str, &str)]| {
            let mut headers =
                vec![("host", "h"), ("connection", "keep-alive, Upgrade"), ("upgrade", protocol)];
            headers.extend(more);
            request(method, &headers)
        };
        let good = upgrade("GET", "WebSocket", &[("sec-websocket-key", "x")]);
        assert!(good.is_websocket());
        let sent = String::from_utf8_lossy(&good.encode(true)).into_owned();
        assert!(sent.ends_with("upgrade: websocket\r\nconnection: Upgrade\r\n\r\n"), "{sent}");
        assert!(sent.contains("sec-websocket-key: x\r\n"), "{sent}");
        for bad in [
            upgrade("GET", "h2c", &[]),
            upgrade("POST", "websocket", &[]),
            upgrade("GET", "websocket", &[("content-length", "5")]),
        ] {
            assert!(!bad.is_websocket());
            assert!(!String::from_utf8_lossy(&bad.encode(true)).contains("pgrade"));
        }
    }

    #[test]
    fn a_response_goes_on_without_what_is_for_one_hop() {
        let text =
            b"HTTP/1.1 200 OK\r\nServer: x\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n\
            Content-Length: 3\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\n";
        let mut parser = ResponseParser::new(Limits::default(), true);
        let Ok((_, Some(ResponseEvent::Head(head)))) = parser.parse(text) else { panic!("a head") };
        let names = |is_head_request| {
            response_fields(&head, is_head_request).into_iter().map(|f| f.0).collect::<Vec<_>>()
        };
        assert_eq!(names(false), ["server", "set-cookie", "set-cookie"]);
        assert_eq!(names(true), ["server", "set-cookie", "set-cookie", "content-length"]);
    }
}
