//! The page service's way to the timelines.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use varve_engine::EngineError;
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::tenant_log::TenantError;

use crate::error::ServerError;
use crate::page_service::{PageSource, SourceError, TimelinePages};
use crate::server::Pageserver;
use crate::timeline_pages::Pages;

/// Finds timelines by id or by name.
#[derive(Debug)]
pub struct Source {
    pageserver: Arc<Pageserver>,
}

impl Source {
    /// A source of what `pageserver` owns, or owned before it was started again.
    pub fn new(pageserver: Arc<Pageserver>) -> Source {
        Source { pageserver }
    }

    async fn find(&self, tenant: &str, timeline: &str) -> Result<Pages, ServerError> {
        let tenants = self.pageserver.tenants();
        let id = match tenant.parse::<TenantId>() {
            Ok(id) => id,
            Err(_) => tenants.id_of(tenant).await?,
        };
        let tenant = tenants.own_if_ours(id, "pages of it are asked for").await?;
        let timeline = match timeline.parse::<TimelineId>() {
            Ok(id) => id,
            Err(_) => tenant.log().state().branch(timeline)?.facts.id,
        };
        let live = tenant.timeline(timeline).await?;
        Ok(Pages::new(tenant, live))
    }
}

impl PageSource for Source {
    fn resolve(&self, tenant: &str, timeline: &str) -> BoxFuture<'_, Result<Arc<dyn TimelinePages>, SourceError>> {
        let (tenant, timeline) = (tenant.to_owned(), timeline.to_owned());
        async move {
            let found = self.find(&tenant, &timeline).await;
            found.map(|pages| Arc::new(pages) as Arc<dyn TimelinePages>).map_err(|error| {
                let words = error.to_string();
                match error {
                    ServerError::UnknownTenant(_) | ServerError::UnknownTenantName(_) => SourceError::NotFound(words),
                    ServerError::Engine(EngineError::Tenant(TenantError::UnknownBranch(_) | TenantError::UnknownTimeline(_))) => {
                        SourceError::NotFound(words)
                    }
                    ServerError::NotOwner { .. } | ServerError::Engine(EngineError::Store(_) | EngineError::Log(_)) => {
                        SourceError::NotReady(words)
                    }
                    _ => SourceError::Failed(words),
                }
            })
        }
        .boxed()
    }
}
