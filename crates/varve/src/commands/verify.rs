//! `varve verify`: whether redo makes the pages that Postgres makes, and whether a branch holds the pages that Postgres
//! has.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::runtime::Handle;
use varve_api::admin::{BranchMoment, Compute, Server, Tenant};
use varve_postgres::{BLCKSZ, Lsn, Major};
use varve_protocol::connect::blocking::Connection;
use varve_protocol::{ConnectConfig, Endpoint};
use varve_redo::verify::{Difference, PageDiff, Verifier};
use varve_verify::branch_wal::{BranchExtent, BranchWal};
use varve_verify::timeline::{self, Branch, Reference, TimelineReport};
use varve_verify::wal::{self, Extent, WalReport, WalSource};
use varve_verify::{DataDirectory, OverflowFile, Standby, WalDirectory, WalStream};

use super::BranchPath;
use crate::branch_wal::BranchWalClient;
use crate::client::{Client, segment};
use crate::output;

/// How long connecting to a branch's compute may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Differences that are printed; JSON has more.
const DIFFERENCES_PRINTED_MAX: usize = 10;

#[derive(Debug, Subcommand)]
pub(crate) enum VerifyCommand {
    /// Redo WAL written with wal_consistency_checking = all, and compare each page with the one that Postgres put into
    /// the record.
    Wal(WalArgs),
    /// Compare every page of a branch with what a stopped or a standby Postgres has.
    Timeline(TimelineArgs),
}

