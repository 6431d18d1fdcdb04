//! Resource manager Database (`commands/dbcommands_xlog.h`; in 14 `commands/dbcommands.h`).

use super::RecordError;
use crate::fields::{Fields, u32s};
use crate::{Major, Oid};

/// A record of the database commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseRecord {
    /// One directory of a database was made as a copy of another's, file by file.
    CreateFileCopy {
        /// The new database.
        db: Oid,
        /// The tablespace of the new directory.
        spc: Oid,
        /// The database copied.
        source_db: Oid,
        /// The tablespace of the directory copied.
        source_spc: Oid,
    },
    /// An empty database was made, whose blocks come in records of their own.
    CreateWalLog {
        /// The new database.
        db: Oid,
        /// Its tablespace.
        spc: Oid,
    },
    /// Directories of a database are gone.
    Drop {
        /// The database.
        db: Oid,
        /// The tablespaces in which its directories were.
        spcs: Vec<Oid>,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], major: Major) -> Result<DatabaseRecord, RecordError> {
    let mut f = Fields::new(data);
    let drop = if major.has_wal_log_database_strategy() { 0x20 } else { 0x10 };
    if info == 0x00 {
        return Ok(DatabaseRecord::CreateFileCopy { db: f.u32()?, spc: f.u32()?, source_db: f.u32()?, source_spc: f.u32()? });
    }
    if info == drop {
        let db = f.u32()?;
        let count = f.i32()?;
        return Ok(DatabaseRecord::Drop { db, spcs: u32s(f.items(count, 4)?) });
    }
    if info == 0x10 {
        return Ok(DatabaseRecord::CreateWalLog { db: f.u32()?, spc: f.u32()? });
    }
    Err(RecordError::UnknownType)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drop_record_has_another_number_in_14() {
        let data: Vec<u8> = [16400u32, 1, 1663].into_iter().flat_map(u32::to_le_bytes).collect();
        let dropped = DatabaseRecord::Drop { db: 16400, spcs: vec![1663] };
        assert_eq!(parse(0x10, &data, Major::V14), Ok(dropped.clone()));
        assert_eq!(parse(0x20, &data, Major::V15), Ok(dropped));
        assert_eq!(parse(0x20, &data, Major::V14), Err(RecordError::UnknownType));
        assert_eq!(parse(0x10, &data, Major::V15), Ok(DatabaseRecord::CreateWalLog { db: 16400, spc: 1 }));
    }
}
