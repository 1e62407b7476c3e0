//! Literal messages, the oracle `httparse`, and any split of the input.

use super::*;
use proptest::prelude::*;

/// An event with its bytes owned, pieces of data joined.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Head(Box<RequestHead>),
    Body(Vec<u8>),
    End,
}

fn feed(parser: &mut RequestParser, mut input: &[u8], seen: &mut Vec<Seen>) -> Result<(), HttpError> {
    loop {
        let (taken, event) = parser.parse(input)?;
        input = &input[taken..];
        match event {
            None => {
                assert!(input.is_empty(), "no event, but input is left");
                return Ok(());
            }
            Some(RequestEvent::Head(head)) => seen.push(Seen::Head(Box::new(head))),
            Some(RequestEvent::Data(data)) => match seen.last_mut() {
                Some(Seen::Body(body)) => body.extend_from_slice(data),
                _ => seen.push(Seen::Body(data.to_vec())),
            },
            Some(RequestEvent::End) => seen.push(Seen::End),
        }
    }
}

fn parse_all(input: &[u8]) -> (Vec<Seen>, Result<(), HttpError>) {
    let mut parser = RequestParser::new(Limits::default());
    let mut seen = Vec::new();
    let result = feed(&mut parser, input, &mut seen);
    (seen, result)
}

fn error_of(input: &[u8]) -> Option<HttpError> {
    parse_all(input).1.err()
}

#[test]
fn pipelined_requests_with_every_framing() {
    let input = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n\
        POST /b HTTP/1.1\r\nhOsT: x\r\nContent-Length: 5\r\n\r\nhello\
        \r\nPUT http://x/c?d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\nExpect: 100-continue\r\n\r\n\
        5;name=value\r\nhello\r\n06\r\n world\r\n0\r\nTrailer: t\r\n\r\n\
        GET / HTTP/1.0\r\n\r\n";
    let (seen, result) = parse_all(input);
    assert_eq!(result, Ok(()));
    let [
        Seen::Head(a),
        Seen::End,
        Seen::Head(b),
        Seen::Body(b_body),
        Seen::End,
        Seen::Head(c),
        Seen::Body(c_body),
        Seen::End,
        Seen::Head(d),
        Seen::End,
    ] = seen.as_slice()
    else {
        panic!("{seen:?}");
    };
    assert_eq!(
        (a.method.as_str(), a.target.as_str(), a.framing, a.keep_alive),
        ("GET", "/a?b=c", Framing::None, true)
    );
    assert_eq!((b.framing, b_body.as_slice()), (Framing::Length(5), b"hello".as_slice()));
    assert_eq!((c.target.as_str(), c.expects_continue), ("/c?d", true));
    assert_eq!((c.framing, c_body.as_slice()), (Framing::Chunked, b"hello world".as_slice()));
    assert!(!d.keep_alive);
}

