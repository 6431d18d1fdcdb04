//! `varve dev`: all roles in one process. Pageserver and control plane call each other; the host is told over loopback
//! HTTP, as one elsewhere would be.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use varve_control::http::{HttpConfig, serve};
use varve_control::{Config, Control, Environment, VerifyConfig};
use varve_host::agent::{self, HostConfig, TokenSource};
use varve_pageserver::page_service::{PageService, PageServiceConfig};
use varve_pageserver::scrubbing::Scrubber;
use varve_pageserver::source::Source;
use varve_pageserver::{Pageserver, PageserverConfig, ShipWal};
use varve_storage::store::{Store, StoreConfig};

use crate::door::Door;
use crate::host_token;

/// How long everything may take to end once what the store lacked is there.
const END_MAX: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// Folder of this server: WAL log and caches; the store, too, unless --store says otherwise.
    #[arg(long)]
    data: PathBuf,
    /// Where everything is kept: a folder, or s3://bucket/prefix (with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
    /// AWS_SECRET_ACCESS_KEY, AWS_REGION).
    #[arg(long)]
    store: Option<String>,
    /// Address of the admin HTTP API.
    #[arg(long, default_value = "127.0.0.1:9898")]
    http: SocketAddr,
    /// Address of the page service.
    #[arg(long, default_value = "127.0.0.1:6400")]
    pages: SocketAddr,
    /// Run no computes here: hosts elsewhere do (varve host).
    #[arg(long)]
    no_host: bool,
    /// File with the token that hosts show; made if it is not there. By default host-token in --data.
    #[arg(long)]
    host_token_file: Option<PathBuf>,
    /// Name in the Host header that requests may carry besides those of loopback; may be given several times.
    #[arg(long)]
    http_host: Vec<String>,
    /// Folder of the computes that run here; by default beside --data, so that they outlive its loss.
    #[arg(long)]
    computes: Option<PathBuf>,
    /// Where the binaries of a Postgres version are, as 15=/usr/lib/postgresql/15/bin; may be given several times.
    #[arg(long, value_parser = version_and_folder)]
    pg_bin_dir: Vec<(u32, PathBuf)>,
    /// Megabytes that the WAL log may hold before commits have to wait for layers.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(64..=1 << 24))]
    wal_log_limit_mb: u64,
    /// Put WAL into the store before layers have it, so that commits with remote_apply outlive this machine: unless the
    /// store is a folder on this server's own disk, or always.
    #[arg(long, value_enum, default_value_t = WalToStore::UnlessSameDisk)]
    wal_to_store: WalToStore,
    #[command(flatten)]
    sandbox: super::host::SandboxArgs,
    /// Megabytes for caches of pages and blocks.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    cache_mb: u64,
    /// Megabytes of disk that the block cache of each compute may take; 0: whatever there is. What a compute has
    /// written stays in it, even beyond that.
    #[arg(long, default_value_t = super::host::COMPUTE_CACHE_MB)]
    compute_cache_mb: u64,
    /// Megabytes of disk that the pg_wal of each compute may take, at least 128, of a small disk a quarter at most; 0:
    /// whatever there is. At the cap who writes waits until this server has stored more.
    #[arg(long, default_value_t = super::host::COMPUTE_WAL_MB)]
    compute_wal_mb: u64,
    /// Megabytes for what is not in layers yet.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    memtable_mb: u64,
    /// Seconds after which a timeline that nobody had use for is closed, and its tenant put to sleep.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    idle_seconds: u64,
    /// How often it is verified that restores work, of each tenant that says nothing else (varve tenant set
    /// --verify-restore): 7d, 12h, or off.
    #[arg(long, default_value = "off", value_parser = verify_every)]
    verify_restore: VerifyEvery,
    /// Verifications of restores that run at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    verify_restore_at_once: u64,
    /// Megabytes a second of the store that are read in the background, to see whether what is stored of this server's
    /// tenants is sound; 0: none.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    scrub_rate_mb: u64,
}

/// How often; none: never.
#[derive(Clone, Copy, Debug)]
struct VerifyEvery(Option<Duration>);

fn verify_every(text: &str) -> Result<VerifyEvery, String> {
    if text == "off" {
        return Ok(VerifyEvery(None));
    }
    match humantime::parse_duration(text) {
        Ok(every) if every >= Duration::from_secs(1) => Ok(VerifyEvery(Some(every))),
        Ok(_) => Err("a second is the least: write 7d, 12h, or off".to_owned()),
        Err(error) => Err(format!("{error}: write 7d, 12h, or off")),
    }
}

