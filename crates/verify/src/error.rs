//! Why something could not be checked.

use std::io;
use std::path::{Path, PathBuf};

use varve_postgres::Lsn;
use varve_postgres::wal::WalError;
use varve_protocol::ClientError;
use varve_redo::RedoError;
use varve_redo::verify::StoreError;

/// Why something could not be checked. What differs is no error but a finding.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A folder is not what it should be.
    #[error("{}: {what}", path.display())]
    NotUsable {
        /// The folder or file.
        path: PathBuf,
        /// What was found, what was expected, what to do.
        what: String,
    },
    /// WAL is damaged: it goes on behind what cannot be read.
    #[error("{}: {source}; the WAL goes on behind that, at {later}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: WalError,
        /// Where WAL is found again.
        later: Lsn,
    },
    /// WAL is not as Postgres writes it.
    #[error("{of}: {source}")]
    Wal {
        /// The server, or what else it is of.
        of: String,
        /// What is wrong, and where.
        source: WalError,
    },
    /// A server did not answer as it should.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A server is not one that can be checked so.
    #[error("{server}: {what}")]
    Server {
        /// The server.
        server: String,
        /// What was found, what was expected, what to do.
        what: String,
    },
    /// Pages could not be read or kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record could not be redone, where that ends the work.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// A fault of ours.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl VerifyError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> VerifyError {
        move |source| VerifyError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn not_usable(path: &Path, what: impl Into<String>) -> VerifyError {
        VerifyError::NotUsable { path: path.to_owned(), what: what.into() }
    }
}
