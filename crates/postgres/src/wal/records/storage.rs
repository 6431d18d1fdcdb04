//! Resource manager Storage (`catalog/storage_xlog.h`).

use super::RecordError;
use crate::fields::Fields;
use crate::{BlockNumber, Fork, Major, RelFork, RelNode};

/// Flag of a truncation that cuts the main fork.
const TRUNCATE_HEAP: i32 = 1;
/// Flag of a truncation that cuts the visibility map.
const TRUNCATE_VM: i32 = 2;
/// Flag of a truncation that cuts the free-space map.
const TRUNCATE_FSM: i32 = 4;

/// A record about relation files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageRecord {
    /// A fork was made.
    Create {
        /// The fork.
        rel: RelFork,
    },
    /// A relation was cut to a number of blocks of its main fork; its maps may be cut to match.
    Truncate {
        /// The relation.
        node: RelNode,
        /// Blocks that stay.
        blocks: BlockNumber,
        /// Whether the main fork is cut.
        main: bool,
        /// Whether the visibility map is.
        visibility_map: bool,
        /// Whether the free-space map is.
        free_space_map: bool,
    },
}

/// Parses a record's main data.
///
/// # Errors
/// [`RecordError`].
pub fn parse(info: u8, data: &[u8], _major: Major) -> Result<StorageRecord, RecordError> {
    let mut f = Fields::new(data);
    match info {
        0x10 => {
            let node = RelNode { spc: f.u32()?, db: f.u32()?, rel: f.u32()? };
            let number = f.i32()?;
            let fork = u8::try_from(number).ok().and_then(Fork::from_number);
            let fork = fork.ok_or_else(|| RecordError::Malformed(format!("fork number {number} does not exist")))?;
            Ok(StorageRecord::Create { rel: node.fork(fork) })
        }
        0x20 => {
            let blocks = f.u32()?;
            let node = RelNode { spc: f.u32()?, db: f.u32()?, rel: f.u32()? };
            let flags = f.i32()?;
            Ok(StorageRecord::Truncate {
                node,
                blocks,
                main: flags & TRUNCATE_HEAP != 0,
                visibility_map: flags & TRUNCATE_VM != 0,
                free_space_map: flags & TRUNCATE_FSM != 0,
            })
        }
        _ => Err(RecordError::UnknownType),
    }
}
