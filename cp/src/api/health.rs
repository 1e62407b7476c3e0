//! `/health`: whether requests can be served.

use crate::http::context::Context;
use crate::http::handler::{Flow, Request, Response, Step};
use serde_json::json;
use std::sync::Arc;

/// `GET /health`. 200 when the database answers, else 503.
pub fn get(_: Request, context: &Arc<Context>) -> Flow {
    let version = context.version;
    Step::database(move |db| {
        db.read(|sql| Ok(sql.row("select 1 as one", &[])?))?;
        Step::respond(Response::json(200, &json!({"status": "ok", "version": version})))
    })
}
