//! Postgres's own facts, in pure Rust: positions in WAL, the names of relations and forks, the page layout and its
//! checksum, `pg_control`, and WAL pages and records, for the majors that Varve supports.
//!
//! This crate does no I/O, knows nothing of Varve (no tenants, no storage), and never panics on bytes from outside:
//! what cannot be decoded is an error that says where and what was expected. Where a layout follows a Postgres header,
//! the item's doc names it.
//!
//! What differs between majors stands in [`major`], what differs between minors of one in [`minor`]; everything else
//! asks there.

pub mod control;
mod fields;
pub mod ids;
pub mod lsn;
pub mod major;
pub mod minor;
pub mod page;
pub mod paths;
pub mod relation_map;
pub mod replication_origin;
pub mod replication_slot;
pub mod settings;
pub mod slru;
pub mod timestamp;
pub mod two_phase;
pub mod wal;

pub use ids::{BlockNumber, Fork, Oid, RelFork, RelNode};
pub use lsn::Lsn;
pub use major::Major;
pub use page::{BLCKSZ, Page};
pub use timestamp::Timestamp;
