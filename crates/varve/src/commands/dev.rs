//! `varve dev`: pageserver, page service and admin HTTP in one process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use varve_pageserver::computes::Spawner;
use varve_pageserver::page_service::{PageService, PageServiceConfig};
use varve_pageserver::pageserver::{Pageserver, PageserverConfig, Source};
use varve_storage::store::{Store, StoreConfig};

#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// Folder of this server: WAL log and caches; the store, too, unless --store says otherwise.
    #[arg(long)]
    data: PathBuf,
    /// Where everything is kept: a folder, or s3://bucket/prefix (with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION).
    #[arg(long)]
    store: Option<String>,
    /// Address of the admin HTTP API.
    #[arg(long, default_value = "127.0.0.1:9898")]
    http: SocketAddr,
    /// Address of the page service.
    #[arg(long, default_value = "127.0.0.1:6400")]
    pages: SocketAddr,
    /// Folder of the computes that run here; by default beside --data, so that they outlive its loss.
    #[arg(long)]
    computes: Option<PathBuf>,
    /// Where the binaries of a Postgres version are, as 15=/usr/lib/postgresql/15/bin; may be given several times.
    #[arg(long, value_parser = version_and_folder)]
    pg_bin_dir: Vec<(u32, PathBuf)>,
    /// Megabytes that the WAL log may hold before commits have to wait for layers.
    #[arg(long, default_value_t = 4096)]
    wal_log_limit_mb: u64,
    /// Megabytes for caches of pages and blocks.
    #[arg(long, default_value_t = 512)]
    cache_mb: u64,
    /// Megabytes for what is not in layers yet.
    #[arg(long, default_value_t = 512)]
    memtable_mb: u64,
}

pub(crate) fn version_and_folder(text: &str) -> Result<(u32, PathBuf), String> {
    let (version, folder) = text.split_once('=').ok_or("write VERSION=FOLDER, such as 15=/usr/lib/postgresql/15/bin")?;
    let version = version.parse().map_err(|_| format!("'{version}' is no major version of Postgres"))?;
    Ok((version, folder.into()))
}

/// Logs to standard error; RUST_LOG says how much.
pub(crate) fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();
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

pub(crate) async fn run(args: DevArgs) -> anyhow::Result<()> {
    log_to_stderr();
    std::fs::create_dir_all(&args.data).with_context(|| format!("cannot make {}", args.data.display()))?;
    let data = args.data.canonicalize().with_context(|| format!("cannot use {}", args.data.display()))?;
    let computes = match args.computes {
        Some(folder) => folder,
        None => {
            let mut name = data.file_name().context("--data names no folder of its own")?.to_owned();
            name.push(".computes");
            data.with_file_name(name)
        }
    };
    std::fs::create_dir_all(&computes).with_context(|| format!("cannot make {}", computes.display()))?;
    let location = args.store.unwrap_or_else(|| data.join("store").display().to_string());
    let store = Store::open(&location, &StoreConfig::from_variables(std::env::vars()))?;
    let http = bind("the admin API", args.http).await?;
    let pages = bind("the page service", args.pages).await?;
    let (http_address, pages_address) = (http.local_addr()?, pages.local_addr()?);
    let spawner = Spawner {
        binary: std::env::current_exe().context("the path of this program is not known")?,
        server_url: format!("http://{http_address}"),
    };
    let pageserver = Pageserver::open(PageserverConfig {
        data: data.clone(),
        computes: computes.canonicalize()?,
        store,
        page_service: pages_address.to_string(),
        spawner,
        pg_bin_dirs: args.pg_bin_dir,
        wal_log_limit_bytes: args.wal_log_limit_mb << 20,
        cache_bytes: args.cache_mb << 20,
        memtable_bytes: args.memtable_mb << 20,
    })
    .await?;

    let shutdown = CancellationToken::new();
    let page_service = PageService::new(Arc::new(Source::new(pageserver.clone())), PageServiceConfig::default());
    let page_service = tokio::spawn(page_service.run(pages, shutdown.clone()));
    let watch = {
        let pageserver = pageserver.clone();
        tokio::spawn(async move { pageserver.watch().await })
    };
    tracing::info!(%http_address, %pages_address, data = %data.display(), store = location, "varve serves");
    let app = varve_pageserver::admin::router(pageserver.clone());
    let ended = shutdown.clone();
    let http_server = tokio::spawn(async move { axum::serve(http, app).with_graceful_shutdown(ended.cancelled_owned()).await });

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tracing::info!("stopping; what the store lacks is put there first");
    // Computes notice by themselves; a second signal ends at once what a store that does not answer holds up.
    tokio::select! {
        () = pageserver.stop() => {}
        _ = interrupt.recv() => tracing::warn!("stopped at once; the WAL log keeps what the store lacks"),
    }
    shutdown.cancel();
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), http_server).await;
    let _ = page_service.await;
    let _ = watch.await;
    Ok(())
}