/// When WAL goes to the store before layers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum WalToStore {
    /// Unless the store is a folder on this server's own disk.
    UnlessSameDisk,
    /// Always.
    Always,
}

pub(crate) fn version_and_folder(text: &str) -> Result<(u32, PathBuf), String> {
    let (version, folder) = text.split_once('=').ok_or("write VERSION=FOLDER, such as 15=/usr/lib/postgresql/15/bin")?;
    let version = version.parse().map_err(|_| format!("'{version}' is no major version of Postgres"))?;
    Ok((version, folder.into()))
}

/// Logs to standard error; RUST_LOG says how much: a level, or `target=level` by commas.
pub(crate) fn log_to_stderr() {
    let asked = std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()).parse::<Targets>();
    let wrong = asked.as_ref().err().map(ToString::to_string);
    let filter = asked.unwrap_or_else(|_| Targets::new().with_default(LevelFilter::INFO));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let lines = tracing_subscriber::fmt::layer().with_ansi(ansi).with_writer(std::io::stderr);
    tracing_subscriber::registry().with(lines).with(filter).init();
    if let Some(e) = wrong {
        tracing::warn!("RUST_LOG is not understood ({e}); logging at info");
    }
}

/// Binds a listener, or says which address cannot be had.
async fn bind(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    if !address.ip().is_loopback() {
        bail!(
            "{what} would listen on {address}: other addresses than loopback need TLS and authentication, which this version does not have yet"
        );
    }
    TcpListener::bind(address).await.with_context(|| format!("{what} cannot listen on {address}: is another server running there?"))
}

/// Folder of the computes, unless told otherwise: beside `data`.
fn computes_beside(data: &Path) -> anyhow::Result<PathBuf> {
    let mut name = data.file_name().context("--data names no folder of its own")?.to_owned();
    name.push(".computes");
    Ok(data.with_file_name(name))
}

/// Makes a folder that only its owner can look into.
fn private_folder(path: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let failed = || format!("cannot use the folder {}", path.display());
    std::fs::create_dir_all(path).with_context(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).with_context(failed)?;
    path.canonicalize().with_context(failed)
}

/// What the pageserver adds to the figures of the control plane.
fn figures(pageserver: &Pageserver) -> String {
    let shipped = pageserver.shipped().unwrap_or_default();
    format!(
        "# TYPE varve_wal_log_bytes gauge\n# UNIT varve_wal_log_bytes bytes\nvarve_wal_log_bytes {}\n\
         # TYPE varve_writers gauge\nvarve_writers {}\n\
         # TYPE varve_tenants_lost gauge\nvarve_tenants_lost {}\n\
         # TYPE varve_wal_orphaned gauge\nvarve_wal_orphaned {}\n\
         # TYPE varve_shared_wal_objects counter\nvarve_shared_wal_objects_total {}\n\
         # TYPE varve_shared_wal_bytes counter\n# UNIT varve_shared_wal_bytes bytes\nvarve_shared_wal_bytes_total {}\n\
         # TYPE varve_shared_wal_stored_bytes counter\n# UNIT varve_shared_wal_stored_bytes bytes\n\
         varve_shared_wal_stored_bytes_total {}\n\
         # TYPE varve_shared_wal_held_objects gauge\nvarve_shared_wal_held_objects {}\n\
         # TYPE varve_shared_wal_failing gauge\nvarve_shared_wal_failing {}\n",
        pageserver.wal_log_bytes(),
        pageserver.writer_count(),
        pageserver.tenants().lost().len(),
        pageserver.orphans().len(),
        shipped.objects,
        shipped.wal_bytes,
        shipped.stored_bytes,
        shipped.held_objects,
        u8::from(shipped.is_failing),
    )
}

