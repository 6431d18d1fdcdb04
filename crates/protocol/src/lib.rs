//! The page service's language: its messages, their framing in the Postgres wire protocol, and clients.
//!
//! - [`message`]: requests and responses of the page stream, as bytes and back.
//! - [`wire`]: the Postgres wire protocol's messages, both sides, without I/O.
//! - [`connect`]: making a connection, authentication, a blocking connection (to the page service or to Postgres
//!   itself).
//! - [`client`]: [`client::PageClient`] for async code, [`client::BlockingPageClient`] for plain threads,
//!   [`client::BaseBackup`].
//!
//! Whatever bytes come in, nothing here panics, and no buffer grows beyond a named limit. The crate knows nothing of
//! storage or tenants: a tenant or a timeline is a word in a command.

pub mod client;
pub mod connect;
pub mod message;
pub mod wire;

pub use client::{BaseBackup, BaseBackupOptions, BlockingPageClient, PageClient, PageStream, ReadLsn};
pub use connect::{ClientError, ConnectConfig, Endpoint};
pub use message::{Answer, Header, Query, RelationSize, Request, Response, SlruSegmentSize, Version};
