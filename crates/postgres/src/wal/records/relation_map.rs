//! Resource manager RelMap (`utils/relmapper.h`).

use super::RecordError;
use crate::fields::Fields;
use crate::{Major, Oid};

/// A new version of a `pg_filenode.map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelationMapUpdate<'a> {
    /// Whose map: a database, or 0 for the shared one.
    pub db: Oid,
    /// The database's tablespace, or the global one.
    pub spc: Oid,
    /// The whole file, checked.
    pub file: &'a [u8],
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<RelationMapUpdate<'_>, RecordError> {
    if info != 0x00 {
        return Err(RecordError::UnknownType);
    }
    let mut f = Fields::new(data);
    let (db, spc, len) = (f.u32()?, f.u32()?, f.i32()?);
    let file = f.items(len, 1)?;
    crate::relation_map::decode(file, major)?;
    Ok(RelationMapUpdate { db, spc, file })
}
