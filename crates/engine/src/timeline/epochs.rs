//! The one compute that may write a timeline: writer epochs, fencing, and the stream of its WAL.
//!
//! **The stream.** A writer's bytes come in through one [`WalStream`]. Ending it closes its gate: what is in the middle
//! of an append or a sync ends first, nothing is appended or acknowledged afterwards, and whoever holds the socket is
//! told.
//!
//! **Beginning an epoch**, in this order: the old stream ends, what it brought is made durable, X is head, (epoch, X)
//! becomes durable in the tenant log, if the branch still points here, then the WAL log voids what older epochs have at
//! or beyond X. So whatever was acknowledged lies before X, and whatever a fenced compute still writes is never taken.
//!
//! **The tail.** What the store does not have of the newest epoch is in one WAL log, which the tenant log names. When
//! that is not ours (our disk was lost), only the epoch's own compute has it, in its pg_wal, and must send it again
//! before anybody may branch off head or begin the next epoch. Until then the tail is [`Tail::Unknown`].
//!
//! The server that has that WAL log may live and acknowledge, though another one has the tenant by now. So a tail is
//! learnt in three steps. The compute waits for a name that nobody has: from then on nothing more is acknowledged. It
//! says how far its WAL is flushed ([`Flushed`]), sends that, and the tenant log names our WAL log. Only then is it
//! told to wait for us. What were acknowledged before that row is durable would be void as soon as the other server has
//! the tenant again.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use varve_postgres::Lsn;
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_storage::ids::{BranchName, WriterEpoch, random_bytes};
use varve_storage::tenant_log::{TenantEdit, TenantLog, TenantState};
use varve_storage::threads::{Panicked, Threads};
use varve_storage::timeline::Position;
use varve_storage::wal_log::{LogPosition, WalLogError};

use super::LiveTimeline;
use crate::error::EngineError;

/// How long somebody who needs head waits for the compute that has the tail.
const TAIL_WAIT_MAX: Duration = Duration::from_secs(20);
/// How long the compute that has the tail may take to send it again.
const TAIL_ARRIVAL_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the store may take to have WAL as ours that it has as another server's.
const FOUND_WAIT_MAX: Duration = Duration::from_secs(60);
/// What is put behind our standby name to make one that nobody has.
const NOBODY: &str = "_later";
/// How often a stream that the WAL log's limit stopped looks again.
const LIMIT_WAIT: Duration = Duration::from_millis(20);

/// Whether all that was acknowledged is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// It is.
    Known,
    /// The newest epoch's compute may have more.
    Unknown,
}

/// What a new epoch begins with.
#[derive(Clone, Debug)]
pub struct EpochStart {
    /// Its number.
    pub epoch: WriterEpoch,
    /// Where it begins.
    pub lsn: Lsn,
    /// Name that its synchronous standby, which is us, will have.
    pub standby_name: String,
}

/// How far a compute is when it attaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flushed {
    /// Where its WAL was flushed to: everything that it ever got acknowledged by whom it waits for ends at or before.
    pub lsn: Lsn,
    /// The standby name that it waited for when it said so; none where it does not say.
    pub waits_for: Option<String>,
}

/// The standby names of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standby {
    /// Ours.
    pub name: String,
    /// The one that the compute has when its WAL begins to come in: ours, or one that nobody has.
    pub first: String,
    /// Whether the tail is being learnt from this stream.
    is_learnt: bool,
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamEnd {
    /// Another stream, or the next epoch, took its place.
    #[error("another compute, or another connection of this one, writes the timeline now")]
    Replaced,
    /// The branch is restored or its compute stops.
    #[error("the timeline takes no more WAL from this compute")]
    Ended,
    /// The timeline is closed.
    #[error("the server closes the timeline")]
    Closing,
    /// Another server has the tenant.
    #[error("another server has the tenant")]
    NotOwner,
}

/// Why a stream does not take bytes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamError {
    /// It has ended.
    #[error("the stream has ended: {0}")]
    Over(StreamEnd),
    /// The WAL log failed.
    #[error(transparent)]
    WalLog(#[from] WalLogError),
}

/// Told why a stream ends.
type OnClose = Box<dyn FnOnce(StreamEnd) + Send>;

