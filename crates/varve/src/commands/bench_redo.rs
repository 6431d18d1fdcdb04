//! `varve bench redo`: how fast WAL is redone, to be measured beside Postgres's own crash recovery of the same
//! (`scripts/bench-recovery`).

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use serde_json::json;
use varve_postgres::BLCKSZ;
use varve_verify::recovery::{RecoveryConfig, recover};

use crate::output;

/// Differences that are printed.
const DIFFERENCES_PRINTED_MAX: usize = 10;

#[derive(Debug, Args)]
pub(crate) struct RedoArgs {
    /// The data directory to begin with, which was shut down.
    base: PathBuf,
    /// The pg_wal folder (or data directory) with the WAL written since.
    wal: PathBuf,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Megabytes of pages to hold at most.
    #[arg(long, default_value_t = 8192)]
    memory_mb: usize,
    /// The data directory of a server that recovered from the same and was shut down: its pages must be equal.
    #[arg(long)]
    compare: Option<PathBuf>,
}

pub(crate) fn run(args: RedoArgs, as_json: bool) -> anyhow::Result<()> {
    let RedoArgs { base, wal, threads, memory_mb, compare } = args;
    let config = RecoveryConfig { base, wal, threads, pages_max: memory_mb.saturating_mul(1 << 20) / BLCKSZ };
    let recovered = recover(&config)?;
    let seconds = recovered.elapsed.as_secs_f64();
    let mut compared = None;
    if let Some(dir) = compare {
        let comparison = recovered.compare(&dir)?;
        if !comparison.differences.is_empty() {
            let told: Vec<String> = comparison
                .differences
                .iter()
                .take(DIFFERENCES_PRINTED_MAX)
                .map(|(rel, blkno, what)| format!("{rel} block {blkno} {what}"))
                .collect();
            bail!(
                "{} of {} pages differ from those in {}:\n{}",
                comparison.differences.len(),
                comparison.pages,
                dir.display(),
                told.join("\n")
            );
        }
        compared = Some(comparison.pages);
    }
    let facts = json!({
        "from": recovered.start.to_string(),
        "to": recovered.end.to_string(),
        "threads": threads,
        "seconds": seconds,
        "wal_bytes": recovered.bytes(),
        "records": recovered.records,
        "changes": recovered.changes,
        "page_bytes": recovered.page_bytes(),
        "pages_compared": compared,
    });
    output::print(as_json, &facts, || {
        let rate = |n: u64| n as f64 / seconds.max(f64::MIN_POSITIVE);
        format!(
            "{} of WAL, {} records, {} changes of pages, {} of pages: {seconds:.3} s on {threads} threads, {}/s, {:.0} ns a record{}",
            output::bytes(recovered.bytes()),
            recovered.records,
            recovered.changes,
            output::bytes(recovered.page_bytes()),
            output::bytes(rate(recovered.bytes()) as u64),
            1e9 / rate(recovered.records).max(1.0),
            compared.map_or_else(String::new, |pages| format!("; {pages} pages are as Postgres has them"))
        )
    })
}
