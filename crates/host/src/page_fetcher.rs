//! The page service as the mount's base: one timeline at one LSN, which moves on.

use std::io;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use varve_postgres::ids::GLOBAL_TABLESPACE;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, Fork, Lsn, Oid, RelFork};
use varve_protocol::client::{BlockingOptions, BlockingPageClient, ReadLsn};
use varve_protocol::connect::{ClientError, ConnectConfig};

use crate::mount::BaseSource;

/// Reads the base from the page service. Calls wait as long as the server is away, up to the client's limit.
pub struct PageFetcher {
    client: BlockingPageClient,
    bases: Mutex<Bases>,
}

/// Where the base is. Each call holds the one that it is about.
struct Bases {
    now: Arc<Lsn>,
    /// Those before that calls may still be about.
    former: Vec<Weak<Lsn>>,
    /// Where it is about to move.
    next: Option<Lsn>,
}

impl PageFetcher {
    /// The base of `timeline` of `tenant` (both as the page service knows them) at `lsn`.
    pub fn new(server: ConnectConfig, tenant: &str, timeline: &str, lsn: Lsn) -> PageFetcher {
        let bases = Bases { now: Arc::new(lsn), former: Vec::new(), next: None };
        PageFetcher { client: BlockingPageClient::new(server, tenant, timeline, BlockingOptions::default()), bases: Mutex::new(bases) }
    }

    /// All that calls may be about, oldest first: former bases that some still are about, the one there is, and the one
    /// that the mount is about to move to.
    pub fn bases(&self) -> Vec<Lsn> {
        let mut bases = self.bases.lock();
        bases.former.retain(|former| former.strong_count() > 0);
        let former = bases.former.iter().filter_map(Weak::upgrade).map(|lsn| *lsn);
        former.chain([*bases.now]).chain(bases.next).collect()
    }

    /// Says where the base is about to move, or that it will not.
    pub fn announce(&self, next: Option<Lsn>) {
        self.bases.lock().next = next;
    }

    /// Waits until the page service has everything up to `lsn`.
    ///
    /// # Errors
    /// When it will not have it.
    pub fn wait_for(&self, lsn: Lsn) -> io::Result<()> {
        self.client.list_relations(GLOBAL_TABLESPACE, 0, ReadLsn::at(lsn)).map(drop).map_err(io_error)
    }

    fn now(&self) -> Arc<Lsn> {
        self.bases.lock().now.clone()
    }
}

/// An answer that says no cannot be cured by asking again; all else can.
fn io_error(error: ClientError) -> io::Error {
    let kind = if error.is_transient() { io::ErrorKind::Other } else { io::ErrorKind::InvalidData };
    io::Error::new(kind, error)
}

fn whole(pages: Vec<u8>, count: u32) -> io::Result<Bytes> {
    if pages.len() == count as usize * BLCKSZ {
        return Ok(Bytes::from(pages));
    }
    let what = format!("the page service gave {} bytes for {count} blocks that exist", pages.len());
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

impl BaseSource for PageFetcher {
    fn relations(&self, spc: Oid, db: Oid) -> io::Result<Vec<(Oid, Fork, u32)>> {
        let base = self.now();
        let found = self.client.list_relations(spc, db, ReadLsn::at(*base)).map_err(io_error)?;
        Ok(found.into_iter().map(|relation| (relation.rel, relation.fork, relation.blocks)).collect())
    }

    fn read_blocks(&self, rel: RelFork, first: u32, count: u32) -> io::Result<Bytes> {
        let base = self.now();
        whole(self.client.page_range(rel, first, count, ReadLsn::at(*base)).map_err(io_error)?, count)
    }

    fn slru_segments(&self, kind: SlruKind) -> io::Result<Vec<(u32, u32)>> {
        let base = self.now();
        let found = self.client.list_slru(kind, ReadLsn::at(*base)).map_err(io_error)?;
        Ok(found.into_iter().map(|segment| (segment.segno, segment.pages)).collect())
    }

    fn read_slru(&self, kind: SlruKind, segno: u32, first: u32, count: u32) -> io::Result<Bytes> {
        let base = self.now();
        whole(self.client.slru_range(kind, segno, first, count, ReadLsn::at(*base)).map_err(io_error)?, count)
    }

    fn read_scattered(&self, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
        let base = self.now();
        let mut pages = vec![Bytes::new(); blocks.len()];
        self.client
            .get_pages(blocks, ReadLsn::at(*base), &mut |index, page| pages[index] = Bytes::copy_from_slice(page))
            .map_err(io_error)?;
        Ok(pages)
    }

    fn move_to(&self, lsn: Lsn) -> io::Result<()> {
        let mut bases = self.bases.lock();
        if lsn < *bases.now {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("the base is at {}, behind {lsn}", bases.now)));
        }
        let former = std::mem::replace(&mut bases.now, Arc::new(lsn));
        bases.former.push(Arc::downgrade(&former));
        bases.next = None;
        Ok(())
    }
}
