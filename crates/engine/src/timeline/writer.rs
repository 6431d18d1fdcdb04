//! The one compute that may write a timeline: writer epochs, fencing, and the stream of its WAL.
//!
//! **Beginning an epoch**, in this order: the old stream ends (no acknowledgement after that), what it brought is made durable, X is head,
//! (epoch, X) becomes durable in the tenant log, then the WAL log voids what older epochs have at or beyond X. So whatever was
//! acknowledged lies before X, and whatever a fenced compute still writes is never taken.
//!
//! **The tail.** What the store does not have of the newest epoch is in one WAL log, which the tenant log names. When that is not ours (our
//! disk was lost), only the epoch's own compute has it, in its pg_wal, and must send it again before anybody may branch off head or begin the next
//! epoch. Until then the tail is [`Tail::Unknown`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_postgres::wal::FramedRecord;
use varve_protocol::{ConnectConfig, Endpoint};
use varve_storage::ids::{WalLogId, WriterEpoch};
use varve_storage::tenant_log::{TenantEdit, TenantLog};
use varve_storage::wal_log::{LogPosition, WalLogError};

use super::ServedTimeline;
use crate::error::{Code, ServerError};
use crate::wal_receiver::{Receiver, ReceiverConfig, SinkError, SlotConfig, WalSink};

/// The superuser over the private socket.
const INTERNAL_ROLE: &str = "varve";
/// How long somebody who needs head waits for the compute that has the tail.
const TAIL_WAIT_MAX: Duration = Duration::from_secs(20);
const TAIL_POLL: Duration = Duration::from_millis(20);
/// How often a receiver that the WAL log's limit stopped looks again.
const LIMIT_WAIT: Duration = Duration::from_millis(20);
/// How often the compute is told what it need not keep.
const SLOT_INTERVAL: Duration = Duration::from_secs(5);

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

/// The writer's side of a timeline.
pub(super) struct Writer {
    /// The newest epoch.
    pub(super) epoch: WriterEpoch,
    pub(super) tail: Tail,
    /// Random, bound to this epoch and this process: nobody else can release its commits.
    pub(super) standby_name: Option<String>,
    pub(super) receiver: Option<Receiver<Sink>>,
    /// Tells the sink of that receiver not to wait for anything any more.
    pub(super) stream_over: Arc<AtomicBool>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer(epoch {}, {:?})", self.epoch.0, self.tail)
    }
}

impl Writer {
    /// Ends the stream: nothing is acknowledged after this.
    pub(super) async fn end_stream(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            self.stream_over.store(true, Ordering::Release);
            let _ = tokio::task::spawn_blocking(move || receiver.join().map(drop)).await;
        }
        self.standby_name = None;
    }
}

fn standby_name() -> Result<String, ServerError> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| ServerError::internal(format!("no random numbers: {error}")))?;
    Ok(format!("varve_{:032x}", u128::from_be_bytes(random)))
}

/// How a compute can be reached by the WAL receiver.
#[derive(Clone, Debug)]
pub struct ComputeAddress {
    /// Directory of its private unix socket.
    pub socket_dir: String,
    /// Port, which names the socket.
    pub port: u16,
    /// Where its WAL was flushed to when it said so: everything it ever got acknowledged ends at or before.
    pub flushed: Lsn,
}

impl ServedTimeline {
    /// Begins the next writer epoch at head; older writers are fenced.
    ///
    /// # Errors
    /// When it cannot be made durable, or the tail is unknown and does not come.
    pub async fn begin_epoch(&self, log: &TenantLog, wal_log: WalLogId) -> Result<EpochStart, ServerError> {
        self.wait_tail().await?;
        let mut writer = self.writer.lock().await;
        writer.end_stream().await;
        let lsn = self.settle_head().await?;
        let timeline = self.id();
        let epoch = log
            .commit(|state| {
                let epochs = &state.timeline(timeline)?.epochs;
                let next = epochs.last().map_or(Some(WriterEpoch(1)), |last| last.epoch.next());
                let epoch = next.ok_or_else(|| ServerError::internal("this timeline has used all of its writer epochs"))?;
                Ok::<_, ServerError>((vec![TenantEdit::Epoch { timeline, epoch, lsn, wal_log }], epoch))
            })
            .await?;
        self.wal.start_epoch(self.tenant, timeline, epoch, lsn).map_err(ServerError::internal)?;
        writer.epoch = epoch;
        let standby_name = standby_name()?;
        writer.standby_name = Some(standby_name.clone());
        tracing::info!(timeline = self.name, epoch = epoch.0, %lsn, "writer epoch begins");
        Ok(EpochStart { epoch, lsn, standby_name })
    }

