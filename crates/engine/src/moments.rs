//! Positions and moments: which record boundary a position is rounded down to, and where in WAL a moment is.
//!
//! All of it looks at one history and at the part `from..to` of WAL that is its own; a caller walks the ancestry.
//! `from` is where the timeline begins (its branch point, or the end of the template), `to` is what is applied. Reads
//! are made at `to`, since the WAL index says the same wherever it is read and only the newest version is complete.
//!
//! A moment T means what `recovery_target_time` means: everything before the first commit or abort that is later than
//! T.

use varve_postgres::{Lsn, Timestamp};
use varve_storage::history::{History, HistoryError};
use varve_storage::key::{Key, KeyKind};
use varve_storage::wal_index::{Boundary, WalIndexPage, page_of};

/// A position or moment that cannot be resolved.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MomentError {
    /// Later than what there is.
    #[error("{lsn} is in the future: the history ends at {end}")]
    Future {
        /// The position asked for.
        lsn: Lsn,
        /// Where the history ends.
        end: Lsn,
    },
    /// Earlier than what there is.
    #[error("{lsn} is before the history, which begins at {start}")]
    BeforeHistory {
        /// The position asked for.
        lsn: Lsn,
        /// Where the history begins.
        start: Lsn,
    },
    /// It was collected.
    #[error("what was asked for is not kept any more: the history of this branch can be read from {earliest} on")]
    Collected {
        /// From where on all of it can be read.
        earliest: Lsn,
    },
    /// A time before the first transaction that the history knows.
    #[error("the time is before the history of this branch")]
    BeforeTime {
        /// The time asked for.
        at: Timestamp,
    },
    /// The history could not be read.
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// Where a moment is, as far as one history knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// A transaction that ended later than the moment is already in the WAL before this history: the answer is in an
    /// ancestor, or before all history.
    Before,
    /// The boundary right before the first transaction that ended later.
    At(Boundary),
    /// No transaction ended later: everything there is belongs to the moment. The boundary is the last one.
    AllOfIt(Boundary),
}

/// The WAL index's page `page`, read at `read_at`; `None` if no record ends on it.
pub(crate) fn index_page(history: &(impl History + ?Sized), page: u64, read_at: Lsn) -> Result<Option<WalIndexPage>, HistoryError> {
    let key = Key::wal_index(page);
    let Some(bytes) = history.get(key, read_at)? else { return Ok(None) };
    let decoded = WalIndexPage::decode(page, &bytes);
    decoded.map(Some).ok_or_else(|| HistoryError(format!("the value of the {key}, read at {read_at}, is malformed")))
}

/// The last page at or before `page` on which a record ends; it may be far away behind a long record.
fn index_page_at_or_before(
    history: &(impl History + ?Sized),
    page: u64,
    read_at: Lsn,
) -> Result<Option<(u64, WalIndexPage)>, HistoryError> {
    if let Some(found) = index_page(history, page, read_at)? {
        return Ok(Some((page, found)));
    }
    let (mut end, mut width) = (page, 1);
    while end > 0 {
        let start = end.saturating_sub(width);
        let mut last = None;
        history.scan(Key::wal_index(start), Key::wal_index(end), read_at, &mut |key, _| {
            if let Some(KeyKind::WalIndex { page }) = key.kind() {
                last = Some(page);
            }
            Ok(())
        })?;
        if let Some(page) = last {
            return Ok(index_page(history, page, read_at)?.map(|found| (page, found)));
        }
        (end, width) = (start, width.saturating_mul(2));
    }
    Ok(None)
}

/// Rounds `lsn` down to a record boundary: the end of the last record that ends at or before it.
///
/// # Errors
/// When `lsn` is not in `from..=to`, or the history cannot be read.
pub fn round_down(history: &(impl History + ?Sized), lsn: Lsn, from: Lsn, to: Lsn) -> Result<Boundary, MomentError> {
    if lsn > to {
        return Err(MomentError::Future { lsn, end: to });
    }
    if lsn < from {
        return Err(MomentError::BeforeHistory { lsn, start: from });
    }
    let mut page = page_of(lsn);
    loop {
        let Some((found_on, found)) = index_page_at_or_before(history, page, to)? else {
            return Err(MomentError::BeforeHistory { lsn, start: from });
        };
        if let Some(boundary) = found.at_or_before(lsn) {
            return Ok(boundary);
        }
        page = found_on.checked_sub(1).ok_or(MomentError::BeforeHistory { lsn, start: from })?;
    }
}

/// Finds the moment `time` in this history's own WAL.
///
/// # Errors
/// When the history cannot be read.
pub fn moment(history: &(impl History + ?Sized), time: Timestamp, from: Lsn, to: Lsn) -> Result<Found, MomentError> {
    if round_down(history, from, from, to)?.time_max > time {
        return Ok(Found::Before);
    }
    let last = round_down(history, to, from, to)?;
    if last.time_max <= time {
        return Ok(Found::AllOfIt(last));
    }
    // The first boundary with a later running maximum is on the last page before which the maximum is not yet later.
    let (mut low, mut high) = (page_of(from), page_of(to));
    let mut best = index_page_at_or_before(history, low, to)?;
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        match index_page_at_or_before(history, middle, to)? {
            Some((page, found)) if page > low && found.before.time_max <= time => {
                best = Some((page, found));
                low = middle;
            }
            Some((page, _)) if page > low => high = page - 1,
            // No record ends on the pages above `low` up to the middle.
            _ => low = middle,
        }
    }
    let Some((_, found)) = best else { return Err(MomentError::BeforeHistory { lsn: from, start: from }) };
    let mut before = found.before;
    for boundary in found.boundaries.iter().take_while(|boundary| boundary.end <= to) {
        if boundary.end > from && boundary.time_max > time {
            return Ok(Found::At(before));
        }
        before = *boundary;
    }
    Ok(Found::AllOfIt(last))
}
