//! What the tests of the other crates share: models to compare with, and things to start.

pub mod acknowledged;
pub mod application;
pub mod beside;
pub mod comparison;
pub mod dev;
pub mod dump;
pub mod limit;
pub mod minio;
pub mod naive_history;
pub mod postgres;
pub mod random;
pub mod redo;
pub mod redo_coverage;
pub mod sim_disk;
pub mod sim_store;
pub mod suites;
