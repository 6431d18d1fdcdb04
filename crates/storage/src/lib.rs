//! The storage engine: the history of each timeline as versions of keys, in immutable layers on an object store, and
//! the WAL log that makes bytes durable before they get there.
//!
//! It knows keys, values and LSNs; it knows nothing of sockets, HTTP or processes.

pub mod block_cache;
pub mod budget;
pub mod chain;
pub mod chance;
pub mod checkpoint_fields;
pub mod compaction;
pub mod database;
pub mod edit_log;
pub mod envelope;
pub mod history;
pub mod ids;
pub mod kept_wal;
pub mod key;
pub mod key_hash;
pub mod layer;
pub mod layer_map;
pub mod manifest;
pub mod memtable;
pub mod page_cache;
pub mod relation;
pub mod relation_size;
pub mod replication_origin;
mod row_fields;
pub mod size_cache;
pub mod slru_extent;
pub mod store;
pub mod tenant_log;
pub mod threads;
pub mod timeline;
pub mod value;
pub mod wal_index;
pub mod wal_log;