pub(crate) async fn run(args: DevArgs) -> anyhow::Result<()> {
    log_to_stderr();
    let data = private_folder(&args.data)?;
    let location = args.store.unwrap_or_else(|| data.join("store").display().to_string());
    let store = Store::open(&location, &StoreConfig::from_variables(std::env::vars()))?;
    let http = bind("the admin API", args.http).await?;
    let pages = bind("the page service", args.pages).await?;
    let (http_address, pages_address) = (http.local_addr()?, pages.local_addr()?);
    let url = format!("http://{http_address}");
    let token_file = args.host_token_file.unwrap_or_else(|| data.join("host-token"));
    let token = host_token::ensure_token(&token_file)?;
    let pageserver = Pageserver::open(PageserverConfig {
        data: data.clone(),
        store: store.clone(),
        url: url.clone(),
        wal_log_limit_bytes: args.wal_log_limit_mb << 20,
        ship_wal: match args.wal_to_store {
            WalToStore::UnlessSameDisk => ShipWal::UnlessSameDisk,
            WalToStore::Always => ShipWal::Always,
        },
        cache_bytes: args.cache_mb << 20,
        memtable_bytes: args.memtable_mb << 20,
        idle: Duration::from_secs(args.idle_seconds),
    })
    .await?;
    let scrubber = Scrubber::open(pageserver.clone(), &data, args.scrub_rate_mb << 20).await;
    let door = Arc::new(Door::new(pageserver.clone(), scrubber.clone(), pages_address.to_string()));
    let config = Config { server: pageserver.id().to_string(), url: url.clone(), version: env!("CARGO_PKG_VERSION").to_owned() };
    let control = Control::new(door, store, config, Environment::system())?;

    let shutdown = CancellationToken::new();
    let page_service = PageService::new(Arc::new(Source::new(pageserver.clone())), PageServiceConfig::default());
    let page_service = tokio::spawn(page_service.run(pages, shutdown.clone()));
    let background = {
        let pageserver = pageserver.clone();
        tokio::spawn(async move { pageserver.run().await })
    };
    let watch = {
        let (control, shutdown) = (control.clone(), shutdown.clone());
        tokio::spawn(async move { control.watch(&shutdown).await })
    };
    let verified = {
        let (control, shutdown) = (control.clone(), shutdown.clone());
        let config = VerifyConfig { every: args.verify_restore.0, at_once: args.verify_restore_at_once as usize };
        tokio::spawn(async move { control.keep_verified(config, &shutdown).await })
    };
    let scrub = {
        let (scrubber, shutdown) = (scrubber.clone(), shutdown.clone());
        tokio::spawn(async move { scrubber.run(&shutdown).await })
    };
    let http_config = HttpConfig {
        hosts: args.http_host,
        metrics: Some({
            let pageserver = pageserver.clone();
            Arc::new(move || figures(&pageserver) + &scrubber.figures())
        }),
        ..HttpConfig::new(token.reveal().to_owned())
    };
    // Before anybody can see that it serves; until here a signal ends it at once.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let http_server = tokio::spawn(serve(control, http_config, http, shutdown.clone()));
    tracing::info!(%http_address, %pages_address, data = %data.display(), store = location, "varve serves");
    let mut host = if args.no_host {
        None
    } else {
        let folder = args.computes.map_or_else(|| computes_beside(&data), Ok)?;
        let config = HostConfig {
            data: folder,
            control_url: url,
            token: TokenSource::Given(token),
            name: super::host::machine_name(),
            pg_bin_dirs: args.pg_bin_dir,
            cache_bytes: super::host::limit_bytes(args.compute_cache_mb),
            wal_bytes: super::host::limit_bytes(args.compute_wal_mb),
            run_dir: None,
            program: std::env::current_exe().context("the path of this program is not known")?,
            sandboxing: args.sandbox.sandboxing(),
        };
        Some(tokio::spawn(agent::run(config, shutdown.clone())))
    };

    let host_ended = async {
        match &mut host {
            Some(host) => host.await,
            None => std::future::pending().await,
        }
    };
    let failed = tokio::select! {
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        ended = host_ended => Some(match ended {
            Ok(Ok(())) => anyhow::anyhow!("the host of this server has ended"),
            Ok(Err(error)) => anyhow::Error::from(error).context("the host of this server cannot run"),
            Err(error) => anyhow::Error::from(error).context("the host of this server has ended"),
        }),
    };
    if failed.is_some() {
        host = None;
    }
    tracing::info!("stopping; what the store lacks is put there first");
    let again = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    // Computes notice by themselves; a second signal ends at once what a store that does not answer holds up.
    tokio::select! {
        () = pageserver.stop() => {}
        () = again => tracing::warn!("stopped at once; the WAL log keeps what the store lacks"),
    }
    shutdown.cancel();
    let ended = async {
        let _ = http_server.await;
        let _ = page_service.await;
        let _ = watch.await;
        let _ = verified.await;
        let _ = scrub.await;
        if let Some(host) = host {
            let _ = host.await;
        }
    };
    if tokio::time::timeout(END_MAX, ended).await.is_err() {
        tracing::warn!("not everything ended in good order within {END_MAX:?}");
    }
    background.abort();
    failed.map_or(Ok(()), Err)
}
