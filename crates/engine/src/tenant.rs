//! A tenant that this pageserver owns: its log, and the timelines of it that are open.
//!
//! Nothing of a tenant is in memory until somebody asks for it; a timeline is opened at its first use, its ancestors before it.

use std::collections::HashMap;
use std::sync::Arc;

use varve_postgres::Major;
use varve_storage::envelope::{self, Format};
use varve_storage::ids::{TenantId, TenantName, TimelineId};
use varve_storage::manifest::timeline_folder;
use varve_storage::store::ObjectName;
use varve_storage::tenant_log::{FileContents, TenantFacts, TenantLog};

use crate::error::ServerError;
use crate::layers::open_history;
use crate::templates::Template;
use crate::timeline::{OpenContext, OpenTimeline, ServedTimeline};

/// Files of data directories that are objects of their own.
const FILE_FORMAT: Format = Format { magic: *b"VFIL", version: 1, what: "a file of a data directory", content_bytes_max: 64 << 20 };

/// See the module's doc.
#[derive(Debug)]
pub struct Tenant {
    facts: Arc<TenantFacts>,
    major: Major,
    log: TenantLog,
    template: Arc<Template>,
    context: Arc<OpenContext>,
    timelines: tokio::sync::Mutex<HashMap<TimelineId, Arc<ServedTimeline>>>,
    /// Sizes of timelines that nobody has written yet, as far as somebody asked.
    sizes: parking_lot::Mutex<HashMap<TimelineId, u64>>,
}

impl Tenant {
    /// A tenant whose log was taken over.
    ///
    /// # Errors
    /// When the log says nothing of a tenant, or one of a Postgres that is not supported.
    pub fn new(log: TenantLog, template: Arc<Template>, context: Arc<OpenContext>) -> Result<Tenant, ServerError> {
        let facts = log.state().facts().cloned().ok_or_else(|| ServerError::internal(format!("{log:?} says nothing of a tenant")))?;
        let major = Major::from_number(facts.pg_version).ok_or_else(|| {
            ServerError::internal(format!("tenant {} is of PostgreSQL {}, which is not supported", facts.name, facts.pg_version))
        })?;
        Ok(Tenant { facts, major, log, template, context, timelines: tokio::sync::Mutex::default(), sizes: parking_lot::Mutex::default() })
    }

    /// Its id.
    pub fn id(&self) -> TenantId {
        self.facts.id
    }

    /// Its name.
    pub fn name(&self) -> &TenantName {
        &self.facts.name
    }

    /// What it is from its first day.
    pub fn facts(&self) -> &TenantFacts {
        &self.facts
    }

    /// Its log.
    pub fn log(&self) -> &TenantLog {
        &self.log
    }

    /// The template that its first timeline began with.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// What the pageserver's timelines share.
    pub fn context(&self) -> &Arc<OpenContext> {
        &self.context
    }

    /// Bytes of a timeline that nobody has written, if it was told before.
    pub fn known_size(&self, id: TimelineId) -> Option<u64> {
        self.sizes.lock().get(&id).copied()
    }

    /// Keeps that size.
    pub fn know_size(&self, id: TimelineId, bytes: u64) {
        self.sizes.lock().insert(id, bytes);
    }

