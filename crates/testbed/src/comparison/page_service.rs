//! A timeline at an LSN, as the page service serves it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::slru::SlruKind;
use varve_postgres::{BlockNumber, Lsn, Oid, Page, RelFork, RelNode};
use varve_protocol::client::{BlockingOptions, BlockingPageClient, ReadLsn};
use varve_protocol::connect::{ConnectConfig, Endpoint};

use super::Cluster;

/// Forks up to this size are read page by page, larger ones by ranges: both ways must give the same.
const SINGLE_PAGES_MAX: BlockNumber = 200;

/// See the module's doc.
pub struct PageService {
    client: BlockingPageClient,
    lsn: Lsn,
    name: String,
}

impl PageService {
    /// History at `lsn` of a timeline, from the page service on `port` of this host.
    pub fn new(port: u16, tenant: &str, timeline: &str, lsn: Lsn) -> PageService {
        let config = ConnectConfig::new(Endpoint::tcp("127.0.0.1", port), "test");
        let client = BlockingPageClient::new(config, tenant, timeline, BlockingOptions::default());
        PageService { client, lsn, name: format!("timeline {timeline} at {lsn}") }
    }
}

impl Cluster for PageService {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn forks(&self, spc: Oid, db: Oid) -> Result<BTreeMap<RelFork, BlockNumber>> {
        let relations = self.client.list_relations(spc, db, ReadLsn::at(self.lsn))?;
        Ok(relations.into_iter().map(|found| (RelNode { spc, db, rel: found.rel }.fork(found.fork), found.blocks)).collect())
    }

    fn pages(&self, rel: RelFork, blocks: BlockNumber) -> Result<Vec<Page>> {
        let at = ReadLsn::at(self.lsn);
        if blocks > SINGLE_PAGES_MAX {
            let bytes = self.client.page_range(rel, 0, blocks, at).with_context(|| format!("{blocks} blocks of {rel}"))?;
            return Ok(bytes.as_chunks().0.to_vec());
        }
        ensure!(self.client.exists(rel, at)?, "{rel} is listed and does not exist");
        let mut pages = vec![ZERO_PAGE; blocks as usize];
        let wanted: Vec<_> = (0..blocks).map(|block| (rel, block)).collect();
        self.client.get_pages(&wanted, at, &mut |i, page| pages[i] = *page).with_context(|| format!("{blocks} blocks of {rel}"))?;
        Ok(pages)
    }

    fn slru(&self, area: SlruKind) -> Result<BTreeMap<u32, Vec<Page>>> {
        let at = ReadLsn::at(self.lsn);
        let mut segments = BTreeMap::new();
        for found in self.client.list_slru(area, at)? {
            let pages = self.client.slru_segment(area, found.segno, at)?;
            segments.insert(found.segno, pages.as_chunks().0.to_vec());
        }
        Ok(segments)
    }
}
