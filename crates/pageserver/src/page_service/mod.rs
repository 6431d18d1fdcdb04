//! The page service: pages, sizes and base backups of timelines, over the Postgres wire protocol.
//!
//! A client connects as to a Postgres server and runs one of the commands that [`Command`] lists. `pagestream_v3` makes
//! the connection a page stream: requests in, answers out, many in flight, answers in the order of the requests.
//!
//! How a page stream is served ([`page_stream`]): all frames that the socket holds are parsed. What the timeline has at
//! hand is answered at once, on the connection's own task, into one buffer that goes out with one write. From the first
//! request that is not at hand, requests are gathered into batches, and each batch is one job of a pool of few threads,
//! which may wait for disk and object store. Several jobs of a connection run side by side; their answers wait for
//! their turn.
//!
//! **It promises fairness between tenants**, whatever one of them does:
//! - To wait for WAL or for a timeline takes no thread and no place, and ends with the client ([`jobs`]).
//! - Places for work are few and given to tenants in turns; none has more than half of them ([`pool`]).
//! - A slow reader of a base backup holds no thread: the backup is made into memory, and sent by the connection's task.
//!   A tenant has at most so many of them in memory. Backups with all relations have a small pool of their own, and a
//!   deadline for what is not taken ([`backup`]).
//! - A tenant's connections are at most half of all. Who logs in and commands nothing is soon sent away.
//!
//! Further limits: connections, requests in a batch, bytes of answers a connection may have unsent (then its requests
//! are not read), lengths of messages, time for a handshake, for a half message, for a client that does not take its
//! answers. Bytes that are no message get an `ErrorResponse` and the connection ends. A job that panics costs its
//! connection, not the server.
//!
//! The service knows timelines only as [`TimelinePages`], found by words through [`PageSource`].

mod answer;
mod backup;
mod command;
mod connection;
mod jobs;
mod listener;
mod page_stream;
mod pool;
mod session;
mod shares;
mod source;

pub use command::Command;
pub use listener::PageService;
pub use source::{Arrival, BackupOptions, PageSource, SourceError, TimelinePages};

use std::time::Duration;

/// Limits of a page service.
#[derive(Clone, Copy, Debug)]
pub struct PageServiceConfig {
    /// Most connections; further ones are told so and closed. A tenant's commands run on at most half of them.
    pub connections_max: usize,
    /// Most jobs that answer requests at once, each on a thread of the runtime's blocking pool.
    pub jobs_max: usize,
    /// Most base backups that are made into memory at once, likewise.
    pub backups_max: usize,
    /// Most base backups of a tenant that are made or not wholly sent; further ones wait.
    pub backups_of_tenant_max: usize,
    /// Most bytes of a base backup in memory; a larger one is made anew as those with all relations are.
    pub backup_memory_max: usize,
    /// Most base backups with all relations at once, each on a thread that waits for its client.
    pub full_backups_max: usize,
    /// How long a client may take to log in, and then until its first command.
    pub handshake_timeout: Duration,
    /// How long a client may be silent between messages.
    pub idle_timeout: Duration,
    /// How long a client may be silent in the middle of a message, or take none of the bytes that it is sent.
    pub stalled_timeout: Duration,
    /// How long connections and jobs may take to end at shutdown.
    pub shutdown_timeout: Duration,
}

impl Default for PageServiceConfig {
    fn default() -> Self {
        PageServiceConfig {
            connections_max: 4096,
            jobs_max: 16,
            backups_max: 8,
            backups_of_tenant_max: 8,
            backup_memory_max: 64 * 1024 * 1024,
            full_backups_max: 4,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30 * 60),
            stalled_timeout: Duration::from_secs(60),
            shutdown_timeout: Duration::from_secs(10),
        }
    }
}
