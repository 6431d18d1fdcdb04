//! Which pages are in which partition.

use varve_postgres::BlockNumber;

use super::page_table::PageKey;

/// Blocks that follow each other and are in one partition, for the sake of caches.
const NEIGHBOURS: u32 = 8;

/// How pages are dealt out to partitions, whose number is a power of two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partitioning {
    bits: u32,
}

impl Partitioning {
    /// One partition has all pages.
    pub(super) const NONE: Partitioning = Partitioning { bits: 0 };
    /// Several partitions for each core, so that one that has more work than others does not hold all up.
    pub(super) const MANY: Partitioning = Partitioning { bits: 4 };

    /// Number of partitions.
    pub(super) fn count(self) -> usize {
        1 << self.bits
    }

    /// The partition of a block: neighbours are dealt out in turn, beginning with another partition for each fork.
    #[inline(always)]
    pub(super) fn partition_of(self, PageKey { rel, blkno }: PageKey) -> usize {
        let number = (blkno / NEIGHBOURS).wrapping_add(rel.node.rel.wrapping_mul(7)).wrapping_add(u32::from(rel.fork.number()) * 5);
        number as usize & (self.count() - 1)
    }

    /// The number of a block among those of its fork that are in the same partition.
    #[inline(always)]
    pub(super) fn slot_of(self, blkno: BlockNumber) -> usize {
        (((blkno / NEIGHBOURS) >> self.bits) * NEIGHBOURS + blkno % NEIGHBOURS) as usize
    }
}
