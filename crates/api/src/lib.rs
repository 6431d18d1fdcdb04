//! What the parts of Varve say to each other over HTTP, and to operators: JSON types, errors with stable codes, one
//! client.
//!
//! - [`admin`]: bodies of the admin API `/v1`, as operators and the CLI use it.
//! - [`history`]: how far back a tenant can go, and its snapshots.
//! - [`host`]: bodies of the routes that hosts and the computes on them use.
//! - [`kept_pages`]: pages that WAL does not give back;
//! - [`kept_files`]: which files of a data directory hosts send and the control plane takes.
//! - [`client`]: the HTTP client that hosts, computes and the CLI use; [`token`]: what it shows.
//! - [`settings`]: which settings of Postgres a tenant cannot make; [`size`]: how much of a machine a compute may take.
//! - [`refusal`]: why something was not done: a code that stays, and a sentence that says what to do.
//!
//! This crate stands below all roles and knows none of them: no storage, no sockets of Postgres, no processes.

pub mod admin;
pub mod client;
pub mod history;
pub mod host;
pub mod kept_files;
pub mod kept_pages;
pub mod refusal;
pub mod settings;
pub mod size;
pub mod token;
pub mod verification;

pub use refusal::{Code, Problem, Refusal};
