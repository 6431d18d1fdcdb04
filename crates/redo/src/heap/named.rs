//! Which tuples a record is about, before its page is at hand.

use std::ops::Range;

use varve_postgres::Page;
use varve_postgres::page::PAGE_HEADER_SIZE;
use varve_postgres::wal::rmgr;

use super::record::opcode;
use crate::item::{self, ITEM_ID_SIZE, ItemId, OffsetNumber};

/// Tuples that a record names, as far as that can be told at a glance: so that memory can be waited for ahead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamedTuples {
    /// Line pointer of the one that is changed, from 1; 0 if there is none.
    changed: OffsetNumber,
    /// Line pointer of the one that is made.
    made: OffsetNumber,
}

impl NamedTuples {
    /// Those of a record of type `info` of resource manager `rmid`.
    #[inline(always)]
    pub fn of(rmid: u8, info: u8, main_data: &[u8]) -> NamedTuples {
        let offset = |at: usize| main_data.get(at..at + 2).map_or(0, |bytes| OffsetNumber::from_le_bytes([bytes[0], bytes[1]]));
        match (rmid, info & opcode::MASK) {
            // They begin with a transaction, `xl_heap_update` has another one before the new tuple's number.
            (rmgr::HEAP, opcode::UPDATE | opcode::HOT_UPDATE) => NamedTuples { changed: offset(4), made: offset(12) },
            (rmgr::HEAP, opcode::DELETE | opcode::LOCK) => NamedTuples { changed: offset(4), made: 0 },
            (rmgr::HEAP, opcode::INSERT) => NamedTuples { changed: 0, made: offset(0) },
            _ => NamedTuples::default(),
        }
    }

    /// Where on their page the line pointers lie.
    pub fn line_pointers(self) -> impl Iterator<Item = usize> {
        let place = |offset| usize::from(offset).checked_sub(1).map(|index| PAGE_HEADER_SIZE + index * ITEM_ID_SIZE);
        [self.changed, self.made].into_iter().filter_map(place)
    }

    /// Where on `page` the tuple lies that is changed.
    pub fn changed(self, page: &Page) -> Option<Range<usize>> {
        let index = usize::from(self.changed).checked_sub(1)?;
        let id = ItemId::from_bytes(*item::line_pointers(page).get(index)?);
        Some(usize::from(id.off())..usize::from(id.off()) + usize::from(id.len()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::heap::record::{Delete, Insert, Lock, Update};

    proptest! {
        #[test]
        fn they_are_those_of_the_record(data in vec(any::<u8>(), 14)) {
            let named = |kind| NamedTuples::of(rmgr::HEAP, kind, &data);
            let (insert, delete) = (Insert::decode(&data).expect("an insert"), Delete::decode(&data).expect("a delete"));
            let (update, lock) = (Update::decode(&data).expect("an update"), Lock::decode(&data).expect("a lock"));
            prop_assert_eq!(named(opcode::INSERT | opcode::INIT_PAGE), NamedTuples { changed: 0, made: insert.offset });
            prop_assert_eq!(named(opcode::DELETE), NamedTuples { changed: delete.offset, made: 0 });
            prop_assert_eq!(named(opcode::HOT_UPDATE), NamedTuples { changed: update.old_offset, made: update.new_offset });
            prop_assert_eq!(named(opcode::LOCK), NamedTuples { changed: lock.offset, made: 0 });
        }
    }
}