#[derive(Debug, Args)]
pub(crate) struct WalArgs {
    /// A pg_wal folder or data directory; a running server, as postgresql://... or "host=...", whose WAL is followed
    /// from now on; or a branch, as tenant/branch, whose kept WAL is read and, while a compute runs on it, followed.
    source: String,
    /// A data directory that was shut down before this WAL was written: the pages to begin with. Without it a page's
    /// first image is taken for true.
    #[arg(long)]
    base: Option<PathBuf>,
    /// Where to begin.
    #[arg(long)]
    from: Option<Lsn>,
    /// Where to end; what is still written is otherwise followed until Ctrl-C.
    #[arg(long)]
    until: Option<Lsn>,
    /// Megabytes for pages in memory; further ones go into a temporary file.
    #[arg(long, default_value_t = 1024)]
    memory_mb: usize,
    /// Folder of that temporary file.
    #[arg(long)]
    temp: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct TimelineArgs {
    /// The branch, as tenant/branch.
    branch: BranchPath,
    /// The moment; by default that of what is compared with, or the newest. A standby is waited for until it has
    /// replayed up to it.
    #[arg(long)]
    lsn: Option<Lsn>,
    /// A stopped data directory, or a standby as postgresql://... or "host=...". Without it, each page is only read and
    /// looked at.
    #[arg(long)]
    against: Option<String>,
}

pub(crate) async fn run(command: VerifyCommand, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    let on_interrupt = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            on_interrupt.store(true, Ordering::Relaxed);
        }
    });
    let matched = match command {
        VerifyCommand::Wal(args) => {
            let source = wal_source(&args.source, client).await?;
            let report = tokio::task::spawn_blocking(move || verify_wal(source, &args, &stop)).await??;
            output::print(json, &report, || wal_text(&report))?;
            report.matched
        }
        VerifyCommand::Timeline(args) => {
            let report = verify_timeline(args, client, stop).await?;
            output::print(json, &report, || timeline_text(&report))?;
            report.matched
        }
    };
    Ok(if matched { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where WAL comes from.
#[derive(Debug)]
enum Source {
    Directory(PathBuf),
    Server(ConnectConfig),
    Branch { branch: String, wal: BranchWalClient, major: Major, system_identifier: u64 },
}

fn is_conninfo(text: &str) -> bool {
    text.starts_with("postgres://") || text.starts_with("postgresql://") || text.contains('=')
}

/// Where a connection string leads; like libpq, with the password of `PGPASSWORD` if it has none.
fn server(conninfo: &str) -> anyhow::Result<ConnectConfig> {
    let mut config = ConnectConfig::from_conninfo(conninfo)?;
    config.password = config.password.or_else(|| std::env::var("PGPASSWORD").ok());
    Ok(config)
}

async fn wal_source(text: &str, client: &Client) -> anyhow::Result<Source> {
    if is_conninfo(text) {
        return Ok(Source::Server(server(text)?));
    }
    if Path::new(text).is_dir() {
        return Ok(Source::Directory(text.into()));
    }
    let branch = text.parse::<BranchPath>().ok().filter(|_| !text.starts_with(['.', '/']));
    let branch = branch.with_context(|| format!("'{text}' is no folder, no connection string and no tenant/branch"))?;
    let tenant: Tenant = client.get(&format!("tenants/{}", segment(&branch.tenant))).await?;
    let major = Major::from_number(tenant.pg_version);
    let major =
        major.with_context(|| format!("tenant {} is of PostgreSQL {}, which this varve does not know", tenant.name, tenant.pg_version))?;
    let wal = BranchWalClient::new(client.clone(), branch.api(), Handle::current());
    Ok(Source::Branch { branch: branch.to_string(), wal, major, system_identifier: tenant.system_identifier.parse()? })
}

/// How to reach the compute that writes a branch, if there is one.
async fn writer_of(branch: &BranchPath, client: &Client) -> anyhow::Result<Option<String>> {
    let computes: Vec<Compute> = client.get(&format!("{}/computes", branch.api())).await?;
    let writer = computes.into_iter().find(|compute| compute.state == "running" && compute.lsn.is_none());
    let Some(writer) = writer else { return Ok(None) };
    // A list has no passwords.
    let shown: Compute = client.get(&format!("computes/{}", segment(&writer.id))).await?;
    Ok(Some(shown.conninfo))
}

/// A progress bar on standard error, hidden where that is no terminal.
fn bar(length: Option<u64>, template: &str) -> anyhow::Result<ProgressBar> {
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(template)?);
    Ok(bar)
}

fn verify_wal(source: Source, args: &WalArgs, stop: &AtomicBool) -> anyhow::Result<WalReport> {
    let base = args.base.as_deref().map(DataDirectory::open).transpose()?;
    let from = args.from.or(base.as_ref().map(DataDirectory::checkpoint));
    if let (Some(base), Some(from)) = (&base, args.from) {
        ensure!(
            from == base.checkpoint(),
            "--base {} stands at {}, so --from must be that, or be left out",
            base.path().display(),
            base.checkpoint()
        );
    }
    let until = args.until.unwrap_or(Lsn::MAX);
    let mut length = None;
    let mut wal: Box<dyn WalSource> = match source {
        Source::Directory(dir) => {
            let mut wal = WalDirectory::open(&dir)?;
            check_cluster(base.as_ref(), &dir.display(), wal.system_identifier())?;
            if let Some(from) = from {
                wal.seek(from)?;
            }
            length = Some(wal.bytes_left_max());
            Box::new(wal)
        }
        Source::Server(config) => Box::new(WalStream::connect(&config, from)?),
        Source::Branch { branch, wal, major, system_identifier } => {
            check_cluster(base.as_ref(), &branch, system_identifier)?;
            Box::new(BranchWal::open(wal, BranchExtent { branch, major, system_identifier, from, until })?)
        }
    };
    let temp = args.temp.clone().unwrap_or_else(std::env::temp_dir);
    let pages_max = args.memory_mb.saturating_mul(1 << 20) / BLCKSZ;
    let mut verifier = Verifier::new(wal.major()).with_limit(pages_max, Box::new(OverflowFile::create(&temp)?));
    if let Some(base) = base {
        verifier = verifier.with_base(Box::new(base));
    }
    let bar = match length {
        Some(length) => bar(Some(length), "{bytes} of at most {total_bytes} [{wide_bar}] {bytes_per_sec}")?,
        None => bar(None, "{spinner} {msg}, Ctrl-C ends ({elapsed})")?,
    };
    let start = wal.position();
    let extent = Extent { from: from.unwrap_or(Lsn::INVALID), until, stop };
    let report = wal::verify(wal.as_mut(), verifier, extent, &mut |at| {
        bar.set_position(at.distance_from(start));
        if length.is_none() {
            bar.set_message(format!("redone up to {at}"));
            bar.tick();
        }
    });
    bar.finish_and_clear();
    Ok(report)
}

/// Pages and WAL must be of one cluster.
fn check_cluster(base: Option<&DataDirectory>, of: &dyn Display, system_identifier: u64) -> anyhow::Result<()> {
    let Some(base) = base else { return Ok(()) };
    ensure!(
        base.control().system_identifier == system_identifier,
        "{} and {of} are of two clusters, with system identifiers {} and {system_identifier}",
        base.path().display(),
        base.control().system_identifier
    );
    Ok(())
}

fn wal_text(report: &WalReport) -> String {
    let header = ["RMGR", "RECORD", "COUNT", "BYTES", "NS/RECORD", "REDONE", "IMAGES", "ADOPTED", "COMPARED", "MISMATCHES"];
    let rows: Vec<Vec<String>> = report
        .types
        .iter()
        .map(|t| {
            let numbers = [t.count, t.bytes, t.ns_per_record, t.redone, t.images, t.adopted, t.compared, t.mismatches];
            [t.rmgr.clone(), t.record.clone()].into_iter().chain(numbers.iter().map(u64::to_string)).collect()
        })
        .collect();
    let mut text = output::table(&header, &rows);
    for mismatch in &report.first_mismatches {
        let what = match &mismatch.error {
            Some(error) => error.clone(),
            None => format!("{} bytes differ", mismatch.differs_at.len()),
        };
        text += &format!(
            "\nmismatch: {} {} at {}, {} block {}: {what}",
            mismatch.rmgr, mismatch.record, mismatch.start, mismatch.relation, mismatch.block
        );
    }
    if let Some(mismatch) = &report.first_difference
        && let Difference::Bytes { at, ours, truth, .. } = &mismatch.difference
    {
        text += &format!("\n\n{mismatch}\n{}", PageDiff { at, ours, truth });
    }
    text += &format!(
        "\n\nPostgreSQL {}, {} to {}: {} records ({}), {} pages compared, {} taken for true, {} mismatches",
        report.pg_version,
        report.from,
        report.to,
        report.records,
        output::bytes(report.bytes),
        report.compared,
        report.adopted,
        report.mismatches
    );
    if report.postgres_own > 0 {
        text += &format!(
            "\n{} pages differ as those of Postgres's own recovery do (a frozen tuple's mark of a combined command id, which a lock clears): no mismatch",
            report.postgres_own
        );
    }
    if report.gaps > 0 {
        text += &format!(
            "\nin {} places between the two WAL is missing, because it was written without its pages and not kept: behind each, pages were taken for true anew",
            report.gaps
        );
    }
    if let Some(failure) = &report.failure {
        text += &format!("\nstopped early: {failure}");
    }
    if report.compared == 0 && report.mismatches == 0 {
        text += "\nnothing was compared: was this WAL written with wal_consistency_checking = all?";
    }
    text
}

async fn verify_timeline(args: TimelineArgs, client: &Client, stop: Arc<AtomicBool>) -> anyhow::Result<TimelineReport> {
    let TimelineArgs { branch, lsn, against } = args;
    let facts: Server = client.get("server").await?;
    let found: varve_api::admin::Branch = client.get(&branch.api()).await?;
    let connect = ConnectConfig::new(facts.page_service.parse::<Endpoint>()?, "varve");
    let writer = writer_of(&branch, client).await?;
    let reference = tokio::task::spawn_blocking(move || reference(against.as_deref(), lsn, writer.as_deref())).await??;
    let tenant: Tenant = client.get(&format!("tenants/{}", segment(&branch.tenant))).await?;
    reference.check_cluster(tenant.pg_version, tenant.system_identifier.parse()?)?;
    let path = match lsn.filter(|_| !matches!(reference, Reference::Standby(_))).or(reference.at()) {
        Some(lsn) => format!("{}/moment?lsn={}", branch.api(), segment(&lsn.to_string())),
        None => format!("{}/moment", branch.api()),
    };
    let moment: BranchMoment = client.get(&path).await?;
    let branch = Branch { connect, tenant: branch.tenant, timeline: found.timeline_id, lsn: moment.lsn.parse()? };
    tokio::task::spawn_blocking(move || {
        let bar = bar(Some(0), "{pos} of {len} pages [{wide_bar}] {per_sec} {msg}")?;
        let report = timeline::compare(&branch, &reference, &stop, &|progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.pages);
            if progress.differences > 0 {
                bar.set_message(format!("{} differ", progress.differences));
            }
        });
        bar.finish_and_clear();
        Ok(report?)
    })
    .await?
}

