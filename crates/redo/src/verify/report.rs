//! What a [`Verifier`](super::Verifier) found.

use std::collections::BTreeMap;
use std::fmt;

use varve_postgres::wal::rmgr;
use varve_postgres::{BlockNumber, Lsn, Page, RelFork};

/// Mismatches of one record type that are kept in full; the rest is counted.
const MISMATCHES_KEPT_MAX: usize = 3;
/// Bytes of a page difference that are printed.
const BYTES_PRINTED_MAX: usize = 24;

/// What was seen of one record type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TypeStats {
    /// Records.
    pub count: u64,
    /// Their bytes in WAL.
    pub bytes: u64,
    /// Pages redone.
    pub pages: u64,
    /// Nanoseconds spent redoing them.
    pub nanos: u64,
    /// Full-page images taken.
    pub images: u64,
    /// Images adopted for pages written before this WAL begins.
    pub adopted: u64,
    /// Pages that were compared and found equal.
    pub compared: u64,
    /// Pages that differ as those of Postgres's own recovery do.
    pub postgres_own: u64,
    /// Pages that differ, or could not be redone.
    pub mismatches: u64,
}

/// How a page is not as it must be.
#[derive(Debug, Clone)]
pub enum Difference {
    /// It could not be redone or compared.
    Failed(String),
    /// Bytes differ.
    Bytes {
        /// Offsets of the bytes that differ after masking.
        at: Vec<u16>,
        /// The page before the record.
        before: Box<Page>,
        /// The page as we redid it.
        ours: Box<Page>,
        /// The page as Postgres had it.
        truth: Box<Page>,
    },
}

/// A page that is not as it must be.
#[derive(Debug, Clone)]
pub struct Mismatch {
    /// The record's resource manager.
    pub rmid: u8,
    /// Its type.
    pub info: u8,
    /// Where it begins.
    pub start: Lsn,
    /// Where it ends.
    pub end: Lsn,
    /// The block's relation.
    pub rel: RelFork,
    /// The block.
    pub blkno: BlockNumber,
    /// What is wrong.
    pub difference: Difference,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rmgr, info, start, rel, blkno) = (rmgr::name(self.rmid), self.info, self.start, self.rel, self.blkno);
        write!(f, "{rmgr} record {info:02X} at {start}, {rel} block {blkno}: ")?;
        match &self.difference {
            Difference::Failed(what) => f.write_str(what),
            Difference::Bytes { at, ours, truth, .. } => {
                write!(f, "{} bytes differ (offset: ours, Postgres's):", at.len())?;
                for &at in at.iter().take(BYTES_PRINTED_MAX) {
                    write!(f, " {at}: {:02X} {:02X},", ours[usize::from(at)], truth[usize::from(at)])?;
                }
                Ok(())
            }
        }
    }
}

/// Everything found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// By resource manager and record type.
    pub types: BTreeMap<(u8, u8), TypeStats>,
    /// The first mismatches of each record type, in order.
    pub mismatches: Vec<Mismatch>,
    /// How many there were in all.
    pub mismatch_count: u64,
}

impl Report {
    pub(super) fn add(&mut self, mismatch: Mismatch) {
        self.mismatch_count += 1;
        self.keep(mismatch);
    }

    fn keep(&mut self, mismatch: Mismatch) {
        let same = |other: &&Mismatch| (other.rmid, other.info) == (mismatch.rmid, mismatch.info);
        if self.mismatches.iter().filter(same).count() < MISMATCHES_KEPT_MAX {
            self.mismatches.push(mismatch);
        }
    }

    /// How often a record type was seen.
    pub fn count(&self, rmid: u8, info: u8) -> u64 {
        self.types.get(&(rmid, info)).map_or(0, |stats| stats.count)
    }

    /// Adds what another run found.
    pub fn merge(&mut self, other: Report) {
        for (kind, stats) in other.types {
            let sum = self.types.entry(kind).or_default();
            sum.count += stats.count;
            sum.bytes += stats.bytes;
            sum.pages += stats.pages;
            sum.nanos += stats.nanos;
            sum.images += stats.images;
            sum.adopted += stats.adopted;
            sum.compared += stats.compared;
            sum.postgres_own += stats.postgres_own;
            sum.mismatches += stats.mismatches;
        }
        self.mismatch_count += other.mismatch_count;
        other.mismatches.into_iter().for_each(|mismatch| self.keep(mismatch));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<18} {:>4} {:>9} {:>11} {:>9} {:>8} {:>7} {:>8} {:>9} {:>10}",
            "rmgr", "info", "records", "bytes", "redone", "ns/page", "images", "adopted", "compared", "mismatches"
        )?;
        for ((rmid, info), t) in &self.types {
            writeln!(
                f,
                "{:<18} {:>4} {:>9} {:>11} {:>9} {:>8} {:>7} {:>8} {:>9} {:>10}",
                rmgr::name(*rmid),
                format!("{info:02X}"),
                t.count,
                t.bytes,
                t.pages,
                t.nanos.checked_div(t.pages).unwrap_or(0),
                t.images,
                t.adopted,
                t.compared,
                t.mismatches
            )?;
        }
        for mismatch in &self.mismatches {
            writeln!(f, "{mismatch}")?;
        }
        write!(f, "{} mismatches", self.mismatch_count)
    }
}
