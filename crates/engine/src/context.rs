//! What all timelines of a pageserver share.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use varve_postgres::Lsn;
use varve_storage::ids::{Generation, TenantId, TimelineId, WalLogId};
use varve_storage::shared_wal::Archive;
use varve_storage::store::Store;
use varve_storage::threads::Threads;
use varve_storage::timeline::Resources;
use varve_storage::wal_log::WalLog;

use crate::shipping::Shipping;
use crate::work_queue::WorkQueue;

/// See the module's doc. Time, threads, disk and store are what it was given.
pub struct Context {
    /// The WAL log.
    pub wal: Arc<WalLog>,
    /// Its identity.
    pub wal_log: WalLogId,
    /// The store.
    pub store: Store,
    /// Caches, budgets, and the store for threads that may block.
    pub resources: Arc<Resources>,
    /// Where blocking work runs.
    pub threads: Arc<dyn Threads>,
    /// Background work of all timelines.
    pub queue: Arc<WorkQueue>,
    /// WAL on its way to the store.
    pub shipping: Shipping,
    /// WAL of all servers that is there.
    pub archive: Archive,
    /// Tenants that turned out to be another server's; whoever owns the tenants looks there.
    pub lost: LostTenants,
}

impl Context {
    /// Lets go of all WAL of timelines that are deleted.
    pub async fn forget_wal(&self, tenant: TenantId, timelines: Vec<TimelineId>) {
        for timeline in &timelines {
            self.shipping.cover(tenant, *timeline, Lsn::MAX);
        }
        let wal = self.wal.clone();
        let forget = move || {
            for timeline in timelines {
                if let Err(error) = wal.forget(tenant, timeline) {
                    tracing::warn!(%tenant, %timeline, %error, "that a timeline is deleted could not be written into the WAL log");
                }
            }
        };
        if let Err(error) = self.threads.call(forget).await {
            tracing::error!(%tenant, %error, "WAL of deleted timelines was not let go of");
        }
    }
}

/// Tenants that turned out to be another server's, until they are dealt with. At most one entry a tenant.
#[derive(Debug, Default)]
pub struct LostTenants {
    tenants: Mutex<BTreeSet<(TenantId, Generation)>>,
    news: Notify,
}

impl LostTenants {
    /// A tenant's log or manifest, which we wrote in `generation`, said that another server has it. By now it may be
    /// ours again, in a later one.
    pub fn note(&self, tenant: TenantId, generation: Generation) {
        if self.tenants.lock().insert((tenant, generation)) {
            self.news.notify_one();
        }
    }

    /// Waits for some, and takes them.
    pub async fn take(&self) -> BTreeSet<(TenantId, Generation)> {
        loop {
            let news = self.news.notified();
            let taken = std::mem::take(&mut *self.tenants.lock());
            if !taken.is_empty() {
                return taken;
            }
            news.await;
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context(WAL log {})", self.wal_log)
    }
}
