//! What can go wrong in a pageserver beyond its engine.

use std::io;
use std::path::PathBuf;

use varve_engine::EngineError;
use varve_postgres::Lsn;
use varve_storage::edit_log::EditLogError;
use varve_storage::ids::{RandomError, TenantId, TimelineId};
use varve_storage::store::{ParseObjectNameError, StoreError};
use varve_storage::tenant_log::TenantError;
use varve_storage::tenant_log::names::NameError;
use varve_storage::threads::Panicked;
use varve_storage::wal_log::WalLogError;

use crate::tenants::LostTo;

/// See the module's doc.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Leftover WAL does not join on to what is here.
    #[error("the WAL that is left of timeline {timeline} begins at {start}, and what is here ends at {head}")]
    LeftoverGap {
        /// The timeline.
        timeline: TimelineId,
        /// Where the leftover begins.
        start: Lsn,
        /// Where it would have to.
        head: Lsn,
    },
    /// The engine's.
    #[error(transparent)]
    Engine(EngineError),
    /// There is no such tenant, or it was deleted.
    #[error("there is no tenant with id {0}")]
    UnknownTenant(TenantId),
    /// There is no tenant of that name.
    #[error("there is no tenant '{0}'")]
    UnknownTenantName(String),
    /// Another server has the tenant.
    #[error("tenant {tenant} belongs to {owner}: ask there, or take it back with 'varve tenant take' on this server")]
    NotOwner {
        /// The tenant.
        tenant: TenantId,
        /// Who has it.
        owner: LostTo,
    },
    /// A name could not be looked up.
    #[error(transparent)]
    Name(#[from] NameError),
    /// No thread could be had.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// A file or folder of this server's.
    #[error("{}: {error}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The identity of the WAL log cannot be read.
    #[error("{}: it should hold the WAL log's id, 32 hexadecimal digits: move the folder away if the WAL log is lost", .0.display())]
    WalLogId(PathBuf),
    /// A data directory that a host sent cannot be taken apart.
    #[error("the data directory that the host sent is not right: {0}")]
    Archive(String),
    /// A major that this release does not know.
    #[error("PostgreSQL {0} is not supported: 14 to 18 are")]
    UnsupportedMajor(u32),
}

/// What the engine's error says already.
macro_rules! from_engine {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for ServerError {
            fn from(error: $error) -> ServerError {
                ServerError::Engine(error.into())
            }
        })*
    };
}

from_engine!(EngineError, EditLogError, StoreError, WalLogError, Panicked, ParseObjectNameError, RandomError, TenantError);

impl ServerError {
    /// Wraps an error of a file or folder.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> ServerError {
        let path = path.into();
        move |error| ServerError::File { path, error }
    }
}
