//! The pageserver's sockets: one binary, so that it is linked once.

mod page_service;
mod wal_receiver;
