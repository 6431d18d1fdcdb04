//! What the control plane asks of a pageserver. It knows no engine and no socket: the binary puts a pageserver behind
//! this door, the simulation another one.
//!
//! A pageserver *owns* a tenant when it has the newest generation of the tenant's log. Only work takes ownership
//! ([`Pageserver::own`]); finding, listing and describing read the log in the store.

use std::future::Future;

use bytes::Bytes;
use futures::stream::BoxStream;
use varve_api::Refusal;
use varve_api::admin::{ScrubStatus, StoreAcknowledgement};
use varve_api::host::{BlockName, Walsender};
use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::{BranchName, TenantId, TimelineId, WriterEpoch};
use varve_storage::tenant_log::{FileContents, TenantLog};

pub use varve_storage::moment::{Moment, Resolved};

/// A timeline that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// End of the last whole record that is durable.
    pub head: Lsn,
    /// Everything up to here can be read.
    pub applied: Lsn,
    /// Everything up to here is in uploaded layers.
    pub layered: Lsn,
    /// Bytes of all relations when it was last flushed, if it was.
    pub size_bytes: Option<u64>,
    /// Why ingest stopped, if it did.
    pub stopped: Option<String>,
}

/// A writer epoch that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochStart {
    /// Its number.
    pub epoch: WriterEpoch,
    /// Where it begins: the base of the compute's data directory.
    pub lsn: Lsn,
    /// Name that its synchronous standby will have.
    pub standby_name: String,
}

/// What a mount must know of a data directory before it has read any of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Databases, each (tablespace, database).
    pub databases: Vec<(u32, u32)>,
    /// Tablespaces but for the two default ones.
    pub tablespaces: Vec<(u32, String)>,
    /// Postgres's catalog version, part of the names of directories in tablespaces.
    pub catalog_version: u32,
    /// Blocks that a start reads.
    pub startup_blocks: Vec<BlockName>,
}

/// A template that tenants can begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Name of its folder in the store.
    pub name: String,
    /// Major of its Postgres.
    pub pg_version: u32,
    /// Where its history ends and tenants' begin.
    pub end: Lsn,
}

/// WAL without a gap that can be had from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalRange {
    /// The timeline that it is of.
    pub timeline: TimelineId,
    /// Its first byte.
    pub start: Lsn,
    /// The byte behind its last.
    pub end: Lsn,
    /// Whether it is in the store; else it is in the pageserver's WAL log only.
    pub in_store: bool,
}

/// A tenant that this pageserver lost to another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The tenant.
    pub tenant: TenantId,
    /// Its name, if it is known.
    pub name: Option<String>,
    /// Who has it now: name of the server, or its generation where it did not say.
    pub owner: String,
    /// Address of that server's admin API, if it said so.
    pub url: Option<String>,
}

/// WAL that a pageserver keeps though no log in the store knows of it: evidence that the store lost something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrphanedWal {
    /// The tenant that it is of.
    pub tenant: TenantId,
    /// The timeline.
    pub timeline: TimelineId,
    /// What is wrong and what to do.
    pub problem: String,
}

/// What went wrong there, as a message from another role: a code and a sentence.
pub type PortResult<T> = Result<T, Refusal>;

