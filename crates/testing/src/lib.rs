//! What the tests of the other crates share: models to compare with, and things to start.

pub mod naive_history;
pub mod postgres;
pub mod redo;
