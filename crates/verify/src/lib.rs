//! Checks Varve against Postgres, from outside the engine.
//!
//! - [`wal`]: redoes WAL that was written with `wal_consistency_checking = all` and compares every page with the one
//!   that Postgres put into the record. The WAL comes from a [`WalDirectory`], a server's [`WalStream`] or what a
//!   pageserver keeps of a branch's ([`branch_wal`]).
//! - [`timeline`]: compares every page of a branch at an LSN with a stopped [`DataDirectory`] or a paused [`Standby`].
//! - [`recovery`]: redoes WAL as fast as it can, to be measured beside Postgres's own crash recovery.
//!
//! Memory is bounded whatever the WAL's or the database's size. Nothing here changes what it checks: data directories
//! are only read, a server whose WAL is followed never waits for us, and the only thing done to a standby is to pause
//! its replay for a while.
//!
//! The crate knows Postgres's files and the page service's client; it knows nothing of storage.

mod data_directory;
mod error;
mod overflow_file;
mod standby;
mod wal_directory;
mod wal_stream;

pub mod branch_wal;
pub mod recovery;
pub mod timeline;
pub mod wal;

pub use data_directory::{DataDirectory, ForkSize};
pub use error::VerifyError;
pub use overflow_file::OverflowFile;
pub use standby::Standby;
pub use wal_directory::WalDirectory;
pub use wal_stream::WalStream;
