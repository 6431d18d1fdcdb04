//! Tells the control plane how a compute's block cache is, where its base is, and what the compute may take: so
//! operators see when the cache is too small, or when what was written fills it. A base must not move before it was
//! told.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use varve_api::admin::CacheUse;
use varve_api::client::ClientError;
use varve_api::host::CacheReport;
use varve_api::size::CurrentLimits;

use crate::mount::MountStatistics;
use crate::page_fetcher::PageFetcher;
use crate::server::Server;

/// How often. What is shown is as old as that at most.
const INTERVAL: Duration = Duration::from_secs(15);

/// Tells it.
pub(crate) struct Reporter {
    server: Server,
    incarnation: u64,
    statistics: Box<dyn Fn() -> MountStatistics + Send + Sync>,
    base: Arc<PageFetcher>,
    limits: watch::Receiver<Option<CurrentLimits>>,
}

impl Reporter {
    pub(crate) fn new(
        (server, incarnation): (Server, u64),
        statistics: impl Fn() -> MountStatistics + Send + Sync + 'static,
        base: Arc<PageFetcher>,
        limits: watch::Receiver<Option<CurrentLimits>>,
    ) -> Reporter {
        Reporter { server, incarnation, statistics: Box::new(statistics), base, limits }
    }

    /// Tells how it is right now.
    ///
    /// # Errors
    /// When the control plane does not hear it.
    pub(crate) async fn send(&self) -> Result<(), ClientError> {
        let of = (self.statistics)();
        let cache = CacheUse {
            hits: of.hits,
            fetches: of.fetches,
            blocks_fetched: of.blocks_fetched,
            blocks_evicted: of.blocks_evicted,
            rebases: of.rebases,
            blocks_handed_over: of.blocks_handed_over,
            cached_bytes: of.cached_bytes,
            dirty_bytes: of.dirty_bytes,
            limit_bytes: of.limit_bytes,
        };
        let report = CacheReport {
            incarnation: self.incarnation,
            cache,
            limits: *self.limits.borrow(),
            bases: self.base.bases().iter().map(ToString::to_string).collect(),
        };
        self.server.cache(&report).await
    }
}

/// Tells it again and again, and limits as soon as they change. A report that is lost is made good by the next; so is a
/// control plane that started anew.
pub(crate) async fn tell(reporter: Arc<Reporter>) {
    let mut limits = reporter.limits.clone();
    loop {
        limits.mark_unchanged();
        if let Err(error) = reporter.send().await {
            tracing::debug!(%error, "the figures of the cache are not told");
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            // Who has no limits has no sender any more.
            Ok(()) = limits.changed() => {}
        }
    }
}
