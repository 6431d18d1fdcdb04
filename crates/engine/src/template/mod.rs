//! Template: the cluster that every new tenant of a Postgres version begins with.
//!
//! Stock `initdb` runs once for each version, on a host, and what it made is taken into a history
//! ([`import_data_directory`]) at the end of its last checkpoint, and kept in the store ([`Templates`]). Tenants share
//! that history and differ in what is no block: system identifier, passwords, TLI.
//!
//! The import takes any data directory that was shut down cleanly, so it also serves to take an existing cluster in.

mod import;
mod kept;

pub use import::{Imported, Progress, import_data_directory, read_control};
pub use kept::{StartupBlock, Template, TemplateFacts, Templates};

use std::path::PathBuf;

use varve_postgres::Major;
use varve_postgres::control::ControlError;
use varve_storage::history::HistoryError;

/// A template that could not be made, or a data directory that could not be taken in.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The cluster is not stopped.
    #[error("the cluster in {} is {state}: stop it cleanly first (pg_ctl stop -m fast)", .dir.display())]
    NotShutDown {
        /// Its data directory.
        dir: PathBuf,
        /// Its state.
        state: &'static str,
    },
    /// A cluster of another kind than is supported.
    #[error("the cluster in {} cannot be taken in: {what}", .dir.display())]
    Unsupported {
        /// Its data directory.
        dir: PathBuf,
        /// Why not.
        what: String,
    },
    /// `pg_control` cannot be read.
    #[error("{}: {error}", .dir.display())]
    Control {
        /// The data directory.
        dir: PathBuf,
        /// What is wrong.
        error: ControlError,
    },
    /// A data directory of another major.
    #[error("{} is a data directory of version '{found}', expected {expected:?}", .dir.display())]
    OtherMajor {
        /// The data directory.
        dir: PathBuf,
        /// What its PG_VERSION says.
        found: String,
        /// What was expected.
        expected: Major,
    },
    /// A file that is not as Postgres writes it.
    #[error("{}: {what}", .path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file that could not be read or written.
    #[error("{}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The history could not be written.
    #[error(transparent)]
    History(#[from] HistoryError),
}

impl TemplateError {
    fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> TemplateError {
        let path = path.into();
        move |error| TemplateError::Io { path, error }
    }
}
