//! A migrated database with an admin, and a driver that carries out the steps of handlers: database and
//! compute steps here and now, host calls against [`FakeHost`]s.

use crate::fake_host::FakeHost;
use crate::postgres::new_filled_database;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use wrenn_cp::api;
use wrenn_cp::auth::id::{Kind, new_slug};
use wrenn_cp::auth::jwt::{self, UserClaims};
use wrenn_cp::db::users::{self, NewUser};
use wrenn_cp::db::{Database, Timestamp, migrate, teams};
use wrenn_cp::http::context::Context;
use wrenn_cp::http::handler::{Flow, HostError, Method, Request, Response, Route, Step};

pub const PASSWORD: &str = "correct horse";
pub const ADMIN: &str = "admin@example.com";

/// A program under test without its sockets.
pub struct Stage {
    pub url: String,
    pub db: Database,
    pub context: Arc<Context>,
    pub hosts: Vec<FakeHost>,
    /// A host that comes back in the first pause.
    pub away: Option<FakeHost>,
    routes: Vec<Route>,
    /// Every stage is another client: failed logins are counted by address.
    peer: IpAddr,
}

fn parameters(route: &'static str, path: &str) -> Option<Vec<(&'static str, String)>> {
    let (pattern, parts): (Vec<_>, Vec<_>) = (route.split('/').collect(), path.split('/').collect());
    if pattern.len() != parts.len() {
        return None;
    }
    let mut found = Vec::new();
    for (pattern, part) in pattern.into_iter().zip(parts) {
        match pattern.strip_prefix('{').and_then(|p| p.strip_suffix('}')) {
            Some(name) => found.push((name, part.to_string())),
            None if pattern == part => {}
            None => return None,
        }
    }
    Some(found)
}

impl Stage {
    pub fn new() -> Stage {
        static NEXT: AtomicU32 = AtomicU32::new(0x0a00_0001);
        let url = new_filled_database(|url| {
            let mut db = Database::connect(url).expect("connect");
            migrate::run(&mut db).expect("migrate");
            api::users::create(&mut db, ADMIN, Some("Admin"), true, PASSWORD).expect("the admin");
        });
        let db = Database::connect(&url).expect("connect");
        let context = Context {
            jwt_secret: b"0123456789abcdef0123456789abcdef".to_vec(),
            database_url: url.clone(),
            proxy_domain: None,
            trusted_proxies: Vec::new(),
            version: "test",
        };
        let peer = IpAddr::V4(Ipv4Addr::from(NEXT.fetch_add(1, Ordering::Relaxed)));
        Stage {
            url,
            db,
            context: Arc::new(context),
            hosts: Vec::new(),
            away: None,
            routes: api::routes(),
            peer,
        }
    }

