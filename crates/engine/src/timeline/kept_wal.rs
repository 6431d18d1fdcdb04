//! WAL that is kept when its flush is published, and given again: that which carries its pages
//! (`wal_consistency_checking`), and that which replication slots may want.
//!
//! A compute begins with WAL from its start on. Who reads through a slot wants older WAL: a decoder from where the
//! oldest transaction began that was running when it stopped, a standby from where it is. So all WAL of a timeline is
//! kept while it has a slot of its tenant's. Whoever writes with `wal_level = logical` means to make one, and a slot
//! reaches back a little behind the moment at which it is known here; so that WAL is kept, too.
//!
//! Ingest notes the end of each such record *before* it puts what the record changes, so no flush that covers it
//! overlooks it, also when a restart ingests the WAL log anew. A flush without such a record costs nothing and is not
//! kept, unless it ends soon behind one: a pause in a load makes no gap, behind which each page would have to be taken
//! for true anew. What is kept is taken from the WAL log, as ingest took it: framed, durable, and without what is void.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_postgres::control::WalLevel;
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::history::{History as _, HistoryError};
use varve_storage::kept_wal::{Keeper, KeptWalError, PIECE_BYTES_MAX};
use varve_storage::key::Key;
use varve_storage::manifest::ManifestEdit;
use varve_storage::wal_log::WalLogError;

use super::LiveTimeline;

/// So far behind the last record that carries its pages WAL is kept.
const PAUSE_BYTES_MAX: u64 = 1 << 20;

/// WAL without a gap that can be had from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptRange {
    /// Its first byte.
    pub start: Lsn,
    /// The byte behind its last.
    pub end: Lsn,
    /// Whether it is in the store; else it is in this pageserver's WAL log only.
    pub in_store: bool,
}

impl LiveTimeline {
    /// Remembers that the record that ends at `end` carries its pages. Records come in order.
    pub(super) fn note_check_images(&self, end: Lsn) {
        self.check_images.store(end.0, Ordering::Release);
    }

    /// Whether the WAL between *layered* and `end`, all that there is or less, is to be kept. Blocks.
    fn keeps_wal(&self, layered: Lsn, end: Lsn) -> Result<bool, HistoryError> {
        let carries_pages = is_worth_keeping(Lsn(self.check_images.load(Ordering::Acquire)), layered, end);
        if carries_pages || self.log.state().has_slots(self.facts.id) {
            return Ok(true);
        }
        let fields = self.history.get(Key::checkpoint(), end.min(self.positions().applied()))?;
        let fields = fields.and_then(|bytes| CheckpointFields::decode(&bytes));
        Ok(fields.is_some_and(|fields| fields.parameters.wal_level == WalLevel::Logical as i32))
    }

    /// From where on WAL up to `end` can be had without a gap, but not from before `earliest`. Blocks no more than a
    /// look at the manifest.
    pub(crate) fn wal_reaches_back(&self, earliest: Lsn, end: Lsn) -> Lsn {
        // *layered* first, as in `wal_ranges`.
        let mut at = end.min(self.positions().layered());
        let published = self.manifest.state();
        while at > earliest
            && let Some(piece) = published.kept_wal_at(Lsn(at.0 - 1))
        {
            at = piece.lsn_start;
        }
        at.max(earliest)
    }

    /// Puts the WAL between *layered* and `end` into the store, if it is to be kept there, and gives the edits that say
    /// so. Blocks.
    ///
    /// # Errors
    /// When it cannot be read or uploaded; to be called again later.
    pub(super) fn keep_wal(&self, end: Lsn) -> Result<Vec<ManifestEdit>, KeptWalError> {
        let layered = self.positions().layered();
        if end <= layered || !self.keeps_wal(layered, end)? {
            return Ok(Vec::new());
        }
        let keeper = Keeper {
            tenant: self.tenant,
            timeline: self.facts.id,
            generation: self.manifest.generation(),
            store: &self.context.resources.store,
        };
        let pieces = keeper.keep((layered, end), &mut |from, max| self.context.wal.read(self.tenant, self.facts.id, from, max))?;
        tracing::debug!(timeline = self.name, start = %layered, %end, pieces = pieces.len(), "WAL is kept");
        Ok(pieces.into_iter().map(ManifestEdit::KeepWal).collect())
    }

