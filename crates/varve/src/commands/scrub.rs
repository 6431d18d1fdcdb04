//! `varve scrub`: reads a store, or one tenant of it, and says what is damaged, missing or left over.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use futures::future::BoxFuture;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use varve_api::admin::{ScrubStatus, Server};
use varve_engine::scrub::{Report, Scrub, Watch};
use varve_storage::store::{Store, StoreConfig};
use varve_storage::threads::RuntimeThreads;

use crate::client::Client;
use crate::output;

#[derive(Debug, Args)]
pub(crate) struct ScrubArgs {
    /// One tenant, by name or id; all without it.
    tenant: Option<String>,
    /// The store: a folder, or s3://bucket/prefix.
    #[arg(long, required_unless_present_any = ["data", "status"], conflicts_with = "data")]
    store: Option<String>,
    /// The folder of a server whose store is there, too.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Megabytes a second that are read at most; 0: as fast as it goes.
    #[arg(long, default_value_t = 0)]
    rate_mb: u64,
    /// Read nothing: show how far the server is that reads in the background (varve dev --scrub-rate-mb).
    #[arg(long, conflicts_with_all = ["tenant", "store", "data", "rate_mb"])]
    pub(crate) status: bool,
}

/// Shows how far a server's own scrub is. Findings are no failure of this command: they stand in what it prints.
pub(crate) async fn show_status(client: &Client, json: bool) -> anyhow::Result<()> {
    let server: Server = client.get("server").await?;
    output::print(json, &server.scrub, || server.scrub.as_ref().map_or_else(|| "this server does not scrub".to_owned(), status_words))
}

fn status_words(status: &ScrubStatus) -> String {
    let mut text = match status.rate_bytes {
        0 => "off at present (varve dev --scrub-rate-mb)\n".to_owned(),
        rate => format!("at most {} a second\n", output::bytes(rate)),
    };
    for (name, pass) in [("current", &status.current), ("last", &status.last)] {
        let Some(pass) = pass else { continue };
        let ended = match (&pass.ended_at, &status.after) {
            (Some(ended), _) => format!("ended {} ago", output::age(ended)),
            (None, Some(after)) => format!("goes on behind tenant {after}"),
            (None, None) => "goes on".to_owned(),
        };
        let read = output::bytes(pass.bytes);
        text += &format!(
            "{name} pass: begun {} ago, {ended}; {read} of {} tenants, {} wrong\n",
            output::age(&pass.begun_at),
            pass.tenants,
            pass.findings
        );
        for found in &pass.found {
            text += &format!("  WRONG {} {}: {}\n", found.tenant, found.object, found.problem);
        }
    }
    text
}

/// Shows how far it is, and keeps to the rate.
struct Progress {
    bar: ProgressBar,
    begun: Instant,
    read: u64,
    bytes_per_second: u64,
}

impl Watch for Progress {
    fn tenant(&mut self, name: &str, number: usize, of: usize) {
        self.bar.set_length(of as u64);
        self.bar.set_position(number as u64 - 1);
        self.bar.set_message(name.to_owned());
    }

    fn read(&mut self, bytes: u64) -> BoxFuture<'_, ()> {
        self.read += bytes;
        let due = match self.bytes_per_second {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(self.read as f64 / rate as f64),
        };
        let pause = due.saturating_sub(self.begun.elapsed());
        Box::pin(tokio::time::sleep(pause))
    }
}

/// Scrubs; the exit status says whether all is sound.
pub(crate) async fn run(args: ScrubArgs, json: bool) -> anyhow::Result<ExitCode> {
    let location = match (&args.store, &args.data) {
        (Some(store), _) => store.clone(),
        (None, Some(data)) => data.join("store").display().to_string(),
        (None, None) => bail!("name the store: --store or --data"),
    };
    if !location.contains("://") && !std::path::Path::new(&location).is_dir() {
        bail!("there is no store in {location}: name the folder that a server has as its store, or the bucket as s3://bucket/prefix");
    }
    let store = Store::open(&location, &StoreConfig::from_variables(std::env::vars()))?;
    let target = if json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{pos} of {len} tenants, {elapsed}: {msg}")?;
    let bar = ProgressBar::with_draw_target(None, target).with_style(style);
    let mut progress =
        Progress { bar: bar.clone(), begun: Instant::now(), read: 0, bytes_per_second: args.rate_mb.saturating_mul(1 << 20) };
    let report = Scrub::new(&store, Arc::new(RuntimeThreads::new(tokio::runtime::Handle::current())), &mut progress)
        .run(args.tenant.as_deref())
        .await;
    bar.finish_and_clear();
    let report = report?;
    if let Some(tenant) = args.tenant.filter(|_| report.tenants == 0) {
        bail!("there is no tenant '{tenant}' in {location}");
    }
    output::print(json, &report, || words(&report))?;
    Ok(if report.findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn words(report: &Report) -> String {
    let mut text = format!(
        "read {} of {} tenants: {} timelines, {} layers, {} other objects\n",
        output::bytes(report.bytes),
        report.tenants,
        report.timelines,
        report.layers,
        report.others
    );
    if report.unreferenced > 0 {
        let size = output::bytes(report.unreferenced_bytes);
        text += &format!(
            "{} objects ({size}) are in no log or manifest: left by a crash, or about to be published; they do no harm\n",
            report.unreferenced
        );
        for object in &report.unreferenced_objects {
            text += &format!("  {object}\n");
        }
    }
    for finding in &report.found {
        text += &format!("WRONG {}: {}\n", finding.object, finding.problem);
    }
    match report.findings {
        0 => text += "all of it is sound",
        1 => text += "1 thing is wrong",
        more => text += &format!("{more} things are wrong"),
    }
    text
}
