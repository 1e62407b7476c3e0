//! Migrations, the database layer and the API's handlers on a real PostgreSQL, with hosts that speak the
//! real messages. The server is private to the run: see [`postgres`].

mod accounts;
mod capsules;
mod database;
mod fake_host;
mod hosts;
mod lifecycle;
mod migrations;
mod postgres;
mod reconciling;
mod stage;
mod teams;
