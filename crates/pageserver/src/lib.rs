//! Placeholder.

pub mod page_service;