/// What lets a stream's bytes in.
#[derive(Default)]
struct Gate {
    /// Why it is closed; held while bytes go through.
    closed: Mutex<Option<StreamEnd>>,
    /// Told once when it closes.
    on_close: Mutex<Option<OnClose>>,
}

impl Gate {
    fn close(&self, end: StreamEnd) {
        // First the holder of the socket, so that nothing new comes; it need not wait for what goes through right now.
        let told = self.on_close.lock().take();
        if let Some(tell) = told {
            tell(end);
        }
        self.closed.lock().get_or_insert(end);
    }

    fn is_closed(&self) -> Option<StreamEnd> {
        *self.closed.lock()
    }
}

/// A [`Tail`] that can be waited for. Who waited first is woken first.
struct TailCell {
    tail: Mutex<Tail>,
    changed: Notify,
}

impl TailCell {
    fn get(&self) -> Tail {
        *self.tail.lock()
    }

    fn is_known_now(&self) {
        *self.tail.lock() = Tail::Known;
        self.changed.notify_waiters();
    }

    async fn wait_until_known(&self) {
        loop {
            let changed = self.changed.notified();
            if self.get() == Tail::Known {
                return;
            }
            changed.await;
        }
    }
}

/// The writer's side of a timeline.
pub(super) struct Writer {
    /// The newest epoch.
    epoch: WriterEpoch,
    tail: Arc<TailCell>,
    /// Random, bound to this epoch and this process: nobody else can release its commits.
    standby_name: Option<String>,
    gate: Option<Arc<Gate>>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer(epoch {}, {:?})", self.epoch.0, self.tail.get())
    }
}

impl Writer {
    pub(super) fn new(epoch: WriterEpoch, tail: Tail) -> Writer {
        Writer { epoch, tail: Arc::new(TailCell { tail: Mutex::new(tail), changed: Notify::new() }), standby_name: None, gate: None }
    }

    pub(super) fn has_stream(&self) -> bool {
        self.gate.as_ref().is_some_and(|gate| gate.is_closed().is_none())
    }

    /// Ends the stream: nothing is appended or acknowledged after this. What goes through right now, an fsync perhaps,
    /// ends first.
    pub(super) async fn end_stream(&mut self, end: StreamEnd, threads: &Arc<dyn Threads>) -> Result<(), Panicked> {
        self.standby_name = None;
        match self.gate.take() {
            Some(gate) => threads.call(move || gate.close(end)).await,
            None => Ok(()),
        }
    }
}

fn standby_name() -> Result<String, EngineError> {
    Ok(format!("varve_{:032x}", u128::from_be_bytes(random_bytes()?)))
}

/// Whether `branch` still points to the timeline; a compute belongs to a branch, never to a timeline.
pub(super) fn check_branch(state: &TenantState, branch: &BranchName, live: &LiveTimeline) -> Result<(), EngineError> {
    if state.is_removed() || state.branch(branch.as_str())?.facts.id != live.id() {
        return Err(EngineError::BranchMoved { branch: branch.clone(), timeline: live.id() });
    }
    Ok(())
}

impl LiveTimeline {
    /// Begins the next writer epoch at head, for the compute of `branch`; older writers are fenced.
    ///
    /// # Errors
    /// [`EngineError::BranchMoved`]; when it cannot be made durable, or the tail is unknown and does not come.
    pub async fn begin_epoch(self: &Arc<Self>, log: &TenantLog, branch: &BranchName) -> Result<EpochStart, EngineError> {
        self.wait_tail().await?;
        let mut writer = self.writer.lock().await;
        check_branch(&log.state(), branch, self)?;
        writer.end_stream(StreamEnd::Replaced, &self.context.threads).await?;
        let lsn = self.settle_head().await?;
        self.keep_found().await?;
        let (timeline, wal_log) = (self.id(), self.context.wal_log);
        let epoch = log
            .commit(|state| {
                check_branch(state, branch, self)?;
                let epochs = &state.timeline(timeline)?.epochs;
                let next = epochs.last().map_or(Some(WriterEpoch(1)), |last| last.epoch.next());
                let epoch = next.ok_or(EngineError::EpochsUsedUp { timeline })?;
                Ok::<_, EngineError>((vec![TenantEdit::Epoch { timeline, epoch, lsn, wal_log }], epoch))
            })
            .await?;
        self.context.wal.start_epoch(self.tenant, timeline, epoch, lsn)?;
        self.is_named_now();
        writer.epoch = epoch;
        let standby_name = standby_name()?;
        writer.standby_name = Some(standby_name.clone());
        tracing::info!(timeline = self.name, epoch = epoch.0, %lsn, "writer epoch begins");
        Ok(EpochStart { epoch, lsn, standby_name })
    }

