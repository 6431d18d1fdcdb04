//! The task that writes what is queued.

use std::sync::Arc;
use std::time::Duration;

use super::entry::{Entry, NamedEntry};
use super::{ENTRY_ROWS_BYTES_MAX, EditLogError, EntryId, EntryKind, Queued, Shared, State};
use crate::ids::random_bytes;
use crate::store::{Created, ObjectName};

/// Pause between two rounds of attempts at an entry whose outcome is not known. Each round has its own, shorter,
/// pauses.
const ROUND_PAUSE: Duration = Duration::from_secs(2);

impl<S: State> Shared<S> {
    /// Writes entries until nothing is queued.
    pub(super) async fn write_queue(self: Arc<Self>) {
        while let Some((batch, number)) = self.next_batch() {
            let id = EntryId { generation: self.ownership.generation, number };
            let written = if batch.iter().all(|queued| queued.row_count == 0) { Ok(0) } else { self.write(&batch, id).await };
            match written {
                Ok(0) => finish(batch, &Ok(())),
                Ok(bytes) => {
                    if let Some(last) = batch.last() {
                        self.durable.store(Arc::new(last.after.clone()));
                    }
                    self.inner.lock().next_number += 1;
                    finish(batch, &Ok(()));
                    self.snapshot_if_due(id, bytes);
                }
                Err(error) => self.fail(batch, error),
            }
        }
    }

    /// Takes what fits into one entry; `None` ends the task.
    fn next_batch(&self) -> Option<(Vec<Queued<S>>, u64)> {
        let mut inner = self.inner.lock();
        let mut bytes = 0;
        let fits = |queued: &Queued<S>| {
            bytes += queued.rows.len();
            bytes <= ENTRY_ROWS_BYTES_MAX
        };
        let count = inner.queue.iter().map(fits).take_while(|fits| *fits).count();
        inner.writing = count > 0;
        inner.last_error = None;
        let number = inner.next_number;
        inner.writing.then(|| (inner.queue.drain(..count).collect(), number))
    }

    /// Writes one entry, until it is known that it is there, or that it never will be. Gives its length.
    async fn write(&self, batch: &[Queued<S>], id: EntryId) -> Result<u64, EditLogError> {
        let rows: Vec<u8> = batch.iter().flat_map(|queued| queued.rows.iter().copied()).collect();
        let row_count = batch.iter().map(|queued| queued.row_count).sum();
        let entry = Entry { row_count, rows: rows.into(), ..Entry::bare(EntryKind::Edits, random_bytes()?, id) };
        let object = self.names.entry(id)?;
        let bytes = entry.encode(&S::FORMAT, &object)?;
        let mut uncertain = false;
        loop {
            let error = match self.store.put_if_absent(&object, bytes.clone()).await {
                Ok(Created::Ours) => return Ok(bytes.len() as u64),
                Ok(Created::Taken(other)) => match self.was_written(&object, id, &other).await {
                    Ok(()) => return Ok(bytes.len() as u64),
                    Err(EditLogError::Store(error)) => {
                        uncertain = true;
                        error
                    }
                    Err(error) => return Err(error),
                },
                Err(error) => error,
            };
            uncertain |= error.is_uncertain();
            if !uncertain {
                return Err(error.into());
            }
            // It may be there, or get there yet: no other bytes can have this number, so only this very write can go
            // on.
            tracing::warn!(log = %self.names.folder(), entry = %id, %error, "an entry is not confirmed, it is tried again");
            self.inner.lock().last_error = Some(error.to_string());
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    /// Under our number stands something else, `bytes`. Nearly always that is the seal of who has taken over, and our
    /// entry was not written.
    ///
    /// But it may have been written by an attempt whose outcome we did not learn, have been read by the next owner,
    /// which sealed the number after it, and been pruned; and then one that had begun to take over before that owner,
    /// and was overtaken while it slept, put its late seal there. The number after it tells: a seal is never pruned.
    async fn was_written(&self, object: &ObjectName, id: EntryId, bytes: &bytes::Bytes) -> Result<(), EditLogError> {
        let entry = Entry::decode(&S::FORMAT, object, NamedEntry { id, is_snapshot: false }, bytes)?;
        let EntryKind::Seal { by } = entry.kind else { return Err(EditLogError::Conflict { object: object.clone() }) };
        let after = self.names.entry(EntryId { number: id.number + 1, ..id })?;
        match self.store.get_optional(&after).await? {
            Some(_) => Ok(()),
            None => Err(EditLogError::Fenced { log: self.log(), own: self.ownership.generation, by }),
        }
    }

    /// Nothing of `batch` was written, so all that came after it, and was decided on its ground, falls with it.
    fn fail(&self, batch: Vec<Queued<S>>, error: EditLogError) {
        // The store may recover from its errors; from another owner there is no way back.
        if !matches!(error, EditLogError::Store(_)) {
            self.end(&error);
        }
        let rest = {
            let mut inner = self.inner.lock();
            inner.latest = S::clone(&self.durable.load());
            std::mem::take(&mut inner.queue)
        };
        tracing::warn!(log = %self.names.folder(), generation = %self.ownership.generation, %error, "edits were not written");
        let outcome = Err(error);
        finish(batch, &outcome);
        finish(rest, &outcome);
    }
}

fn finish<S>(batch: Vec<Queued<S>>, outcome: &Result<(), EditLogError>) {
    for queued in batch {
        // Who went away does not want to know.
        let _gone = queued.done.send(outcome.clone());
    }
}
