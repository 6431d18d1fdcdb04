//! What the whole program promises, from the command line down to stock Postgres: one module for each promise.
//!
//! `cargo test -p varve --test e2e main_job::` runs one module.

mod bad_input;
mod comparison;
mod damaged_files;
mod free_space;
mod full_disks;
mod harder_loads;
mod kept_pages;
mod left_in_pg_wal;
mod like_stock;
mod limits;
mod lost_machines;
mod main_job;
mod majors;
mod minio;
mod nothing_is_lost;
mod postgres_suites;
mod random_lsns;
mod replication;
mod restores_under_kills;
mod retention;
mod sandbox;
mod scrub;
mod tablespaces;
mod tidy;
mod two_machines;
mod verify;
mod verify_restore;
mod waiting_commits;
mod way_back;
mod written_blocks;
