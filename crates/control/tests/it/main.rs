//! The control plane over a pageserver and a host that are played here, and a store in memory.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod broken_off;
mod door;
mod host;
mod keys;
mod life;
mod lists;
mod pageserver;
mod restore;
mod world;
