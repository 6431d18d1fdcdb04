//! The simulation.

pub mod actors;
pub mod compute;
pub mod kinds;
pub mod ledger;
pub mod many;
pub mod node;
pub mod run;
pub mod steward;
pub mod template;
pub mod threads;
pub mod trace;
pub mod wal;
pub mod world;