    /// Another program on the same database.
    pub fn attach(url: &str, context: &Arc<Context>) -> Stage {
        Stage {
            url: url.to_string(),
            db: Database::connect(url).expect("connect"),
            context: Arc::clone(context),
            hosts: Vec::new(),
            away: None,
            routes: api::routes(),
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }

    /// A request with a body and one header.
    pub fn request(&mut self, method: Method, target: &str, header: (&str, &str), body: &str) -> Response {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (name.to_string(), value.to_string())
        });
        let mut fitting: Vec<_> = self
            .routes
            .iter()
            .filter(|route| route.method == method)
            .filter_map(|route| Some((route.handler, parameters(route.path, path)?)))
            .collect();
        fitting.sort_by_key(|(_, params)| params.len());
        let (handler, params) = fitting.into_iter().next().expect("a route");
        let request = Request {
            method,
            path: path.to_string(),
            query: query.collect(),
            headers: vec![(header.0.to_string(), header.1.to_string())],
            body: body.as_bytes().to_vec(),
            params,
            peer: self.peer,
            proven_key: None,
        };
        let first = handler(request, &Arc::clone(&self.context));
        self.drive(first)
    }

    /// Carries steps out to the end, what goes on behind an answer as well.
    pub fn drive(&mut self, mut flow: Flow) -> Response {
        let mut behind = None;
        for _ in 0..1000 {
            flow = match flow {
                Err(response) | Ok(Step::Respond(response)) => return behind.unwrap_or(response),
                Ok(Step::RespondThen(response, then)) => {
                    behind = Some(response);
                    Ok(*then)
                }
                Ok(Step::Database(work)) => work(&mut self.db),
                Ok(Step::Compute(work)) => work(),
                Ok(Step::Host(call)) => {
                    let host = self.hosts.iter_mut().find(|host| host.address == call.address);
                    let result = match host {
                        Some(host) => host.answer(&call),
                        None => Err(HostError::Unreachable {
                            address: call.address.clone(),
                            reason: "connection refused".into(),
                        }),
                    };
                    (call.then)(result)
                }
                Ok(Step::Pause(ms, then)) => {
                    std::thread::sleep(Duration::from_millis(ms));
                    let away = self.away.take();
                    self.hosts.extend(away);
                    then(Ok(()))
                }
                Ok(_) => panic!("a step that this driver does not know"),
            };
        }
        panic!("the handler does not come to an end");
    }

    /// Runs all recurring jobs once.
    pub fn run_jobs(&mut self) {
        for job in api::jobs() {
            let first = (job.run)(&Arc::clone(&self.context));
            let end = self.drive(first);
            assert!(end.status < 400, "{}: {:?}", job.name, end.error_message());
        }
    }

    /// Logs somebody in.
    pub fn login(&mut self, email: &str, password: &str) -> Response {
        let body = json!({"email": email, "password": password}).to_string();
        self.request(Method::Post, "/v1/auth/login", ("x-test", ""), &body)
    }

    /// An account with a team of its own and the admin's password, logged in: the `Authorization` header.
    /// Without the work that passwords make on purpose.
    pub fn person(&mut self, email: &str) -> String {
        let claims = self
            .db
            .transaction(|sql| {
                if email != ADMIN {
                    let password = users::find_by_email(sql, ADMIN)?.and_then(|admin| admin.password);
                    let id = Kind::User.new_id();
                    let password = password.expect("the admin has a password");
                    let new = NewUser { id: &id, email, name: "", password: &password, is_admin: false };
                    users::insert(sql, &new)?;
                    teams::insert(sql, &Kind::Team.new_id(), "Team", &new_slug(), &id)?;
                }
                let user = users::find_by_email(sql, email)?.expect("an account");
                let team_id = teams::of_user(sql, &user.id)?.remove(0).team.id;
                Ok(UserClaims::new(&user.id, &team_id, Timestamp::now().seconds()))
            })
            .expect("an account");
        format!("Bearer {}", jwt::sign(&self.context.jwt_secret, &claims).expect("a token"))
    }

    /// A new API key of somebody's team.
    pub fn api_key(&mut self, bearer: &str) -> String {
        let answer = self.request(Method::Post, "/v1/api-keys", ("authorization", bearer), "{}");
        assert_eq!(answer.status, 201, "{:?}", answer.error_message());
        text(&json(&answer)["key"])
    }

    /// A registered host that serves everyone and was heard of: its id.
    pub fn add_host(&mut self, bearer: &str, address: &str, memory_mb: u32) -> String {
        let made =
            self.request(Method::Post, "/v1/hosts", ("authorization", bearer), r#"{"type":"regular"}"#);
        assert_eq!(made.status, 201, "{:?}", made.error_message());
        let body = json!({
            "token": json(&made)["registration_token"], "address": address, "arch": "x86_64", "cpu_cores": 2,
            "memory_mb": memory_mb, "disk_gb": 100,
        });
        let registered = self.request(Method::Post, "/v1/hosts/register", ("x-test", ""), &body.to_string());
        assert_eq!(registered.status, 201, "{:?}", registered.error_message());
        self.hosts.push(FakeHost::new(address));
        let (id, token) = (text(&json(&registered)["host"]["id"]), text(&json(&registered)["token"]));
        let beat = format!("/v1/hosts/{id}/heartbeat");
        assert_eq!(self.request(Method::Post, &beat, ("x-host-token", &token), "{}").status, 204);
        id
    }
}

/// A response's body.
pub fn json(response: &Response) -> Value {
    serde_json::from_slice(&response.body).unwrap_or(Value::Null)
}

/// A JSON text.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a text")).to_string()
}

/// A response's error: status, code, message.
pub fn error(response: &Response) -> (u16, String, String) {
    let body = json(response);
    (response.status, text(&body["error"]["code"]), text(&body["error"]["message"]))
}
