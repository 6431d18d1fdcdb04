//! Edit logs: the state of a tenant, or of a timeline's layers, as numbered objects of edits, with a snapshot from
//! time to time.
//!
//! **Writing.** An [`EditLog`] holds the state in memory. [`EditLog::commit`] looks at the state, *with all edits
//! that are still on their way*, decides, and gives edits; they become durable as the next numbered object, written
//! with put-if-absent, and only then does the caller hear of it. While one object is being written, the edits of all
//! that come meanwhile queue up and share the next one. A caller that goes away does not stop its edits: a task of
//! its own writes, and ends when there is nothing to write, so that an idle log costs nothing.
//!
//! **Uncertain writes.** Where a write's outcome is not known it is tried again, with the very same bytes, until it
//! is: the nonce in each entry tells whether the object found under the name is ours. No other bytes are ever written
//! under that number.
//!
//! **Taking over.** Each owner has a generation and writes only its own entries, numbered from 1. Who takes over
//! 1. *claims* the next generation by creating its entry 0;
//! 2. lists the log; where a newer generation has been claimed it gives up;
//! 3. reads the newest snapshot and all entries after it, generation by generation, and *seals* each older generation
//!    by creating the number after its last entry. Where that number turns out to be taken by an edit it is read, and
//!    the next one is tried.
//!
//! A claim may bring edits with it that hold whatever the log says. They count when it is read, as its generation's
//! first.
//!
//! Only then does it write. So all edits have one order, whatever the clocks say, and an old owner that wakes up
//! collides with the seal at its next write and knows that it was fenced. For that reason claims and seals are never
//! pruned.
//!
//! **Reopening.** An owner that dropped an idle log to save memory reads it again, by the same right and without
//! writing anything ([`EditLog::reopen`]).
//!
//! **Pruning.** Entries that a snapshot covers are deleted. The owner first makes the snapshot durable, then lists
//! and goes on only if there is no newer claim. A newer owner lists after it claimed: so either the old one sees the
//! claim and deletes nothing, or the new one sees the snapshot and needs nothing of what is deleted.
//!
//! **Snapshots** are edits too: the shortest list that makes the state. They are written when reading the entries
//! since the last one would cost more than reading another, so their cost per commit is bounded however large the
//! state is.
//!
//! Layout of the objects: [`entry`].

pub mod entry;
mod error;
mod open;
mod snapshot;
mod write;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use crate::envelope::Format;
use crate::ids::{Generation, random_bytes};
use crate::store::{ObjectName, Store};

pub use entry::{EntryId, EntryKind};
use entry::{LogNames, Nonce};
pub use error::{ApplyError, CommitError, EditLogError};
pub use open::{DumpedEntry, dump, read_state};
use snapshot::Cadence;

/// Commits that may be on their way at once; more wait for their turn.
pub const COMMITS_QUEUED_MAX: usize = 4096;
/// Most bytes of rows in one entry.
pub const ENTRY_ROWS_BYTES_MAX: usize = 4 << 20;
/// How long a caller waits for its edits to become durable before it hears that this is not known.
pub const COMMIT_PATIENCE: Duration = Duration::from_secs(60);

/// Formats of a log's objects.
#[derive(Clone, Copy, Debug)]
pub struct LogFormat {
    /// Entries.
    pub entry: Format,
    /// Snapshots.
    pub snapshot: Format,
    /// How many kinds of edits this release knows.
    pub edit_kinds: u32,
}

/// What a log's edits make. Cloning must be cheap (shared structure): each commit does it.
pub trait State: Clone + Default + Send + Sync + 'static {
    /// A change. An enum whose variants never change and are only added at the end.
    type Edit: Serialize + DeserializeOwned + Debug + Send + Sync + 'static;

    /// How the objects look.
    const FORMAT: LogFormat;

    /// Makes the change, or says why it does not fit, and then leaves the state in any condition (the caller discards
    /// it).
    fn apply(&mut self, edit: &Self::Edit) -> Result<(), ApplyError>;

    /// Gives the edits that make this state out of the default one.
    fn for_each_edit(&self, emit: &mut dyn FnMut(&Self::Edit));
}

