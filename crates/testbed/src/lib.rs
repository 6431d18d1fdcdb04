//! What end-to-end tests start and look at: stock Postgres servers of all majors, `varve dev`, MinIO, dumps,
//! comparisons, suites.

pub mod acknowledged;
pub mod appended;
pub mod application;
pub mod beside;
pub mod comparison;
pub mod dev;
pub mod dump;
pub mod limit;
pub mod minio;
pub mod postgres;
pub mod redo;
pub mod redo_coverage;
pub mod session;
pub mod suites;
mod warned;
