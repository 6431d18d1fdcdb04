//! What ingest and base backup need of a timeline: versions of keys to read at an LSN, and to write at the end.
//!
//! `timeline::Timeline` is the real one; `varve_testing` has a naive one.

use bytes::Bytes;
use varve_postgres::{Lsn, Major, Page};

use crate::key::Key;
use crate::value::Value;

/// A history that could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct HistoryError(pub String);

/// What a scan calls for each key and its value.
pub type Visit<'a> = dyn FnMut(Key, Bytes) -> Result<(), HistoryError> + 'a;

/// Reading a timeline at an LSN. Calls may block on disk and object store, so they do not belong on a runtime's
/// workers.
///
/// All LSNs are at most what is applied.
pub trait History: Send + Sync {
    /// The major whose WAL this is.
    fn major(&self) -> Major;

    /// LSN and newest value of a key that is no page (not for blocks and SLRU pages); versions at or below `floor` do
    /// not count. `None` if it has none.
    ///
    /// # Errors
    /// When a layer cannot be read.
    fn get_above(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<(Lsn, Bytes)>, HistoryError>;

    /// The newest value of a key that is no page; `None` if it has none.
    ///
    /// # Errors
    /// When a layer cannot be read.
    fn get(&self, key: Key, lsn: Lsn) -> Result<Option<Bytes>, HistoryError> {
        Ok(self.get_above(key, Lsn::INVALID, lsn)?.map(|(_, value)| value))
    }

    /// The page that a block or SLRU-page key names, redone up to `lsn`; versions at or below `floor` do not count.
    /// `None` if it has no version.
    ///
    /// # Errors
    /// When a layer cannot be read, or redo fails.
    fn page(&self, key: Key, floor: Lsn, lsn: Lsn) -> Result<Option<Box<Page>>, HistoryError>;

    /// Calls `visit` with the index of each of `wanted`, keys of pages with the floors at or below which versions do
    /// not count, and the page, redone up to `lsn`; `None` for one that has no version.
    ///
    /// # Errors
    /// When a layer cannot be read, or redo fails.
    fn each_page(&self, wanted: &[(Key, Lsn)], lsn: Lsn, visit: &mut dyn FnMut(usize, Option<&Page>)) -> Result<(), HistoryError> {
        for (index, (key, floor)) in wanted.iter().enumerate() {
            visit(index, self.page(*key, *floor, lsn)?.as_deref());
        }
        Ok(())
    }

    /// Calls `visit` for each key in `from..to` that has a value (not a page), in order, with that value; versions at
    /// or below `floor` do not count.
    ///
    /// # Errors
    /// When a layer cannot be read, or what `visit` returns.
    fn scan_above(&self, from: Key, to: Key, floor: Lsn, lsn: Lsn, visit: &mut Visit<'_>) -> Result<(), HistoryError>;

    /// The same with all versions.
    ///
    /// # Errors
    /// When a layer cannot be read, or what `visit` returns.
    fn scan(&self, from: Key, to: Key, lsn: Lsn, visit: &mut Visit<'_>) -> Result<(), HistoryError> {
        self.scan_above(from, to, Lsn::INVALID, lsn, visit)
    }
}

/// Writing a timeline at its end. One writer a timeline.
pub trait HistoryWriter: History {
    /// Adds a version of `key` at `lsn`, which is above what is applied. At most one value for each (key, LSN): a
    /// second one at the same LSN replaces an image by an image and is otherwise kept in order (a record may change a
    /// page twice).
    ///
    /// # Errors
    /// When the timeline stopped.
    fn put(&self, key: Key, lsn: Lsn, value: Value) -> Result<(), HistoryError>;

    /// Everything that ends at or before `lsn` has been put: readers may see it.
    fn advance(&self, lsn: Lsn);
}
