//! Clients of the page service.
//!
//! [`PageClient`] is a session; it becomes a [`PageStream`] (requests and answers, many in flight) or a stream of a
//! base backup's bytes. [`BlockingPageClient`] is for plain threads, such as those of a FUSE mount: it keeps a few
//! sessions, which the calling threads use themselves without a hop to another, and it waits for a server that is away.
//! [`BaseBackup`] reads a base backup on a plain thread.

mod asynchronous;
mod blocking;
mod command;
mod pool;
mod stream;

pub use asynchronous::{BaseBackupStream, PageClient};
pub use blocking::{BlockingOptions, BlockingPageClient};
pub use command::{BaseBackup, BaseBackupOptions};
pub use stream::PageStream;

use varve_postgres::Lsn;

use crate::message::{Header, Query, Request};

/// The moment that a read is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadLsn {
    /// History at this position; [`Lsn::MAX`] is the newest.
    pub lsn: Lsn,
    /// What is read did not change between here and `lsn`.
    pub not_modified_since: Lsn,
}

impl ReadLsn {
    /// History at `lsn`, nothing known about earlier changes.
    pub fn at(lsn: Lsn) -> ReadLsn {
        ReadLsn { lsn, not_modified_since: lsn }
    }

    /// The newest there is.
    pub fn newest() -> ReadLsn {
        ReadLsn { lsn: Lsn::MAX, not_modified_since: Lsn::INVALID }
    }

    fn request(self, request_id: u64, query: Query) -> Request {
        Request { header: Header { request_id, request_lsn: self.lsn, not_modified_since: self.not_modified_since }, query }
    }
}
