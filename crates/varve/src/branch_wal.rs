//! A branch's WAL over the admin HTTP API, for a thread that may block.

use bytes::Bytes;
use tokio::runtime::Handle;
use varve_api::admin::Wal;
use varve_postgres::Lsn;
use varve_verify::VerifyError;
use varve_verify::branch_wal::{Kept, WalKeeper};

use crate::client::{Client, segment};

/// The server that keeps a branch's WAL.
#[derive(Debug)]
pub(crate) struct BranchWalClient {
    client: Client,
    /// Path of the branch in the API.
    path: String,
    runtime: Handle,
}

impl BranchWalClient {
    /// For the branch at `path` of the API; requests run on `runtime`.
    pub(crate) fn new(client: Client, path: String, runtime: Handle) -> BranchWalClient {
        BranchWalClient { client, path, runtime }
    }

    fn failed(&self, error: &anyhow::Error) -> VerifyError {
        VerifyError::Server { server: self.client.url().to_owned(), what: format!("{error:#}") }
    }
}

impl WalKeeper for BranchWalClient {
    fn list(&mut self) -> Result<Kept, VerifyError> {
        let listed = self.runtime.block_on(self.client.get::<Wal>(&format!("{}/wal", self.path)));
        listed.and_then(|wal| kept(&wal)).map_err(|error| self.failed(&error))
    }

    fn read(&mut self, from: Lsn) -> Result<Bytes, VerifyError> {
        let path = format!("{}/wal/bytes?from={}", self.path, segment(&from.to_string()));
        self.runtime.block_on(self.client.get_bytes(&path)).map_err(|error| self.failed(&error))
    }
}

fn kept(wal: &Wal) -> anyhow::Result<Kept> {
    let ranges = wal.ranges.iter().map(|range| Ok((range.start.parse()?, range.end.parse()?)));
    Ok(Kept { head: wal.head.parse()?, written: wal.written, ranges: ranges.collect::<anyhow::Result<_>>()? })
}