/// The right to write a tenant's logs: who took which generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The generation.
    pub generation: Generation,
    nonce: Nonce,
}

/// Edits on their way.
struct Queued<S> {
    rows: Vec<u8>,
    row_count: u32,
    /// The state with these edits and all before.
    after: S,
    done: oneshot::Sender<Result<(), EditLogError>>,
    _room: OwnedSemaphorePermit,
}

struct Inner<S> {
    /// The state with all edits, also those on their way.
    latest: S,
    queue: Vec<Queued<S>>,
    /// Number of the entry that is being, or will be, written next.
    next_number: u64,
    /// Whether the writing task runs.
    writing: bool,
    /// The store's last error while that entry was tried.
    last_error: Option<String>,
    cadence: Cadence,
}

struct Shared<S> {
    store: Store,
    names: LogNames,
    ownership: Ownership,
    /// The state as it is durable.
    durable: ArcSwap<S>,
    inner: Mutex<Inner<S>>,
    /// Why nothing is written any more. Set under `inner`'s lock.
    ended: watch::Sender<Option<EditLogError>>,
    room: Arc<Semaphore>,
}

/// See the module's doc. Cheap to clone; clones are the same log.
pub struct EditLog<S: State> {
    shared: Arc<Shared<S>>,
}

impl<S: State> Clone for EditLog<S> {
    fn clone(&self) -> Self {
        EditLog { shared: self.shared.clone() }
    }
}

impl<S: State> Debug for EditLog<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EditLog({}, generation {})", self.shared.names.folder(), self.shared.ownership.generation)
    }
}

impl<S: State> EditLog<S> {
    fn new(store: Store, names: LogNames, ownership: Ownership, state: S, next_number: u64, cadence: Cadence) -> Self {
        let inner = Inner { latest: state.clone(), queue: Vec::new(), next_number, writing: false, last_error: None, cadence };
        let durable = ArcSwap::from_pointee(state);
        let room = Arc::new(Semaphore::new(COMMITS_QUEUED_MAX));
        let ended = watch::Sender::new(None);
        EditLog { shared: Arc::new(Shared { store, names, ownership, durable, inner: Mutex::new(inner), ended, room }) }
    }

    /// The state as it is durable.
    pub fn state(&self) -> Arc<S> {
        self.shared.durable.load_full()
    }

    /// By which right this log is written; [`EditLog::take_over_as`] takes the tenant's other logs over by the same.
    pub fn ownership(&self) -> Ownership {
        self.shared.ownership
    }

    /// Why nothing can be written any more, if so: fenced, mostly.
    pub fn ended(&self) -> Option<EditLogError> {
        self.shared.ended.borrow().clone()
    }

    /// The generation that has taken the log over, if a write, a check or a snapshot has found one.
    pub fn lost(&self) -> Option<Generation> {
        match &*self.shared.ended.borrow() {
            Some(EditLogError::Fenced { by, .. }) => Some(*by),
            _ => None,
        }
    }

    /// Waits until nothing can be written any more, and says why: fenced, mostly, see [`EditLog::lost`]. Who serves
    /// by this log's right must stop then. Gives nothing when the log was closed. Whoever waits does not keep the log
    /// open.
    pub fn wait_lost(&self) -> impl Future<Output = Option<EditLogError>> + Send + use<S> {
        let mut ended = self.shared.ended.subscribe();
        async move { ended.wait_for(Option::is_some).await.ok()?.clone() }
    }

    /// Whether nothing is being written, no snapshot either, and nobody else holds the log open: then it can be
    /// dropped, and be reopened later by its owner.
    pub fn is_idle(&self) -> bool {
        let inner = self.shared.inner.lock();
        !inner.writing && !inner.cadence.is_running() && Arc::strong_count(&self.shared) == 1
    }

