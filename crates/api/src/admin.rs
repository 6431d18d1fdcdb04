//! JSON of the admin HTTP API `/v1`: what operators, and the CLI on their behalf, send and get.
//!
//! LSNs are texts as Postgres prints them, times RFC 3339 in UTC.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::history::History;
use crate::size::{CurrentLimits, Size};
use crate::verification::RestoreVerification;

/// Body of `POST /v1/tenants`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTenant {
    /// Unique name: 1 to 63 lower-case letters, digits, `-`, `_` or `.`, beginning with a letter or digit.
    pub name: String,
    /// Postgres major; by default the newest that this server has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg_version: Option<u32>,
}

/// A tenant.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Tenant {
    /// Unique name.
    pub name: String,
    /// Id, 32 hexadecimal digits.
    pub id: String,
    /// Postgres major.
    pub pg_version: u32,
    /// Postgres's system identifier, as a decimal text (it passes 2^53).
    pub system_identifier: String,
    /// When it was created.
    pub created_at: String,
    /// Number of branches.
    pub branches: usize,
    /// How far back its branches can go.
    #[serde(default)]
    pub history: History,
    /// Whether restores of it work, as far as that was verified.
    #[serde(default)]
    pub restore_verification: RestoreVerification,
    /// Who took the tenant over last, as far as its log says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<TenantOwner>,
    /// In a list: why nothing else is known of this tenant than its name and id. Its log cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The password of a tenant's superuser, as Varve gave it last. What the tenant made of it by SQL is not known here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantPassword {
    /// The tenant's name.
    pub tenant: String,
    /// The role that has it.
    pub role: String,
    /// The password.
    pub password: String,
    /// How many there were, with this one.
    pub number: u32,
}

/// The server that owns a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantOwner {
    /// Its name.
    pub server: String,
    /// Address of its admin API.
    pub url: String,
    /// By which generation of the tenant's log.
    pub generation: u32,
    /// Whether that is the server that answers.
    pub here: bool,
}

/// Answer to the deletion of a tenant or branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Deleted {
    /// What was deleted: `tenant`, or `tenant/branch`.
    pub deleted: String,
}

/// Answer to a clean stop of a compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stopped {
    /// The compute's id.
    pub stopped: String,
    /// What a stock server would have kept and the next start will not find, in words: unlogged contents beyond the
    /// limit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Body of `POST /v1/tenants/{tenant}/branches`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewBranch {
    /// Name, unique in the tenant; same rules as a tenant's.
    pub name: String,
    /// The branch to start from; `main` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The LSN to start at, or `head`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// The time to start at, as `recovery_target_time` means it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// The snapshot to start from, instead of a branch and a moment of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

/// A branch.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Branch {
    /// Tenant name.
    pub tenant: String,
    /// Name, unique in the tenant.
    pub name: String,
    /// The timeline that the name points to.
    pub timeline_id: String,
    /// Postgres timeline (TLI).
    pub tli: u32,
    /// The branch that its timeline came from, if that still has a name.
    pub parent: Option<String>,
    /// Where it left its parent.
    pub branch_lsn: Option<String>,
    /// Head: end of the last whole, durable record.
    pub last_lsn: String,
    /// From where on all of its history can be read.
    #[serde(default)]
    pub earliest_lsn: String,
    /// Bytes of all relations at the newest applied LSN, if they are known without reading.
    pub size_bytes: Option<u64>,
    /// When the timeline was created.
    pub created_at: String,
    /// Id of the compute that writes it, if one runs.
    pub compute: Option<String>,
    /// Why ingest stopped, if it did: what comes later is kept, and cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}

/// Body of `PATCH /v1/tenants/{tenant}/branches/{branch}`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BranchChange {
    /// The new name.
    pub name: String,
}

/// Body of `POST /v1/tenants/{tenant}/branches/{branch}/restore`: one of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// The LSN to go back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// The time to go back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// The snapshot to go back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
}

/// Answer to a restore.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Restored {
    /// The branch, on its new timeline.
    pub branch: Branch,
    /// Where the old history went.
    pub before: Branch,
}

/// Body of `POST /v1/tenants/{tenant}/branches/{branch}/computes`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewCompute {
    /// Port to listen on; a free one by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Addresses to listen on, as `listen_addresses`; loopback by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// An LSN of the past: the compute is thrown away with what it writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// A moment of the past: the compute is thrown away with what it writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// Begin anew where a compute runs already, with these arguments. Without it a running compute is left alone.
    #[serde(default, skip_serializing_if = "is_false")]
    pub replace: bool,
    /// Settings by name that hold for this start only, over those of the branch. Those that Varve makes itself are
    /// refused.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
    /// Its size from now on; what is left out stays. One that runs takes it while it runs.
    #[serde(default, skip_serializing_if = "Size::is_empty")]
    pub size: Size,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde gives a reference
fn is_false(value: &bool) -> bool {
    !*value
}

