//! Tells the control plane how a compute's block cache is, and what the compute may take: so operators see when it is
//! too small, or when what was written fills it. Nothing depends on it.

use std::time::Duration;

use tokio::sync::watch;
use varve_api::admin::CacheUse;
use varve_api::host::CacheReport;
use varve_api::size::CurrentLimits;

use crate::mount::MountStatistics;
use crate::server::Server;

/// How often. What is shown is as old as that at most.
const INTERVAL: Duration = Duration::from_secs(15);

/// Tells it again and again, and limits as soon as they change. A report that is lost is made good by the next; so is a
/// control plane that started anew.
pub(crate) async fn tell(
    server: Server,
    incarnation: u64,
    statistics: impl Fn() -> MountStatistics,
    mut limits: watch::Receiver<Option<CurrentLimits>>,
) {
    loop {
        let MountStatistics { hits, fetches, blocks_fetched, blocks_evicted, cached_bytes, dirty_bytes, limit_bytes, .. } = statistics();
        let cache = CacheUse { hits, fetches, blocks_fetched, blocks_evicted, cached_bytes, dirty_bytes, limit_bytes };
        let report = CacheReport { incarnation, cache, limits: *limits.borrow_and_update() };
        if let Err(error) = server.cache(&report).await {
            tracing::debug!(%error, "the figures of the cache are not told");
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            // Who has no limits has no sender any more.
            Ok(()) = limits.changed() => {}
        }
    }
}
