//! The host role: all that knows this machine. It runs computes, each one stock Postgres on a lazily cloned data
//! directory.
//!
//! Two kinds of processes:
//! - [`agent`] is the host itself: it does what the control plane orders, keeps records of its computes ([`record`],
//!   [`reserve`]), chooses ports ([`mod@ports`]) and user ids ([`uids`]), finds Postgres installations ([`bin_dirs`])
//!   and runs `initdb` ([`initdb`]).
//! - [`process`] is the life of one compute process: it begins at the server, mounts the data directory ([`mount`],
//!   over FUSE), starts Postgres ([`postgres`]) in a sandbox ([`sandbox`], [`cgroup`]) with a bounded `pg_wal`
//!   ([`wal_gate`]), offers its walsender
//!   ([`handover`]), attaches, follows orders, and begins anew when Postgres ends in any way but a clean shutdown: the
//!   cache is disposable, and durability is the pageserver's. What Postgres has written can be dropped from the cache
//!   once the page service has it ([`rebase`]).
//!
//! It knows the other roles only through the page service ([`page_fetcher`]) and the messages of `varve-api`. No path
//! of another process's disk comes here, and none of ours goes out but that of a socket.

pub mod agent;
pub mod asked;
mod beneath;
pub mod bin_dirs;
mod cache_report;
pub mod cgroup;
mod check;
pub mod config;
pub mod dirs;
mod events;
pub mod files;
pub mod handover;
pub mod identity;
pub mod initdb;
mod kept_pages;
pub mod leftover;
mod log;
pub mod mount;
pub mod page_fetcher;
mod passage;
mod password;
pub mod ports;
pub mod postgres;
pub mod process;
mod rebase;
pub mod record;
pub mod reserve;
pub mod sandbox;
pub mod server;
pub mod sessions;
mod sizing;
mod start;
pub mod start_failure;
pub mod tablespaces;
mod task;
pub mod uids;
pub mod waiters;
pub mod wal_gate;
