//! What a history holds at a boundary, besides blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::ops::Range;

use bytes::Bytes;
use varve_postgres::control::CheckPoint;
use varve_postgres::ids::GLOBAL_TABLESPACE;
use varve_postgres::page::{self, ZERO_PAGE};
use varve_postgres::paths::{BLOCKS_PER_FILE, database_directory, relation_file};
use varve_postgres::slru::{PAGES_PER_SEGMENT, SlruKind, segment_name};
use varve_postgres::{BLCKSZ, Fork, Lsn, Oid, Page, RelFork, relation_map};
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::database::DatabaseEntry;
use varve_storage::history::{History, HistoryError};
use varve_storage::key::{Key, KeyKind};
use varve_storage::relation::{self, RelationError};
use varve_storage::wal_index::Boundary;

use super::BaseBackupError;
use super::files::TarWriter;
use crate::cluster::ClusterFacts;

/// A database's directory in a tablespace.
type Directory = (Oid, Oid);

/// See the module's doc.
#[derive(Debug)]
pub struct StateAt {
    lsn: Lsn,
    /// The checkpoint fields, with the exact next transaction.
    pub fields: CheckpointFields,
    /// Tablespaces other than the two that every cluster has, with where they were on the server that made them.
    pub tablespaces: BTreeMap<Oid, String>,
    /// Directories of databases; those that are a database's main one have a relation map.
    pub(super) directories: BTreeSet<Directory>,
    pub(super) relation_maps: BTreeMap<Directory, Bytes>,
    /// Prepared transactions: id with epoch, and the main data of the record.
    pub(super) prepared: Vec<(u64, Bytes)>,
    pub(super) origins: Vec<(u16, Lsn)>,
}

fn malformed(key: Key) -> HistoryError {
    HistoryError(format!("the value of the {key} is malformed"))
}

impl StateAt {
    /// Reads it at `boundary`.
    ///
    /// # Errors
    /// When the history cannot be read, or has no checkpoint fields there.
    pub fn read(history: &(impl History + ?Sized), boundary: &Boundary) -> Result<StateAt, HistoryError> {
        let lsn = boundary.end;
        let fields =
            history.get(Key::checkpoint(), lsn)?.ok_or_else(|| HistoryError(format!("the history at {lsn} has no checkpoint fields")))?;
        let fields = CheckpointFields::decode(&fields).ok_or_else(|| malformed(Key::checkpoint()))?;
        let mut at = StateAt {
            lsn,
            fields: CheckpointFields { next_xid: boundary.next_xid, ..fields },
            tablespaces: BTreeMap::new(),
            directories: BTreeSet::new(),
            relation_maps: BTreeMap::new(),
            prepared: Vec::new(),
            origins: Vec::new(),
        };
        for first in [Key::tablespace(0), Key::database(0, 0), Key::relation_map(0, 0), Key::two_phase(0), Key::replication_origin(0)] {
            let (from, to) = Key::all_of_kind(first);
            history.scan(from, to, lsn, &mut |key, value| at.take(key, value))?;
        }
        Ok(at)
    }

    fn take(&mut self, key: Key, value: Bytes) -> Result<(), HistoryError> {
        match key.kind().ok_or_else(|| malformed(key))? {
            KeyKind::Tablespace { spc } => {
                self.tablespaces.insert(spc, String::from_utf8_lossy(&value).into_owned());
            }
            KeyKind::Database { spc, db } => {
                if DatabaseEntry::decode(&value).ok_or_else(|| malformed(key))?.exists {
                    self.directories.insert((spc, db));
                }
            }
            KeyKind::RelationMap { spc, db } => {
                self.relation_maps.insert((spc, db), value);
            }
            KeyKind::TwoPhase { xid } => self.prepared.push((xid, value)),
            KeyKind::ReplicationOrigin { origin } => {
                self.origins.push((origin, varve_storage::replication_origin::decode(&value).ok_or_else(|| malformed(key))?));
            }
            _ => return Err(malformed(key)),
        }
        Ok(())
    }

