//! What one WAL record does to one page, and its bytes as a stored value.
//!
//! Layout of a stored change, little-endian: tag `u8`, then
//! - 0 [`BlockRecord`]: rmid `u8`, info `u8`, flags `u8` (1 initialises, 2 has data), xid `u32`, block id `u8`, fork
//!   `u8`, block `u32`, number of other blocks `u8`, each id `u8`, fork `u8`, block `u32`; length of the main data
//!   `u32`, the main data, the block's data.
//! - 1 [`Change::ClearVisibility`]: flags `u8`, heap blocks `u32` each.
//! - 2 [`Change::ClogStatus`]: status `u8`, xids `u32` each.
//! - 3 [`Change::MultiXactOffset`]: multi `u32`, offset `u32`.
//! - 4 [`Change::MultiXactMembers`]: first `u32`, then xid `u32` and status `u8` each.
//! - 5 [`Change::CommitTs`]: time `i64`, origin `u16`, xids `u32` each.
//! - 6 [`Change::TruncateVisibility`]: heap blocks `u32`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use smallvec::SmallVec;
use varve_postgres::{BlockNumber, Fork, wal};

/// Bytes of a stored record's fixed fields.
const HEAD_SIZE: usize = 19;
/// Bytes of another block there.
const OTHER_SIZE: usize = 6;

/// Another block of the same record, whose number a page function may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OtherBlock {
    /// Its id in the record.
    pub id: u8,
    /// Its fork.
    pub fork: Fork,
    /// Its number.
    pub blkno: BlockNumber,
}

/// A WAL record trimmed to what one of its blocks needs: a view of the record's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRecord<'a> {
    /// Resource manager.
    pub rmid: u8,
    /// Type (the high four bits; the low ones are cleared).
    pub info: u8,
    /// Transaction that wrote it.
    pub xid: u32,
    /// The record's own data, shared by its blocks.
    pub main_data: &'a [u8],
    /// The block's id in the record.
    pub block_id: u8,
    /// The block's fork.
    pub fork: Fork,
    /// The block's number.
    pub blkno: BlockNumber,
    /// Whether redo initialises the page.
    pub will_init: bool,
    /// Whether the record has data for the block.
    pub has_data: bool,
    /// The block's data.
    pub data: &'a [u8],
    /// The record's other blocks, ids ascending.
    pub others: Others,
}

impl<'a> BlockRecord<'a> {
    /// The part of `record` that concerns its block `block`.
    #[inline(always)]
    pub fn trim(record: &wal::Record<'a>, block: &wal::Block<'a>) -> BlockRecord<'a> {
        BlockRecord {
            rmid: record.header.rmid,
            info: record.kind(),
            xid: record.header.xid,
            main_data: record.main_data,
            block_id: block.id,
            fork: block.rel.fork,
            blkno: block.blkno,
            will_init: block.will_init,
            has_data: block.has_data,
            data: block.data,
            others: if record.blocks.len() < 2 { Others::new() } else { other_blocks(record, block).collect() },
        }
    }

    /// The number of the record's block `id`, this one or another; `None` if the record has no such block.
    pub fn block_number(&self, id: u8) -> Option<BlockNumber> {
        if id == self.block_id {
            return Some(self.blkno);
        }
        self.others.iter().find(|other| other.id == id).map(|other| other.blkno)
    }
}

/// A record's other blocks.
pub type Others = SmallVec<[OtherBlock; 2]>;
/// Transactions of one change: most have no subtransactions.
pub type Xids = SmallVec<[u32; 4]>;

/// The fixed fields of a stored [`BlockRecord`].
struct Head {
    rmid: u8,
    info: u8,
    will_init: bool,
    has_data: bool,
    xid: u32,
    block_id: u8,
    fork: Fork,
    blkno: BlockNumber,
}

impl Head {
    fn encode(&self, others: impl Iterator<Item = OtherBlock> + Clone, main_data: &[u8], data: &[u8]) -> Bytes {
        let count = others.clone().count();
        let mut out = BytesMut::with_capacity(HEAD_SIZE + count * OTHER_SIZE + main_data.len() + data.len());
        out.put_u8(0);
        out.put_u8(self.rmid);
        out.put_u8(self.info);
        out.put_u8(u8::from(self.will_init) | u8::from(self.has_data) << 1);
        out.put_u32_le(self.xid);
        out.put_u8(self.block_id);
        out.put_u8(self.fork.number());
        out.put_u32_le(self.blkno);
        out.put_u8(count as u8);
        for other in others {
            out.put_u8(other.id);
            out.put_u8(other.fork.number());
            out.put_u32_le(other.blkno);
        }
        out.put_u32_le(main_data.len() as u32);
        out.put_slice(main_data);
        out.put_slice(data);
        out.freeze()
    }
}

