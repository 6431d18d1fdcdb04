//! Connections to servers that speak the Postgres protocol: where they are, how a client proves who it is, and a
//! blocking connection.

mod auth;
mod config;
mod conninfo;
mod handover;
mod input;
mod socket;

pub mod blocking;

pub use auth::{AuthStep, Authenticator};
pub use config::{ConnectConfig, Endpoint};
pub use conninfo::ParseConninfoError;
pub use handover::{Credential, LINE_MAX as HANDOVER_LINE_MAX};
pub use input::InputBuffer;
pub use socket::{Socket, SocketCloser};

use std::sync::Arc;

use crate::message::MessageError;
use crate::wire::{ServerMessage, WireError};

/// Why a client did not get what it wanted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The connection could not be made, or broke.
    #[error("{endpoint}: {what}: {source}")]
    Io {
        /// The server.
        endpoint: String,
        /// What the client was doing.
        what: &'static str,
        /// What the system says.
        source: Arc<std::io::Error>,
    },
    /// The server closed the connection where an answer was due.
    #[error("{endpoint}: the server closed the connection")]
    Closed {
        /// The server.
        endpoint: String,
    },
    /// The server did not answer in time.
    #[error("{endpoint}: no answer within {seconds} s")]
    TimedOut {
        /// The server.
        endpoint: String,
        /// How long the client waited.
        seconds: u64,
    },
    /// The server refused.
    #[error("{endpoint}: {message}")]
    Server {
        /// The server.
        endpoint: String,
        /// What it says.
        message: Box<ServerMessage>,
    },
    /// The server and the client do not agree on who may come in how.
    #[error("{endpoint}: authentication as '{user}' failed: {what}")]
    Authentication {
        /// The server.
        endpoint: String,
        /// As whom.
        user: String,
        /// Why.
        what: String,
    },
    /// The server sent something that does not belong there.
    #[error("{endpoint}: unexpected answer: {what}")]
    Protocol {
        /// The server.
        endpoint: String,
        /// What was expected and what came.
        what: String,
    },
    /// The page service answered a request with an error.
    #[error("{0}")]
    Answer(String),
}

impl ClientError {
    /// Whether the same on a new connection, later, may go well: the server is away, or says that it is not ready.
    pub fn is_transient(&self) -> bool {
        match self {
            ClientError::Io { .. } | ClientError::Closed { .. } | ClientError::TimedOut { .. } => true,
            ClientError::Server { message, .. } => crate::wire::backend::sqlstate::is_transient(&message.code),
            ClientError::Authentication { .. } | ClientError::Protocol { .. } | ClientError::Answer(_) => false,
        }
    }

    pub(crate) fn protocol(endpoint: &str, what: impl Into<String>) -> ClientError {
        ClientError::Protocol { endpoint: endpoint.to_owned(), what: what.into() }
    }

    pub(crate) fn wire(endpoint: &str, error: &WireError) -> ClientError {
        Self::protocol(endpoint, error.to_string())
    }

    pub(crate) fn message(endpoint: &str, error: &MessageError) -> ClientError {
        Self::protocol(endpoint, error.to_string())
    }

    pub(crate) fn server(endpoint: &str, message: ServerMessage) -> ClientError {
        ClientError::Server { endpoint: endpoint.to_owned(), message: Box::new(message) }
    }

    pub(crate) fn io(endpoint: &str, what: &'static str, source: std::io::Error) -> ClientError {
        ClientError::Io { endpoint: endpoint.to_owned(), what, source: Arc::new(source) }
    }
}