    /// The shutdown checkpoint at the boundary; its `redo` is set where the record is made.
    pub(super) fn checkpoint(&self, tli: u32, prev_tli: u32, time_unix: i64) -> CheckPoint {
        let f = &self.fields;
        CheckPoint {
            redo: self.lsn,
            tli,
            prev_tli,
            full_page_writes: f.full_page_writes,
            wal_level: f.parameters.wal_level,
            next_xid: f.next_xid,
            next_oid: f.next_oid,
            next_multi: f.next_multi,
            next_multi_offset: f.next_multi_offset,
            oldest_xid: f.oldest_xid,
            oldest_xid_db: f.oldest_xid_db,
            oldest_multi: f.oldest_multi,
            oldest_multi_db: f.oldest_multi_db,
            time: time_unix,
            oldest_commit_ts_xid: f.oldest_commit_ts_xid,
            newest_commit_ts_xid: f.newest_commit_ts_xid,
            oldest_active_xid: 0,
        }
    }

    pub(super) fn write_databases<W: Write>(
        &self,
        tar: &mut TarWriter<W>,
        cluster: &ClusterFacts,
        version: &str,
    ) -> Result<(), BaseBackupError> {
        for spc in self.tablespaces.keys() {
            let directory = format!("pg_tblspc/{spc}/{}", cluster.major.tablespace_directory(cluster.catalog_version));
            tar.directory(&format!("pg_tblspc/{spc}"))?;
            tar.directory(&directory)?;
        }
        for (spc, db) in &self.directories {
            let directory = database_directory(*spc, *db, cluster.major, cluster.catalog_version);
            tar.parents_of(&directory)?;
            tar.directory(&directory)?;
        }
        for ((spc, db), map) in &self.relation_maps {
            let directory = database_directory(*spc, *db, cluster.major, cluster.catalog_version);
            tar.file(&format!("{directory}/{}", relation_map::FILE_NAME), map)?;
            if *spc != GLOBAL_TABLESPACE {
                tar.file(&format!("{directory}/PG_VERSION"), version.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Every segment file of every area, from its first page to the last that exists.
    pub(super) fn write_slrus<W: Write>(&self, history: &(impl History + ?Sized), tar: &mut TarWriter<W>) -> Result<(), BaseBackupError> {
        for area in SlruKind::ALL {
            let extent = relation::slru_extent(history, area, self.lsn)?;
            for (segment, pages) in segments(extent.intervals()) {
                let path = format!("{}/{}", area.directory(), segment_name(segment));
                let contents =
                    Pages::new(pages, |page| match relation::slru_page(history, area, segment * PAGES_PER_SEGMENT + page, self.lsn) {
                        Err(RelationError::NoSlruPage { .. }) => Ok(Box::new(ZERO_PAGE)),
                        other => other,
                    });
                tar.stream(&path, u64::from(pages) * BLCKSZ as u64, contents)?;
            }
        }
        Ok(())
    }

    /// Every file of every relation.
    pub(super) fn write_relations<W: Write>(
        &self,
        history: &(impl History + ?Sized),
        cluster: &ClusterFacts,
        tar: &mut TarWriter<W>,
    ) -> Result<(), BaseBackupError> {
        for (spc, db) in std::iter::once((GLOBAL_TABLESPACE, 0)).chain(self.directories.iter().copied()) {
            let mut forks: BTreeMap<RelFork, u32> = BTreeMap::new();
            relation::list(history, spc, db, self.lsn, &mut |rel, blocks| {
                forks.insert(rel, blocks);
                Ok(())
            })?;
            for (rel, blocks) in &forks {
                self.write_fork(history, cluster, tar, *rel, *rel, *blocks)?;
                let main = rel.node.fork(Fork::Main);
                if rel.fork == Fork::Init && !forks.contains_key(&main) {
                    self.write_fork(history, cluster, tar, *rel, main, *blocks)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the files of fork `rel` under the name of `target`.
    fn write_fork<W: Write>(
        &self,
        history: &(impl History + ?Sized),
        cluster: &ClusterFacts,
        tar: &mut TarWriter<W>,
        rel: RelFork,
        target: RelFork,
        blocks: u32,
    ) -> Result<(), BaseBackupError> {
        let Some(live) = relation::live_size(history, rel, self.lsn)? else { return Ok(()) };
        for file_number in 0..blocks.div_ceil(BLOCKS_PER_FILE).max(1) {
            let first = file_number * BLOCKS_PER_FILE;
            let in_file = (blocks - first).min(BLOCKS_PER_FILE);
            let contents = Pages::new(in_file, |i| {
                let block = first + i;
                let mut page = relation::block_above(history, rel, block, live.floor(block), self.lsn)?;
                if cluster.data_checksum_version != 0 && !page::is_new(&page) {
                    let checksum = page::compute_checksum(&page, block);
                    page::set_checksum(&mut page, checksum);
                }
                Ok(page)
            });
            let path = relation_file(target, file_number, cluster.major, cluster.catalog_version);
            tar.stream(&path, u64::from(in_file) * BLCKSZ as u64, contents)?;
        }
        Ok(())
    }
}

/// Pages one after the other, as a reader for the tar.
struct Pages<F> {
    next: u32,
    count: u32,
    read: F,
    page: Option<Box<Page>>,
    taken: usize,
}

impl<F: FnMut(u32) -> Result<Box<Page>, RelationError>> Pages<F> {
    fn new(count: u32, read: F) -> Pages<F> {
        Pages { next: 0, count, read, page: None, taken: 0 }
    }
}

impl<F: FnMut(u32) -> Result<Box<Page>, RelationError>> Read for Pages<F> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.page.is_none() || self.taken == BLCKSZ {
            if self.next == self.count {
                return Ok(0);
            }
            self.page = Some((self.read)(self.next).map_err(io::Error::other)?);
            self.next += 1;
            self.taken = 0;
        }
        let Some(page) = &self.page else { return Ok(0) };
        let n = (BLCKSZ - self.taken).min(out.len());
        out[..n].copy_from_slice(&page[self.taken..self.taken + n]);
        self.taken += n;
        Ok(n)
    }
}

/// The segment files in which pages `intervals` (ascending) lie, ascending, each with the number of its pages up to the
/// last that exists. They may be very many, so they are not collected.
fn segments(intervals: &[Range<u32>]) -> impl Iterator<Item = (u32, u32)> {
    intervals.iter().enumerate().flat_map(|(i, pages)| {
        let end = (pages.end - 1) / PAGES_PER_SEGMENT + 1;
        // A segment that two intervals share ends with the later one.
        let end = intervals.get(i + 1).map_or(end, |next| end.min(next.start / PAGES_PER_SEGMENT));
        (pages.start / PAGES_PER_SEGMENT..end).map(|segment| {
            let first = segment * PAGES_PER_SEGMENT;
            (segment, (pages.end - first).min(PAGES_PER_SEGMENT))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // one interval is meant, not its elements
    fn segments_reach_to_their_last_page() {
        let of = |intervals: &[Range<u32>]| segments(intervals).collect::<Vec<_>>();
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[0..1]), [(0, 1)]);
        assert_eq!(of(&[30..34]), [(0, 32), (1, 2)]);
        assert_eq!(of(&[0..3, 5..6, 40..64]), [(0, 6), (1, 32)], "a segment that two intervals share is one");
        assert_eq!(of(&[10..40, 50..51, 100..101]), [(0, 32), (1, 19), (3, 5)]);
        assert_eq!(segments(&[0..u32::MAX]).last(), Some((u32::MAX / 32, 31)), "as many as there can be");
    }
}