    /// A timeline, opened if need be.
    ///
    /// # Errors
    /// When there is no such timeline, or it cannot be opened.
    pub async fn timeline(&self, id: TimelineId) -> Result<Arc<ServedTimeline>, ServerError> {
        let mut open = self.timelines.lock().await;
        if let Some(timeline) = open.get(&id) {
            return Ok(timeline.clone());
        }
        let state = self.log.state();
        let chain: Vec<TimelineId> = state.ancestry(id)?.into_iter().map(|(state, _)| state.facts.id).collect();
        let mut ancestor: Option<Arc<ServedTimeline>> = None;
        for id in chain.into_iter().rev() {
            if let Some(timeline) = open.get(&id) {
                ancestor = Some(timeline.clone());
                continue;
            }
            let timeline = state.timeline(id)?.clone();
            let below = match (ancestor.take(), timeline.facts.ancestor) {
                (Some(ancestor), Some(at)) => Some((ancestor, at.lsn)),
                _ => None,
            };
            let (tenant, major, system_identifier, context) =
                (self.facts.id, self.major, self.facts.system_identifier, self.context.clone());
            let ownership = self.log.ownership();
            let below_history = below.as_ref().map(|(ancestor, lsn)| (ancestor.history().clone(), *lsn));
            let history = open_history(&context, tenant, major, &timeline, below_history, &self.template, ownership).await?;
            let served = tokio::task::spawn_blocking(move || {
                ServedTimeline::open(OpenTimeline { tenant, major, system_identifier, state: &timeline, history, ancestor: below, context })
            });
            let served = served.await.map_err(ServerError::internal)??;
            open.insert(id, served.clone());
            ancestor = Some(served);
        }
        ancestor.ok_or_else(|| ServerError::internal("a timeline is in its own ancestry"))
    }

    /// A timeline if it is open.
    pub async fn opened(&self, id: TimelineId) -> Option<Arc<ServedTimeline>> {
        self.timelines.lock().await.get(&id).cloned()
    }

    /// Stops all timelines.
    pub async fn stop(&self) {
        let timelines: Vec<_> = self.timelines.lock().await.drain().map(|(_, timeline)| timeline).collect();
        for timeline in timelines {
            timeline.stop().await;
        }
    }

    /// All timelines that are open.
    pub async fn all_opened(&self) -> Vec<Arc<ServedTimeline>> {
        self.timelines.lock().await.values().cloned().collect()
    }

    /// Stops a timeline that the log no longer has, and removes what is stored of it.
    pub async fn remove_timeline(&self, id: TimelineId) {
        self.sizes.lock().remove(&id);
        if let Some(timeline) = self.timelines.lock().await.remove(&id) {
            timeline.stop().await;
        }
        self.context.wal.forget(self.facts.id, id);
        if let Err(error) = self.remove_objects(id).await {
            tracing::warn!(tenant = %self.facts.name, timeline = %id, %error, "objects of a deleted branch stay behind");
        }
    }

    async fn remove_objects(&self, timeline: TimelineId) -> Result<(), ServerError> {
        let store = &self.context.store;
        let folder = timeline_folder(self.facts.id, timeline).map_err(ServerError::internal)?;
        let objects: Vec<ObjectName> = store.list(&folder).await?.into_iter().map(|listed| listed.name).collect();
        Ok(store.delete_all(&objects).await?)
    }

    /// Keeps a file of a data directory that is too large for the tenant log as an object of its own.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn put_file_object(&self, bytes: Vec<u8>) -> Result<FileContents, ServerError> {
        let name = format!("tenants/{}/files/{}", self.facts.id, uuid::Uuid::new_v4().simple());
        let len = bytes.len() as u64;
        let object: ObjectName = name.parse().map_err(ServerError::internal)?;
        let encoded = envelope::encode(&FILE_FORMAT, envelope::Codec::Zstd, &name, &bytes).map_err(ServerError::internal)?;
        self.context.store.put(&object, encoded).await?;
        Ok(FileContents::Object { name, len })
    }

    /// Contents of a file version. Blocks on the store where it is an object.
    pub(crate) fn file_contents(&self, contents: &FileContents) -> Result<Option<Vec<u8>>, ServerError> {
        match contents {
            FileContents::Inline(bytes) => Ok(Some(bytes.clone())),
            FileContents::Removed => Ok(None),
            FileContents::Object { name, .. } => {
                let object: ObjectName = name.parse().map_err(ServerError::internal)?;
                let bytes = self.context.resources.store.get(&object)?;
                envelope::decode(&FILE_FORMAT, name, &bytes).map(|bytes| Some(bytes.content.to_vec())).map_err(ServerError::internal)
            }
        }
    }
}