    /// Ends the stream without beginning another epoch: its compute's commits are not acknowledged any more, until it
    /// comes again. Returns head.
    ///
    /// # Errors
    /// When the WAL log fails.
    pub async fn end_stream(&self, end: StreamEnd) -> Result<Lsn, EngineError> {
        self.writer.lock().await.end_stream(end, &self.context.threads).await?;
        self.settle_head().await
    }

    /// Makes durable what the ended stream brought.
    async fn settle_head(&self) -> Result<Lsn, EngineError> {
        let wal = self.context.wal.clone();
        self.context.threads.call(move || wal.sync_all()).await??;
        Ok(self.positions().head())
    }

    /// Sees to it that WAL which was found in the store is there as ours. Before the tenant's log names our WAL log:
    /// from then on nobody looks for another server's.
    async fn keep_found(self: &Arc<Self>) -> Result<(), EngineError> {
        if self.positions().stored() < self.found_up_to {
            self.context.shipping.hurry();
            self.positions().wait(Position::Stored, self.found_up_to, FOUND_WAIT_MAX).await?;
        }
        Ok(())
    }

    /// Takes WAL from the compute of epoch `epoch`, which belongs to `branch`. `on_close` is told when the stream must
    /// end. Gives the stream, and whom the compute must wait for: [`LiveTimeline::waits_for`] says it in the end.
    ///
    /// Whether the tenant is still ours is asked of the store: a compute may come from a server that took it over, and
    /// that has what it acknowledged since.
    ///
    /// # Errors
    /// [`EngineError::EpochOver`] when a later epoch has begun, [`EngineError::BranchMoved`]; the log's, when the
    /// tenant is another server's.
    pub async fn open_stream(
        self: &Arc<Self>,
        log: &TenantLog,
        branch: &BranchName,
        epoch: WriterEpoch,
        flushed: Flushed,
        on_close: impl FnOnce(StreamEnd) + Send + 'static,
    ) -> Result<(WalStream, Standby), EngineError> {
        log.check_ownership().await?;
        let mut writer = self.writer.lock().await;
        // An epoch or a restore that is on its way to the store counts, too, though whoever asked for it may have given
        // up waiting: what were acknowledged beyond its start would be void. With no edits of its own this waits until
        // what it saw is durable.
        let timeline = self.id();
        let newest = log
            .commit(|state| {
                check_branch(state, branch, self)?;
                let newest = state.timeline(timeline)?.epochs.last().map_or(WriterEpoch(0), |last| last.epoch);
                Ok::<_, EngineError>((Vec::new(), newest))
            })
            .await?;
        let current = newest.max(writer.epoch);
        if epoch != current {
            return Err(EngineError::EpochOver { timeline, epoch: epoch.0, current: current.0 });
        }
        let name = match writer.standby_name.clone() {
            Some(name) => name,
            None => standby_name()?,
        };
        writer.end_stream(StreamEnd::Replaced, &self.context.threads).await?;
        writer.standby_name = Some(name.clone());
        let gate = Arc::new(Gate { closed: Mutex::default(), on_close: Mutex::new(Some(Box::new(on_close))) });
        writer.gate = Some(gate.clone());
        let start = self.positions().head();
        let nobody = format!("{name}{NOBODY}");
        let is_known = writer.tail.get() == Tail::Known;
        let waits_for_nobody = flushed.waits_for.as_ref() == Some(&nobody);
        if !is_known && (waits_for_nobody || flushed.waits_for.is_none()) {
            let (live, log) = (self.clone(), log.clone());
            tokio::spawn(live.learn_tail(log, epoch, flushed.lsn));
        }
        let first = if is_known || flushed.waits_for.is_none() { name.clone() } else { nobody };
        let standby = Standby { name, first, is_learnt: !is_known && waits_for_nobody };
        self.touch();
        Ok((WalStream { live: self.clone(), gate, epoch, position: None, appended: start, framed: start, awaited: Lsn::INVALID }, standby))
    }

