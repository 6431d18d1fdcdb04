//! The control plane over a pageserver and a host that are played here, and a store in memory.

mod door;
mod host;
mod keys;
mod life;
mod lists;
mod pageserver;
mod restore;
mod world;
