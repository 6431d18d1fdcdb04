//! Orphans: objects of a tenant that nothing refers to.
//!
//! A crash between an upload and its publishing leaves them, and a deletion that broke off. What nobody can come to
//! refer to any more is deleted:
//! - all of a timeline that the tenant's log does not know: its row comes before its first object;
//! - layers and kept WAL that no manifest names and an earlier generation wrote: since the manifest is ours, its owner
//!   publishes nothing more. Only of timelines that are open here, whose manifests are;
//! - files that the tenant's log does not name and that are so old that nobody is about to name them.
//!
//! What is listed is listed first, and looked up in what the logs say *afterwards*; that the tenant is still ours is
//! checked last.

use std::collections::{BTreeMap, BTreeSet};

use varve_postgres::Timestamp;
use varve_storage::ids::Generation;
use varve_storage::store::{Listed, ObjectName};
use varve_storage::tenant_log::tenant_folder;

use crate::error::EngineError;
use crate::scrub::{files_of, timeline_of};
use crate::tenant::Tenant;
use crate::timeline::LiveTimeline;

/// Age of a file's object from which on nobody is about to name it: a day, in microseconds.
const FILE_AGE_MIN: i64 = 24 * 3600 * 1_000_000;

/// Generation that wrote a timeline's object, as its name says: `layers/<generation>-...`.
fn generation_of(object: &ObjectName) -> Option<Generation> {
    let (_, name) = object.as_str().rsplit_once('/')?;
    let (generation, _) = name.split_once('-')?;
    u32::from_str_radix(generation, 16).ok().map(Generation)
}

impl LiveTimeline {
    /// Which of its objects nobody can come to refer to any more.
    fn orphans(&self, objects: Vec<ObjectName>) -> Vec<ObjectName> {
        let state = self.manifest().state();
        let layers = state.layers().map(|row| row.object.clone());
        let named: BTreeSet<ObjectName> = layers.chain(state.kept_wal().map(|piece| piece.object.clone())).collect();
        // Somebody may still read these: they are deleted once nobody does (`Timeline::delete_retired`).
        let retired: BTreeSet<String> = self.history().retired_objects().into_iter().collect();
        let is_of_former = |object: &ObjectName| generation_of(object).is_some_and(|generation| generation < self.manifest().generation());
        objects.into_iter().filter(|object| !named.contains(object) && !retired.contains(object.as_str()) && is_of_former(object)).collect()
    }
}

impl Tenant {
    /// Deletes the tenant's orphans. How many there were.
    ///
    /// # Errors
    /// When something cannot be read, or the tenant is another server's by now.
    pub(crate) async fn delete_orphans(&self, now: Timestamp) -> Result<usize, EngineError> {
        let store = &self.context().store;
        let folder = tenant_folder(self.id())?;
        let listed = store.list(&folder).await?;
        let state = self.log().state();
        let named_files = files_of(store, &state, false).await?;
        let is_log = |object: &ObjectName| object.as_str().contains("/log/");
        let (mut orphans, mut of_timelines) = (Vec::new(), BTreeMap::<_, Vec<ObjectName>>::new());
        for Listed { name, written, .. } in listed {
            match timeline_of(&folder, &name) {
                Some(timeline) if state.timeline(timeline).is_err() => orphans.push(name),
                Some(timeline) if !is_log(&name) => of_timelines.entry(timeline).or_default().push(name),
                Some(_) => {}
                None => {
                    let is_file = folder.relative(&name).is_some_and(|rest| rest.starts_with("files/"));
                    let is_old = written.is_some_and(|written| now.unix_micros().saturating_sub(written) > FILE_AGE_MIN);
                    if is_file && is_old && !named_files.contains_key(&name) {
                        orphans.push(name);
                    }
                }
            }
        }
        for (timeline, objects) in of_timelines {
            if let Some(live) = self.opened(timeline) {
                orphans.extend(live.orphans(objects));
            }
        }
        if !orphans.is_empty() {
            self.log().check_ownership().await?;
            store.delete_all(&orphans).await?;
        }
        Ok(orphans.len())
    }
}
