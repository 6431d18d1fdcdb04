//! The tenant's log in the object store: `tenants/<tenant>/log/...`.

use futures::{StreamExt, stream};

use super::edit::{TenantEdit, TenantFacts};
use super::names::{self, NameError};
use super::state::{Owner, TenantState};
use crate::edit_log::{self, ApplyError, EditLog, EditLogError, LogFormat, State};
use crate::envelope::Format;
use crate::ids::{Generation, TenantId, TenantName};
use crate::store::{ObjectName, ParseObjectNameError, Store};

/// A tenant's log, open for writing. [`EditLog::take_over`] at [`tenant_folder`] opens an existing one.
pub type TenantLog = EditLog<TenantState>;

impl State for TenantState {
    type Edit = TenantEdit;

    const FORMAT: LogFormat = LogFormat {
        entry: Format { magic: *b"VTLE", version: 1, what: "a tenant log entry", content_bytes_max: 16 << 20 },
        snapshot: Format { magic: *b"VTLS", version: 1, what: "a tenant log snapshot", content_bytes_max: 1 << 30 },
        edit_kinds: TenantEdit::KINDS,
    };

    fn apply(&mut self, edit: &TenantEdit) -> Result<(), ApplyError> {
        TenantState::apply(self, edit).map_err(|error| ApplyError(error.to_string()))
    }

    fn for_each_edit(&self, emit: &mut dyn FnMut(&TenantEdit)) {
        self.edits().iter().for_each(emit);
    }
}

/// Logs that are read at once.
const READS_AT_ONCE: usize = 32;

/// Reads a tenant's log as of about now, without taking it over; `None` when there is no such tenant.
///
/// # Errors
/// What cannot be read; the store's.
pub async fn read(store: &Store, tenant: TenantId) -> Result<Option<TenantState>, EditLogError> {
    let read = edit_log::read_state(store, &tenant_folder(tenant)?).await?;
    Ok(read.map(|(state, _)| state))
}

/// Reads the logs of several tenants, some at a time, in their order. What cannot be read of one says nothing of the
/// others.
pub async fn read_all(store: &Store, tenants: &[TenantId]) -> Vec<Result<Option<TenantState>, EditLogError>> {
    stream::iter(tenants).map(|tenant| read(store, *tenant)).buffered(READS_AT_ONCE).collect().await
}

/// Who has a tenant, as its log tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundOwner {
    /// The newest generation.
    pub generation: Generation,
    /// What its owner said of itself; none if it said nothing.
    pub owner: Option<Owner>,
}

/// Finds out who has a tenant, without taking it over; `None` when there is no such tenant.
///
/// # Errors
/// What cannot be read; the store's.
pub async fn find_owner(store: &Store, tenant: TenantId) -> Result<Option<FoundOwner>, EditLogError> {
    let read = edit_log::read_state::<TenantState>(store, &tenant_folder(tenant)?).await?;
    Ok(read.map(|(state, last)| {
        let owner = state.owner().filter(|owner| owner.generation == last.generation).cloned();
        FoundOwner { generation: last.generation, owner }
    }))
}

/// Takes a tenant over in the name of `server`, which is reached at `url`: the claim itself says so, in one write.
/// `None` when there is no such tenant.
///
/// # Errors
/// As [`EditLog::take_over`].
pub async fn take_over(store: &Store, tenant: TenantId, server: &str, url: &str) -> Result<Option<TenantLog>, EditLogError> {
    let edits = |generation| vec![TenantEdit::Owner { generation, server: server.to_owned(), url: url.to_owned() }];
    TenantLog::take_over_with(store, &tenant_folder(tenant)?, edits).await
}

/// Folder of everything that is a tenant's; its log stands in `log` below it.
///
/// # Errors
/// None in practice: an id is a good name.
pub fn tenant_folder(tenant: TenantId) -> Result<ObjectName, ParseObjectNameError> {
    format!("tenants/{tenant}").parse()
}

/// How creating a tenant can fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CreateTenantError {
    /// Another tenant has the name.
    #[error("there is a tenant '{0}' already: choose another name")]
    NameTaken(TenantName),
    /// The name could not be reserved.
    #[error(transparent)]
    Name(NameError),
    /// The log could not be written.
    #[error(transparent)]
    Log(#[from] EditLogError),
}

/// Creates a tenant with the edits of its first day, in two writes: its log, then its name. The tenant exists once
/// its name does: a log whose name never came about is garbage that nothing points to.
///
/// # Errors
/// [`CreateTenantError::NameTaken`], also when another server creates it at the same time; the store's.
pub async fn create_tenant(store: &Store, facts: TenantFacts, others: Vec<TenantEdit>) -> Result<TenantLog, CreateTenantError> {
    let (tenant, name) = (facts.id, facts.name.clone());
    // Nearly always a name that is taken was taken long ago.
    if names::lookup(store, &name).await.map_err(CreateTenantError::Name)?.is_some() {
        return Err(CreateTenantError::NameTaken(name));
    }
    let mut edits = vec![TenantEdit::Tenant(facts)];
    edits.extend(others);
    let folder = tenant_folder(tenant).map_err(EditLogError::from)?;
    let log = TenantLog::create(store, &folder, &edits).await?;
    match names::reserve(store, &name, tenant).await {
        Ok(()) => Ok(log),
        // Only here is it certain that the name is another's: after other errors it may yet turn out to be ours.
        Err(NameError::Taken { .. }) => {
            if let Err(error) = delete_objects(store, tenant).await {
                tracing::warn!(%tenant, %error, "the log of a tenant that was not created stays behind");
            }
            Err(CreateTenantError::NameTaken(name))
        }
        Err(error) => Err(CreateTenantError::Name(error)),
    }
}

/// Deletes all objects of a tenant, its log last. The caller has committed [`TenantEdit::TenantRemoved`] and given
/// the name free before.
///
/// # Errors
/// The store's. Calling it again goes on where it failed.
pub async fn delete_objects(store: &Store, tenant: TenantId) -> Result<(), EditLogError> {
    let folder = tenant_folder(tenant)?;
    let log = folder.join("log")?;
    let listed = store.list(&folder).await?.into_iter().map(|listed| listed.name);
    let (log_objects, others): (Vec<_>, Vec<_>) = listed.partition(|name| log.relative(name).is_some());
    store.delete_all(&others).await?;
    store.delete_all(&log_objects).await?;
    Ok(())
}
