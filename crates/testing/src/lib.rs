//! What tests of any crate share and that needs no server: seeds, a simulated disk and store, a naive history to
//! compare with.

pub mod naive_history;
pub mod random;
pub mod sim_disk;
pub mod sim_store;
