//! Unique names of tenants: the object `names/<name>` says whose it is. It is created by put-if-absent, so of any
//! number of servers that create a tenant of one name exactly one succeeds; the list of tenants is the listing of
//! `names/`.
//!
//! The object is an [`crate::envelope`] (magic `VTNM`) around: nonce 16 bytes, tenant id 16 bytes.

use futures::{StreamExt, TryStreamExt, stream};

use crate::envelope::{self, Codec, EnvelopeError, Format};
use crate::ids::{RandomError, TenantId, TenantName, random_bytes};
use crate::store::{Created, ObjectName, PageRequest, ParseObjectNameError, Store, StoreError};

const FORMAT: Format = Format { magic: *b"VTNM", version: 1, what: "a tenant's name", content_bytes_max: 1024 };
/// Objects that are read at once when all tenants are listed.
const READS_AT_ONCE: usize = 32;

/// What can go wrong with a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is another tenant's.
    #[error("the name '{name}' is that of tenant {tenant}: choose another name")]
    Taken {
        /// The name.
        name: TenantName,
        /// Whose it is.
        tenant: TenantId,
    },
    /// The object is damaged or of a newer version.
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No randomness for a nonce.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// A name that no store takes.
    #[error(transparent)]
    Name(#[from] ParseObjectNameError),
}

fn object(name: &TenantName) -> Result<ObjectName, ParseObjectNameError> {
    format!("names/{name}").parse()
}

fn decode(object: &ObjectName, bytes: &bytes::Bytes) -> Result<TenantId, NameError> {
    let content = envelope::decode(&FORMAT, object.as_str(), bytes)?.content;
    match content.get(16..).map(<[u8; 16]>::try_from) {
        Some(Ok(id)) => Ok(TenantId(id)),
        _ => {
            let problem = format!("it has {} bytes instead of 32", content.len());
            Err(EnvelopeError::Damaged { object: object.to_string(), problem }.into())
        }
    }
}

/// Makes `name` that of `tenant`, for good. Doing so again changes nothing.
///
/// # Errors
/// [`NameError::Taken`] when it is another's; the store's.
pub async fn reserve(store: &Store, name: &TenantName, tenant: TenantId) -> Result<(), NameError> {
    let object = object(name)?;
    let content = [random_bytes::<16>()?, tenant.0].concat();
    let bytes = envelope::encode(&FORMAT, Codec::None, object.as_str(), &content)?;
    match store.put_if_absent(&object, bytes).await? {
        Created::Ours => Ok(()),
        Created::Taken(other) => match decode(&object, &other)? {
            owner if owner == tenant => Ok(()),
            owner => Err(NameError::Taken { name: name.clone(), tenant: owner }),
        },
    }
}

/// Whose name it is.
///
/// # Errors
/// A damaged object; the store's.
pub async fn lookup(store: &Store, name: &TenantName) -> Result<Option<TenantId>, NameError> {
    let object = object(name)?;
    store.get_optional(&object).await?.map(|bytes| decode(&object, &bytes)).transpose()
}

/// Gives `name` free if it is that of `tenant`.
///
/// # Errors
/// A damaged object; the store's.
pub async fn free(store: &Store, name: &TenantName, tenant: TenantId) -> Result<(), NameError> {
    if lookup(store, name).await? == Some(tenant) {
        store.delete(&object(name)?).await?;
    }
    Ok(())
}

/// Names of tenants, each with its tenant, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamesPage {
    /// The names. One that was given free while the page was read is missing.
    pub tenants: Vec<(TenantName, TenantId)>,
    /// Behind which name the next page begins; none if this is the last page.
    pub next: Option<TenantName>,
}

/// At most `limit` names that begin with `prefix` and come after `after`. Reads these names' objects and no others.
///
/// # Errors
/// A damaged object; the store's.
pub async fn page(store: &Store, prefix: &str, after: Option<&TenantName>, limit: usize) -> Result<NamesPage, NameError> {
    let folder: ObjectName = "names".parse()?;
    let request = PageRequest { begin_with: prefix, after: after.map(TenantName::as_str), limit: limit.saturating_add(1) };
    let listed = store.list_page(&folder, request).await?;
    let more = listed.len() > limit;
    let named: Vec<TenantName> = listed.iter().take(limit).filter_map(|name| name.parse().ok()).collect();
    let next = if more { named.last().cloned() } else { None };
    Ok(NamesPage { tenants: whose(store, named).await?, next })
}

/// Whose `names` are, in their order, without those that are nobody's (any more).
async fn whose(store: &Store, names: Vec<TenantName>) -> Result<Vec<(TenantName, TenantId)>, NameError> {
    let found = names.into_iter().map(|name| async move {
        let tenant = lookup(store, &name).await?;
        Ok::<_, NameError>(tenant.map(|tenant| (name, tenant)))
    });
    stream::iter(found).buffered(READS_AT_ONCE).try_filter_map(|found| async move { Ok(found) }).try_collect().await
}

/// All names, each with its tenant, by name. One read for each: for people, and for a server that starts.
///
/// # Errors
/// A damaged object; the store's.
pub async fn list(store: &Store) -> Result<Vec<(TenantName, TenantId)>, NameError> {
    let folder: ObjectName = "names".parse()?;
    let listed = store.list(&folder).await?;
    let named: Vec<TenantName> = listed.iter().filter_map(|listed| folder.relative(&listed.name)?.parse().ok()).collect();
    whose(store, named).await
}