    /// Where there is WAL of this timeline, below `limit`, that is kept, or will be; ascending. Of records that ingest
    /// has not seen yet it is not known whether they carry their pages.
    /// Blocks.
    ///
    /// # Errors
    /// When the history cannot be read.
    pub fn wal_ranges(&self, limit: Lsn) -> Result<Vec<KeptRange>, KeptWalError> {
        let mut ranges: Vec<KeptRange> = Vec::new();
        let mut add = |start: Lsn, end: Lsn, in_store: bool| match ranges.last_mut() {
            Some(last) if last.end == start && last.in_store == in_store => last.end = end,
            _ => ranges.push(KeptRange { start, end, in_store }),
        };
        // *layered* first: a flush publishes before it moves it, so what it says is in the store is in the manifest,
        // and pieces beyond do not count yet.
        let (layered, head) = (self.positions().layered(), self.positions().head());
        let published = self.manifest.state();
        for piece in published.kept_wal().filter(|piece| piece.lsn_start < limit.min(layered)) {
            add(piece.lsn_start, piece.lsn_end.min(limit), true);
        }
        let end = head.min(limit);
        if layered < end && self.keeps_wal(layered, end)? {
            add(layered, end, false);
        }
        Ok(ranges)
    }

    /// WAL from `from` on, which lies below `limit`: at least a byte and at most [`PIECE_BYTES_MAX`]; nothing if it is
    /// neither kept nor in the WAL log. Blocks.
    ///
    /// # Errors
    /// When the store or the WAL log cannot be read.
    pub fn wal_bytes(&self, from: Lsn, limit: Lsn) -> Result<Option<Bytes>, KeptWalError> {
        let max = limit.min(self.positions().head()).distance_from(from).min(PIECE_BYTES_MAX as u64) as usize;
        match self.context.wal.read(self.tenant, self.facts.id, from, max) {
            Ok(bytes) => return Ok(Some(bytes).filter(|bytes| !bytes.is_empty())),
            // What the log lets go of is published before.
            Err(WalLogError::NotHeld { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let Some(piece) = self.manifest.state().kept_wal_at(from).cloned() else { return Ok(None) };
        let bytes = piece.read(&self.context.resources.store, from)?;
        let below_limit = limit.distance_from(from).min(bytes.len() as u64) as usize;
        Ok(Some(bytes.slice(..below_limit)))
    }
}

/// Whether WAL from `start` to `end` is kept, where `last` is the end of the newest record that carries its pages, if
/// there is one.
fn is_worth_keeping(last: Lsn, start: Lsn, end: Lsn) -> bool {
    last > start || last.is_valid() && end.distance_from(last) <= PAUSE_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wal_is_kept_with_check_images_and_a_little_behind_them() {
        let mib = |n: u64| Lsn(n << 20);
        for (last, start, end, kept, what) in [
            (Lsn::INVALID, Lsn(0x28), Lsn(0x100), false, "no record ever carried its pages"),
            (mib(5), mib(4), mib(9), true, "a record between the two does"),
            (mib(9), mib(4), mib(9), true, "the last one does"),
            (mib(20), mib(4), mib(9), true, "one does, and so does a later one"),
            (mib(4), mib(4), mib(5), true, "it ends soon behind one"),
            (mib(4), mib(4), mib(5) + 8, false, "it does not"),
            (mib(3), mib(4), mib(5), false, "it begins soon behind one, but does not end so"),
        ] {
            assert_eq!(is_worth_keeping(last, start, end), kept, "{what}: {last}, {start}..{end}");
        }
    }
}
