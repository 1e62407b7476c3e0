//! `GET /v1/capsules/{id}/metrics`: what a capsule uses, from the rings that its host keeps.

use super::capsule_access::{Target, find};
use super::fields::invalid;
use super::principal::Principal;
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, HostError, Request, Response, Step};
use serde::Serialize;
use std::sync::Arc;
use wire::message::{CapsuleMetrics, CapsuleMetricsReply, CapsuleState, Code};

/// How long a host may take to look into its memory, in milliseconds.
const TIMEOUT_MS: u64 = 10_000;
/// The ranges and their lengths in seconds.
const RANGES: [(&str, u32); 7] = [
    ("5m", 300),
    ("10m", 600),
    ("1h", 3_600),
    ("2h", 7_200),
    ("6h", 21_600),
    ("12h", 43_200),
    ("24h", 86_400),
];
/// The range when none is asked for.
const DEFAULT_RANGE: &str = "10m";

#[derive(Debug, PartialEq, Serialize)]
struct Metrics {
    sandbox_id: String,
    range: &'static str,
    points: Vec<Point>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Point {
    timestamp_unix: u64,
    cpu_pct: f64,
    mem_bytes: u64,
    disk_bytes: u64,
}

/// `GET /v1/capsules/{id}/metrics`.
pub fn get(request: Request, context: &Arc<Context>) -> Flow {
    let context = Arc::clone(context);
    Step::database(move |db| {
        let target = db.read(|sql| {
            let principal = Principal::of(sql, &context, &request)?;
            let capsule = find(sql, &principal, request.param("id"))?;
            let is_there = !matches!(
                capsule.status,
                CapsuleState::Pending | CapsuleState::Stopped | CapsuleState::Missing | CapsuleState::Error
            );
            match (is_there, capsule.host_id, capsule.host_address) {
                (true, Some(host_id), Some(address)) => {
                    Ok(Target { host_id, address, capsule_id: capsule.id })
                }
                _ => Err(not_available(capsule.status).into()),
            }
        })?;
        let (range, range_sec) = range(request.query("range"))?;
        let message = CapsuleMetrics { capsule_id: target.capsule_id.clone(), range_sec };
        HostCall::new(&target.host_id, &target.address, &message, TIMEOUT_MS)
            .until::<CapsuleMetricsReply>()
            .then(move |result| answer(target.capsule_id, range, result.and_then(|reply| reply.message())))
    })
}

fn not_available(state: CapsuleState) -> Response {
    let message = format!("there are no metrics of a capsule that is {}", state.name());
    Response::error(404, "not_found", &message)
}

fn range(asked: Option<&str>) -> Result<(&'static str, u32), Response> {
    let asked = asked.filter(|range| !range.is_empty()).unwrap_or(DEFAULT_RANGE);
    RANGES.into_iter().find(|(name, _)| *name == asked).ok_or_else(|| {
        let names = RANGES.map(|(name, _)| name).join(", ");
        let shown: String = asked.chars().take(20).collect();
        invalid(&format!("range must be one of {names}, not {shown:?}"))
    })
}

fn answer(sandbox_id: String, range: &'static str, result: Result<CapsuleMetricsReply, HostError>) -> Flow {
    match result {
        Ok(reply) => {
            Step::respond(Response::json(200, &Metrics { sandbox_id, range, points: points(&reply) }))
        }
        Err(error) if error.remote_code() == Some(Code::NotFound) => {
            Err(Response::error(404, "not_found", "the capsule's host has no metrics of it"))
        }
        Err(error) => Err(error.into()),
    }
}

/// Where lists differ in length, as far as all of them go.
fn points(reply: &CapsuleMetricsReply) -> Vec<Point> {
    let values = reply.cpu.iter().zip(&reply.memory).zip(&reply.disk);
    let point = |(time, ((cpu, memory), disk)): (&u64, ((&u32, &u64), &u64))| Point {
        timestamp_unix: *time,
        cpu_pct: f64::from(*cpu) / 100.0,
        mem_bytes: *memory,
        disk_bytes: *disk,
    };
    reply.times.iter().zip(values).map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_public_api() {
        assert_eq!(range(None), Ok(("10m", 600)));
        assert_eq!(range(Some("")), Ok(("10m", 600)));
        assert_eq!(range(Some("24h")), Ok(("24h", 86_400)));
        let refused = range(Some("3h")).expect_err("no such range");
        assert_eq!(refused.status, 400);
        assert!(refused.error_message().is_some_and(|m| m.contains("5m, 10m, 1h")));
    }

    #[test]
    fn lists_become_points() {
        let reply = CapsuleMetricsReply {
            times: vec![10, 11, 12],
            cpu: vec![1_250, 10_000, 1],
            memory: vec![4096, 8192],
            disk: vec![1, 2, 3],
        };
        let expected = [
            Point { timestamp_unix: 10, cpu_pct: 12.5, mem_bytes: 4096, disk_bytes: 1 },
            Point { timestamp_unix: 11, cpu_pct: 100.0, mem_bytes: 8192, disk_bytes: 2 },
        ];
        assert_eq!(points(&reply), expected);
    }
}
