//! The WAL receiver: the synchronous standby of a compute, or of any other primary.
//!
//! One thread a primary does everything between socket and disk, since each hop to another thread costs more than the
//! work: it reads what the socket holds, frames it into records ([`varve_postgres::wal::Framer`], which checks each
//! CRC), hands bytes and records to a [`WalSink`], lets it sync once for all of that, and replies at once.
//!
//! What an acknowledgement says: write and flush are the end of the last whole, CRC-checked record that the sink made
//! durable; apply is how far the store has it ([`WalSink::store_durable`]). So `synchronous_commit = on` waits for our
//! disk, `remote_apply` for the bucket. Bytes of a record that is not whole are kept and never acknowledged; a record
//! whose CRC is wrong ends the stream with an error that names it.
//!
//! Before the first byte ([`session`]): the server is the tenant's (system identifier), of the right major and on the
//! right Postgres timeline, was started for this Varve timeline and writer epoch, is no minor with holes in synchronous
//! commit, and waits for this very standby. Bytes must join on to what is there, and a start below the timeline's base
//! is refused here, since a walsender streams whatever its files hold.
//!
//! A connection that breaks is made again, from the last whole record on, until [`Receiver::stop`]; what cannot get
//! better by trying again ends the receiver. After `stop` has returned nothing is acknowledged any more, whatever the
//! thread was doing.
//!
//! Beside it, on a thread and a connection of its own, [`slot`] keeps the slot that makes the primary retain what the
//! store lacks.

mod receiver;
mod server_version;
mod session;
mod shared;
mod sink;
mod slot;
mod stream;

pub use receiver::{Outcome, Receiver, Stopper};
pub use shared::{ReceiverPhase, ReceiverPositions};
pub use sink::{SinkError, WalSink};

use std::time::Duration;

use varve_postgres::wal::WalError;
use varve_postgres::{Lsn, Major};
use varve_protocol::{ClientError, ConnectConfig};

/// Whose WAL to receive, and what must be so.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// The timeline, for logs and the thread's name.
    pub label: String,
    /// The server, and a role there that may replicate.
    pub connect: ConnectConfig,
    /// The name that we give as `application_name`, by which the primary knows the standby it waits for.
    pub standby_name: String,
    /// The tenant's.
    pub system_identifier: u64,
    /// The tenant's.
    pub major: Major,
    /// The Postgres timeline.
    pub tli: u32,
    /// Where the timeline begins: nothing below it is taken.
    pub base: Lsn,
    /// Where to go on: the end of the last whole record that is durable.
    pub start: Lsn,
    /// The start of that record, if known.
    pub last_record: Option<Lsn>,
    /// Settings that must have these values, such as `varve.timeline` and `varve.epoch`.
    pub settings: Vec<(String, String)>,
    /// What `synchronous_standby_names` must be; until it is, nothing is received. `None` for a primary that is not
    /// ours to configure.
    pub synchronous_standby_names: Option<String>,
    /// The physical slot to create and advance, if any.
    pub slot: Option<SlotConfig>,
}

/// The slot that makes the primary keep WAL until the store has it.
#[derive(Clone, Debug)]
pub struct SlotConfig {
    /// Its name, `varve`.
    pub name: String,
    /// How often it is advanced, if there is reason to.
    pub interval: Duration,
}

/// Why a receiver ended by itself. Nothing behind the last acknowledged position was acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum ReceiverError {
    /// The server is not the one whose WAL this timeline takes.
    #[error("{endpoint}: refused to receive WAL: {what}")]
    Refused {
        /// The server.
        endpoint: String,
        /// What was found, what was expected, what to do.
        what: String,
    },
    /// The stream is not WAL as Postgres writes it.
    #[error("{endpoint}: stopped receiving WAL, acknowledged up to {framed}: {source}")]
    Wal {
        /// The server.
        endpoint: String,
        /// End of the last whole record.
        framed: Lsn,
        /// What is wrong, and where.
        source: WalError,
    },
    /// Bytes are missing.
    #[error("{endpoint}: stopped receiving WAL: the stream goes on at {found}, expected {expected}")]
    Gap {
        /// The server.
        endpoint: String,
        /// Where the stream was.
        expected: Lsn,
        /// Where it went on.
        found: Lsn,
    },
    /// The server will not send what we need, now or later.
    #[error("the server cannot send WAL from {start} on: {source}")]
    Server {
        /// Where we would go on.
        start: Lsn,
        /// What it says.
        source: ClientError,
    },
    /// The WAL could not be kept.
    #[error("stopped receiving WAL: {0}")]
    Sink(#[from] SinkError),
    /// A fault of ours.
    #[error("internal error: the WAL receiver's thread panicked; the server's log has more")]
    Panicked,
}
