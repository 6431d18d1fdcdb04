//! WAL on its way to the store: what the WAL log has and layers do not yet.
//!
//! One task (of [`run`]) puts the WAL of all timelines that have some into shared objects
//! ([`varve_storage::shared_wal`]), one object at a time: [`GATHER_MAX`] after there is something, as soon as an object
//! is full, and at once when a commit waits for the store. All that waits meanwhile shares the next object. Nothing is
//! written while nothing comes. A timeline's *stored* position is how far it is; it moves with layers, too, so what
//! these cover already is skipped.
//!
//! **Fairness.** Timelines take turns. In an object each has a share, however much WAL it has waiting.
//!
//! **Safety.** Before a run takes a tenant's first WAL, the store is asked whether the tenant is ours yet; what another
//! server sealed takes nothing more. See there for why that is enough.
//!
//! **Space.** An object is deleted when layers cover all that is in it. What former processes, and servers that are no
//! more, left behind is looked through from time to time, by a task of its own ([`former`]).
//!
//! Where the store is a folder on the disk of the WAL log, nothing is shipped: a copy there would be lost with it. The
//! WAL log counts as the store then.

mod former;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use varve_postgres::Lsn;
use varve_storage::ids::{Generation, TenantId, TimelineId};
use varve_storage::shared_wal::{Chunk, Encoded, OBJECT_BYTES_MAX, Put, ROWS_MAX, Row, Run, SharedWalError};
use varve_storage::store::ObjectName;
use varve_storage::timeline::Position;
use varve_storage::wal_log::WalLogError;

use crate::context::Context;
use crate::error::EngineError;
use crate::timeline::LiveTimeline;

/// How long WAL may gather for which nobody waits.
pub const GATHER_MAX: Duration = Duration::from_millis(250);
/// Bytes of an object that a timeline has at least, however many there are.
const SHARE_MIN: usize = 64 * 1024;
/// How often it is looked for objects that layers cover.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// How long it sleeps while there is nothing.
const IDLE_INTERVAL: Duration = Duration::from_secs(3600);
/// Pause after a first failure; it doubles with each, up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// See [`PAUSE_FIRST`].
const PAUSE_MAX: Duration = Duration::from_secs(5);

type Owner = (TenantId, TimelineId);

/// What timelines and the task that ships share.
#[derive(Debug)]
pub struct Shipping {
    is_on: bool,
    /// Timelines that have WAL which is to go. One that is closed has none: all of it is in layers.
    waiting: Mutex<Vec<Weak<LiveTimeline>>>,
    /// Bytes that came since the last object was begun.
    bytes: AtomicU64,
    /// Whether a commit waits for the store.
    is_awaited: AtomicBool,
    news: Notify,
    hurry: Notify,
    /// How far layers cover timelines of which there are objects.
    covered: Mutex<HashMap<Owner, Lsn>>,
    figures: Mutex<Figures>,
    /// Number of the run that is written; 0: none.
    current_run: AtomicU32,
}

/// What was shipped since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Objects that were put.
    pub objects: u64,
    /// Bytes of WAL in them.
    pub wal_bytes: u64,
    /// Bytes that the store got.
    pub stored_bytes: u64,
    /// Objects that are needed still.
    pub held_objects: u64,
    /// Objects that were deleted.
    pub deleted_objects: u64,
    /// Bytes of WAL that other servers had put, and that were found by this one.
    pub found_bytes: u64,
    /// Whether the newest attempt failed.
    pub is_failing: bool,
}

impl Shipping {
    /// With WAL going to the store, or, where that is on the disk of the WAL log, without.
    pub fn new(is_on: bool) -> Shipping {
        Shipping {
            is_on,
            waiting: Mutex::default(),
            bytes: AtomicU64::new(0),
            is_awaited: AtomicBool::new(false),
            news: Notify::new(),
            hurry: Notify::new(),
            covered: Mutex::default(),
            figures: Mutex::default(),
            current_run: AtomicU32::new(0),
        }
    }

    /// Whether WAL goes to the store before layers do.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// What was shipped.
    pub fn figures(&self) -> Figures {
        *self.figures.lock()
    }

    /// So many bytes of another server's WAL were found.
    pub(crate) fn note_found(&self, bytes: u64) {
        self.figures.lock().found_bytes += bytes;
    }

