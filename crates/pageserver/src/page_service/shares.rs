//! How much of something each tenant may have at a time.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use varve_storage::ids::TenantId;

/// The same number of places for each tenant; a tenant that holds none and waits for none costs nothing.
#[derive(Clone)]
pub(super) struct Shares(Arc<Inner>);

struct Inner {
    of_tenant_max: usize,
    tenants: Mutex<HashMap<TenantId, Places>>,
}

struct Places {
    free: Arc<Semaphore>,
    /// Who holds a place or waits for one.
    users: usize,
}

/// A place of a tenant; given back when dropped.
pub(super) struct Share {
    permit: Option<OwnedSemaphorePermit>,
    tenant: TenantId,
    inner: Arc<Inner>,
}

impl Shares {
    pub(super) fn new(of_tenant_max: usize) -> Shares {
        let of_tenant_max = of_tenant_max.clamp(1, Semaphore::MAX_PERMITS);
        Shares(Arc::new(Inner { of_tenant_max, tenants: Mutex::new(HashMap::new()) }))
    }

    pub(super) fn of_tenant_max(&self) -> usize {
        self.0.of_tenant_max
    }

    /// A place of `tenant` if one is free.
    pub(super) fn try_take(&self, tenant: TenantId) -> Option<Share> {
        let (mut share, free) = self.enter(tenant);
        share.permit = Some(free.try_acquire_owned().ok()?);
        Some(share)
    }

    /// A place of `tenant`, as soon as one is free, in the order of asking.
    pub(super) async fn take(&self, tenant: TenantId) -> Share {
        let (mut share, free) = self.enter(tenant);
        share.permit = free.acquire_owned().await.ok(); // it is never closed
        share
    }

    fn enter(&self, tenant: TenantId) -> (Share, Arc<Semaphore>) {
        let mut tenants = self.0.tenants.lock();
        let new = || Places { free: Arc::new(Semaphore::new(self.0.of_tenant_max)), users: 0 };
        let places = tenants.entry(tenant).or_insert_with(new);
        places.users += 1;
        (Share { permit: None, tenant, inner: self.0.clone() }, places.free.clone())
    }
}

impl Share {
    pub(super) fn tenant(&self) -> TenantId {
        self.tenant
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.permit = None;
        let mut tenants = self.inner.tenants.lock();
        if let Some(places) = tenants.get_mut(&self.tenant) {
            places.users -= 1;
            if places.users == 0 {
                tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn each_tenant_has_its_own_and_who_leaves_leaves_nothing() {
        let shares = Shares::new(2);
        let (a, b) = (TenantId([1; 16]), TenantId([2; 16]));
        let (first, second) = (shares.take(a).await, shares.try_take(a).expect("a second place"));
        assert!(shares.try_take(a).is_none(), "there are two");
        assert!(shares.try_take(b).is_some(), "another tenant has its own");
        let mut third = Box::pin(shares.take(a));
        assert!(third.as_mut().now_or_never().is_none(), "it waits");
        let abandoned = Box::pin(shares.take(a));
        drop(abandoned);
        drop(first);
        let third = third.now_or_never().expect("a free place");
        assert_eq!((second.tenant(), third.tenant()), (a, a));
        drop((second, third));
        assert!(shares.0.tenants.lock().is_empty(), "no tenant is remembered for nothing");
    }
}