/// Opens what the branch is compared with. A standby needs a checkpoint of its primary's, which may be the branch's own
/// compute.
fn reference(against: Option<&str>, lsn: Option<Lsn>, writer: Option<&str>) -> anyhow::Result<Reference> {
    let Some(against) = against else { return Ok(Reference::Nothing) };
    if !is_conninfo(against) {
        return Ok(Reference::Directory(DataDirectory::open(Path::new(against))?));
    }
    let config = server(against)?;
    let mut checkpoint = || {
        let Some(writer) = writer else { return };
        let done = ConnectConfig::from_conninfo(writer).map_err(anyhow::Error::from).and_then(|config| {
            let mut connection = Connection::connect(&config, CONNECT_TIMEOUT)?;
            connection.simple_query("CHECKPOINT")?;
            Ok(())
        });
        if let Err(error) = done {
            eprintln!("varve: the branch's compute makes no checkpoint: {error:#}");
        }
    };
    Ok(Reference::Standby(Standby::pause(&config, lsn.unwrap_or(Lsn::INVALID), &mut checkpoint)?))
}

fn timeline_text(report: &TimelineReport) -> String {
    let mut text = String::new();
    for difference in report.first_differences.iter().take(DIFFERENCES_PRINTED_MAX) {
        let block = difference.block.map_or_else(String::new, |block| format!(" block {block}"));
        text += &format!("{}{block} {}", difference.relation, difference.what);
        if !difference.differs_at.is_empty() {
            text += &format!(" (at {:?})", difference.differs_at);
        }
        text.push('\n');
    }
    if report.differences > DIFFERENCES_PRINTED_MAX as u64 {
        text += "...\n";
    }
    let allowed = report.allowed;
    text += &format!(
        "at {}: {} forks, {} pages, {} differences\nmay differ and did: {} pages of free-space maps, {} of visibility maps, {} of sequences; \
         {} forks of unlogged relations left out",
        report.lsn,
        report.forks,
        report.pages,
        report.differences,
        allowed.free_space_map,
        allowed.visibility_map,
        allowed.sequence,
        report.unlogged_forks
    );
    if report.stopped {
        text += "\nstopped before the end";
    }
    text
}
