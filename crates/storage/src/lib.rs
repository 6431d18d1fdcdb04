//! The storage engine: the history of each timeline as versions of keys, in immutable layers on an object store, and
//! the WAL log that makes bytes durable before they get there.
//!
//! - What is durable first: [`wal_log::WalLog`], one log on one disk for the WAL of all timelines.
//! - What becomes of it: [`memtable`]s, flushed as [`layer`]s into the [`store::Store`], merged as [`compaction`]
//!   plans; [`manifest::Manifest`] says which layers a timeline has, [`history::History`] reads a key at any LSN.
//! - Who it belongs to: [`tenant_log::TenantLog`], the one place of a tenant's branches, timelines, writer epochs and
//!   endpoints. Log and manifests are [`edit_log`]s, which one owner writes and the next one fences.
//! - How a timeline is addressed: [`key`] and [`value`] for what is stored, [`ids`] for what is named, [`moment`] for
//!   points in its history, [`timeline::Positions`] for how far it has come.
//!
//! **It promises** that what [`wal_log::WalLog::sync`] or a commit returned is there after any crash; that a damaged or
//! missing byte is an error with a name, never another answer; that an owner that was fenced writes nothing that
//! counts. Every durable byte is in an [`envelope`] or a chunk with a checksum and a version (docs/storage.md).
//!
//! **It must not know** sockets, HTTP, processes, or how Postgres changes a page. Clock, chance, threads, disk and
//! store are given.

pub mod block_cache;
pub mod budget;
pub mod chain;
pub mod chance;
pub mod checkpoint_fields;
pub mod compaction;
pub mod database;
pub mod edit_log;
pub mod envelope;
pub mod free_space;
pub mod history;
pub mod ids;
pub mod kept_wal;
pub mod key;
pub mod key_hash;
pub mod layer;
pub mod layer_map;
pub mod manifest;
pub mod memtable;
pub mod moment;
pub mod page_cache;
pub mod relation;
pub mod relation_size;
pub mod replication_origin;
pub mod retained;
mod row_fields;
pub mod shared_wal;
pub mod size_cache;
pub mod slru_extent;
pub mod store;
pub mod tenant_log;
pub mod threads;
pub mod timeline;
pub mod value;
mod varint;
pub mod wal_index;
pub mod wal_log;
