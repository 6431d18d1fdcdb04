//! Databases and tablespaces that come, are copied, and go.
//!
//! A database also gets a directory in another tablespace, without a record of its own, when its first relation is made
//! there.

use varve_postgres::ids::{DEFAULT_TABLESPACE, GLOBAL_TABLESPACE};
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::wal::Record;
use varve_postgres::wal::records::database::DatabaseRecord;
use varve_postgres::wal::records::tablespace::TablespaceRecord;
use varve_postgres::{Lsn, Oid, RelFork, RelNode};
use varve_storage::database::DatabaseEntry;
use varve_storage::history::HistoryError;
use varve_storage::key::{Key, KeyKind};
use varve_storage::relation;
use varve_storage::value::Value;

use super::{Ingest, IngestError};

impl Ingest {
    pub(super) fn ingest_database(&mut self, record: &Record<'_>, parsed: DatabaseRecord) -> Result<(), IngestError> {
        // Everything before is needed, and readable only when it was made so.
        self.publish()?;
        match parsed {
            DatabaseRecord::CreateFileCopy { db, spc, source_db, source_spc } => {
                self.begin_database(record, spc, db)?;
                self.copy_database(record, (source_spc, source_db), (spc, db))
            }
            DatabaseRecord::CreateWalLog { db, spc } => self.begin_database(record, spc, db),
            DatabaseRecord::Drop { db, spcs } => {
                for spc in spcs {
                    self.put_database(record.end, spc, db, DatabaseEntry { exists: false, floor: record.end })?;
                    self.put(Key::relation_map(spc, db), record.end, Value::Absent)?;
                }
                Ok(())
            }
        }
    }

    /// A directory is made; whatever was there under its name is dead, as redo removes it first.
    fn begin_database(&mut self, record: &Record<'_>, spc: Oid, db: Oid) -> Result<(), IngestError> {
        self.put_database(record.end, spc, db, DatabaseEntry { exists: true, floor: record.start })
    }

    fn put_database(&mut self, lsn: Lsn, spc: Oid, db: Oid, entry: DatabaseEntry) -> Result<(), IngestError> {
        self.sizes.forget(spc, db);
        self.forget_free_space_of(spc, db, lsn)?;
        if entry.exists {
            self.known_directories.insert((spc, db));
        } else {
            self.known_directories.remove(&(spc, db));
        }
        Ok(self.put(Key::database(spc, db), lsn, Value::Image(entry.encode()))?)
    }

    /// A relation is made: its database has a directory in its tablespace from now on.
    pub(super) fn note_directory(&mut self, node: RelNode, lsn: Lsn) -> Result<(), HistoryError> {
        let directory = (node.spc, node.db);
        if matches!(node.spc, DEFAULT_TABLESPACE | GLOBAL_TABLESPACE) || self.known_directories.contains(&directory) {
            return Ok(());
        }
        let entry = relation::database(&*self.history, node.spc, node.db, self.applied)?.unwrap_or_default();
        if !entry.exists {
            let entry = DatabaseEntry { exists: true, ..entry };
            self.put(Key::database(node.spc, node.db), lsn, Value::Image(entry.encode()))?;
        }
        self.known_directories.insert(directory);
        Ok(())
    }

    /// Copies every fork of every relation, and the relation map, block by block: only the list of forks is held in
    /// memory.
    fn copy_database(&mut self, record: &Record<'_>, source: (Oid, Oid), target: (Oid, Oid)) -> Result<(), IngestError> {
        let (at, lsn) = (self.applied, record.end);
        if let Some(map) = self.history.get(Key::relation_map(source.0, source.1), at)? {
            self.put(Key::relation_map(target.0, target.1), lsn, Value::Image(map))?;
        }
        let mut forks: Vec<RelFork> = Vec::new();
        relation::list(&*self.history, source.0, source.1, at, &mut |rel, _| {
            forks.push(rel);
            Ok(())
        })?;
        for from in forks {
            let mut to = from;
            (to.node.spc, to.node.db) = target;
            let Some(live) = relation::live_size(&*self.history, from, at)? else { continue };
            self.extend(to, live.size.blocks, lsn)?;
            for block in 0..live.size.blocks {
                let page = relation::block_above(&*self.history, from, block, live.floor(block), at)?;
                // What was never written is zeros there too.
                if *page != ZERO_PAGE {
                    self.put_page(Key::block(to, block), lsn, &page)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn ingest_tablespace(&mut self, record: &Record<'_>, parsed: TablespaceRecord) -> Result<(), IngestError> {
        let (spc, value) = match parsed {
            TablespaceRecord::Create { spc, path } => (spc, Value::Image(path.into_bytes().into())),
            TablespaceRecord::Drop { spc } => {
                self.drop_directories(spc, record.end)?;
                (spc, Value::Absent)
            }
        };
        self.put(Key::tablespace(spc), record.end, value).map_err(HistoryError::into)
    }

    /// The empty directories of databases go with their tablespace.
    fn drop_directories(&mut self, spc: Oid, lsn: Lsn) -> Result<(), IngestError> {
        self.publish()?;
        let mut directories = Vec::new();
        self.history.scan(Key::database(spc, 0), Key::database(spc, Oid::MAX), self.applied, &mut |key, value| {
            if let (Some(KeyKind::Database { db, .. }), Some(entry)) = (key.kind(), DatabaseEntry::decode(&value))
                && entry.exists
            {
                directories.push(db);
            }
            Ok(())
        })?;
        for db in directories {
            self.put_database(lsn, spc, db, DatabaseEntry { exists: false, floor: lsn })?;
        }
        Ok(())
    }
}
