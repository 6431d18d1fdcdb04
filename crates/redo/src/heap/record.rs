//! The heap's WAL records taken apart (`access/heapam_xlog.h`), as far as redo needs them.

use varve_postgres::wal::rmgr;

use crate::Fault;
use crate::cursor::Cursor;
use crate::item::OffsetNumber;

/// Record types of Heap and Heap2: bits 4 to 6 of the record's info; bit 7 is [`INIT_PAGE`](opcode::INIT_PAGE).
pub(crate) mod opcode {
    /// `XLOG_HEAP_OPMASK`.
    pub(crate) const MASK: u8 = 0x70;
    /// `XLOG_HEAP_INIT_PAGE`: the page is initialised first.
    pub(crate) const INIT_PAGE: u8 = 0x80;

    pub(crate) const INSERT: u8 = 0x00;
    pub(crate) const DELETE: u8 = 0x10;
    pub(crate) const UPDATE: u8 = 0x20;
    pub(crate) const HOT_UPDATE: u8 = 0x40;
    pub(crate) const CONFIRM: u8 = 0x50;
    pub(crate) const LOCK: u8 = 0x60;
    pub(crate) const INPLACE: u8 = 0x70;

    /// Up to 16 `XLOG_HEAP2_PRUNE`, from 17 on `XLOG_HEAP2_PRUNE_ON_ACCESS`.
    pub(crate) const PRUNE: u8 = 0x10;
    /// Up to 16 `XLOG_HEAP2_VACUUM`, from 17 on `XLOG_HEAP2_PRUNE_VACUUM_SCAN`.
    pub(crate) const VACUUM: u8 = 0x20;
    /// Up to 16 `XLOG_HEAP2_FREEZE_PAGE`, from 17 on `XLOG_HEAP2_PRUNE_VACUUM_CLEANUP`.
    pub(crate) const FREEZE_PAGE: u8 = 0x30;
    pub(crate) const VISIBLE: u8 = 0x40;
    pub(crate) const MULTI_INSERT: u8 = 0x50;
    pub(crate) const LOCK_UPDATED: u8 = 0x60;
}

/// Whether a record of type `info` of resource manager `rmid` says that it clears bits of the visibility map.
#[inline(always)]
pub(crate) fn clears_visibility(rmid: u8, info: u8, main_data: &[u8]) -> bool {
    // Where the record's flags stand, and which of them.
    let (at, flags) = match (rmid, info & opcode::MASK) {
        (rmgr::HEAP, opcode::INSERT) => (2, 1),
        (rmgr::HEAP, opcode::UPDATE | opcode::HOT_UPDATE) => (7, 3),
        (rmgr::HEAP, opcode::DELETE | opcode::LOCK) | (rmgr::HEAP2, opcode::LOCK_UPDATED) => (7, 1),
        (rmgr::HEAP2, opcode::MULTI_INSERT) => (0, 1),
        _ => return false,
    };
    main_data.get(at).is_some_and(|found| found & flags != 0)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// `xl_heap_header`, and in a multi-insert the same fields after the tuple's length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TupleHeader {
    pub(crate) infomask2: u16,
    pub(crate) infomask: u16,
    pub(crate) hoff: u8,
}

impl TupleHeader {
    pub(crate) fn decode(data: &mut Cursor<'_>) -> Result<TupleHeader, Fault> {
        let b: [u8; 5] = data.array()?;
        Ok(TupleHeader { infomask2: u16_at(&b, 0), infomask: u16_at(&b, 2), hoff: b[4] })
    }
}

/// `xl_heap_insert`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Insert {
    pub(crate) offset: OffsetNumber,
    flags: u8,
}

impl Insert {
    #[inline]
    pub(crate) fn decode(data: &[u8]) -> Result<Insert, Fault> {
        let b: [u8; 3] = Cursor::new(data).array()?;
        Ok(Insert { offset: u16_at(&b, 0), flags: b[2] })
    }

    pub(crate) fn all_visible_cleared(self) -> bool {
        self.flags & 1 << 0 != 0
    }
}

/// `xl_heap_multi_insert`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MultiInsert<'a> {
    flags: u8,
    pub(crate) tuples: u16,
    /// Offset numbers, 2 bytes each; empty when the page is initialised, they then count from 1.
    offsets: &'a [u8],
}

