//! Framing of the Postgres wire protocol, version 3, as far as a page service, its clients and a WAL receiver need it;
//! both sides.
//!
//! [`startup`] is what comes first on a connection; [`frame`] cuts a stream into tagged messages; [`frontend`] holds
//! the messages that a client sends, [`backend`] those that a server sends, [`replication`] what travels inside the
//! COPY of a replication stream. Everything works on byte buffers and does no I/O, so that blocking and async code
//! share it.
//!
//! Decoding never panics and allocates nothing that a length field merely announces: a frame longer than the reader's
//! limit is refused when its five header bytes are there.

pub mod backend;
pub mod frame;
pub mod frontend;
pub mod replication;
pub mod startup;

mod text;

pub use backend::{AuthRequest, BackendMessage, Row, ServerMessage};
pub use frame::{FRAME_HEADER_SIZE, Frame, peek_frame, take_frame};
pub use frontend::FrontendMessage;
pub use startup::StartupPacket;

/// Bytes that are not the Postgres wire protocol as we speak it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A message longer than it may be.
    #[error("{what} of {len} bytes is longer than the {max} that are allowed here")]
    TooLong {
        /// What kind of message.
        what: String,
        /// Length that it announces.
        len: u64,
        /// Limit.
        max: usize,
    },
    /// Something else is wrong with it.
    #[error("{0}")]
    Malformed(String),
}

impl WireError {
    pub(crate) fn malformed(what: impl Into<String>) -> WireError {
        WireError::Malformed(what.into())
    }
}
