//! The pageserver: takes the WAL of stock Postgres servers in, files it into timelines, and serves pages and base backups of any moment.

pub mod base_backup;
pub mod cluster;
pub mod ingest;
pub mod page_service;
pub mod template;
pub mod time;
pub mod wal_receiver;
