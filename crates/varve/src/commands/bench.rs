//! `varve bench`: what the page service does for a client, how fast redo is, and a store.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde_json::json;
use varve_api::admin::{Branch, Server};
use varve_postgres::{Fork, Lsn, RelNode};
use varve_protocol::client::{PageClient, ReadLsn};
use varve_protocol::connect::{ConnectConfig, Endpoint};

use super::BranchPath;
use crate::client::Client;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// GetPage of random blocks of a branch's largest relation, over one connection.
    Pages {
        /// The branch, as tenant/branch.
        branch: BranchPath,
        /// The relation, as tablespace/database/relation file number (pg_relation_filenode).
        #[arg(long, value_parser = relation)]
        relation: RelNode,
        /// Requests in flight.
        #[arg(long, default_value_t = 1)]
        depth: usize,
        /// How long to measure.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
    },
    /// Puts to a store, one after the other, as WAL is put there; needs no server. What it writes it deletes.
    Store(super::bench_store::StoreArgs),
    /// Redo of a server's WAL from a data directory on; needs no server.
    Redo(super::bench_redo::RedoArgs),
}

fn relation(text: &str) -> Result<RelNode, String> {
    let parts: Vec<u32> =
        text.split('/').map(|part| part.parse().map_err(|_| format!("'{part}' is no number"))).collect::<Result<_, _>>()?;
    match parts[..] {
        [spc, db, rel] => Ok(RelNode { spc, db, rel }),
        _ => Err("write tablespace/database/relation, such as 1663/5/16384".to_owned()),
    }
}

/// Numbers that look random, the same in each run.
struct Sequence(u64);

impl Sequence {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(n)) as u32
    }
}

pub(crate) async fn run(command: BenchCommand, client: &Client, as_json: bool) -> anyhow::Result<()> {
    let (branch, relation, depth, seconds) = match command {
        BenchCommand::Store(args) => return super::bench_store::run(args, as_json).await,
        BenchCommand::Redo(args) => return tokio::task::spawn_blocking(move || super::bench_redo::run(args, as_json)).await?,
        BenchCommand::Pages { branch, relation, depth, seconds } => (branch, relation, depth, seconds),
    };
    ensure!(depth > 0, "at least one request must be in flight");
    let server: Server = client.get("server").await?;
    let found: Branch = client.get(&branch.api()).await?;
    let (host, port) = server.page_service.rsplit_once(':').context("the server names no page service")?;
    let config = ConnectConfig::new(Endpoint::tcp(host, port.parse::<u16>()?), "varve");
    let stream = PageClient::connect(&config).await?.pagestream_v3(&branch.tenant, &found.timeline_id).await?;
    let at = ReadLsn::at(found.last_lsn.parse::<Lsn>()?);
    let rel = relation.fork(Fork::Main);
    let blocks = stream.nblocks(rel, at).await?;
    ensure!(blocks > 0, "relation {rel} is empty");
    let mut sequence = Sequence(42);
    // Once over everything first: the figures are those of a warm server.
    for block in 0..blocks.min(20_000) {
        stream.get_page(rel, block, at).await?;
    }
    let mut latencies: Vec<Duration> = Vec::new();
    let started = Instant::now();
    let mut flying = FuturesUnordered::new();
    let ask = |block: u32| {
        let stream = &stream;
        async move {
            let begun = Instant::now();
            stream.get_page(rel, block, at).await.map(|_| begun.elapsed())
        }
    };
    for _ in 0..depth {
        flying.push(ask(sequence.below(blocks)));
    }
    while let Some(latency) = flying.next().await {
        latencies.push(latency?);
        if started.elapsed() < Duration::from_secs(seconds) {
            flying.push(ask(sequence.below(blocks)));
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    latencies.sort();
    let at_part = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
    let (per_second, p50, p99) = (latencies.len() as f64 / elapsed, at_part(0.5), at_part(0.99));
    let value =
        json!({ "depth": depth, "pages": latencies.len(), "pages_per_second": per_second, "p50_us": p50, "p99_us": p99, "blocks": blocks });
    output::print(as_json, &value, || format!("depth {depth}: {per_second:.0} pages/s, p50 {p50:.0} us, p99 {p99:.0} us ({blocks} blocks)"))
}
