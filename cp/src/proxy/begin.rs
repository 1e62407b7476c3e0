//! Who asks, and the way to the capsule.

use super::destination::Destination;
use super::exchange::Exchange;
use super::head::ClientRequest;
use crate::api::{Target, with_capsule};
use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use std::sync::Arc;

/// The name among a request's parameters of its method, as it came.
pub const METHOD: &str = "method";
/// The name among a request's parameters of its target, as it came.
pub const TARGET: &str = "target";
/// The name among a request's parameters of the port.
pub const PORT: &str = "port";

/// An exchange on its way to a service.
pub struct Proxy {
    /// The capsule.
    pub target: Target,
    /// Its port.
    pub port: u16,
    /// The exchange.
    pub exchange: Exchange,
}

/// The parameters that [`begin`] needs of a request.
pub fn parameters(to: Destination, method: &str, target: &str) -> Vec<(&'static str, String)> {
    vec![
        ("id", to.capsule_id),
        (PORT, to.port.to_string()),
        (METHOD, method.to_string()),
        (TARGET, target.to_string()),
    ]
}

/// Handles a request to a service. Like every other one it needs the capsule's team's API key or a login's
/// token; where `Authorization` is not needed for that it is the service's.
pub fn begin(request: Request, context: &Arc<Context>) -> Flow {
    let port: u16 = request
        .param(PORT)
        .parse()
        .map_err(|_| Response::error(400, "invalid_request", "a port is a number from 1 to 65535"))?;
    let authorization = request.header("x-api-key").is_some();
    let client = ClientRequest {
        method: request.param(METHOD).to_string(),
        target: request.param(TARGET).to_string(),
        headers: request.headers.clone(),
        peer: request.peer.to_string(),
    };
    with_capsule(&request, context, move |target| {
        let exchange = Exchange::new(&client, port, authorization);
        Ok(Step::Proxy(Box::new(Proxy { target, port, exchange })))
    })
}
