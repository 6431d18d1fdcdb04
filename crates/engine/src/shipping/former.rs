//! Objects of shared WAL that their writers do not look after any more: those of this server's former processes and
//! runs, and of servers that are gone.
//!
//! An object may go when every timeline in it is deleted, or its layers cover what the object has: then nobody will
//! ever ask for it. So any server may delete any object, and twice. It is listed first, and the logs are read
//! *afterwards*: what is covered stays so. Where a tenant's log is missing the tenant was deleted, or the log is lost:
//! the object stays for [`UNKNOWN_AGE_MIN`]. The newest object of another server's run stays, behind which a seal
//! belongs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use varve_postgres::Lsn;
use varve_storage::edit_log;
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::manifest::{ManifestState, timeline_folder};
use varve_storage::shared_wal::{Archive, Kind, Row};
use varve_storage::store::ObjectName;
use varve_storage::tenant_log::{self, TenantState};

use crate::context::Context;
use crate::error::EngineError;

/// How often they are looked through.
const INTERVAL: Duration = Duration::from_secs(3600);
/// Age from which on nobody comes for WAL of a tenant that has no log: a week, in microseconds.
const UNKNOWN_AGE_MIN: i64 = 7 * 24 * 3600 * 1_000_000;

/// What logs say, each read once.
struct Logs<'a> {
    context: &'a Context,
    tenants: BTreeMap<TenantId, Option<TenantState>>,
    layered: BTreeMap<(TenantId, TimelineId), Lsn>,
}

impl Logs<'_> {
    /// Whether anybody may ask for a row of an object, which is of such an age.
    async fn needs(&mut self, row: &Row, age: i64) -> Result<bool, EngineError> {
        let store = &self.context.store;
        if let std::collections::btree_map::Entry::Vacant(entry) = self.tenants.entry(row.tenant) {
            entry.insert(tenant_log::read(store, row.tenant).await?);
        }
        match self.tenants.get(&row.tenant) {
            Some(Some(state)) if state.is_removed() || state.was_removed(row.timeline) => return Ok(false),
            Some(Some(state)) if state.timeline(row.timeline).is_ok() => {}
            Some(Some(_)) => return Ok(true),
            _ => return Ok(age < UNKNOWN_AGE_MIN),
        }
        let owner = (row.tenant, row.timeline);
        let layered = match self.layered.get(&owner) {
            Some(layered) => *layered,
            None => {
                let manifest = edit_log::read_state::<ManifestState>(store, &timeline_folder(row.tenant, row.timeline)?).await?;
                *self.layered.entry(owner).or_insert(manifest.map_or(Lsn::INVALID, |(state, _)| state.layered()))
            }
        };
        Ok(row.end > layered)
    }
}

/// Looks through them from time to time, until it is dropped.
pub(super) async fn keep_deleted(context: Arc<Context>) {
    loop {
        match delete(&context).await {
            Ok(0) => {}
            Ok(deleted) => tracing::info!(deleted, "objects of WAL that layers cover, of former processes, are deleted"),
            // They are looked through again; nothing but space depends on it.
            Err(error) => tracing::warn!(%error, "objects of WAL of former processes were not looked through"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Deletes what nobody needs, but for what this server's present run has. How many objects that was.
async fn delete(context: &Context) -> Result<usize, EngineError> {
    let mut logs = Logs { context, tenants: BTreeMap::new(), layered: BTreeMap::new() };
    let mut gone: Vec<ObjectName> = Vec::new();
    let listed = context.archive.list().await?;
    // After the listing: a run has its number before its first WAL.
    let current = context.shipping.current_run.load(Ordering::SeqCst);
    // By the store's own clock: some object is always new.
    let now = listed.iter().filter_map(|listed| listed.written).max().unwrap_or(0);
    let mut newest = BTreeMap::new();
    for (wal_log, place) in listed.iter().filter_map(|listed| Archive::place(&listed.name)) {
        let number = newest.entry((wal_log, place.run)).or_insert(place.number);
        *number = place.number.max(*number);
    }
    for listed in listed {
        let Some((wal_log, place)) = Archive::place(&listed.name) else { continue };
        let is_ours = wal_log == context.wal_log;
        let is_newest = newest.get(&(wal_log, place.run)) == Some(&place.number);
        if is_ours && current == place.run || !is_ours && is_newest {
            continue;
        }
        let directory = match context.archive.directory(&listed.name, listed.bytes).await {
            Ok(directory) => directory,
            Err(error) if error.is_not_found() => continue,
            Err(error) => {
                tracing::error!(object = %listed.name, %error, "an object of shared WAL cannot be read");
                continue;
            }
        };
        let is_needed = match &directory.kind {
            // Whoever sleeps must find the seal one day, and a run's number is not used twice.
            Kind::Begin | Kind::Seal { .. } => true,
            Kind::Wal(rows) => {
                let mut needed = false;
                for row in rows {
                    let age = now.saturating_sub(listed.written.unwrap_or(now));
                    // What cannot be found out now is looked at the next time.
                    needed = needed || logs.needs(row, age).await.unwrap_or(true);
                }
                needed
            }
        };
        if !is_needed {
            gone.push(listed.name);
        }
    }
    context.store.delete_all(&gone).await?;
    Ok(gone.len())
}
