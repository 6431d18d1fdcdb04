//! The page service as the mount's base: one timeline at one LSN.

use std::io;

use bytes::Bytes;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BLCKSZ, Fork, Lsn, Oid, RelFork};
use varve_protocol::client::{BlockingOptions, BlockingPageClient, ReadLsn};
use varve_protocol::connect::{ClientError, ConnectConfig};

use crate::mount::BaseSource;

/// Reads the base from the page service. Calls wait as long as the server is away, up to the client's limit.
pub struct PageFetcher {
    client: BlockingPageClient,
    at: ReadLsn,
}

impl PageFetcher {
    /// The base of `timeline` of `tenant` (both as the page service knows them) at `lsn`.
    pub fn new(server: ConnectConfig, tenant: &str, timeline: &str, lsn: Lsn) -> PageFetcher {
        PageFetcher { client: BlockingPageClient::new(server, tenant, timeline, BlockingOptions::default()), at: ReadLsn::at(lsn) }
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
        let found = self.client.list_relations(spc, db, self.at).map_err(io_error)?;
        Ok(found.into_iter().map(|relation| (relation.rel, relation.fork, relation.blocks)).collect())
    }

    fn read_blocks(&self, rel: RelFork, first: u32, count: u32) -> io::Result<Bytes> {
        whole(self.client.page_range(rel, first, count, self.at).map_err(io_error)?, count)
    }

    fn slru_segments(&self, kind: SlruKind) -> io::Result<Vec<(u32, u32)>> {
        let found = self.client.list_slru(kind, self.at).map_err(io_error)?;
        Ok(found.into_iter().map(|segment| (segment.segno, segment.pages)).collect())
    }

    fn read_slru(&self, kind: SlruKind, segno: u32, first: u32, count: u32) -> io::Result<Bytes> {
        whole(self.client.slru_range(kind, segno, first, count, self.at).map_err(io_error)?, count)
    }

    fn read_scattered(&self, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
        let mut pages = vec![Bytes::new(); blocks.len()];
        self.client.get_pages(blocks, self.at, &mut |index, page| pages[index] = Bytes::copy_from_slice(page)).map_err(io_error)?;
        Ok(pages)
    }
}
