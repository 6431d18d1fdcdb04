//! The value of a relation-size key: how many blocks a fork has, and below which LSN older versions of its blocks are
//! dead.
//!
//! Nothing deleted may come back: after a truncation or a drop, blocks that the fork gets again begin as zeros,
//! whatever versions an older layer has. So each size carries the **floor**: steps (LSN, blocks) of truncations and
//! drops, ascending in both. A version at LSN `v` of block `b` is dead if `v <= floor(b)`, where `floor(b)` is the LSN
//! of the last step with `blocks <= b`.
//!
//! Layout, little-endian: exists `u8`, blocks `u32`, number of steps `u16`, each LSN `u64` and blocks `u32`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use varve_postgres::{BlockNumber, Lsn};

/// See the module's doc.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RelationSize {
    /// Whether the fork exists; a dropped one keeps its floor.
    pub exists: bool,
    /// Blocks in the fork.
    pub blocks: u32,
    steps: Vec<(Lsn, u32)>,
}

impl RelationSize {
    /// LSN at or below which versions of `block` are dead.
    pub fn floor(&self, block: BlockNumber) -> Lsn {
        self.steps.iter().rev().find(|(_, blocks)| *blocks <= block).map_or(Lsn::INVALID, |(lsn, _)| *lsn)
    }

    /// Adds: at `lsn` the fork was cut to `blocks` blocks.
    pub fn truncate(&mut self, lsn: Lsn, blocks: u32) {
        self.exists = true;
        self.cut(lsn, blocks);
    }

    /// Adds: at `lsn` the fork was dropped.
    pub fn remove(&mut self, lsn: Lsn) {
        self.exists = false;
        self.cut(lsn, 0);
    }

    /// Makes sure that the fork exists and has at least `blocks` blocks. Whether that changed anything.
    pub fn extend(&mut self, blocks: u32) -> bool {
        let changed = !self.exists || self.blocks < blocks;
        self.exists = true;
        self.blocks = self.blocks.max(blocks);
        changed
    }

    fn cut(&mut self, lsn: Lsn, blocks: u32) {
        self.blocks = blocks;
        self.steps.retain(|(_, kept)| *kept < blocks);
        self.steps.push((lsn, blocks));
    }

    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(7 + self.steps.len() * 12);
        out.put_u8(u8::from(self.exists));
        out.put_u32_le(self.blocks);
        out.put_u16_le(self.steps.len() as u16);
        for (lsn, blocks) in &self.steps {
            out.put_u64_le(lsn.0);
            out.put_u32_le(*blocks);
        }
        out.freeze()
    }

    /// Reads the stored form; `None` if it is not one.
    pub fn decode(mut bytes: &[u8]) -> Option<RelationSize> {
        let exists = bytes.try_get_u8().ok()? != 0;
        let blocks = bytes.try_get_u32_le().ok()?;
        let n = usize::from(bytes.try_get_u16_le().ok()?);
        if bytes.len() != n * 12 {
            return None;
        }
        let steps = (0..n).map(|_| (Lsn(bytes.get_u64_le()), bytes.get_u32_le())).collect();
        Some(RelationSize { exists, blocks, steps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_follow_truncations_that_no_later_one_covers() {
        let mut size = RelationSize::default();
        assert!(size.extend(100));
        size.truncate(Lsn(10), 50);
        assert_eq!((size.floor(49), size.floor(50)), (Lsn(0), Lsn(10)));
        size.extend(100);
        size.truncate(Lsn(20), 70);
        assert_eq!((size.floor(60), size.floor(70)), (Lsn(10), Lsn(20)));
        size.truncate(Lsn(30), 20);
        assert_eq!((size.floor(19), size.floor(20), size.floor(99)), (Lsn(0), Lsn(30), Lsn(30)));
        assert_eq!(size.steps.len(), 1, "the lower, later step covers the others");
        size.remove(Lsn(40));
        assert_eq!(size.floor(0), Lsn(40));
        assert_eq!(RelationSize::decode(&size.encode()), Some(size));
    }
}
