//! What a client can make the server hold. By itself, because it looks at the process's memory.

mod support;

use std::sync::Arc;
use support::{resident_kib, start};
use wrenn_cp::http::context::Context;
use wrenn_cp::http::handler::Method::Get;
use wrenn_cp::http::handler::{Flow, Request, Response, Route, Step};

fn hello(_: Request, _: &Arc<Context>) -> Flow {
    Step::respond(Response::json(200, "hello"))
}

static ROUTES: &[Route] = &[Route::new(Get, "/hello", hello)];

#[test]
fn a_header_of_ten_megabytes_is_refused_in_bounded_memory() {
    let server = start(ROUTES, Vec::new());
    let before = resident_kib();
    for _ in 0..3 {
        let mut request = b"GET /hello HTTP/1.1\r\nHost: x\r\nA: ".to_vec();
        request.resize(10_000_000, b'a');
        let answer = server.exchange(&request);
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(answer.contains("connection: close"));
    }
    // Three of the client's own buffers, and no more.
    assert!(resident_kib() < before + 40_000, "{before} -> {} KiB", resident_kib());
}
