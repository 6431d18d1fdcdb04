//! What hosts, and the compute processes on them, say to the control plane: JSON bodies of `/v1/hosts/...` and
//! `/v1/computes/{id}/...`. All of these routes need the host's token.
//!
//! A host registers ([`Hello`]), then asks by long poll what should run on it ([`HostOrders`]), starts and ends compute
//! processes accordingly, and reports ([`ComputeReport`]). Orders name everything that should run, so that a message
//! that is lost is healed by the next.
//!
//! The life of a compute, seen from here: [`Begin`] (the server fences whoever wrote the branch before and says where
//! to start), Postgres starts, [`Attach`] (the server connects its WAL receiver), then [`Orders`] by long poll until
//! told otherwise. After the server restarted, the compute attaches again. Each fresh start of Postgres is an
//! *incarnation* and begins again.

use serde::{Deserialize, Serialize};

use crate::admin::{CacheUse, EventKind};
use crate::kept_pages::KeptPages;
use crate::size::{Capacity, CurrentLimits, Size};

/// Body of `POST /v1/computes/{id}/begin`; may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginRequest {
    /// The host that runs the process. A compute that moved to another host refuses the process that it left behind.
    #[serde(default)]
    pub host: Option<String>,
}

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
    /// SCRAM verifier of the superuser's password, see [`Password`].
    pub password_verifier: String,
    /// Its number. A server of an older release has the first one only.
    #[serde(default = "first_password")]
    pub password_number: u32,
    /// Databases, each (tablespace, database), whose directories the mount must show.
    pub databases: Vec<(u32, u32)>,
    /// Tablespaces but for the two default ones.
    pub tablespaces: Vec<u32>,
    /// Where they are, as whoever made them named it; empty for one inside the data directory. A server of an older
    /// release does not say.
    #[serde(default)]
    pub tablespace_locations: Vec<(u32, String)>,
    /// Postgres's catalog version, part of the names of directories in tablespaces.
    pub catalog_version: u32,
    /// Blocks (tablespace, database, relation, fork, block) that a start reads, to be fetched in one batch.
    pub startup_blocks: Vec<BlockName>,
    /// Settings that hold for this start, over those of the branch.
    #[serde(default)]
    pub settings: Vec<(String, String)>,
    /// Pages that a stop exactly here kept.
    #[serde(default)]
    pub pages: KeptPages,
    /// How much of the machine it may take.
    #[serde(default)]
    pub size: Size,
}

fn first_password() -> u32 {
    1
}

impl Begin {
    /// The superuser's password.
    pub fn password(&self) -> Password {
        Password { number: self.password_number, verifier: self.password_verifier.clone() }
    }
}

/// Parameters of `GET` and `POST /v1/computes/{id}/leftover-wal`: whose WAL is left in the compute's `pg_wal` after its
/// processes were killed. `POST` brings it as `application/octet-stream`, before the compute begins again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftoverQuery {
    /// The timeline that it wrote.
    pub timeline_id: String,
    /// The epoch in which it did.
    pub epoch: u32,
    /// Where the bytes begin; only with `POST`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// Where the last whole record ends; only with `POST`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
}

/// Answer to both: where the pageserver's WAL of that epoch ends; none when what is left does not count any more.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftoverStart {
    /// The position.
    pub lsn: Option<String>,
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
    /// Postmaster's process id. Told to operators; nobody acts on it.
    pub pid: u32,
    /// Process id of the mount (and supervisor). Told to operators; nobody acts on it.
    pub mount_pid: u32,
    /// Where the compute's host hands out connections to its walsender.
    pub walsender: Walsender,
    /// Where its WAL is flushed to: everything it ever got acknowledged by whom it waited for then ends at or before.
    pub flushed: String,
    /// The standby name that it waited for when it looked. Where the answer has another one, the compute waits for that
    /// one first, and then attaches again: until then a former server may have acknowledged more.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// What was done at this start that its owner should know of, in words.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Where a host hands out connections to a compute's walsender: a Unix socket of the host's. Whoever connects sends
