//! Resource manager Tablespace (`commands/tablespace.h`).

use super::RecordError;
use crate::fields::Fields;
use crate::{Major, Oid};

/// A record of the tablespace commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TablespaceRecord {
    /// A tablespace was made.
    Create {
        /// The tablespace.
        spc: Oid,
        /// Where its link pointed on the server that made it; empty for one inside the data directory.
        path: String,
    },
    /// A tablespace is gone.
    Drop {
        /// The tablespace.
        spc: Oid,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], _major: Major) -> Result<TablespaceRecord, RecordError> {
    let mut f = Fields::new(data);
    match info {
        0x00 => {
            let spc = f.u32()?;
            let path = f.rest().split(|byte| *byte == 0).next().unwrap_or(&[]);
            Ok(TablespaceRecord::Create { spc, path: String::from_utf8_lossy(path).into_owned() })
        }
        0x10 => Ok(TablespaceRecord::Drop { spc: f.u32()? }),
        _ => Err(RecordError::UnknownType),
    }
}