    /// A timeline has so many bytes more that are to go.
    pub(crate) fn add(&self, live: &Arc<LiveTimeline>, bytes: u64) {
        if !live.ship_scheduled().swap(true, Ordering::SeqCst) {
            self.waiting.lock().push(Arc::downgrade(live));
            self.news.notify_one();
        }
        if self.bytes.fetch_add(bytes, Ordering::SeqCst) + bytes >= OBJECT_BYTES_MAX as u64 {
            self.hurry.notify_one();
        }
    }

    /// A commit waits until what was added is in the store.
    pub(crate) fn hurry(&self) {
        if !self.is_awaited.swap(true, Ordering::SeqCst) {
            self.hurry.notify_one();
        }
    }

    /// Layers cover a timeline up to `lsn`.
    pub(crate) fn cover(&self, tenant: TenantId, timeline: TimelineId, lsn: Lsn) {
        if let Some(covered) = self.covered.lock().get_mut(&(tenant, timeline)) {
            *covered = lsn.max(*covered);
        }
    }

    fn is_due(&self) -> bool {
        self.is_awaited.load(Ordering::SeqCst) || self.bytes.load(Ordering::SeqCst) >= OBJECT_BYTES_MAX as u64
    }
}

/// Why nothing was shipped.
#[derive(Debug, thiserror::Error)]
enum ShipError {
    #[error(transparent)]
    Shared(#[from] SharedWalError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Puts WAL into the store, until it is dropped, and looks after what is there of former processes.
pub async fn run(context: Arc<Context>) {
    if !context.shipping.is_on() {
        return std::future::pending().await;
    }
    tokio::join!(ship(context.clone()), former::keep_deleted(context));
}

async fn ship(context: Arc<Context>) {
    let mut shipper = Shipper {
        context,
        run: None,
        checked: BTreeMap::new(),
        turn: Turn::default(),
        pending: None,
        objects: VecDeque::new(),
        swept: Instant::now(),
    };
    let mut pause = None;
    loop {
        shipper.wait().await;
        match shipper.step().await {
            Ok(()) => {
                if pause.take().is_some() {
                    shipper.context.shipping.figures.lock().is_failing = false;
                    tracing::info!("WAL goes to the store again");
                }
            }
            Err(error) => {
                if pause.is_none() {
                    tracing::warn!(%error, "WAL does not get into the store; commits with remote_apply wait, it is tried again");
                    shipper.context.shipping.figures.lock().is_failing = true;
                }
                let next = pause.map_or(PAUSE_FIRST, |pause: Duration| (pause * 2).min(PAUSE_MAX));
                pause = Some(next);
                tokio::time::sleep(next).await;
            }
        }
    }
}

/// Where a timeline will be when an object is in the store.
type Ends = Vec<(Arc<LiveTimeline>, Lsn)>;

struct Shipper {
    context: Arc<Context>,
    run: Option<Run>,
    /// Tenants that were ours, in that generation, after the run had begun.
    checked: BTreeMap<TenantId, Generation>,
    /// Timelines that have something.
    turn: Turn,
    /// An object of which it is not known yet whether it is in the store: no other one may have its number.
    pending: Option<(Encoded, Ends)>,
    /// Objects of this process that are needed, oldest first.
    objects: VecDeque<(ObjectName, Vec<Row>)>,
    swept: Instant,
}

/// Timelines that take turns, each once, whose turn is next first.
#[derive(Default)]
struct Turn {
    order: VecDeque<Arc<LiveTimeline>>,
    /// Which are in it, by address: of one that was closed and opened anew both may be.
    members: BTreeSet<usize>,
}

impl Turn {
    fn push(&mut self, live: Arc<LiveTimeline>) {
        if self.members.insert(Arc::as_ptr(&live) as usize) {
            self.order.push_back(live);
        }
    }

    fn pop(&mut self) -> Option<Arc<LiveTimeline>> {
        let live = self.order.pop_front()?;
        self.members.remove(&(Arc::as_ptr(&live) as usize));
        Some(live)
    }

    fn retain(&mut self, mut has_more: impl FnMut(&LiveTimeline) -> bool) {
        let Turn { order, members } = self;
        order.retain(|live| has_more(live) || !members.remove(&(Arc::as_ptr(live) as usize)));
    }
}

impl Shipper {
    /// Waits until there is something to do.
    async fn wait(&self) {
        let shipping = &self.context.shipping;
        if self.pending.is_none() && self.turn.order.is_empty() {
            let sweep = self.next_look().saturating_duration_since(Instant::now());
            tokio::select! {
                biased;
                () = shipping.news.notified() => {}
                () = tokio::time::sleep(sweep) => return,
            }
        }
        let gathered = tokio::time::sleep(GATHER_MAX);
        tokio::pin!(gathered);
        while !shipping.is_due() {
            tokio::select! {
                biased;
                () = shipping.hurry.notified() => {}
                () = &mut gathered => return,
            }
        }
    }

    fn next_look(&self) -> Instant {
        self.swept + if self.objects.is_empty() { IDLE_INTERVAL } else { SWEEP_INTERVAL }
    }

    async fn step(&mut self) -> Result<(), ShipError> {
        while let Some(pending) = self.next_object().await? {
            self.put(pending).await?;
            // Whoever is behind is not kept waiting.
            if !self.context.shipping.is_due() && self.turn.order.is_empty() {
                break;
            }
        }
        self.sweep().await
    }

    /// The object that is to be put next.
    async fn next_object(&mut self) -> Result<Option<(Encoded, Ends)>, ShipError> {
        if let Some(pending) = self.pending.take() {
            return Ok(Some(pending));
        }
        let shipping = &self.context.shipping;
        // Before heads are read: who comes later notes it anew.
        shipping.bytes.store(0, Ordering::SeqCst);
        shipping.is_awaited.store(false, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *shipping.waiting.lock());
        for live in waiting.into_iter().filter_map(|live| live.upgrade()) {
            live.ship_scheduled().store(false, Ordering::SeqCst);
            self.turn.push(live);
        }
        self.turn.retain(|live| live.positions().stored() < live.sure_end() && !live.is_closing());
        if self.turn.order.is_empty() {
            return Ok(None);
        }
        if self.run.is_none() {
            let run = Run::begin(&self.context.store, self.context.wal_log).await?;
            shipping.current_run.store(run.number(), Ordering::SeqCst);
            self.run = Some(run);
            self.checked.clear();
        }
        let picked = self.pick().await?;
        let Some(run) = self.run.take() else { return Ok(None) };
        if picked.is_empty() {
            self.run = Some(run);
            return Ok(None);
        }
        let (chunks, ends): (Vec<Chunk>, Ends) = picked.into_iter().map(|(live, chunk)| (chunk.clone(), (live, chunk.end()))).unzip();
        // Compression takes a core's time.
        let (run, encoded) = self
            .context
            .threads
            .call(move || {
                let encoded = run.encode(&chunks);
                (run, encoded)
            })
            .await
            .map_err(EngineError::from)?;
        self.run = Some(run);
        match encoded {
            Ok(encoded) => Ok(Some((encoded, ends))),
            Err(error) => {
                ends.into_iter().for_each(|(live, _)| self.turn.push(live));
                Err(error.into())
            }
        }
    }

    /// What the next object has: a share of each timeline whose turn it is.
    async fn pick(&mut self) -> Result<Vec<(Arc<LiveTimeline>, Chunk)>, ShipError> {
        let waiting = self.turn.order.len();
        let share = (OBJECT_BYTES_MAX / waiting.max(1)).max(SHARE_MIN);
        let mut room = OBJECT_BYTES_MAX;
        let (mut picked, mut failed): (Vec<(Arc<LiveTimeline>, Chunk)>, Option<EngineError>) = (Vec::new(), None);
        for _ in 0..waiting {
            if room == 0 || picked.len() >= ROWS_MAX {
                break;
            }
            let Some(live) = self.turn.pop() else { break };
            let read = match self.is_ours(&live).await {
                Ok(true) => self.read(&live, share.min(room)).await,
                Ok(false) => continue,
                Err(error) => Err(error),
            };
            match read {
                Ok(Some(chunk)) => {
                    room = room.saturating_sub(chunk.bytes.len());
                    if chunk.end() < live.sure_end() {
                        self.turn.push(live.clone());
                    }
                    picked.push((live, chunk));
                }
                Ok(None) => {}
                // It is nobody else's trouble.
                Err(error) => {
                    tracing::debug!(timeline = live.name(), %error, "its WAL does not go to the store now");
                    self.turn.push(live);
                    failed = Some(error);
                }
            }
        }
        match failed {
            Some(error) if picked.is_empty() => Err(error.into()),
            _ => Ok(picked),
        }
    }

    /// Whether the tenant is still ours, as of after the run began.
    async fn is_ours(&mut self, live: &Arc<LiveTimeline>) -> Result<bool, EngineError> {
        let generation = live.manifest().generation();
        if self.checked.get(&live.tenant()) == Some(&generation) {
            return Ok(true);
        }
        match live.check_ownership().await {
            Ok(()) => {
                self.checked.insert(live.tenant(), generation);
                Ok(true)
            }
            Err(error) if error.is_fenced() => {
                self.context.lost.note(live.tenant(), generation);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// What a timeline has that the store lacks, up to so many bytes.
    async fn read(&self, live: &Arc<LiveTimeline>, bytes_max: usize) -> Result<Option<Chunk>, EngineError> {
        let (tenant, timeline) = (live.tenant(), live.id());
        let (start, limit) = (live.positions().stored(), live.sure_end());
        let wanted = (limit.0.saturating_sub(start.0) as usize).min(bytes_max);
        if wanted == 0 {
            return Ok(None);
        }
        let wal = self.context.wal.clone();
        match self.context.threads.call(move || wal.read(tenant, timeline, start, wanted)).await? {
            Ok(bytes) if bytes.is_empty() => Ok(None),
            Ok(bytes) => Ok(Some(Chunk { tenant, timeline, start, bytes })),
            // Layers have it by now, or the timeline was closed.
            Err(WalLogError::NotHeld { .. } | WalLogError::NotAttached { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn put(&mut self, (encoded, ends): (Encoded, Ends)) -> Result<(), ShipError> {
        let Some(run) = &mut self.run else { return Ok(()) };
        match run.put(&self.context.store, &encoded).await {
            Ok(Put::Stored) => {
                let shipping = &self.context.shipping;
                {
                    let mut covered = shipping.covered.lock();
                    for (live, _) in &ends {
                        let layered = live.positions().layered();
                        let lsn = covered.entry((live.tenant(), live.id())).or_default();
                        *lsn = layered.max(*lsn);
                    }
                }
                let wal_bytes: u64 = encoded.rows.iter().map(|row| row.end.distance_from(row.start)).sum();
                {
                    let mut figures = shipping.figures.lock();
                    figures.objects += 1;
                    figures.held_objects += 1;
                    figures.wal_bytes += wal_bytes;
                    figures.stored_bytes += encoded.stored_bytes();
                }
                tracing::debug!(object = %encoded.object, timelines = ends.len(), wal_bytes, "WAL is in the store");
                self.objects.push_back((encoded.object, encoded.rows));
                ends.into_iter().for_each(|(live, end)| live.positions().raise(Position::Stored, end));
                Ok(())
            }
            Ok(Put::Sealed) => {
                tracing::info!(run = run.number(), "another server wants WAL that is in the store's run of ours: the next one begins");
                self.begin_anew(ends);
                Ok(())
            }
            Err(error @ SharedWalError::Foreign { .. }) => {
                tracing::error!(%error, "WAL of this server is written by another one, too");
                self.begin_anew(ends);
                Err(error.into())
            }
            Err(error) => {
                self.pending = Some((encoded, ends));
                Err(error.into())
            }
        }
    }

    /// This run takes nothing more; what was to go into it goes into the next.
    fn begin_anew(&mut self, ends: Ends) {
        self.run = None;
        ends.into_iter().for_each(|(live, _)| self.turn.push(live));
    }

    /// Deletes objects that layers cover.
    async fn sweep(&mut self) -> Result<(), ShipError> {
        let now = Instant::now();
        if now.duration_since(self.swept) >= SWEEP_INTERVAL {
            self.swept = now;
            let gone = self.uncovered();
            self.context.store.delete_all(&gone).await.map_err(SharedWalError::from)?;
            let mut figures = self.context.shipping.figures.lock();
            figures.deleted_objects += gone.len() as u64;
            figures.held_objects = self.objects.iter().filter(|(_, rows)| !rows.is_empty()).count() as u64;
        }
        Ok(())
    }

    /// Takes the objects that nobody needs out of those that are held, but for the newest: who seals the run does so
    /// behind that. Should their deletion fail, they are a former process's one day.
    fn uncovered(&mut self) -> Vec<ObjectName> {
        let mut gone = Vec::new();
        let mut covered = self.context.shipping.covered.lock();
        let is_covered = |row: &Row| covered.get(&(row.tenant, row.timeline)).is_none_or(|lsn| row.end <= *lsn);
        let newest = self.objects.back().map(|(object, _)| object.clone());
        self.objects.retain_mut(|(object, rows)| {
            rows.retain(|row| !is_covered(row));
            let is_gone = rows.is_empty() && Some(&*object) != newest.as_ref();
            if is_gone {
                gone.push(object.clone());
            }
            !is_gone
        });
        let held: BTreeSet<Owner> = self.objects.iter().flat_map(|(_, rows)| rows).map(|row| (row.tenant, row.timeline)).collect();
        covered.retain(|owner, _| held.contains(owner));
        gone
    }
}