    /// Ends the newest epoch without beginning another: its compute's commits are no longer acknowledged. Returns head.
    ///
    /// # Errors
    /// When the WAL log fails.
    pub async fn end_epoch(&self) -> Result<Lsn, ServerError> {
        let mut writer = self.writer.lock().await;
        writer.end_stream().await;
        self.settle_head().await
    }

    /// Makes durable what the ended stream brought.
    async fn settle_head(&self) -> Result<Lsn, ServerError> {
        let wal = self.wal.clone();
        tokio::task::spawn_blocking(move || wal.sync_all()).await.map_err(ServerError::internal)?.map_err(ServerError::internal)?;
        Ok(self.head())
    }

    /// Takes WAL from the compute of epoch `epoch`, at `address`. Returns the standby name that it must wait for.
    ///
    /// # Errors
    /// [`Code::Fenced`] when a later epoch has begun.
    pub async fn attach_writer(
        self: &Arc<Self>,
        log: &TenantLog,
        wal_log: WalLogId,
        epoch: WriterEpoch,
        address: &ComputeAddress,
    ) -> Result<String, ServerError> {
        let mut writer = self.writer.lock().await;
        if epoch != writer.epoch {
            return Err(ServerError::new(
                Code::Fenced,
                format!("writer epoch {} of timeline {} is over: epoch {} writes now", epoch.0, self.id(), writer.epoch.0),
            ));
        }
        let name = match &writer.standby_name {
            Some(name) => name.clone(),
            None => standby_name()?,
        };
        writer.end_stream().await;
        writer.stream_over = Arc::default();
        writer.standby_name = Some(name.clone());
        let start = self.head();
        let endpoint = Endpoint::unix(&address.socket_dir, address.port);
        let config = ReceiverConfig {
            label: self.name.clone(),
            connect: ConnectConfig::new(endpoint, INTERNAL_ROLE),
            database: "postgres".to_owned(),
            standby_name: name.clone(),
            system_identifier: self.system_identifier,
            major: self.major,
            tli: self.facts.tli,
            base: self.facts.start,
            start,
            last_record: None,
            settings: vec![("varve.timeline".to_owned(), self.id().to_string()), ("varve.epoch".to_owned(), epoch.0.to_string())],
            synchronous_standby_names: Some(name.clone()),
            slot: Some(SlotConfig { name: "varve".to_owned(), interval: SLOT_INTERVAL }),
        };
        let over = writer.stream_over.clone();
        let sink = Sink { timeline: self.clone(), epoch, position: None, appended: start, framed: start, over };
        let receiver = Receiver::spawn(config, sink).map_err(|error| ServerError::internal(format!("cannot start a thread: {error}")))?;
        writer.receiver = Some(receiver);
        if writer.tail == Tail::Unknown {
            tokio::spawn(self.clone().learn_tail(log.clone(), wal_log, epoch, address.flushed));
        }
        Ok(name)
    }

