//! Proof, offline, that what was built is what was read.
//!
//! Four layers, each of which trusts only the ones before it:
//! - formats: [`codec`] (inflate, gzip, tar, zlib), [`toml`], [`json`], [`version`], [`date`], [`elf`];
//! - integrity: [`lock`] and [`manifest`] against [`archive`] against [`vendor`], and no
//!   [`configuration`] that could put anything else in their place;
//! - judgement: [`policy`], [`audits`], [`inventory`] (with its [`scan`]), [`licence`], [`advisories`],
//!   over what [`resolve`] says is compiled for a [`target`];
//! - evidence: [`sbom`], the list inside each binary ([`dependencies`]), [`inputs`] and [`release`].
//!
//! Every failure is a [`failure::Class`] with its own exit code. Nothing here opens a socket.

pub mod advisories;
pub mod archive;
pub mod audits;
pub mod check;
pub mod codec;
pub mod configuration;
pub mod date;
pub mod dependencies;
pub mod elf;
pub mod failure;
pub mod files;
pub mod inputs;
pub mod inventory;
pub mod json;
pub mod licence;
pub mod lock;
pub mod manifest;
pub mod policy;
pub mod release;
pub mod resolve;
pub mod sbom;
pub mod scan;
pub mod target;
pub mod toml;
pub mod vendor;
pub mod version;
