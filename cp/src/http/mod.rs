//! The public HTTP face: the server's loop and connections, the router, and what handlers see.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`handler`] | what handlers are given and answer |
//! | [`router`] | from method and path to a handler |
//! | [`server`] | the event loop |
//! | [`client`] | one connection |
//! | [`task`] | a request's chain of steps |
//! | [`multipart`] | uploaded files |
//! | `proxying` | requests to services in capsules |
//! | [`limits`] | every bound |

pub mod client;
pub mod context;
pub mod date;
pub mod forwarded;
pub mod handler;
pub mod limits;
pub mod multipart;
mod proxying;
pub mod router;
pub mod server;
mod steps;
mod streams;
pub mod task;
mod wire_streams;

use wire::http1::RequestHead;

/// The `Sec-WebSocket-Key` of a request that asks for an upgrade (RFC 6455 section 4.2.1).
fn websocket_key(head: &RequestHead) -> Option<String> {
    let headers = &head.headers;
    let asks = head.method == "GET"
        && head.minor_version >= 1
        && headers.has_token("connection", "upgrade")
        && headers.has_token("upgrade", "websocket")
        && headers.get("sec-websocket-version") == Some("13");
    headers.get("sec-websocket-key").filter(|_| asks).map(str::to_string)
}
