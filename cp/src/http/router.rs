//! From method and path to a route, with 404 and 405 (RFC 9110 section 15.5.6).

use super::handler::{Method, Response, Route};
use crate::proxy::Destination;
use wire::http1::percent_decode;

/// The routing table, taken apart once.
#[derive(Debug)]
pub struct Router {
    entries: Vec<Entry>,
    proxy_domain: Option<String>,
}

#[derive(Debug)]
struct Entry {
    segments: Vec<Segment>,
    route: Route,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Literal(&'static str),
    Place(&'static str),
}

/// A route that fits a path, with what stands in its places.
#[derive(Debug)]
pub struct Match {
    /// The route.
    pub route: Route,
    /// What stands in its places, decoded.
    pub params: Vec<(&'static str, String)>,
}

impl Router {
    /// Takes a table apart. Where two routes fit, the one with the literal segment wins, so
    /// `/v1/capsules/stats` is not a capsule's id.
    pub fn new(routes: &[Route]) -> Router {
        let entries = routes
            .iter()
            .map(|route| Entry {
                segments: segments(route.path)
                    .map(|s| match s.strip_prefix('{').and_then(|s| s.strip_suffix('}')) {
                        Some(name) => Segment::Place(name),
                        None => Segment::Literal(s),
                    })
                    .collect(),
                route: *route,
            })
            .collect();
        Router { entries, proxy_domain: None }
    }

    /// The same, with services in capsules under this domain only.
    pub fn with_proxy_domain(mut self, domain: Option<String>) -> Router {
        self.proxy_domain = domain;
        self
    }

    /// The service in a capsule that a Host header names, if it names one.
    pub fn destination(&self, host: &str) -> Option<Destination> {
        Destination::of(host, self.proxy_domain.as_deref())
    }

    /// The route for a request. `path` is still percent-encoded, without its query.
    ///
    /// # Errors
    /// 404 when no route has the path, 405 with `Allow` when only other methods do, 501 for a method
    /// that no route can have, 400 when the path cannot be decoded.
    pub fn find(&self, method: &str, path: &str) -> Result<Match, Response> {
        let parts: Option<Vec<String>> = segments(path).map(percent_decode).collect();
        let parts = parts.filter(|_| path.starts_with('/')).ok_or_else(|| {
            Response::error(400, "invalid_request", "the path has a percent escape that cannot be decoded")
        })?;
        let mut fitting: Vec<&Entry> = self.entries.iter().filter(|e| fits(&e.segments, &parts)).collect();
        fitting.sort_by_key(|e| places(&e.segments));
        let Some(best) = fitting.first().map(|e| places(&e.segments)) else {
            return Err(Response::error(404, "not_found", "there is nothing at this path"));
        };
        // A path that is named literally is not also one of a place's values.
        fitting.retain(|e| places(&e.segments) == best);
        let wanted = Method::from_name(method);
        if let Some(entry) = fitting.iter().find(|e| Some(e.route.method) == wanted) {
            let params = entry
                .segments
                .iter()
                .zip(parts)
                .filter_map(|(segment, part)| match segment {
                    Segment::Place(name) => Some((*name, part)),
                    Segment::Literal(_) => None,
                })
                .collect();
            return Ok(Match { route: entry.route, params });
        }
        let mut allowed: Vec<&str> = Vec::new();
        for entry in fitting {
            allowed.push(entry.route.method.name());
            if entry.route.method == Method::Get {
                allowed.push("HEAD");
            }
        }
        allowed.sort_unstable();
        let allowed = allowed.join(", ");
        let known = wanted.is_some() || matches!(method, "OPTIONS" | "TRACE" | "CONNECT");
        let (status, code) = if known { (405, "invalid_request") } else { (501, "invalid_request") };
        let message = format!("{method} is not possible here; possible: {allowed}");
        Err(Response::error(status, code, &message).with_header("allow", allowed))
    }
}

/// The segments of a path. `/a/` has an empty last one and so is not `/a`.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.strip_prefix('/').unwrap_or(path).split('/')
}

fn fits(segments: &[Segment], parts: &[String]) -> bool {
    segments.len() == parts.len()
        && segments.iter().zip(parts).all(|(segment, part)| match segment {
            Segment::Literal(text) => text == part,
            Segment::Place(_) => !part.is_empty(),
        })
}

/// Which segments are places, the first one weighing most.
fn places(segments: &[Segment]) -> Vec<bool> {
    segments.iter().map(|s| matches!(s, Segment::Place(_))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::handler::{Context, Flow, Request, Step};
    use std::sync::Arc;

    fn handler(_: Request, _: &Arc<Context>) -> Flow {
        Step::respond(Response::no_content())
    }

    fn router() -> Router {
        Router::new(&[
            Route::new(Method::Get, "/v1/capsules/{id}", handler),
            Route::new(Method::Delete, "/v1/capsules/{id}", handler),
            Route::new(Method::Get, "/v1/capsules/stats", handler),
            Route::new(Method::Post, "/v1/capsules/{id}/processes/{selector}", handler),
            Route::new(Method::Get, "/", handler),
        ])
    }

    #[test]
    fn literal_segments_win_and_places_are_decoded() {
        let router = router();
        let found = router.find("GET", "/v1/capsules/stats").map(|m| (m.route.path, m.params));
        assert_eq!(found, Ok(("/v1/capsules/stats", vec![])));
        let found = router.find("HEAD", "/v1/capsules/cl-%31").map(|m| m.params);
        assert_eq!(found, Ok(vec![("id", "cl-1".to_string())]));
        let found = router.find("POST", "/v1/capsules/a%2Fb/processes/c").map(|m| m.params);
        assert_eq!(found, Ok(vec![("id", "a/b".to_string()), ("selector", "c".to_string())]));
        assert!(router.find("GET", "/").is_ok());
    }

    #[test]
    fn errors_say_what_is_possible() {
        let router = router();
        let status = |method, path| router.find(method, path).map(|_| 0).unwrap_or_else(|r| r.status);
        for path in ["/v1", "/v1/capsules", "/v1/capsules/", "/v1/capsules/x/", "//", "/v1//x"] {
            assert_eq!(status("GET", path), 404, "{path}");
        }
        assert_eq!(status("GET", "/v1/capsules/%zz"), 400);
        assert_eq!(status("GET", "*"), 400);
        let refused = router.find("POST", "/v1/capsules/x").err();
        let allow = refused.and_then(|r| r.headers.iter().find(|h| h.0 == "allow").cloned());
        assert_eq!(allow, Some(("allow", "DELETE, GET, HEAD".to_string())));
        assert_eq!(status("DELETE", "/v1/capsules/stats"), 405);
        assert_eq!(status("OPTIONS", "/"), 405);
        assert_eq!(status("BREW", "/"), 501);
    }
}
