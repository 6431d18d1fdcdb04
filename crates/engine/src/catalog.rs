//! What databases, tablespaces and bytes a history has at a moment.

use varve_postgres::Lsn;
use varve_postgres::Oid;
use varve_postgres::ids::GLOBAL_TABLESPACE;
use varve_storage::database::DatabaseEntry;
use varve_storage::history::{History, HistoryError};
use varve_storage::key::{Key, KeyKind};
use varve_storage::relation;

/// The databases that exist at `lsn`: tablespace and database, without the shared relations.
///
/// # Errors
/// When the history cannot be read.
pub fn databases(history: &dyn History, lsn: Lsn) -> Result<Vec<(Oid, Oid)>, HistoryError> {
    let mut found = Vec::new();
    let (from, to) = Key::all_of_kind(Key::database(0, 0));
    history.scan(from, to, lsn, &mut |key, value| {
        if let (Some(KeyKind::Database { spc, db }), Some(entry)) = (key.kind(), DatabaseEntry::decode(&value))
            && entry.exists
            && spc != GLOBAL_TABLESPACE
        {
            found.push((spc, db));
        }
        Ok(())
    })?;
    Ok(found)
}

/// The tablespaces that exist at `lsn`, but for the two default ones, and where they were on the server that made them:
/// nowhere, where they lie in the data directory.
///
/// # Errors
/// When the history cannot be read.
pub fn tablespaces(history: &dyn History, lsn: Lsn) -> Result<Vec<(Oid, String)>, HistoryError> {
    let mut found = Vec::new();
    let (from, to) = Key::all_of_kind(Key::tablespace(0));
    history.scan(from, to, lsn, &mut |key, value| {
        if let Some(KeyKind::Tablespace { spc }) = key.kind() {
            found.push((spc, String::from_utf8_lossy(&value).into_owned()));
        }
        Ok(())
    })?;
    Ok(found)
}

/// Bytes of all relations at `lsn`.
///
/// # Errors
/// When the history cannot be read.
pub fn total_size(history: &dyn History, lsn: Lsn) -> Result<u64, HistoryError> {
    let mut blocks = 0u64;
    let mut places = databases(history, lsn)?;
    places.push((GLOBAL_TABLESPACE, 0));
    for (spc, db) in places {
        relation::list(history, spc, db, lsn, &mut |_, size| {
            blocks += u64::from(size);
            Ok(())
        })?;
    }
    Ok(blocks * varve_postgres::BLCKSZ as u64)
}
