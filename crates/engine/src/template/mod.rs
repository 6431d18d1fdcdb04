//! Template: the cluster that every new tenant of a Postgres version begins with.
//!
//! Stock `initdb` runs once for each version ([`prepare_template`]), and what it made is taken into a history ([`import_data_directory`]) at the end of its
//! last checkpoint. Tenants share that history and differ in what is no block: system identifier, passwords, TLI.
//!
//! The import takes any data directory that was shut down cleanly, so it also serves to take an existing cluster in.

mod import;
mod initdb;

pub use import::{Imported, Progress, import_data_directory, read_control};
pub use initdb::{RunAs, SUPERUSER, SYSTEM_ROLE, Template, prepare_template, server_major};

use std::path::PathBuf;

use varve_postgres::Major;
use varve_postgres::control::ControlError;
use varve_storage::history::HistoryError;

/// A template that could not be made, or a data directory that could not be taken in.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No server where one was expected.
    #[error("there is no Postgres in {}: install the server of the version you want (on Debian: apt-get install postgresql-15), or say where \
             its programs are with --pg-bin-dir", .bin_dir.display())]
    NoPostgres {
        /// Where it was looked for.
        bin_dir: PathBuf,
    },
    /// A server of a version that is not supported.
    #[error("the Postgres in {} is of version '{version}': 14 to 18 are supported", .bin_dir.display())]
    UnsupportedVersion {
        /// Where it is.
        bin_dir: PathBuf,
        /// What it says.
        version: String,
    },
    /// Postgres refuses to run as root.
    #[error("Postgres refuses to run as root: start varve as another user, or give it a user for Postgres to run as (such as 'postgres')")]
    Root,
    /// A program failed.
    #[error("{program} failed: {what}")]
    Program {
        /// Which.
        program: String,
        /// What it said.
        what: String,
    },
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