    /// Whom a compute, whose WAL comes in, must wait for from now on. Where it waits for another one yet, it attaches
    /// again afterwards.
    ///
    /// # Errors
    /// [`EngineError::TailUnknown`] where it does not send all that it has.
    pub async fn waits_for(&self, standby: Standby) -> Result<String, EngineError> {
        if standby.is_learnt {
            self.wait_tail().await?;
            return Ok(standby.name);
        }
        Ok(standby.first)
    }

    /// The compute of epoch `epoch` ended cleanly, with the shutdown checkpoint at `checkpoint`, after it sent all its
    /// WAL: puts everything into the store and closes the epoch.
    ///
    /// # Errors
    /// [`EngineError::CheckpointMissing`] when it did not.
    /// When the store cannot be written. [`EngineError::TailUnknown`] where the compute sent its WAL to another server:
    /// what it sent ends beyond our head.
    pub async fn close_epoch(self: &Arc<Self>, log: &TenantLog, epoch: WriterEpoch, checkpoint: Option<Lsn>) -> Result<(), EngineError> {
        {
            let mut writer = self.writer.lock().await;
            if writer.epoch != epoch {
                return Ok(());
            }
            if writer.tail.get() == Tail::Unknown {
                return Err(self.tail_unknown(epoch));
            }
            writer.end_stream(StreamEnd::Ended, &self.context.threads).await?;
        }
        let lsn = self.settle_head().await?;
        let timeline = self.id();
        // That Postgres ended well does not say that we took all of it.
        if let Some(checkpoint) = checkpoint.filter(|checkpoint| lsn <= *checkpoint) {
            return Err(EngineError::CheckpointMissing { timeline, head: lsn, checkpoint });
        }
        self.flush_up_to(lsn).await?;
        log.commit(|state| {
            let newest = state.timeline(timeline)?.epochs.last().map(|last| last.epoch);
            let edits = if newest == Some(epoch) { vec![TenantEdit::EpochClosed { timeline, epoch, lsn }] } else { Vec::new() };
            Ok::<_, EngineError>((edits, ()))
        })
        .await?;
        Ok(())
    }

    /// The compute sends again what was lost: once it did, the tail is known.
    async fn learn_tail(self: Arc<Self>, log: TenantLog, epoch: WriterEpoch, flushed: Lsn) {
        if self.positions().wait(Position::Head, flushed, TAIL_ARRIVAL_MAX).await.is_err() {
            return; // closed, or never sent
        }
        if let Err(error) = self.keep_found().await {
            tracing::error!(timeline = self.name, %error, "WAL that the store has is not there as ours; the compute attaches again");
            return;
        }
        let writer = self.writer.lock().await;
        if writer.tail.get() == Tail::Known || writer.epoch != epoch {
            return;
        }
        let wal_log = self.context.wal_log;
        match log.push(vec![TenantEdit::EpochMoved { timeline: self.id(), epoch, wal_log }]).await {
            Ok(()) => {
                let head = self.positions().head();
                tracing::info!(timeline = self.name, epoch = epoch.0, %head, "the compute has sent again what was lost");
                self.is_named_now();
                writer.tail.is_known_now();
            }
            Err(error) => tracing::error!(timeline = self.name, %error, "the tenant log cannot be written"),
        }
    }

    /// Whether all that its newest writer ever had acknowledged is here, and no stream brings more.
    pub(crate) fn is_complete(&self) -> bool {
        self.writer.try_lock().is_ok_and(|writer| writer.tail.get() == Tail::Known && !writer.has_stream())
    }

    fn tail_unknown(&self, epoch: WriterEpoch) -> EngineError {
        EngineError::TailUnknown { timeline: self.id(), epoch: epoch.0, head: self.positions().head(), wal_log: self.tail_in.clone() }
    }

