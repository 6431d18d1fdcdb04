//! The pageserver: takes the WAL of stock Postgres servers in, files it into timelines, and serves pages and base backups of any moment.
//!
//! [`pageserver::Pageserver`] holds everything together; `docs/architecture.md` says how a record and a page travel through the modules.

pub mod admin;
pub mod base_backup;
pub mod cluster;
pub mod computes;
pub mod error;
pub mod ingest;
pub mod layers;
mod moment;
pub mod page_service;
pub mod pageserver;
mod password;
pub mod template;
pub mod templates;
pub mod tenant;
pub mod time;
pub mod timeline;
pub mod timeline_pages;
pub mod wal_receiver;
