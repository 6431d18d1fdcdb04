//! The pages that a [`Verifier`](super::Verifier) knows, and what records do to them without naming blocks.

use std::collections::{BTreeMap, HashMap, HashSet};

use varve_postgres::wal::{Record, rmgr};
use varve_postgres::{BlockNumber, Fork, Lsn, Major, Oid, Page, RelFork, RelNode, page};

use crate::Fault;
use crate::change::Change;
use crate::cursor::Cursor;
use crate::visibility_map::HEAP_BLOCKS_PER_PAGE;

/// A page, and the resource manager that changed it last.
#[derive(Debug, Clone)]
struct Known {
    page: Box<Page>,
    rmid: u8,
}

/// The pages that WAL has made known.
#[derive(Debug, Default)]
pub struct Pages {
    relations: HashMap<RelNode, BTreeMap<(Fork, BlockNumber), Known>>,
    /// Relations that the WAL created, or truncated: what is not known of them is zeros.
    created: HashSet<RelNode>,
}

impl Pages {
    /// What a change of this block begins with, if that can be known.
    pub(super) fn base(&self, rel: RelFork, blkno: BlockNumber) -> Option<Page> {
        match self.get(rel, blkno) {
            Some((page, _)) => Some(*page),
            None => self.created.contains(&rel.node).then_some(page::ZERO_PAGE),
        }
    }

    /// The block's page, and the resource manager that changed it last.
    pub fn get(&self, rel: RelFork, blkno: BlockNumber) -> Option<(&Page, u8)> {
        let known = self.relations.get(&rel.node)?.get(&(rel.fork, blkno))?;
        Some((&known.page, known.rmid))
    }

    /// All known pages, and the resource manager that changed each last.
    pub fn iter(&self) -> impl Iterator<Item = (RelFork, BlockNumber, &Page, u8)> {
        self.relations
            .iter()
            .flat_map(|(node, blocks)| blocks.iter().map(|((fork, blkno), known)| (node.fork(*fork), *blkno, &*known.page, known.rmid)))
    }

    pub(super) fn put(&mut self, rel: RelFork, blkno: BlockNumber, page: Page, rmid: u8) {
        self.relations.entry(rel.node).or_default().insert((rel.fork, blkno), Known { page: Box::new(page), rmid });
    }

    pub(super) fn forget(&mut self, rel: RelFork, blkno: BlockNumber) {
        if let Some(blocks) = self.relations.get_mut(&rel.node) {
            blocks.remove(&(rel.fork, blkno));
        }
    }

    fn drop_relation(&mut self, node: RelNode) {
        self.relations.remove(&node);
        self.created.remove(&node);
    }

    /// What `record` does beyond its blocks: creates, truncates and drops relations, copies and drops databases.
    pub(super) fn follow(&mut self, record: &Record, major: Major) -> Result<(), String> {
        let mut data = Cursor::new(&record.main_data);
        let done = match (record.header.rmid, record.kind()) {
            (rmgr::SMGR, kind) => self.follow_storage(kind, &mut data, record.end),
            (rmgr::XACT, kind) => self.follow_transaction(kind, &mut data),
            (rmgr::DBASE, kind) => self.follow_database(kind, &mut data, major),
            _ => Ok(()),
        };
        done.map_err(|fault| match fault {
            Fault::Inconsistent(what) => what,
            Fault::Unsupported => format!("no such record type: {:02X}", record.kind()),
        })
    }

