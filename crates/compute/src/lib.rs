//! A compute: one stock Postgres on a lazily cloned data directory.
//!
//! [`mount`] is the data directory over FUSE; [`process`] is the life of one compute process: it begins at the pageserver, mounts,
//! starts Postgres ([`postgres`]), attaches, follows orders, and begins anew when Postgres ends in any way but a clean shutdown, for
//! the cache is disposable and durability is the pageserver's.
//!
//! This crate knows the pageserver only through the page service ([`page_source`]) and the admin HTTP API ([`server`]).

pub mod config;
pub mod dirs;
pub mod files;
pub mod mount;
pub mod page_source;
pub mod postgres;
pub mod process;
pub mod server;
pub mod sessions;
mod start;
pub mod waiters;