/// `credential` and a newline, and gets a descriptor that is connected to Postgres (`SCM_RIGHTS`), or a line that says
/// why not.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walsender {
    /// Path of the socket, at most 107 bytes.
    pub socket: String,
    /// What opens it: random, new for each incarnation.
    pub credential: String,
}

impl std::fmt::Debug for Walsender {
    /// Without the credential: what is logged must open nothing.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walsender").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Answer to [`Attach`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attached {
    /// Name that `synchronous_standby_names` must have; it changes when another server process takes the tenant over.
    pub standby_name: Option<String>,
    /// The superuser's password: another one than at the beginning once it was rotated.
    #[serde(default)]
    pub password: Option<Password>,
}

/// A password of the superuser. The first is given to a server whose superuser has none, each further one once to each
/// history: what the tenant makes of it afterwards stays.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Password {
    /// 1 is the first.
    pub number: u32,
    /// Its SCRAM verifier, as `pg_authid.rolpassword` holds it.
    pub verifier: String,
}

impl std::fmt::Debug for Password {
    /// Without the verifier.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Password").field("number", &self.number).finish_non_exhaustive()
    }
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
    /// How much of the machine it may take; none of a server that does not say.
    #[serde(default)]
    pub size: Option<Size>,
    /// Number of a check of all that is in its databases that is to be made; none of one that is not to be checked. See
    /// [`crate::verification::CheckReport`].
    #[serde(default)]
    pub check: Option<u64>,
}

/// Parameters of the request for [`Orders`]: what the compute does already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrdersQuery {
    /// The incarnation that runs.
    #[serde(default)]
    pub incarnation: u64,
    /// The server run that it has attached to.
    #[serde(default)]
    pub server_run: String,
    /// The size that it has, as [`size_text`] writes it; none of a compute that knows no sizes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Number of the check that it makes or has made, 0 if none; none of a compute that knows no checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<u64>,
}

/// A size as it stands in [`OrdersQuery`]: equal texts are equal sizes.
pub fn size_text(size: &Size) -> String {
    let part =
        |between: Option<crate::size::Between>| between.map_or_else(String::new, |between| format!("{}-{}", between.min, between.max));
    format!("{},{}", part(size.cpu_milli), part(size.memory_bytes))
}

/// A block by name: tablespace, database, relation, fork, block.
pub type BlockName = (u32, u32, u32, u8, u32);

/// Body of `POST /v1/computes/{id}/startup-blocks`: what a start of Postgres read before it answered, in that order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartupBlocks {
    /// The blocks.
    pub blocks: Vec<BlockName>,
}

/// Body of `POST /v1/computes/{id}/cache`, sent now and then, and when its limits change: what became
/// of the block cache, and what the compute may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CacheReport {
    /// The incarnation whose it is.
    pub incarnation: u64,
    /// The figures.
    pub cache: CacheUse,
    /// What the compute may take right now, where it has limits.
    #[serde(default)]
    pub limits: Option<CurrentLimits>,
    /// The LSNs at which its mount reads, or is about to: history at these must stay.
    #[serde(default)]
    pub bases: Vec<String>,
}

/// Body of `POST /v1/computes/{id}/events`: something happened to the compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventReport {
    /// What kind of thing.
    pub kind: EventKind,
    /// What happened, in words.
    pub words: String,
    /// How long ago, in milliseconds: it is told as soon as the server is there.
    pub age_ms: u64,
}

/// Body of `POST /v1/computes/{id}/ended`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ended {
    /// The incarnation that ended.
    pub incarnation: u64,
    /// The timeline that it wrote: a server that was started since may not know.
    #[serde(default)]
    pub timeline_id: Option<String>,
    /// The epoch in which it did.
    #[serde(default)]
    pub epoch: Option<u32>,
    /// Whether Postgres shut down cleanly, and everything that is kept of its files was taken.
    pub clean: bool,
    /// Where the shutdown checkpoint is with which it did, as Postgres prints it: its end is clean once the pageserver
    /// has that.
    #[serde(default)]
    pub checkpoint: Option<String>,
    /// Of a clean end: the pages that WAL does not give back.
    #[serde(default)]
    pub pages: KeptPages,
    /// What of them is left out, in words.
    #[serde(default)]
    pub warnings: Vec<String>,
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

