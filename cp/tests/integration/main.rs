//! Migrations, the database layer and the API's handlers on a real PostgreSQL, with hosts that speak the
//! real messages. The server is private to the run: see [`postgres`].

mod accounts;
#[path = "../support/agent.rs"]
mod agent;
mod capsules;
mod database;
mod fake_host;
mod frozen;
mod hosts;
mod lifecycle;
mod migrations;
mod network;
mod postgres;
mod proxying;
mod reconciling;
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod teams;
