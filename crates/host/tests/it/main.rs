//! What the mount promises, one module for each kind of promise, on synthetic clusters and under stock Postgres.

mod mount_failures;
mod mount_model;
mod mount_observer;
mod mount_postgres;
mod mount_semantics;
mod support;
