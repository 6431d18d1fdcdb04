//! `varve bench store`: how long a put takes, one at a time.

use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Args;
use serde_json::json;
use varve_storage::chance::random_bytes;
use varve_storage::store::{Created, ObjectName, Store, StoreConfig};

use crate::output;

#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// The store: a folder, or s3://bucket/prefix.
    #[arg(long)]
    store: String,
    /// Bytes of each object.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(16..=64 << 20))]
    bytes: u32,
    /// How long to measure.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

pub(crate) async fn run(args: StoreArgs, as_json: bool) -> anyhow::Result<()> {
    let store = Store::open(&args.store, &StoreConfig::from_variables(std::env::vars()))?;
    store.probe().await?;
    let folder: ObjectName = format!("probe/bench-{:032x}", u128::from_be_bytes(random_bytes()?)).parse()?;
    let (mut names, mut latencies) = (Vec::new(), Vec::new());
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(args.seconds) {
        let name = folder.join(&format!("{:08}", names.len()))?;
        let mut bytes = vec![0; args.bytes as usize];
        bytes[..16].copy_from_slice(&random_bytes::<16>()?);
        names.push(name.clone());
        let begun = Instant::now();
        ensure!(store.put_if_absent(&name, bytes.into()).await? == Created::Ours, "{name} is there already");
        latencies.push(begun.elapsed());
    }
    store.delete_all(&names).await?;
    latencies.sort();
    let at_part = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    let (p50, p99) = (at_part(0.5), at_part(0.99));
    let value = json!({ "puts": latencies.len(), "bytes": args.bytes, "p50_ms": p50, "p99_ms": p99 });
    output::print(as_json, &value, || format!("{} puts of {} bytes: p50 {p50:.2} ms, p99 {p99:.2} ms", latencies.len(), args.bytes))
}
