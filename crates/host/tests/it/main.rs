//! What the host promises: its orders and the connections that it hands over; and what the mount promises, one module
//! for each kind of promise, on synthetic clusters and under stock Postgres.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

mod agent;
mod handover;
mod mount_budget;
mod mount_failures;
mod mount_model;
mod mount_observer;
mod mount_postgres;
mod mount_semantics;
mod own_settings;
mod support;