    fn follow_storage(&mut self, kind: u8, data: &mut Cursor<'_>, lsn: Lsn) -> Result<(), Fault> {
        const CREATE: u8 = 0x10;
        const TRUNCATE: u8 = 0x20;
        const TRUNCATE_HEAP: u32 = 1;
        const TRUNCATE_VM: u32 = 2;
        const TRUNCATE_FSM: u32 = 4;
        match kind {
            CREATE => {
                let node = relation(data)?;
                if data.u32()? == 0 {
                    self.created.insert(node);
                }
                Ok(())
            }
            TRUNCATE => {
                let blocks = data.u32()?;
                let node = relation(data)?;
                let flags = data.u32()?;
                let Some(known) = self.relations.get_mut(&node) else { return Ok(()) };
                if flags & TRUNCATE_HEAP != 0 {
                    known.retain(|(fork, blkno), _| *fork != Fork::Main || *blkno < blocks);
                    self.created.insert(node);
                }
                if flags & TRUNCATE_FSM != 0 {
                    known.retain(|(fork, _), _| *fork != Fork::FreeSpaceMap);
                }
                if flags & TRUNCATE_VM != 0 {
                    let last = blocks / HEAP_BLOCKS_PER_PAGE;
                    known.retain(|(fork, blkno), _| *fork != Fork::VisibilityMap || *blkno <= last);
                    if let Some(known) = known.get_mut(&(Fork::VisibilityMap, last)) {
                        let change = Change::TruncateVisibility { heap_blocks: blocks };
                        crate::apply(Major::V15, lsn, last, &change, &mut known.page).map_err(|error| error.to_string())?;
                    }
                }
                Ok(())
            }
            _ => Err(Fault::Unsupported),
        }
    }

    fn follow_transaction(&mut self, kind: u8, data: &mut Cursor<'_>) -> Result<(), Fault> {
        const COMMIT: u8 = 0x00;
        const ABORT: u8 = 0x20;
        const COMMIT_PREPARED: u8 = 0x30;
        const ABORT_PREPARED: u8 = 0x40;
        const HAS_INFO: u8 = 0x80;
        const HAS_DATABASE: u32 = 1 << 0;
        const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
        const HAS_RELATIONS: u32 = 1 << 2;
        if !matches!(kind & 0x70, COMMIT | ABORT | COMMIT_PREPARED | ABORT_PREPARED) || kind & HAS_INFO == 0 {
            return Ok(());
        }
        data.u64()?; // time
        let info = data.u32()?;
        if info & HAS_DATABASE != 0 {
            data.take(8)?;
        }
        if info & HAS_SUBTRANSACTIONS != 0 {
            let count = data.u32()? as usize;
            data.take(count.saturating_mul(4))?;
        }
        if info & HAS_RELATIONS != 0 {
            for _ in 0..data.u32()? {
                let node = relation(data)?;
                self.drop_relation(node);
            }
        }
        Ok(())
    }

    fn follow_database(&mut self, kind: u8, data: &mut Cursor<'_>, major: Major) -> Result<(), Fault> {
        const CREATE_FILE_COPY: u8 = 0x00;
        let drop = if major == Major::V14 { 0x10 } else { 0x20 };
        if kind == CREATE_FILE_COPY {
            let target = (data.u32()?, data.u32()?);
            let source = (data.u32()?, data.u32()?);
            self.drop_database(target.0, target.1);
            let copies: Vec<_> = self
                .relations
                .iter()
                .filter(|(node, _)| (node.db, node.spc) == source)
                .map(|(node, blocks)| (RelNode { spc: target.1, db: target.0, rel: node.rel }, blocks.clone()))
                .collect();
            self.relations.extend(copies);
        } else if kind == drop {
            let db = data.u32()?;
            for _ in 0..data.u32()? {
                let spc = data.u32()?;
                self.drop_database(db, spc);
            }
        }
        Ok(())
    }

    fn drop_database(&mut self, db: Oid, spc: Oid) {
        let gone = |node: &RelNode| node.db == db && node.spc == spc;
        self.relations.retain(|node, _| !gone(node));
        self.created.retain(|node| !gone(node));
    }
}

fn relation(data: &mut Cursor<'_>) -> Result<RelNode, Fault> {
    Ok(RelNode { spc: data.u32()?, db: data.u32()?, rel: data.u32()? })
}
