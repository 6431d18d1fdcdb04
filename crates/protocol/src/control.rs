//! What a compute process and the pageserver say to each other over the admin HTTP API: JSON bodies of `/v1/computes/{id}/...`.
//!
//! The life of a compute, seen from here: [`Begin`] (the server fences whoever wrote the branch before and says where to start),
//! Postgres starts, [`Attach`] (the server connects its WAL receiver), then [`Orders`] by long poll until told otherwise. After the
//! server restarted, the compute attaches again. Each fresh start of Postgres is an *incarnation* and begins again.

use serde::{Deserialize, Serialize};

/// Answer to `POST /v1/computes/{id}/begin`: what to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// Tenant name.
    pub tenant: String,
    /// Branch name.
    pub branch: String,
    /// Tenant id, 32 hexadecimal digits.
    pub tenant_id: String,
    /// Timeline id, 32 hexadecimal digits.
    pub timeline_id: String,
    /// Postgres major.
    pub pg_version: u32,
    /// Directory of the `postgres` binary.
    pub pg_bin_dir: String,
    /// Where the base backup is taken, as Postgres prints it.
    pub base_lsn: String,
    /// The writer epoch; none for a throw-away compute, which may not write the timeline.
    pub epoch: Option<u32>,
    /// Name of the synchronous standby; none for a throw-away compute.
    pub standby_name: Option<String>,
    /// Number of this incarnation, as in [`Orders`].
    pub incarnation: u64,
    /// Address of the page service, `host:port`.
    pub page_service: String,
    /// Address that Postgres listens on.
    pub listen: String,
    /// Port that Postgres listens on.
    pub port: u16,
    /// SCRAM verifier of the superuser's password, as `pg_authid.rolpassword` holds it.
    pub password_verifier: String,
    /// Databases, each (tablespace, database), whose directories the mount must show.
    pub databases: Vec<(u32, u32)>,
    /// Tablespaces but for the two default ones.
    pub tablespaces: Vec<u32>,
    /// Postgres's catalog version, part of the names of directories in tablespaces.
    pub catalog_version: u32,
    /// Blocks (tablespace, database, relation, fork, block) that a start reads, to be fetched in one batch.
    pub startup_blocks: Vec<BlockName>,
}

/// Body of `POST /v1/computes/{id}/attach`: Postgres runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attach {
    /// The timeline that it runs on.
    pub timeline_id: String,
    /// Its writer epoch.
    pub epoch: Option<u32>,
    /// The incarnation.
    pub incarnation: u64,
    /// Postmaster's process id.
    pub pid: u32,
    /// Process id of the mount (and supervisor).
    pub mount_pid: u32,
    /// Directory of the private unix socket, through which the WAL receiver connects.
    pub socket_dir: String,
    /// Port, which also names the socket.
    pub port: u16,
    /// Where its WAL is flushed to: everything it ever got acknowledged ends at or before.
    pub flushed: String,
}

/// Answer to [`Attach`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attached {
    /// Name that `synchronous_standby_names` must have; it changes when another server process takes the tenant over.
    pub standby_name: Option<String>,
}

/// What a compute is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// Run.
    Run,
    /// Stop cleanly and end.
    Stop,
    /// Another compute writes the branch: kill Postgres at once and end.
    Fenced,
}

/// Answer to `GET /v1/computes/{id}/orders?incarnation=N`, which waits while there is nothing new.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orders {
    /// What to do.
    pub desired: Desired,
    /// The incarnation that should run: when it is above the one that does, Postgres is killed and begins anew.
    pub incarnation: u64,
    /// Number of the server process; when it changed, attach again.
    pub server_run: String,
}

/// A block by name: tablespace, database, relation, fork, block.
pub type BlockName = (u32, u32, u32, u8, u32);

/// Body of `POST /v1/computes/{id}/startup-blocks`: what a start of Postgres read before it answered, in that order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartupBlocks {
    /// The blocks.
    pub blocks: Vec<BlockName>,
}

/// Body of `POST /v1/computes/{id}/ended`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ended {
    /// The incarnation that ended.
    pub incarnation: u64,
    /// Whether Postgres shut down cleanly, so that all its WAL was sent.
    pub clean: bool,
    /// Why, in words.
    pub reason: String,
}

/// Body of `POST /v1/computes/{id}/files`: a file that has no WAL and must outlive the compute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileVersion {
    /// The incarnation that wrote it.
    pub incarnation: u64,
    /// Path relative to the data directory.
    pub path: String,
    /// Contents, base64; none when the file was removed.
    pub contents: Option<String>,
}

/// An `application/problem+json` answer (RFC 9457).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// Stable name of the kind of error.
    pub code: String,
    /// HTTP status.
    pub status: u16,
    /// Short text for the status.
    pub title: String,
    /// What happened and what to do.
    pub detail: String,
}
