//! Who is asking: passwords, tokens, API keys, and the random numbers and ids behind them.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`random`] | the kernel's random numbers |
//! | [`id`] | ids such as `cl-…` |
//! | [`jwt`] | tokens of users and hosts, HS256 |
//! | [`password`] | PBKDF2 and the stored form of a password |
//! | [`secret`] | API keys and host tokens: made, recognised, hashed |
//! | [`limiter`] | bounds on failed logins |

pub mod id;
pub mod jwt;
pub mod limiter;
pub mod password;
pub mod random;
pub mod secret;