    /// Shows `plan` the state with all edits before its own, and makes the edits that it gives durable; then gives
    /// what else it gave. With no edits it waits until what it saw is durable. `plan` runs under a lock: it must be
    /// quick and must not wait.
    ///
    /// A caller that is dropped while it waits leaves its edits on their way.
    ///
    /// # Errors
    /// [`CommitError::Refused`] with what `plan` said. [`CommitError::Log`] otherwise; after
    /// [`EditLogError::Unconfirmed`] and [`EditLogError::Stopped`] it is not known whether the edits were written,
    /// after all others they were not.
    pub async fn commit<T, E>(&self, plan: impl FnOnce(&S) -> Result<(Vec<S::Edit>, T), E>) -> Result<T, CommitError<E>> {
        let shared = &self.shared;
        let Ok(permit) = shared.room.clone().acquire_owned().await else {
            return Err(shared.stopped().into());
        };
        let (done, is_done) = oneshot::channel();
        let value = {
            let mut inner = shared.inner.lock();
            if let Some(error) = self.ended() {
                return Err(error.into());
            }
            let (edits, value) = plan(&inner.latest).map_err(CommitError::Refused)?;
            let mut after = inner.latest.clone();
            let mut rows = Vec::new();
            for edit in &edits {
                after.apply(edit).map_err(|problem| EditLogError::Invalid { log: shared.log(), problem })?;
                entry::push_row(&mut rows, edit)?;
            }
            if rows.len() > ENTRY_ROWS_BYTES_MAX {
                let limit_bytes = ENTRY_ROWS_BYTES_MAX;
                return Err(EditLogError::TooLong { log: shared.log(), bytes: rows.len(), limit_bytes }.into());
            }
            if edits.is_empty() && !inner.writing {
                // All that `plan` saw is durable.
                return Ok(value);
            }
            inner.latest = after.clone();
            let row_count = edits.len() as u32;
            inner.queue.push(Queued { rows, row_count, after, done, _room: permit });
            if !inner.writing {
                inner.writing = true;
                tokio::spawn(shared.clone().write_queue());
            }
            value
        };
        match tokio::time::timeout(COMMIT_PATIENCE, is_done).await {
            Ok(Ok(outcome)) => outcome.map(|()| value).map_err(CommitError::Log),
            Ok(Err(_)) => Err(shared.stopped().into()),
            Err(_) => Err(shared.unconfirmed().into()),
        }
    }

    /// Makes `edits` durable without looking at the state first.
    ///
    /// # Errors
    /// As [`EditLog::commit`].
    pub async fn push(&self, edits: Vec<S::Edit>) -> Result<(), EditLogError> {
        let plan = |_: &S| Ok::<_, std::convert::Infallible>((edits, ()));
        self.commit(plan).await.map_err(|error| match error {
            CommitError::Log(error) => error,
            CommitError::Refused(never) => match never {},
        })
    }
}

impl<S> Shared<S> {
    /// Writes nothing more, for `error`'s sake, unless it was so before.
    fn end(&self, error: &EditLogError) {
        let _inner = self.inner.lock();
        self.ended.send_if_modified(|ended| {
            let is_first = ended.is_none();
            ended.get_or_insert_with(|| error.clone());
            is_first
        });
    }

    fn log(&self) -> ObjectName {
        self.names.folder().clone()
    }

    fn stopped(&self) -> EditLogError {
        EditLogError::Stopped { log: self.log() }
    }

    fn unconfirmed(&self) -> EditLogError {
        let inner = self.inner.lock();
        EditLogError::Unconfirmed {
            log: self.log(),
            entry: EntryId { generation: self.ownership.generation, number: inner.next_number },
            waited_s: COMMIT_PATIENCE.as_secs(),
            last: inner.last_error.clone().unwrap_or_else(|| "the store has not answered".to_owned()),
        }
    }
}

impl Ownership {
    fn new(generation: Generation) -> Result<Ownership, EditLogError> {
        Ok(Ownership { generation, nonce: random_bytes()? })
    }
}
