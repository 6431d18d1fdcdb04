//! The pageserver: the sockets of the engine.

pub mod page_service;
pub mod wal_receiver;