#[test]
fn what_could_be_smuggled_is_refused() {
    let refused: &[(&[u8], u16)] = &[
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n: empty name\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: \xff\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\r\nHost: x\r\n\r\n", 400),
        (b"GET x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"G(T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET / http/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            501,
        ),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
        (b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n 5\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5 x\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n00000000000000005\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n bad\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nExpect: magic\r\n\r\n", 417),
    ];
    for (input, status) in refused {
        let error = error_of(input);
        assert_eq!(error.map(HttpError::status), Some(*status), "{:?}", String::from_utf8_lossy(input));
    }
}

#[test]
fn limits_hold_before_the_head_is_complete() {
    let limits = Limits::default();
    let mut input = b"GET / HTTP/1.1\r\nHost: x\r\nA: ".to_vec();
    input.resize(limits.max_head_bytes + 1, b'a');
    assert_eq!(error_of(&input), Some(HttpError::HeadTooLong));
    let mut input = b"GET /".to_vec();
    input.resize(limits.max_target_bytes + 100, b'a');
    assert_eq!(error_of(&input), Some(HttpError::TargetTooLong));
    let mut input = b"GET / HTTP/1.1\r\nHost: x\r\n".to_vec();
    for _ in 0..limits.max_headers {
        input.extend_from_slice(b"a: b\r\n");
    }
    input.extend_from_slice(b"\r\n");
    assert_eq!(error_of(&input), Some(HttpError::TooManyHeaders));
    let mut input = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;".to_vec();
    input.resize(input.len() + limits.max_trailer_bytes, b'a');
    assert_eq!(error_of(&input), Some(HttpError::HeadTooLong));
}

#[test]
fn a_failed_parser_stays_failed() {
    let mut parser = RequestParser::new(Limits::default());
    assert!(parser.parse(b"\n").is_err());
    assert!(parser.parse(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").is_err());
}

fn read_response(input: &[u8], is_head: bool) -> Result<(ResponseHead, Vec<u8>, bool), HttpError> {
    let mut parser = ResponseParser::new(Limits::default(), is_head);
    let (mut head, mut body, mut rest) = (None, Vec::new(), input);
    loop {
        let (taken, event) = parser.parse(rest)?;
        rest = &rest[taken..];
        match event {
            Some(ResponseEvent::Head(h)) => head = Some(h),
            Some(ResponseEvent::Data(data)) => body.extend_from_slice(data),
            Some(ResponseEvent::End) => {
                return head.map(|h| (h, body, true)).ok_or(HttpError::Truncated);
            }
            None => {
                parser.connection_ended()?;
                return head.map(|h| (h, body, false)).ok_or(HttpError::Truncated);
            }
        }
    }
}

#[test]
fn responses_with_every_framing() {
    let with_length = read_response(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", false);
    assert_eq!(with_length.map(|r| (r.0.status, r.1, r.2)), Ok((200, b"hi".to_vec(), true)));
    let interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n";
    assert_eq!(read_response(interim, false).map(|r| (r.0.status, r.1)), Ok((201, b"hi".to_vec())));
    let until_close = read_response(b"HTTP/1.0 200 Very Well\r\n\r\nhi", false);
    assert_eq!(until_close.map(|r| (r.0.keep_alive, r.1, r.2)), Ok((false, b"hi".to_vec(), false)));
    let to_head = read_response(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", true);
    assert_eq!(to_head.map(|r| r.1), Ok(Vec::new()));
    let no_content = read_response(b"HTTP/1.1 204 No Content\r\n\r\n", false);
    assert_eq!(no_content.map(|r| r.0.status), Ok(204));
    let cut = read_response(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", false);
    assert_eq!(cut, Err(HttpError::Truncated));
    assert_eq!(read_response(b"HTTP/1.1 20 OK\r\n\r\n", false).map_err(HttpError::status).err(), Some(400));
}

#[test]
fn what_is_written_is_read_back() {
    let mut out = Vec::new();
    let body: Vec<u8> = (0..=255).collect();
    let writer = ResponseWriter::start(&mut out, 200, [("x-a", "b")], Framing::Chunked, true, false);
    writer.body(&mut out, &body);
    writer.body(&mut out, b"");
    writer.body(&mut out, b"tail");
    writer.end(&mut out);
    let expected = [body.as_slice(), b"tail"].concat();
    let read = read_response(&out, false);
    assert_eq!(
        read.map(|r| (r.0.headers.get("x-a").map(str::to_string), r.1)),
        Ok((Some("b".into()), expected))
    );

    let mut out = Vec::new();
    write_request(&mut out, "POST", "/v1/x", "h:80", [("content-type", "application/json")], b"{}");
    let (seen, result) = parse_all(&out);
    assert_eq!(result, Ok(()));
    let [Seen::Head(head), Seen::Body(body), Seen::End] = seen.as_slice() else { panic!("{seen:?}") };
    assert_eq!(
        (head.headers.get("host"), body.as_slice(), head.keep_alive),
        (Some("h:80"), b"{}".as_slice(), false)
    );
}

#[test]
fn targets_and_queries_are_decoded() {
    assert_eq!(percent_decode("/a%20b%2Fc"), Some("/a b/c".to_string()));
    assert_eq!(percent_decode("%c3%a4"), Some("ä".to_string()));
    for bad in ["%", "%2", "%zz", "%00", "%ff"] {
        assert_eq!(percent_decode(bad), None, "{bad}");
    }
    let pairs = parse_query("a=1&b=x+y%26&&c").map(|p| p.len());
    assert_eq!(pairs, Some(3));
    assert_eq!(parse_query("a=x+y%26"), Some(vec![("a".into(), "x y&".into())]));
    assert_eq!(parse_query("a=%"), None);
    assert_eq!(parse_query(&"a&".repeat(101)), None);
}

/// Method, target and fields.
type OracleHead = (String, String, Vec<(String, Vec<u8>)>);

/// What `httparse` makes of the head, when it is complete and valid.
fn oracle(input: &[u8]) -> Option<OracleHead> {
    let mut fields = [httparse::EMPTY_HEADER; 200];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(input) {
        Ok(httparse::Status::Complete(_)) => Some((
            request.method.unwrap_or_default().to_string(),
            request.path.unwrap_or_default().to_string(),
            request.headers.iter().map(|h| (h.name.to_ascii_lowercase(), h.value.to_vec())).collect(),
        )),
        _ => None,
    }
}

/// Whatever we accept `httparse` accepts too, and reads the same from it.
fn check_against_oracle(input: &[u8]) {
    let mut parser = RequestParser::new(Limits::default());
    if let Ok((_, Some(RequestEvent::Head(head)))) = parser.parse(input) {
        let Some((method, path, fields)) = oracle(input) else {
            panic!("httparse refuses what we accept: {:?}", String::from_utf8_lossy(input));
        };
        assert_eq!(head.method, method);
        if path.starts_with('/') {
            assert_eq!(head.target, path);
        }
        let ours: Vec<(String, Vec<u8>)> =
            head.headers.iter().map(|(n, v)| (n.to_string(), v.as_bytes().to_vec())).collect();
        let theirs: Vec<(String, Vec<u8>)> =
            fields.into_iter().map(|(n, v)| (n, v.trim_ascii().to_vec())).collect();
        assert_eq!(ours, theirs);
    }
}

/// Requests and near misses: pieces that matter, put together at random.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(b"GET / HTTP/1.1\r\nHost: x\r\n".to_vec()),
        Just(b"POST /a/b?c=d HTTP/1.1\r\nHost: x\r\n".to_vec()),
        Just(b"GET / HTTP/1.0\r\n".to_vec()),
        Just(b"Content-Length: 5\r\n".to_vec()),
        Just(b"Transfer-Encoding: chunked\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"\n".to_vec()),
        Just(b" ".to_vec()),
        Just(b"hello".to_vec()),
        Just(b"5\r\nhello\r\n".to_vec()),
        Just(b"0\r\n\r\n".to_vec()),
        "[A-Za-z-]{1,8}: ?[ -~]{0,12}\r\n".prop_map(String::into_bytes),
        proptest::collection::vec(any::<u8>(), 0..4),
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_split_gives_the_same_events(input in message(), cuts in proptest::collection::vec(0usize..400, 0..8)) {
        let (whole, whole_result) = parse_all(&input);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(input.len())).collect();
        cuts.extend([0, input.len()]);
        cuts.sort_unstable();
        let mut parser = RequestParser::new(Limits::default());
        let (mut seen, mut result) = (Vec::new(), Ok(()));
        for pair in cuts.windows(2) {
            result = feed(&mut parser, &input[pair[0]..pair[1]], &mut seen);
            if result.is_err() {
                break;
            }
        }
        prop_assert_eq!(seen, whole);
        prop_assert_eq!(result, whole_result);
    }

    #[test]
    fn what_we_accept_httparse_accepts(input in message()) {
        check_against_oracle(&input);
    }

    #[test]
    fn no_bytes_panic(input in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_all(&input);
        let _ = read_response(&input, false);
    }
}