    /// Waits until all that was acknowledged is known here.
    ///
    /// # Errors
    /// [`EngineError::TailUnknown`] when the compute that has it does not come.
    pub async fn wait_tail(&self) -> Result<(), EngineError> {
        let (tail, epoch) = {
            let writer = self.writer.lock().await;
            (writer.tail.clone(), writer.epoch)
        };
        let known = tokio::time::timeout(TAIL_WAIT_MAX, tail.wait_until_known()).await;
        match known {
            Ok(()) => Ok(()),
            Err(_) => Err(self.tail_unknown(epoch)),
        }
    }
}

/// Where a writer's bytes come in. Its calls may block.
pub struct WalStream {
    live: Arc<LiveTimeline>,
    gate: Arc<Gate>,
    epoch: WriterEpoch,
    /// What was appended since the last sync.
    position: Option<LogPosition>,
    /// End of what was appended.
    appended: Lsn,
    /// End of the last whole record that was appended.
    framed: Lsn,
    /// End of the last commit among them that waits for the store.
    awaited: Lsn,
}

impl WalStream {
    /// Where the stream goes on: the end of the last whole record that is durable.
    pub fn start(&self) -> Lsn {
        self.framed
    }

    /// The timeline that it writes.
    pub fn timeline(&self) -> &Arc<LiveTimeline> {
        &self.live
    }

    /// Keeps bytes that begin at `start`. Waits while the WAL log is at its limit: the socket is not read meanwhile, so
    /// commits wait until layers have caught up.
    ///
    /// # Errors
    /// [`StreamError::Over`]; what the WAL log says.
    pub fn append(&mut self, start: Lsn, bytes: &[u8]) -> Result<(), StreamError> {
        let context = &self.live.context;
        while context.wal.is_over_limit() {
            if let Some(end) = self.gate.is_closed() {
                return Err(StreamError::Over(end));
            }
            context.threads.pause(LIMIT_WAIT);
        }
        let closed = self.gate.closed.lock();
        if let Some(end) = *closed {
            return Err(StreamError::Over(end));
        }
        self.position = Some(context.wal.append(self.live.tenant, self.live.facts.id, self.epoch, start, bytes)?);
        self.appended = start + bytes.len() as u64;
        Ok(())
    }

    /// Says that the last whole record of what was appended ends at `end`.
    pub fn framed(&mut self, end: Lsn) {
        self.framed = end;
    }

    /// Says that a commit which was appended, and ends at `end`, waits for the store.
    pub fn awaits_store(&mut self, end: Lsn) {
        self.awaited = end;
    }

    /// Makes durable what was appended, and moves head to the end of the last whole record. What this returns may be
    /// acknowledged.
    ///
    /// # Errors
    /// [`StreamError::Over`]; what the WAL log says.
    pub fn sync(&mut self) -> Result<Lsn, StreamError> {
        let closed = self.gate.closed.lock();
        if let Some(end) = *closed {
            return Err(StreamError::Over(end));
        }
        if let Some(position) = self.position.take() {
            self.live.context.wal.sync(position)?;
        }
        // Head moves before the acknowledgement does. A record ends behind its padding, which may come with the next
        // bytes only: until then head stays where it was, for ingest takes what is missing below head for lost.
        if self.framed <= self.appended {
            self.live.raise_head(self.framed);
            if self.awaited > self.store_durable() {
                self.live.context.shipping.hurry();
            }
        }
        Ok(self.appended)
    }

    /// Everything up to here is in the store: what waits for that may go on.
    pub fn store_durable(&self) -> Lsn {
        self.live.positions().stored()
    }

    /// A commit that ends here waits for the store, unless that has it.
    pub fn awaited(&self) -> Lsn {
        self.awaited
    }

    /// Nobody need keep WAL before this: the store has it, and not merely a WAL log on its disk.
    pub fn not_needed_before(&self) -> Lsn {
        let positions = self.live.positions();
        if !self.live.context.shipping.is_on() {
            return positions.layered();
        }
        // What is stored may end within a record, which whoever goes on with it wants whole; it rarely spans a segment.
        positions.layered().max(Lsn(positions.stored().0.saturating_sub(WAL_SEGMENT_SIZE)))
    }
}