/// The stored form of what `record` does to its block `block`: that of [`BlockRecord::trim`], made in one go.
pub fn encode_block_record(record: &wal::Record<'_>, block: &wal::Block<'_>) -> Bytes {
    let head = Head {
        rmid: record.header.rmid,
        info: record.kind(),
        will_init: block.will_init,
        has_data: block.has_data,
        xid: record.header.xid,
        block_id: block.id,
        fork: block.rel.fork,
        blkno: block.blkno,
    };
    head.encode(other_blocks(record, block), record.main_data, block.data)
}

fn other_blocks(record: &wal::Record<'_>, block: &wal::Block<'_>) -> impl Iterator<Item = OtherBlock> + Clone {
    let others = record.blocks.iter().filter(|other| other.id != block.id);
    others.map(|other| OtherBlock { id: other.id, fork: other.rel.fork, blkno: other.blkno })
}

/// What one record does to one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// A record that names the block.
    Record(BlockRecord<'a>),
    /// A heap record cleared bits of this visibility-map page (`visibilitymap_clear`), which it does not name.
    ClearVisibility {
        /// Heap blocks, each of which this map page covers.
        heap_blocks: SmallVec<[BlockNumber; 2]>,
        /// Bits to clear: 1 all-visible, 2 all-frozen.
        flags: u8,
    },
    /// Transactions on this page of `pg_xact` got a status (`TransactionIdSetTreeStatus`).
    ClogStatus {
        /// 1 committed, 2 aborted, 3 sub-committed.
        status: u8,
        /// The transactions, each on this page.
        xids: Xids,
    },
    /// A multixact on this page of `pg_multixact/offsets` begins at a member offset (`RecordNewMultiXact`).
    MultiXactOffset {
        /// The multixact.
        multi: u32,
        /// Its first member.
        offset: u32,
    },
    /// Members on this page of `pg_multixact/members`.
    MultiXactMembers {
        /// Offset of the first of them, on this page.
        first: u32,
        /// Transaction and status of each.
        members: Vec<(u32, u8)>,
    },
    /// Transactions on this page of `pg_commit_ts` were committed.
    CommitTs {
        /// Microseconds since 2000-01-01 UTC.
        time: i64,
        /// Replication origin.
        origin: u16,
        /// The transactions, each on this page.
        xids: Xids,
    },
    /// The heap of this visibility-map page was truncated (`visibilitymap_prepare_truncate`).
    TruncateVisibility {
        /// The heap's new length in blocks, which ends on this map page.
        heap_blocks: BlockNumber,
    },
}