impl<'a> MultiInsert<'a> {
    /// Decodes the record's main data; `init` says whether it initialises the page.
    pub(crate) fn decode(data: &'a [u8], init: bool) -> Result<MultiInsert<'a>, Fault> {
        let mut data = Cursor::new(data);
        let flags = data.u8()?;
        data.u8()?; // padding
        let tuples = data.u16()?;
        let offsets = if init { &[] } else { data.take(usize::from(tuples) * 2)? };
        Ok(MultiInsert { flags, tuples, offsets })
    }

    /// Where the tuple with index `i` goes.
    pub(crate) fn offset(&self, i: u16) -> OffsetNumber {
        let at = usize::from(i) * 2;
        match self.offsets.get(at..at + 2) {
            Some(bytes) => u16::from_le_bytes([bytes[0], bytes[1]]),
            None => i.saturating_add(1),
        }
    }

    pub(crate) fn all_visible_cleared(&self) -> bool {
        self.flags & 1 << 0 != 0
    }

    /// All tuples are frozen, so the page becomes all-visible.
    pub(crate) fn all_frozen_set(&self) -> bool {
        self.flags & 1 << 5 != 0
    }
}

/// `xl_heap_delete`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delete {
    pub(crate) xmax: u32,
    pub(crate) offset: OffsetNumber,
    pub(crate) infobits: u8,
    flags: u8,
}

impl Delete {
    #[inline]
    pub(crate) fn decode(data: &[u8]) -> Result<Delete, Fault> {
        let b: [u8; 8] = Cursor::new(data).array()?;
        Ok(Delete { xmax: u32_at(&b, 0), offset: u16_at(&b, 4), infobits: b[6], flags: b[7] })
    }

    pub(crate) fn all_visible_cleared(self) -> bool {
        self.flags & 1 << 0 != 0
    }

    /// A speculative insertion is taken back.
    pub(crate) fn is_super(self) -> bool {
        self.flags & 1 << 3 != 0
    }

    /// The row moves to another partition.
    pub(crate) fn is_partition_move(self) -> bool {
        self.flags & 1 << 4 != 0
    }
}

/// `xl_heap_update`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub(crate) old_xmax: u32,
    pub(crate) old_offset: OffsetNumber,
    pub(crate) old_infobits: u8,
    flags: u8,
    pub(crate) new_xmax: u32,
    pub(crate) new_offset: OffsetNumber,
}

impl Update {
    #[inline]
    pub(crate) fn decode(data: &[u8]) -> Result<Update, Fault> {
        let b: [u8; 14] = Cursor::new(data).array()?;
        Ok(Update {
            old_xmax: u32_at(&b, 0),
            old_offset: u16_at(&b, 4),
            old_infobits: b[6],
            flags: b[7],
            new_xmax: u32_at(&b, 8),
            new_offset: u16_at(&b, 12),
        })
    }

    pub(crate) fn old_all_visible_cleared(self) -> bool {
        self.flags & 1 << 0 != 0
    }

    pub(crate) fn new_all_visible_cleared(self) -> bool {
        self.flags & 1 << 1 != 0
    }

    /// The new tuple's values begin with bytes of the old one, which are not in the record.
    pub(crate) fn prefix_from_old(self) -> bool {
        self.flags & 1 << 5 != 0
    }

    /// They end with bytes of the old one.
    pub(crate) fn suffix_from_old(self) -> bool {
        self.flags & 1 << 6 != 0
    }
}

/// `xl_heap_lock` and `xl_heap_lock_updated`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lock {
    pub(crate) xmax: u32,
    pub(crate) offset: OffsetNumber,
    pub(crate) infobits: u8,
    flags: u8,
}

impl Lock {
    #[inline]
    pub(crate) fn decode(data: &[u8]) -> Result<Lock, Fault> {
        let b: [u8; 8] = Cursor::new(data).array()?;
        Ok(Lock { xmax: u32_at(&b, 0), offset: u16_at(&b, 4), infobits: b[6], flags: b[7] })
    }

    pub(crate) fn all_frozen_cleared(self) -> bool {
        self.flags & 1 << 0 != 0
    }
}

/// `xl_heap_visible`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Visible {
    /// Bits set in the visibility map.
    pub(crate) flags: u8,
}

impl Visible {
    #[inline]
    pub(crate) fn decode(data: &[u8]) -> Result<Visible, Fault> {
        let mut data = Cursor::new(data);
        data.u32()?; // snapshot conflict horizon, for standbys
        Ok(Visible { flags: data.u8()? })
    }
}