    /// The compute of epoch `epoch` ended cleanly after it sent all its WAL: puts everything into the store and closes the epoch.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn close_epoch(self: &Arc<Self>, log: &TenantLog, epoch: WriterEpoch) -> Result<(), ServerError> {
        {
            let mut writer = self.writer.lock().await;
            if writer.epoch != epoch {
                return Ok(());
            }
            writer.end_stream().await;
        }
        let lsn = self.settle_head().await?;
        self.flush_up_to(lsn).await?;
        let timeline = self.id();
        log.commit(|state| {
            let newest = state.timeline(timeline)?.epochs.last().map(|last| last.epoch);
            let edits = if newest == Some(epoch) { vec![TenantEdit::EpochClosed { timeline, epoch, lsn }] } else { Vec::new() };
            Ok::<_, ServerError>((edits, ()))
        })
        .await?;
        Ok(())
    }

    /// The compute sends again what was lost: once it did, the tail is known.
    async fn learn_tail(self: Arc<Self>, log: TenantLog, wal_log: WalLogId, epoch: WriterEpoch, flushed: Lsn) {
        while self.head() < flushed {
            if self.stopping.load(Ordering::Acquire) || self.writer.lock().await.epoch != epoch {
                return;
            }
            tokio::time::sleep(TAIL_POLL).await;
        }
        let mut writer = self.writer.lock().await;
        if writer.tail == Tail::Known || writer.epoch != epoch {
            return;
        }
        match log.push(vec![TenantEdit::EpochMoved { timeline: self.id(), epoch, wal_log }]).await {
            Ok(()) => {
                tracing::info!(timeline = self.name, epoch = epoch.0, head = %self.head(), "the compute has sent again what was lost");
                writer.tail = Tail::Known;
            }
            Err(error) => tracing::error!(timeline = self.name, %error, "the tenant log cannot be written"),
        }
    }

    /// Waits until all that was acknowledged is known here.
    ///
    /// # Errors
    /// [`Code::Unavailable`] when the compute that has it does not come.
    pub async fn wait_tail(&self) -> Result<(), ServerError> {
        let deadline = tokio::time::Instant::now() + TAIL_WAIT_MAX;
        loop {
            let epoch = {
                let writer = self.writer.lock().await;
                if writer.tail == Tail::Known {
                    return Ok(());
                }
                writer.epoch
            };
            if tokio::time::Instant::now() > deadline {
                return Err(ServerError::unavailable(format!(
                    "timeline {}: what the compute of epoch {} wrote after {} was on a disk that is lost, and only that compute has it: let \
                     it run and reach this server, then try again; if it is lost for good, give that up with 'varve branch restore TENANT/BRANCH --lsn {}'",
                    self.id(),
                    epoch.0,
                    self.head(),
                    self.head()
                )));
            }
            tokio::time::sleep(TAIL_POLL).await;
        }
    }
}

/// Where the receiver's bytes go.
pub(super) struct Sink {
    timeline: Arc<ServedTimeline>,
    epoch: WriterEpoch,
    /// What was appended since the last sync.
    position: Option<LogPosition>,
    /// End of what was appended.
    appended: Lsn,
    /// End of the last whole record that was appended.
    framed: Lsn,
    /// Whether the stream has ended.
    over: Arc<AtomicBool>,
}

impl WalSink for Sink {
    fn append(&mut self, start: Lsn, bytes: Bytes) -> Result<(), SinkError> {
        let t = &self.timeline;
        while t.wal.is_over_limit() {
            if self.over.load(Ordering::Acquire) || t.stopping.load(Ordering::Acquire) {
                return Err(SinkError("the stream ended while the WAL log was at its limit".to_owned()));
            }
            // The socket is not read meanwhile: commits wait until layers have caught up.
            std::thread::sleep(LIMIT_WAIT);
        }
        self.position = Some(t.wal.append(t.tenant, t.facts.id, self.epoch, start, &bytes)?);
        self.appended = start + bytes.len() as u64;
        Ok(())
    }

    fn records(&mut self, records: &mut Vec<FramedRecord>) -> Result<(), SinkError> {
        if let Some(last) = records.last() {
            self.framed = last.end;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<Lsn, SinkError> {
        if let Some(position) = self.position.take() {
            self.timeline.wal.sync(position)?;
        }
        // Head moves before the acknowledgement does.
        self.timeline.raise_head(self.framed);
        Ok(self.appended)
    }

    fn store_durable(&self) -> Lsn {
        self.timeline.layered()
    }
}

impl From<WalLogError> for SinkError {
    fn from(error: WalLogError) -> SinkError {
        SinkError(error.to_string())
    }
}