impl<'a> Change<'a> {
    /// Whether the page before does not matter.
    pub fn will_init(&self) -> bool {
        matches!(self, Change::Record(record) if record.will_init)
    }

    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64);
        match self {
            Change::Record(r) => {
                let head = Head {
                    rmid: r.rmid,
                    info: r.info,
                    will_init: r.will_init,
                    has_data: r.has_data,
                    xid: r.xid,
                    block_id: r.block_id,
                    fork: r.fork,
                    blkno: r.blkno,
                };
                return head.encode(r.others.iter().copied(), r.main_data, r.data);
            }
            Change::ClearVisibility { heap_blocks, flags } => {
                out.put_u8(1);
                out.put_u8(*flags);
                heap_blocks.iter().for_each(|block| out.put_u32_le(*block));
            }
            Change::ClogStatus { status, xids } => {
                out.put_u8(2);
                out.put_u8(*status);
                xids.iter().for_each(|xid| out.put_u32_le(*xid));
            }
            Change::MultiXactOffset { multi, offset } => {
                out.put_u8(3);
                out.put_u32_le(*multi);
                out.put_u32_le(*offset);
            }
            Change::MultiXactMembers { first, members } => {
                out.put_u8(4);
                out.put_u32_le(*first);
                for (xid, status) in members {
                    out.put_u32_le(*xid);
                    out.put_u8(*status);
                }
            }
            Change::CommitTs { time, origin, xids } => {
                out.put_u8(5);
                out.put_i64_le(*time);
                out.put_u16_le(*origin);
                xids.iter().for_each(|xid| out.put_u32_le(*xid));
            }
            Change::TruncateVisibility { heap_blocks } => {
                out.put_u8(6);
                out.put_u32_le(*heap_blocks);
            }
        }
        out.freeze()
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn decode(mut bytes: &'a [u8]) -> Result<Change<'a>, String> {
        let short = |_| "a stored change ends too early".to_owned();
        let tag = bytes.try_get_u8().map_err(short)?;
        Ok(match tag {
            0 => {
                let rmid = bytes.try_get_u8().map_err(short)?;
                let info = bytes.try_get_u8().map_err(short)?;
                let flags = bytes.try_get_u8().map_err(short)?;
                let xid = bytes.try_get_u32_le().map_err(short)?;
                let block_id = bytes.try_get_u8().map_err(short)?;
                let fork = fork(bytes.try_get_u8().map_err(short)?)?;
                let blkno = bytes.try_get_u32_le().map_err(short)?;
                let n = bytes.try_get_u8().map_err(short)?;
                let mut others = Others::new();
                for _ in 0..n {
                    others.push(OtherBlock {
                        id: bytes.try_get_u8().map_err(short)?,
                        fork: self::fork(bytes.try_get_u8().map_err(short)?)?,
                        blkno: bytes.try_get_u32_le().map_err(short)?,
                    });
                }
                let main_len = bytes.try_get_u32_le().map_err(short)? as usize;
                let (main_data, data) = bytes
                    .split_at_checked(main_len)
                    .ok_or_else(|| format!("a stored record announces {main_len} bytes of main data and has {}", bytes.len()))?;
                Change::Record(BlockRecord {
                    rmid,
                    info,
                    xid,
                    main_data,
                    block_id,
                    fork,
                    blkno,
                    will_init: flags & 1 != 0,
                    has_data: flags & 2 != 0,
                    data,
                    others,
                })
            }
            1 => {
                let flags = bytes.try_get_u8().map_err(short)?;
                Change::ClearVisibility { flags, heap_blocks: u32s(bytes)? }
            }
            2 => {
                let status = bytes.try_get_u8().map_err(short)?;
                Change::ClogStatus { status, xids: u32s(bytes)? }
            }
            3 => Change::MultiXactOffset { multi: bytes.try_get_u32_le().map_err(short)?, offset: bytes.try_get_u32_le().map_err(short)? },
            4 => {
                let first = bytes.try_get_u32_le().map_err(short)?;
                let mut members = Vec::with_capacity(bytes.len() / 5);
                while !bytes.is_empty() {
                    members.push((bytes.try_get_u32_le().map_err(short)?, bytes.try_get_u8().map_err(short)?));
                }
                Change::MultiXactMembers { first, members }
            }
            5 => {
                let time = bytes.try_get_i64_le().map_err(short)?;
                let origin = bytes.try_get_u16_le().map_err(short)?;
                Change::CommitTs { time, origin, xids: u32s(bytes)? }
            }
            6 => Change::TruncateVisibility { heap_blocks: bytes.try_get_u32_le().map_err(short)? },
            _ => return Err(format!("a stored change has the unknown tag {tag}")),
        })
    }
}

fn fork(number: u8) -> Result<Fork, String> {
    Fork::from_number(number).ok_or_else(|| format!("a stored change names fork {number}"))
}

fn u32s<const N: usize>(bytes: &[u8]) -> Result<SmallVec<[u32; N]>, String>
where
    [u32; N]: smallvec::Array<Item = u32>,
{
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(format!("a stored change has {} bytes too many", rest.len()));
    }
    Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

#[cfg(test)]
mod tests {
    use varve_postgres::wal::{Block, Record, RecordHeader};
    use varve_postgres::{Lsn, RelNode};

    use super::*;

    #[test]
    fn a_block_s_stored_record_is_the_trimmed_one() {
        let header = RecordHeader { total_len: 100, xid: 740, prev: Lsn(8), info: 0x83, rmid: 10, crc: 0 };
        let block = |id, blkno, fork| Block {
            id,
            rel: RelNode { spc: 1663, db: 5, rel: 16384 }.fork(fork),
            blkno,
            will_init: id == 1,
            has_data: id != 1,
            image: None,
            data: if id == 1 { b"" } else { b"data" },
        };
        let blocks = vec![block(0, 7, Fork::Main), block(1, 9, Fork::Main), block(3, 0, Fork::VisibilityMap)].into();
        let main_data = b"main";
        let record = Record { header, start: Lsn(40), end: Lsn(140), blocks, main_data, origin: None, toplevel_xid: None };
        for block in &record.blocks {
            let trimmed = Change::Record(BlockRecord::trim(&record, block));
            let stored = encode_block_record(&record, block);
            assert_eq!(stored, trimmed.encode());
            assert_eq!(Change::decode(&stored), Ok(trimmed));
        }
    }
}
