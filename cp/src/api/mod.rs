//! The public API: the handlers, one file a resource, and the routing table.
//!
//! Handlers look at a request in this order: who asks (401), what it is about (404), in which state that
//! is (409), and what the request says (400). `openapi.yaml` beside this crate describes what is here.

pub mod api_keys;
pub mod capsule_access;
pub mod capsule_create;
pub mod capsule_metrics;
pub mod capsules;
pub mod exec;
pub mod fields;
pub mod files;
pub mod health;
pub mod host_agents;
pub mod host_delete;
pub mod hosts;
mod jobs;
pub mod lifecycle;
pub mod login;
pub mod me;
pub mod network;
pub mod principal;
pub mod processes;
pub mod snapshots;
pub mod streams;
pub mod teams;
pub mod templates;
pub mod users;

pub use capsule_access::{Target, with_capsule, with_capsule_as};
pub use jobs::jobs;

use crate::http::handler::Method::{Delete, Get, Patch, Post};
use crate::http::handler::Route;

/// Every route.
pub fn routes() -> Vec<Route> {
    let mut routes = vec![
        Route::new(Get, "/health", health::get),
        Route::new(Post, "/v1/auth/login", login::login),
        Route::new(Post, "/v1/auth/switch-team", login::switch_team),
        Route::new(Get, "/v1/me", me::get),
        Route::new(Patch, "/v1/me", me::rename),
        Route::new(Delete, "/v1/me", me::delete),
        Route::new(Post, "/v1/me/password", me::change_password),
        Route::new(Get, "/v1/api-keys", api_keys::list),
        Route::new(Post, "/v1/api-keys", api_keys::create),
        Route::new(Delete, "/v1/api-keys/{id}", api_keys::delete),
        Route::new(Get, "/v1/users/search", users::search),
        Route::new(Get, "/v1/teams", teams::list),
        Route::new(Post, "/v1/teams", teams::create),
        Route::new(Get, "/v1/teams/{id}", teams::get),
        Route::new(Patch, "/v1/teams/{id}", teams::rename),
        Route::new(Delete, "/v1/teams/{id}", teams::delete),
        Route::new(Get, "/v1/teams/{id}/members", teams::members),
        Route::new(Post, "/v1/teams/{id}/members", teams::add_member),
        Route::new(Patch, "/v1/teams/{id}/members/{uid}", teams::set_role),
        Route::new(Delete, "/v1/teams/{id}/members/{uid}", teams::remove_member),
        Route::new(Post, "/v1/teams/{id}/leave", teams::leave),
        Route::new(Get, "/v1/hosts", hosts::list),
        Route::new(Post, "/v1/hosts", hosts::create),
        Route::new(Post, "/v1/hosts/register", host_agents::register),
        Route::new(Post, "/v1/hosts/auth/refresh", host_agents::refresh),
        Route::new(Get, "/v1/hosts/{id}", hosts::get),
        Route::new(Delete, "/v1/hosts/{id}", host_delete::delete),
        Route::new(Get, "/v1/hosts/{id}/delete-preview", host_delete::preview),
        Route::new(Post, "/v1/hosts/{id}/token", hosts::renew_token),
        Route::new(Post, "/v1/hosts/{id}/heartbeat", host_agents::heartbeat),
        Route::new(Get, "/v1/hosts/{id}/tags", hosts::tags),
        Route::new(Post, "/v1/hosts/{id}/tags", hosts::add_tag),
        Route::new(Delete, "/v1/hosts/{id}/tags/{tag}", hosts::remove_tag),
        Route::new(Get, "/v1/capsules", capsules::list),
        Route::new(Post, "/v1/capsules", capsule_create::create),
        Route::new(Get, "/v1/capsules/{id}", capsules::get),
        Route::new(Delete, "/v1/capsules/{id}", capsules::delete),
        Route::new(Post, "/v1/capsules/{id}/ping", lifecycle::ping),
        Route::new(Post, "/v1/capsules/{id}/pause", lifecycle::pause),
        Route::new(Post, "/v1/capsules/{id}/resume", lifecycle::resume),
        Route::new(Get, "/v1/capsules/{id}/network", network::get),
        Route::new(Patch, "/v1/capsules/{id}/network", network::change),
        Route::new(Get, "/v1/capsules/{id}/metrics", capsule_metrics::get),
        Route::new(Post, "/v1/capsules/{id}/exec", exec::exec),
        Route::new(Get, "/v1/capsules/{id}/processes", processes::list),
        Route::new(Delete, "/v1/capsules/{id}/processes/{selector}", processes::kill),
        Route::new(Post, "/v1/capsules/{id}/files/list", files::list),
        Route::new(Post, "/v1/capsules/{id}/files/mkdir", files::make_directory),
        Route::new(Post, "/v1/capsules/{id}/files/remove", files::remove),
        Route::new(Post, "/v1/capsules/{id}/clone", snapshots::clone),
        Route::new(Get, "/v1/snapshots", templates::list),
        Route::new(Post, "/v1/snapshots", snapshots::create),
        Route::new(Delete, "/v1/snapshots/{name}", snapshots::delete),
    ];
    routes.extend(streams::routes());
    routes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn openapi_yaml_describes_exactly_what_is_routed() {
        let methods = ["get", "post", "put", "patch", "delete"];
        let mut described = BTreeSet::new();
        let mut path = "";
        // Paths are indented by two, their methods by four; nothing else there ends like them.
        let paths = include_str!("../../openapi.yaml").lines().skip_while(|line| *line != "paths:").skip(1);
        for line in paths.take_while(|line| line.is_empty() || line.starts_with(' ')) {
            let Some(name) = line.strip_suffix(':') else { continue };
            if let Some(found) = name.strip_prefix("  ").filter(|name| name.starts_with('/')) {
                path = found;
            } else if let Some(method) = name.strip_prefix("    ").filter(|name| methods.contains(name)) {
                described.insert(format!("{} {path}", method.to_uppercase()));
            }
        }
        let routed: BTreeSet<String> =
            routes().iter().map(|route| format!("{} {}", route.method.name(), route.path)).collect();
        assert_eq!(routed.len(), routes().len(), "a route is there twice");
        assert_eq!(described.difference(&routed).collect::<Vec<_>>(), Vec::<&String>::new(), "not served");
        assert_eq!(routed.difference(&described).collect::<Vec<_>>(), Vec::<&String>::new(), "not described");
    }
}
