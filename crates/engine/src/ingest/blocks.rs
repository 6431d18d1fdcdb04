//! The relation blocks that a record names, and the visibility-map pages whose bits it clears without naming them.

use bytes::Bytes;
use varve_postgres::wal::{Block, Record, records, rmgr};
use varve_postgres::{BlockNumber, Fork, RelFork, page};
use varve_redo::change::{Change, encode_block_record};
use varve_redo::visibility_map::visibility_map_clears;
use varve_storage::key::Key;
use varve_storage::value::Value;

use super::{Ingest, IngestError};

impl Ingest {
    pub(super) fn ingest_blocks(&mut self, record: &Record<'_>) -> Result<(), IngestError> {
        for block in &record.blocks {
            let Some(value) = self.value_of(record, block)? else { continue };
            self.extend(block.rel, block.blkno.saturating_add(1), record.end)?;
            self.put(Key::block(block.rel, block.blkno), record.end, value)?;
        }
        if matches!(record.header.rmid, rmgr::HEAP | rmgr::HEAP2) {
            for (map, page, change) in visibility_map_clears(record) {
                self.clear_visibility(record, map, page, &change)?;
            }
            self.note_free_space(record)?;
        }
        Ok(())
    }

    /// What the record makes of the block; nothing if it only carried hints.
    fn value_of(&self, record: &Record<'_>, block: &Block<'_>) -> Result<Option<Value>, IngestError> {
        if block.image.as_ref().is_some_and(|image| image.apply) {
            let mut page = page::ZERO_PAGE;
            varve_redo::restore_image(record, block, &mut page)?;
            return Ok(Some(Value::Image(Bytes::copy_from_slice(&page))));
        }
        let (rmid, info, lsn) = (record.header.rmid, record.kind(), record.start);
        if rmid == rmgr::XLOG {
            // Hints come without an image where full-page writes are off; then nothing is to be redone.
            if info == records::xlog::FPI_FOR_HINT {
                return Ok(None);
            }
            return Err(IngestError::malformed(
                record,
                format!("block {} of {} comes without its full-page image", block.blkno, block.rel),
            ));
        }
        if !varve_redo::is_supported(self.major, rmid, info) {
            return Err(IngestError::Unsupported { rmid, info, lsn });
        }
        Ok(Some(Value::Change { will_init: block.will_init, bytes: encode_block_record(record, block) }))
    }

    fn clear_visibility(&mut self, record: &Record<'_>, map: RelFork, page: BlockNumber, change: &Change<'_>) -> Result<(), IngestError> {
        debug_assert_eq!(map.fork, Fork::VisibilityMap);
        let size = self.size(map)?;
        // Bits on a page that the map does not have are clear already.
        if size.exists && page < size.blocks {
            self.put(Key::block(map, page), record.end, Value::Change { will_init: false, bytes: change.encode() })?;
        }
        Ok(())
    }
}