/// A compute.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Compute {
    /// Id.
    pub id: String,
    /// The branch, `tenant/branch`.
    pub branch: String,
    /// `starting`, `running`, `stopping`, `failed`, or `unknown`: it should run, and no host has said yet that it has
    /// it.
    pub state: String,
    /// A libpq URI; with the password where the answer is about one compute, without it in lists.
    pub conninfo: String,
    /// Process id of the postmaster.
    pub pid: Option<u32>,
    /// Process id of the mount, which also supervises Postgres.
    pub mount_pid: Option<u32>,
    /// Port that Postgres listens on.
    pub port: u16,
    /// The moment that a throw-away compute shows.
    pub lsn: Option<String>,
    /// Why it failed, or, where it runs, why its commits wait.
    pub error: Option<String>,
    /// What was done at its start that its owner should know of, such as a repair.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Its block cache, as it was some seconds ago; none until it has told.
    #[serde(default)]
    pub cache: Option<CacheUse>,
    /// The LSNs at which its data directory reads pages, or is about to; none until it has told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<String>,
    /// How much of the machine it may take: the least and the most.
    #[serde(default)]
    pub size: Size,
    /// What it may take right now; none until it has told, or where there are no limits.
    #[serde(default)]
    pub limits: Option<CurrentLimits>,
}

/// The size of a branch's compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BranchSize {
    /// The branch, `tenant/branch`.
    pub branch: String,
    /// The least and the most.
    pub size: Size,
    /// What the compute may take right now, if one runs and has told.
    #[serde(default)]
    pub limits: Option<CurrentLimits>,
}

/// Something that happened to the compute of a branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// When, RFC 3339 in UTC.
    pub at: String,
    /// What kind of thing.
    pub kind: EventKind,
    /// What happened, in words.
    pub words: String,
}

/// See [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The disk of its host is full: what needs more of it is refused, or waits.
    DiskFull,
    /// The disk of its host will be full soon.
    DiskNearlyFull,
    /// Its memory was not enough, and the kernel killed a process of it.
    OutOfMemory,
    /// Something that the tenant broke was mended.
    Repaired,
    /// It has another size.
    Resized,
    /// It was verified whether a restore of its branch works, and it does not, or that could not be found out.
    RestoreNotVerified,
    /// It could not be started.
    StartFailed,
    /// Its `pg_wal` is at its cap: who writes waits.
    WalFull,
    /// Its `pg_wal` will be at its cap soon.
    WalNearlyFull,
}

impl EventKind {
    /// As it stands in JSON.
    pub fn name(self) -> &'static str {
        match self {
            EventKind::DiskFull => "disk_full",
            EventKind::DiskNearlyFull => "disk_nearly_full",
            EventKind::OutOfMemory => "out_of_memory",
            EventKind::Repaired => "repaired",
            EventKind::Resized => "resized",
            EventKind::RestoreNotVerified => "restore_not_verified",
            EventKind::StartFailed => "start_failed",
            EventKind::WalFull => "wal_full",
            EventKind::WalNearlyFull => "wal_nearly_full",
        }
    }
}

/// The block cache of a compute since its last start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CacheUse {
    /// Reads that it answered without the page service. What the kernel answers itself is not seen.
    pub hits: u64,
    /// Calls of the page service for blocks.
    pub fetches: u64,
    /// Blocks that they brought.
    pub blocks_fetched: u64,
    /// Blocks that were dropped to make room.
    pub blocks_evicted: u64,
    /// How often its base moved on, to a checkpoint of Postgres's.
    #[serde(default)]
    pub rebases: u64,
    /// Blocks that were written, and that may be dropped since the base moved on.
    #[serde(default)]
    pub blocks_handed_over: u64,
    /// Bytes that the page service has as well, and that may be dropped.
    pub cached_bytes: u64,
    /// Bytes that were written, and stay until the base has them, too.
    pub dirty_bytes: u64,
    /// What both should not exceed together; none: whatever there is. They do where `dirty_bytes` alone does.
    pub limit_bytes: Option<u64>,
}

/// The settings of a branch: those of its `postgresql.auto.conf`, which `ALTER SYSTEM` changes, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Settings {
    /// The branch, `tenant/branch`.
    pub branch: String,
    /// Values by name.
    pub settings: BTreeMap<String, String>,
    /// Lines of the file that are no settings, and stay as they are; `reset_all` takes them out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

/// Body of `PATCH /v1/tenants/{tenant}/branches/{branch}/settings`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingsChange {
    /// Take all settings back first.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reset_all: bool,
    /// Settings to take back, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset: Vec<String>,
    /// Settings to make, by name. Those that Varve makes itself are refused.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub set: BTreeMap<String, String>,
}

/// The WAL of a branch and its ancestors that can be had: that written with `wal_consistency_checking`, of which redo
/// can be checked.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Wal {
    /// Head: end of the last whole, durable record.
    pub head: String,
    /// Whether a compute writes the branch, so that there may be more soon.
    pub written: bool,
    /// Ascending; what lies between them is not kept.
    pub ranges: Vec<WalPart>,
}

