//! The page service: pages, sizes and base backups of timelines, over the Postgres wire protocol.
//!
//! A client connects as to a Postgres server and runs one of the commands that [`Command`] lists. `pagestream_v3` makes the connection a
//! page stream: requests in, answers out, many in flight, answers in the order of the requests.
//!
//! How a page stream is served ([`page_stream`]): all frames that the socket holds are parsed; what the timeline has at hand is answered at
//! once, on the connection's own task, into one buffer that goes out with one write. From the first request that is not at hand, requests are
//! gathered into batches, and each batch is one job of a bounded pool of threads, which may wait for disk, object store or WAL. Several jobs of
//! a connection run side by side; their answers wait for their turn.
//!
//! Limits: connections, jobs, requests in a batch, bytes of answers a connection may have unsent (then its requests are not read), lengths of
//! messages, time for a handshake, for a half message, for a client that does not take its answers. Bytes that are no message get an
//! `ErrorResponse` and the connection ends. A job that panics costs its connection, not the server.
//!
//! The service knows timelines only as [`TimelinePages`], found by words through [`PageSource`].

mod answer;
mod backup;
mod command;
mod connection;
mod listener;
mod page_stream;
mod pool;
mod session;
mod source;

pub use command::Command;
pub use listener::PageService;
pub use source::{BackupOptions, PageSource, SourceError, TimelinePages};

use std::time::Duration;

/// Limits of a page service.
#[derive(Clone, Copy, Debug)]
pub struct PageServiceConfig {
    /// Most connections; further ones are told so and closed.
    pub connections_max: usize,
    /// Most jobs that run at once, each on a thread of the runtime's blocking pool.
    pub jobs_max: usize,
    /// Most base backups that are made at once; further ones wait.
    pub backups_max: usize,
    /// How long a client may take to log in.
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
            jobs_max: 64,
            backups_max: 8,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30 * 60),
            stalled_timeout: Duration::from_secs(60),
            shutdown_timeout: Duration::from_secs(10),
        }
    }
}
