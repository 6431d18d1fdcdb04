//! The page service's way to the timelines.

use std::sync::Arc;

use varve_storage::ids::{TenantId, TimelineId};

use super::Pageserver;
use crate::error::{Code, ServerError};
use crate::page_service::{PageSource, SourceError, TimelinePages};
use crate::timeline_pages::Pages;

/// Finds timelines by id or by name.
#[derive(Debug)]
pub struct Source {
    pageserver: Arc<Pageserver>,
    runtime: tokio::runtime::Handle,
}

impl Source {
    /// A source for the page service, on the current runtime.
    pub fn new(pageserver: Arc<Pageserver>) -> Source {
        Source { pageserver, runtime: tokio::runtime::Handle::current() }
    }

    async fn find(&self, tenant: &str, timeline: &str) -> Result<Pages, ServerError> {
        let tenant = match tenant.parse::<TenantId>() {
            Ok(id) => self.pageserver.tenant_by_id(id).await?,
            Err(_) => self.pageserver.tenant(tenant).await?,
        };
        let timeline = match timeline.parse::<TimelineId>() {
            Ok(id) => id,
            Err(_) => Pageserver::find_branch(&tenant, timeline)?.1,
        };
        let served = tenant.timeline(timeline).await?;
        Ok(Pages::new(tenant, served))
    }
}

impl PageSource for Source {
    fn resolve(&self, tenant: &str, timeline: &str) -> Result<Arc<dyn TimelinePages>, SourceError> {
        let found = self.runtime.block_on(self.find(tenant, timeline));
        found.map(|pages| Arc::new(pages) as Arc<dyn TimelinePages>).map_err(|error| match error.code {
            Code::Unavailable | Code::NotOwner => SourceError::NotReady(error.detail),
            Code::UnknownTenant | Code::UnknownBranch => SourceError::NotFound(error.detail),
            _ => SourceError::Failed(error.detail),
        })
    }
}