/// WAL without a gap.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WalPart {
    /// Its first byte; a record begins there, or the page of one.
    pub start: String,
    /// The byte behind its last; a record ends there.
    pub end: String,
    /// The timeline that it is of.
    pub timeline_id: String,
    /// Where it is.
    pub place: WalPlace,
}

/// Where WAL is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WalPlace {
    /// In the store, for good.
    Store,
    /// In the pageserver's WAL log, which the store soon has.
    WalLog,
}

/// The server itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Server {
    /// Its version.
    pub version: String,
    /// Address of its page service, `host:port`.
    pub page_service: String,
    /// Its name, as the logs of its tenants say it.
    #[serde(default)]
    pub name: String,
    /// Address of its admin API.
    #[serde(default)]
    pub url: String,
    /// The machines that run computes.
    #[serde(default)]
    pub hosts: Vec<Host>,
    /// Tenants that it owned and that another server has now.
    #[serde(default)]
    pub lost: Vec<LostTenant>,
    /// WAL that it keeps though no log in the store knows of it.
    #[serde(default)]
    pub orphaned_wal: Vec<OrphanedWal>,
    /// What `remote_apply` waits for.
    #[serde(default)]
    pub store_acknowledgement: StoreAcknowledgement,
    /// How far it is with reading what is stored of its tenants; null where it never did.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
}

/// What a commit with `synchronous_commit = remote_apply` waits for on a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum StoreAcknowledgement {
    /// The WAL log of the server: the store is a folder on the same disk, and would be lost with it.
    #[default]
    WalLog,
    /// An object of WAL in the store: the loss of every machine loses nothing that was acknowledged so.
    Objects(ShippedWal),
}

/// WAL that a server has put into the store before layers, since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShippedWal {
    /// Objects that were put.
    pub objects: u64,
    /// Bytes of WAL in them.
    pub wal_bytes: u64,
    /// Bytes that the store got.
    pub stored_bytes: u64,
    /// Objects that layers do not cover yet.
    pub held_objects: u64,
    /// Objects that were deleted.
    pub deleted_objects: u64,
    /// Bytes of WAL of other servers that were found in the store, and go on here.
    pub found_bytes: u64,
    /// Whether the store did not take the newest: commits that wait for it go on waiting.
    pub is_failing: bool,
}

/// How far a server is with reading everything that is stored of its tenants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubStatus {
    /// Bytes a second that it reads at most; 0: it does not, at present.
    pub rate_bytes: u64,
    /// The name of the last tenant that the current pass has dealt with.
    pub after: Option<String>,
    /// The pass that goes on; null between two.
    pub current: Option<ScrubPass>,
    /// The last one that was complete.
    pub last: Option<ScrubPass>,
}

/// What a pass has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubPass {
    /// When it began.
    pub begun_at: String,
    /// When it ended; null while it goes on.
    pub ended_at: Option<String>,
    /// Tenants that were read.
    pub tenants: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Things that are wrong.
    pub findings: u64,
    /// The first of them.
    pub found: Vec<ScrubFinding>,
}

/// Something that is stored and is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubFinding {
    /// Of which tenant.
    pub tenant: String,
    /// The object, or the log's folder.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

/// WAL that a server keeps though no log in the store knows of it: evidence that the store lost something.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OrphanedWal {
    /// Id of the tenant that it is of.
    pub tenant_id: String,
    /// Id of the timeline.
    pub timeline_id: String,
    /// What is wrong and what to do.
    pub problem: String,
}

/// Answer to `DELETE /v1/server/orphaned-wal/{tenant_id}`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ForgottenWal {
    /// How many timelines' WAL was given up.
    pub timelines: usize,
}

/// A machine that runs computes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Version of its program.
    pub version: String,
    /// Majors of its Postgres binaries.
    pub postgres: Vec<u32>,
    /// What it lacks to run computes.
    pub lacks: Vec<String>,
    /// Whether it has been heard of lately.
    pub here: bool,
}

/// A tenant that a server lost to another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LostTenant {
    /// The tenant's id.
    pub id: String,
    /// Its name, if it is known.
    pub name: Option<String>,
    /// Who has it now.
    pub owner: String,
    /// Address of that server's admin API, if it said so.
    pub url: Option<String>,
}

/// Answer to `GET /readyz`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    /// True: the store can be reached, and WAL be kept. Otherwise the answer is a problem.
    pub ready: bool,
    /// Tenants that other servers took over. The server is ready for all others.
    pub lost: Vec<LostTenant>,
}

/// A moment of a branch.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BranchMoment {
    /// The branch, `tenant/branch`.
    pub branch: String,
    /// The LSN, a record's end.
    pub lsn: String,
    /// Time of the last commit or abort at or before it, if there is one.
    pub time: Option<String>,
}
