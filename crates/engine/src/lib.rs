//! The engine: a timeline's whole life, from the WAL that comes in to the pages and base backups that go out.
//!
//! - [`LiveTimeline`] is an open timeline: positions, the one writer, ingest, flush, merge; [`Tenant`] a tenant's log
//!   and those of its timelines that are open.
//! - [`WorkQueue`] does the background work of all of them, with fair shares by tenant and a fixed number of threads.
//! - [`retention`] says from where on history is kept; [`resolve`] says which record boundary a moment is; [`catalog`]
//!   which databases there are and how large; [`backup`] and [`base_backup`] make a data directory that a stock
//!   Postgres starts from; [`template`] takes one in.
//!
//! **It promises** that head covers every acknowledged commit; that what a fenced compute writes is never taken; that
//! what is closed and opened again, after a crash too, stands where it stood; that no lock of a map is held while
//! anything is read or written; that a wait takes no thread.
//!
//! **It must not know** sockets, processes, HTTP, or what a compute is beyond the stream that it writes. Clock,
//! threads, disk and store are given ([`Context`]), so that a simulation can give others.

pub mod backup;
pub mod base_backup;
pub mod catalog;
pub mod cluster;
pub mod context;
pub mod error;
pub mod fair_queue;
pub mod held;
pub mod histories;
pub mod ingest;
pub mod moments;
mod orphans;
pub mod resolve;
pub mod retention;
pub mod scrub;
pub mod shipping;
pub mod template;
pub mod tenant;
pub mod timeline;
pub mod work_queue;

pub use context::Context;
pub use error::EngineError;
pub use tenant::Tenant;
pub use timeline::{EpochStart, LiveTimeline, StreamEnd, StreamError, Tail, WalStream};
pub use work_queue::WorkQueue;