/// Answer to `POST /v1/computes/{id}/pages`, whose body is a piece of a file (`application/octet-stream`).
/// `GET /v1/computes/{id}/pages?name=NAME` gives its bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PieceKept {
    /// The object.
    pub name: String,
}

/// Body of `POST /v1/hosts/{id}/hello`: a host is there, or there again. `id` is 32 hexadecimal digits, made once and
/// kept by the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The machine's name, for people.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// Differs between runs of the host's process.
    pub run: String,
    /// Majors of the Postgres binaries that it has, with their full version, such as (15, "15.20").
    pub postgres: Vec<(u32, String)>,
    /// What it lacks to run computes (no `/dev/fuse`, no user for Postgres), in words; empty when it is fit.
    pub lacks: Vec<String>,
    /// What is wrong with its Postgres binaries, in words: a folder that holds another major than it should.
    #[serde(default)]
    pub problems: Vec<String>,
    /// The most that it gives to one compute; none where it can limit none.
    #[serde(default)]
    pub capacity: Option<Capacity>,
    /// The computes of which it has a record.
    pub computes: Vec<HostedCompute>,
}

/// A compute of which a host has a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostedCompute {
    /// The endpoint's id.
    pub id: String,
    /// The tenant's id.
    pub tenant_id: String,
    /// Whether its process runs.
    pub runs: bool,
}

/// Answer to [`Hello`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// Differs between runs of the control plane's process: when it changes, say hello again.
    pub server_run: String,
}

/// Answer to `GET /v1/hosts/{id}/orders?known=REVISION`, which waits while the revision is still that.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostOrders {
    /// Of these orders.
    pub revision: u64,
    /// As in [`Welcome`].
    pub server_run: String,
    /// Everything that should run on this host, or is to be ended. What the host runs besides is not known to the
    /// control plane: its process is left alone until an order names it.
    pub computes: Vec<ComputeOrder>,
    /// A template to make: run `initdb` of this major and send what it made.
    pub template: Option<TemplateOrder>,
}

/// What a host is to do about a compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeOrder {
    /// The endpoint's id.
    pub id: String,
    /// The tenant's id.
    pub tenant_id: String,
    /// The branch, `tenant/branch`, for people and logs.
    pub branch: String,
    /// Addresses to listen on.
    pub listen: String,
    /// Port to listen on; 0: the host chooses a free one and reports it.
    pub port: u16,
    /// What to do.
    pub action: HostAction,
}

/// See [`ComputeOrder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostAction {
    /// See to it that its process runs. Where it runs with other addresses or another port, the host only looks whether
    /// the new ones can be used, and reports; the process takes them when it begins its next incarnation, which the
    /// control plane tells it afterwards.
    Run,
    /// It was told to end and should have ended by now: end its process, keep its folder with `pg_wal`.
    End,
    /// Everything that it wrote is durable elsewhere: end its process, take its folder and record away.
    Remove,
}

/// Body of `POST /v1/hosts/{id}/computes/{compute}`: what became of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ComputeReport {
    /// Its process was started, and will listen on this port.
    Started {
        /// The port.
        port: u16,
    },
    /// Its process could not be started, or the port cannot be used.
    Refused {
        /// Stable code, such as `port_in_use` or `host_unfit`.
        code: String,
        /// Why, and what to do.
        detail: String,
    },
    /// Its process is gone.
    Gone,
    /// Its folder and record are gone, too.
    Removed,
}

/// See [`HostOrders::template`]. The answer is `POST /v1/hosts/{id}/templates/{order}` with the data directory as a tar
/// archive, compressed with zstd (`application/zstd`), or with a [`crate::Problem`] when `initdb` failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateOrder {
    /// Names the order.
    pub order: String,
    /// The major.
    pub pg_version: u32,
}
