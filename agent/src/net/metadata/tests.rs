use super::*;
use serde_json::json;

fn endpoint() -> Endpoint {
    Endpoint::new(json!({"instanceID": "c-1", "envID": "minimal", "nested": {"n": 1}}))
}

/// Sends one request on a new connection and returns the answer.
fn ask_at(endpoint: &mut Endpoint, request: &str, now_ms: u64) -> String {
    let Some(id) = endpoint.accept(now_ms) else { return "refused".into() };
    endpoint.receive(id, request.as_bytes(), now_ms);
    let answer = String::from_utf8_lossy(endpoint.output(id)).into_owned();
    endpoint.close(id);
    answer
}

fn ask(endpoint: &mut Endpoint, request: &str) -> String {
    ask_at(endpoint, request, 0)
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

fn token(endpoint: &mut Endpoint) -> String {
    let answer = ask(endpoint, "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n");
    assert_eq!(status(&answer), "200", "{answer}");
    answer.rsplit("\r\n").next().unwrap_or_default().to_owned()
}

fn get(path: &str, token: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: m\r\nX-metadata-token: {token}\r\nAccept: application/json\r\n\r\n")
}

#[test]
fn a_token_opens_the_document_and_the_owner_is_told() {
    let mut endpoint = endpoint();
    let token = token(&mut endpoint);
    assert!(!endpoint.take_fetched());
    let answer = ask(&mut endpoint, &get("/", &token));
    assert_eq!(
        answer,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 55\r\n\r\n\
         {\"envID\":\"minimal\",\"instanceID\":\"c-1\",\"nested\":{\"n\":1}}"
    );
    assert!(endpoint.take_fetched());
    assert!(!endpoint.take_fetched());
    let listing = format!("GET / HTTP/1.1\r\nx-aws-ec2-metadata-token: {token}\r\n\r\n");
    assert!(ask(&mut endpoint, &listing).ends_with("\r\n\r\nenvID\ninstanceID\nnested/"));
}

#[test]
fn without_a_valid_token_there_is_nothing() {
    let mut endpoint = endpoint();
    let token = token(&mut endpoint);
    assert_eq!(status(&ask(&mut endpoint, "GET / HTTP/1.1\r\n\r\n")), "401");
    assert_eq!(status(&ask(&mut endpoint, &get("/", "0123"))), "401");
    assert_eq!(status(&ask_at(&mut endpoint, &get("/", &token), 59_999)), "200");
    endpoint.take_fetched();
    assert_eq!(status(&ask_at(&mut endpoint, &get("/", &token), 60_000)), "401");
    assert!(!endpoint.take_fetched());
}

#[test]
fn each_mistake_has_its_status() {
    let mut endpoint = endpoint();
    let token = token(&mut endpoint);
    let put =
        |ttl: &str| format!("PUT /latest/api/token HTTP/1.1\r\nX-Metadata-Token-TTL-Seconds: {ttl}\r\n\r\n");
    let long = "x".repeat(http::MAX_HEAD_BYTES);
    let cases: Vec<(String, &str)> = vec![
        (put("1"), "200"),
        (put("21600"), "200"),
        (put("0"), "400"),
        (put("21601"), "400"),
        (put("-1"), "400"),
        (put("+5x"), "400"),
        (put("99999999999999999999"), "400"),
        ("PUT /latest/api/token HTTP/1.1\r\n\r\n".into(), "400"),
        (put("60\r\nX-Forwarded-For: 10.0.0.1"), "400"),
        ("PUT /other HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n".into(), "404"),
        (get("/nothing", &token), "404"),
        (get("/nested/n", &token), "200"),
        (get("/nested/n", &token).replace("application/json", "text/plain"), "501"),
        ("DELETE / HTTP/1.1\r\n\r\n".into(), "405"),
        ("HEAD / HTTP/1.1\r\n\r\n".into(), "405"),
        ("GET / HTTP/2.0\r\n\r\n".into(), "400"),
        ("GET  / HTTP/1.1\r\n\r\n".into(), "400"),
        ("GET nothing HTTP/1.1\r\n\r\n".into(), "400"),
        ("nonsense\r\n\r\n".into(), "400"),
        ("\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nname : space\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\n folded: x\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".into(), "501"),
        ("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n".into(), "400"),
        ("GET / HTTP/1.1\r\nContent-Length: 1025\r\n\r\n".into(), "413"),
        ("GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".into(), "413"),
        (format!("GET /{long} HTTP/1.1\r\n\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40)), "431"),
    ];
    for (request, expected) in cases {
        let answer = ask(&mut endpoint, &request);
        assert_eq!(status(&answer), expected, "{request:?} -> {answer:?}");
    }
}

#[test]
fn requests_may_come_byte_by_byte_or_all_at_once() {
    let mut endpoint = endpoint();
    let token = token(&mut endpoint);
    let request = get("/instanceID", &token);
    let whole = ask(&mut endpoint, &request);
    let Some(id) = endpoint.accept(0) else { panic!("no connection") };
    for byte in request.as_bytes() {
        assert!(endpoint.output(id).is_empty());
        endpoint.receive(id, &[*byte], 0);
    }
    assert_eq!(endpoint.output(id), whole.as_bytes());
    assert!(!endpoint.finished(id));
    // A body that nobody asked for is passed over, and the next request follows it.
    let with_body = request.replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\nhello");
    let closing = request.replace("\r\n\r\n", "\r\nConnection: Close\r\n\r\n");
    endpoint.receive(id, format!("{with_body}{request}{closing}{request}").as_bytes(), 0);
    let answers = String::from_utf8_lossy(endpoint.output(id)).into_owned();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 4);
    assert_eq!(answers.matches("Connection: close").count(), 1);
    endpoint.consume_output(id, answers.len() - 1);
    assert!(!endpoint.finished(id));
    endpoint.consume_output(id, 1);
    assert!(endpoint.finished(id));
}

#[test]
fn the_number_of_connections_is_bounded() {
    let mut endpoint = endpoint();
    let ids: Vec<_> = std::iter::from_fn(|| endpoint.accept(0)).collect();
    assert_eq!(ids.len(), MAX_CONNECTIONS);
    endpoint.close(ids[3]);
    assert_eq!(endpoint.accept(0), Some(ids[3]));
    assert_eq!(endpoint.accept(0), None);
}

#[test]
fn a_client_that_never_finishes_its_request_expires() {
    let mut endpoint = endpoint();
    assert_eq!(endpoint.next_timeout_ms(), None);
    let Some(slow) = endpoint.accept(1_000) else { panic!("no connection") };
    for now_ms in (1_000..10_000).step_by(1_000) {
        endpoint.receive(slow, b"G", now_ms);
    }
    assert_eq!(endpoint.next_timeout_ms(), Some(11_000));
    assert_eq!(endpoint.expired(10_999), []);
    assert_eq!(endpoint.expired(11_000), [slow]);
}

#[test]
fn a_client_that_asks_without_reading_is_cut_off() {
    let mut endpoint = Endpoint::new(json!({"big": "x".repeat(10_000)}));
    let token = token(&mut endpoint);
    let Some(id) = endpoint.accept(0) else { panic!("no connection") };
    endpoint.receive(id, get("/", &token).repeat(100).as_bytes(), 0);
    assert!(endpoint.output(id).is_empty());
    assert!(endpoint.finished(id));
    endpoint.receive(id, get("/", &token).as_bytes(), 0);
    assert!(endpoint.output(id).is_empty());
}

#[test]
fn a_connection_answers_a_bounded_number_of_requests() {
    let mut endpoint = endpoint();
    let Some(id) = endpoint.accept(0) else { panic!("no connection") };
    for _ in 0..MAX_REQUESTS_PER_CONNECTION {
        assert!(!endpoint.finished(id));
        endpoint.receive(id, b"GET / HTTP/1.1\r\n\r\n", 0);
        endpoint.consume_output(id, usize::MAX);
    }
    assert!(endpoint.finished(id));
}

#[test]
fn any_bytes_are_survived() {
    // A small generator with a fixed seed: every run sees the same requests, cut and damaged differently.
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut endpoint = endpoint();
    let token = token(&mut endpoint);
    let good = get("/instanceID", &token).repeat(3).into_bytes();
    for _ in 0..2_000 {
        let mut bytes = good.clone();
        for _ in 0..random() % 8 {
            let at = random() as usize % bytes.len();
            bytes[at] = random() as u8;
        }
        let Some(id) = endpoint.accept(0) else { panic!("no connection") };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at((random() as usize % 200 + 1).min(rest.len()));
            endpoint.receive(id, now, 0);
            rest = later;
        }
        assert!(endpoint.output(id).len() <= MAX_OUTPUT_BYTES);
        endpoint.close(id);
    }
}
