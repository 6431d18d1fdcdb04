//! The engine beside stock Postgres: what it takes in, what it gives out.

#![allow(clippy::disallowed_methods, reason = "real servers take real time")]

mod base_backup_starts_postgres;
mod counters_wrap_around;
mod free_space_maps_are_kept;
mod golden;
mod ingest_equals_postgres;
mod oracle;
mod template;
