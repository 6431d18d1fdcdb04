//! Snapshots: when, and what is deleted afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::entry::{Entry, NamedEntry, push_row};
use super::open::fenced;
use super::{EditLogError, EntryId, EntryKind, Shared, State};
use crate::ids::{Generation, random_bytes};
use crate::store::ObjectName;

/// Reading an entry costs as much as reading this many bytes of a snapshot, and as many more as the entry has.
const ENTRY_COST_BYTES: u64 = 8 << 10;
/// Where the last snapshot was longer than this, encoding the next takes too long for a thread that serves others.
const ENCODED_IN_PASSING_BYTES_MAX: u64 = 256 << 10;
/// Entries since the last snapshot may cost this much, however small the snapshot was.
const ENTRIES_COST_MIN_BYTES: u64 = 512 << 10;

/// What reading the log costs, so that a snapshot is taken in time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cadence {
    /// Length of the last snapshot.
    pub(super) snapshot_bytes: u64,
    /// What reading the entries since then costs.
    entries_cost_bytes: u64,
    /// A snapshot is being written.
    running: bool,
}

impl Cadence {
    /// Counts an entry of `bytes` bytes.
    pub(super) fn count(&mut self, bytes: u64) {
        self.entries_cost_bytes += ENTRY_COST_BYTES + bytes;
    }

    /// Whether a snapshot is being written.
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    fn is_due(&self) -> bool {
        !self.running && self.entries_cost_bytes >= self.snapshot_bytes.max(ENTRIES_COST_MIN_BYTES)
    }
}

fn encode<S: State>(state: &S, id: EntryId, object: &ObjectName) -> Result<Bytes, EditLogError> {
    let (mut rows, mut row_count, mut failed) = (Vec::new(), 0, None);
    state.for_each_edit(&mut |edit| {
        row_count += 1;
        if let Err(error) = push_row(&mut rows, edit) {
            failed = Some(error);
        }
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let entry = Entry { row_count, rows: rows.into(), ..Entry::bare(EntryKind::Snapshot, random_bytes()?, id) };
    Ok(entry.encode(&S::FORMAT, object)?)
}

impl<S: State> Shared<S> {
    /// After entry `id`, of `bytes` bytes, was written: takes a snapshot in the background if it is time.
    pub(super) fn snapshot_if_due(self: &Arc<Self>, id: EntryId, bytes: u64) {
        let (counted, is_large) = {
            let mut inner = self.inner.lock();
            inner.cadence.count(bytes);
            if !inner.cadence.is_due() {
                return;
            }
            inner.cadence.running = true;
            (inner.cadence.entries_cost_bytes, inner.cadence.snapshot_bytes > ENCODED_IN_PASSING_BYTES_MAX)
        };
        let state = S::clone(&self.durable.load());
        let shared = self.clone();
        tokio::spawn(async move {
            let written = shared.snapshot(state, id, is_large).await;
            let mut inner = shared.inner.lock();
            inner.cadence.running = false;
            // After a failure, too, only after as many entries more is it tried again.
            inner.cadence.entries_cost_bytes -= counted;
            match written {
                Ok(bytes) => inner.cadence.snapshot_bytes = bytes,
                Err(error) => tracing::warn!(log = %shared.names.folder(), %error, "no snapshot could be written; the log works on"),
            }
        });
    }

    /// Writes the state after entry `id`, and deletes what it makes superfluous.
    async fn snapshot(&self, state: S, id: EntryId, is_large: bool) -> Result<u64, EditLogError> {
        let object = self.names.snapshot(id)?;
        let bytes = if is_large {
            let object = object.clone();
            let encoded = tokio::task::spawn_blocking(move || encode(&state, id, &object)).await;
            encoded.map_err(|_| self.stopped())??
        } else {
            encode(&state, id, &object)?
        };
        let length = bytes.len() as u64;
        // Nobody else takes snapshots in our generation, and after each entry there is at most one.
        self.store.put(&object, bytes).await?;
        self.prune(id).await?;
        Ok(length)
    }

    /// Deletes entries and snapshots that the snapshot after entry `id` covers, unless somebody has taken over: see the
    /// log's doc.
    async fn prune(&self, id: EntryId) -> Result<(), EditLogError> {
        let listed = self.store.list(self.names.folder()).await?;
        let mut named: Vec<(NamedEntry, ObjectName)> =
            listed.into_iter().filter_map(|listed| Some((self.names.parse(&listed.name)?, listed.name))).collect();
        named.sort_by_key(|(named, _)| *named);
        if let Some(by) = named.last().map(|(named, _)| named.id.generation).filter(|newest| *newest > id.generation) {
            self.end(&fenced(&self.names, id.generation, by));
            return Ok(());
        }
        // The last entry of an older generation is its seal.
        let mut last: BTreeMap<Generation, u64> = BTreeMap::new();
        for (named, _) in named.iter().filter(|(named, _)| !named.is_snapshot) {
            last.insert(named.id.generation, named.id.number);
        }
        let covered = |named: &NamedEntry| {
            if named.is_snapshot {
                return named.id < id;
            }
            let is_claim = named.id.number == 0;
            let is_seal = named.id.generation < id.generation && last.get(&named.id.generation) == Some(&named.id.number);
            named.id <= id && !is_claim && !is_seal
        };
        let superfluous: Vec<ObjectName> = named.into_iter().filter(|(named, _)| covered(named)).map(|(_, object)| object).collect();
        self.store.delete_all(&superfluous).await?;
        Ok(())
    }
}
