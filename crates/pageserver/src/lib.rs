//! The pageserver: the sockets of the engine, and which tenants it owns.
//!
//! - [`Pageserver`] is what the control plane asks: moments, writer epochs, templates; [`tenants`] says whose tenants
//!   are here.
//! - [`page_service`] serves pages and base backups, fairly between tenants; [`timeline_pages`] is its way to a
//!   timeline, [`source`] finds one.
//! - [`wal_receiver`] is the synchronous standby of a compute; [`writers`] has one for each.
//!
//! **It promises** that what is acknowledged is durable here and covered by head; that it acknowledges nothing of a
//! tenant that it lost, and says who has it; that no client, slow or many, keeps another tenant's waiting.
//!
//! **It must not know** processes, mounts or `initdb`: what runs on a host is the host's, and reached through a socket
//! that the host hands out.

mod ending;
pub mod error;
pub mod held_wal;
pub mod page_service;
pub mod scrubbing;
pub mod server;
mod ship_wal;
pub mod source;
pub mod tenants;
pub mod timeline_pages;
pub mod wal_receiver;
mod wall_clock;
pub mod writers;

pub use error::ServerError;
pub use server::{Pageserver, PageserverConfig};
pub use ship_wal::ShipWal;
