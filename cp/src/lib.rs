//! Wrenn's control plane: the public HTTP API over PostgreSQL and the wire sessions to its hosts.
//!
//! One event loop thread owns every socket (HTTP clients, host sessions); a fixed pool of worker
//! threads owns the database connections. Handlers are plain functions that return the next
//! [step](http::handler::Step), so no thread ever waits for a host or a client.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`http`] | server loop, connections, router, what handlers see |
//! | [`worker`] | the pool of threads with database connections |
//! | [`hosts`] | the live sessions to hosts; scheduler and reconciler |
//! | [`wire_clients`] | clients of the wire protocol on the public port |
//! | [`api`] | the handlers, one file a resource, and the routing table |
//! | [`proxy`] | services inside capsules, reached by the Host header |
//! | [`auth`] | passwords, logins, API keys, host tokens |
//! | [`db`] | the database connection, migrations, one file a table |
//! | [`audit`] | who did what |
//! | [`network`] | what a capsule may reach, as requests say it |
//! | [`budget`] | bounds on what many hold together |
//! | [`cli`] | the command line |

pub mod api;
pub mod audit;
pub mod auth;
pub mod budget;
pub mod cli;
pub mod db;
pub mod hosts;
pub mod http;
pub mod network;
pub mod proxy;
pub mod wire_clients;
pub mod worker;