/// See the module's doc. All of it may wait for the store; nothing of it blocks the thread.
pub trait Pageserver: Send + Sync + 'static {
    /// The tenant's log, to write; taken over if this pageserver does not own the tenant. `why` is logged when it does
    /// take it.
    ///
    /// Errors: [`varve_api::Code::UnknownTenant`], also of one that was removed.
    fn own(&self, tenant: TenantId, why: &'static str) -> impl Future<Output = PortResult<TenantLog>> + Send;

    /// The log of a tenant that this pageserver owns right now, without I/O; none takes nothing.
    fn owned(&self, tenant: TenantId) -> Option<TenantLog>;

    /// A tenant that was just created is this pageserver's.
    fn adopt(&self, log: TenantLog) -> impl Future<Output = PortResult<()>> + Send;

    /// Stops a tenant's timelines and forgets it and its WAL: it was deleted.
    fn forget(&self, tenant: TenantId) -> impl Future<Output = ()> + Send;

    /// Stops timelines that the log no longer has, and removes what is stored of them.
    fn remove_timelines(&self, tenant: TenantId, timelines: Vec<TimelineId>) -> impl Future<Output = ()> + Send;

    /// Collects what a tenant need not keep any more, and waits until that is done.
    fn collect(&self, tenant: TenantId) -> impl Future<Output = PortResult<()>> + Send;

    /// Reads all that is stored of a tenant, and says of each object that is damaged or missing which it is and what is
    /// wrong.
    fn scrub(&self, _tenant: TenantId) -> impl Future<Output = PortResult<Vec<String>>> + Send {
        std::future::ready(Ok(Vec::new()))
    }

    /// How far it is with reading what is stored of its tenants, if it does.
    fn scrub_status(&self) -> Option<ScrubStatus> {
        None
    }

    /// Where a timeline stands, if it is open here: never opens it.
    fn live(&self, tenant: TenantId, timeline: TimelineId) -> Option<Live>;

    /// The boundary that a moment of a timeline is. Opens the timeline; for head it waits for the compute that has the
    /// tail.
    fn resolve(&self, tenant: TenantId, timeline: TimelineId, moment: Moment) -> impl Future<Output = PortResult<Resolved>> + Send;

    /// When the last transaction before a boundary ended; none before any.
    fn time_at(&self, tenant: TenantId, at: Resolved) -> impl Future<Output = PortResult<Option<Timestamp>>> + Send;

    /// Begins the next writer epoch at head, if `branch` still points to `timeline` when that is written; older writers
    /// are fenced.
    ///
    /// Errors: [`varve_api::Code::Fenced`] when the branch points elsewhere by now.
    fn begin_epoch(
        &self,
        tenant: TenantId,
        branch: &BranchName,
        timeline: TimelineId,
    ) -> impl Future<Output = PortResult<EpochStart>> + Send;

    /// Ends the newest epoch's stream without beginning another: its compute's commits are not acknowledged any more,
    /// until it attaches again.
    fn end_stream(&self, tenant: TenantId, timeline: TimelineId) -> impl Future<Output = PortResult<()>> + Send;

    /// Takes WAL from the compute of epoch `epoch`, if `branch` still points to `timeline`. Gives the standby name that
    /// it must wait for.
    ///
    /// Errors: [`varve_api::Code::Fenced`] when a later epoch has begun or the branch points elsewhere.
    fn attach_writer(&self, writer: AttachWriter) -> impl Future<Output = PortResult<String>> + Send;

    /// Where what is left in the `pg_wal` of a compute that was killed would go on; none when it does not count any
    /// more.
    fn leftover_start(&self, of: LeftoverOf) -> impl Future<Output = PortResult<Option<Lsn>>> + Send;

    /// Takes what is left, of which `bytes` begin at `start` and whole records end at `end`. Gives up to where it is
    /// durable now.
    fn take_leftover(
        &self,
        of: LeftoverOf,
        start: Lsn,
        end: Lsn,
        bytes: BoxStream<'static, PortResult<Bytes>>,
    ) -> impl Future<Output = PortResult<Lsn>> + Send;

    /// The compute of epoch `epoch` ended cleanly after it sent all its WAL: puts everything into the store and closes
    /// the epoch. A `checkpoint` with which it ended must be here.
    ///
    /// Errors: [`varve_api::Code::Unavailable`] when it is not.
    fn close_epoch(
        &self,
        tenant: TenantId,
        timeline: TimelineId,
        epoch: WriterEpoch,
        checkpoint: Option<Lsn>,
    ) -> impl Future<Output = PortResult<()>> + Send;

    /// What a mount of a timeline at `lsn` must know; waits until that is applied.
    fn places(&self, tenant: TenantId, timeline: TimelineId, lsn: Lsn) -> impl Future<Output = PortResult<Places>> + Send;

    /// Keeps a file of a data directory: in the row where it is small, as an object of its own elsewhere.
    fn put_file(&self, tenant: TenantId, bytes: Vec<u8>) -> impl Future<Output = PortResult<FileContents>> + Send;

    /// What [`Pageserver::put_file`] kept.
    fn get_file(&self, tenant: TenantId, contents: FileContents) -> impl Future<Output = PortResult<Vec<u8>>> + Send;

    /// Where there is WAL of a timeline and its ancestors of which redo can be checked, ascending, and its head.
    fn kept_wal(&self, tenant: TenantId, timeline: TimelineId) -> impl Future<Output = PortResult<(Lsn, Vec<WalRange>)>> + Send;

    /// That WAL from `from` on: at least a byte.
    ///
    /// Errors: [`varve_api::Code::NotRetained`] where it is not kept, [`varve_api::Code::InTheFuture`] where there is
    /// none yet.
    fn kept_wal_bytes(&self, tenant: TenantId, timeline: TimelineId, from: Lsn) -> impl Future<Output = PortResult<Bytes>> + Send;

    /// The template for new tenants of a major, if there is one.
    fn template_of(&self, pg_version: u32) -> impl Future<Output = PortResult<Option<Template>>> + Send;

    /// Takes what a host's `initdb` made (a tar of the data directory, compressed with zstd) as the template of its
    /// major.
    fn import_template(&self, pg_version: u32, archive: Bytes) -> impl Future<Output = PortResult<Template>> + Send;

    /// Keeps which blocks a start of a tenant's Postgres read, for the tenant's template.
    fn learn_startup_blocks(&self, tenant: TenantId, blocks: Vec<BlockName>) -> impl Future<Output = PortResult<()>> + Send;

    /// Address of the page service, `host:port`, for computes of a tenant that this pageserver owns.
    fn page_service(&self) -> String;

    /// What `remote_apply` waits for.
    fn store_acknowledgement(&self) -> StoreAcknowledgement;

    /// WAL in its WAL log of which no log in the store knows.
    fn orphans(&self) -> Vec<OrphanedWal>;

    /// Lets go of such WAL, at an operator's word: of a tenant, or of one timeline. How many timelines' there was.
    fn forget_orphans(&self, tenant: TenantId, timeline: Option<TimelineId>) -> impl Future<Output = usize> + Send;

    /// A tenant that was lost may be taken again, at an operator's word.
    fn forgive(&self, tenant: TenantId) -> impl Future<Output = ()> + Send;

    /// Why the WAL of a timeline's compute does not come in right now, in words.
    fn wal_trouble(&self, _tenant: TenantId, _timeline: TimelineId) -> Option<String> {
        None
    }

    /// Why it cannot keep the WAL that comes, of any compute: a full disk, mostly.
    fn not_kept(&self) -> Option<String> {
        None
    }

    /// The tenants that it lost to others since it was started.
    fn lost(&self) -> Vec<Lost>;
}

/// See [`Pageserver::attach_writer`].
#[derive(Clone, Debug)]
pub struct AttachWriter {
    /// The tenant.
    pub tenant: TenantId,
    /// The branch that the compute belongs to.
    pub branch: BranchName,
    /// The timeline that it was started on.
    pub timeline: TimelineId,
    /// Its writer epoch.
    pub epoch: WriterEpoch,
    /// Where its walsender is reached.
    pub walsender: Walsender,
    /// Where its WAL was flushed to when it said so: everything it ever got acknowledged by whom it waited for then
    /// ends at or before.
    pub flushed: Lsn,
    /// The standby name that it waited for then, if it said so.
    pub waits_for: Option<String>,
}

/// Whose WAL is left in the `pg_wal` of a compute that was killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftoverOf {
    /// The tenant.
    pub tenant: TenantId,
    /// The compute's branch.
    pub branch: BranchName,
    /// The timeline that it wrote.
    pub timeline: TimelineId,
    /// In which epoch.
    pub epoch: WriterEpoch,
}
