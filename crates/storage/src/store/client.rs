//! The few requests that Varve makes of an object store, one attempt each; behind a trait so that tests can put
//! faults between.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};

use super::{ClientError, ObjectName};

/// Deletions that run at once.
pub(super) const DELETES_AT_ONCE: usize = 16;

/// What a put does where the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PutMode {
    /// Fails with [`super::Failure::AlreadyExists`]: of any number of racing creates of one name exactly one succeeds.
    Create,
    /// Replaces the object.
    Overwrite,
}

/// An object as a listing tells it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Its name.
    pub name: ObjectName,
    /// Its length.
    pub bytes: u64,
    /// When it was written, as the store says: microseconds since 1970-01-01 UTC. None where nobody knows.
    pub written: Option<i64>,
}

/// Which of a folder's objects a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest<'a> {
    /// Their names within the folder begin with this.
    pub begin_with: &'a str,
    /// Their names within the folder are greater than this.
    pub after: Option<&'a str>,
    /// Most objects.
    pub limit: usize,
}

impl PageRequest<'_> {
    /// Whether an object of this name within the folder is one of them, if there is room.
    fn takes(&self, name: &str) -> bool {
        name.starts_with(self.begin_with) && self.after.is_none_or(|after| name > after) && !name.contains('/')
    }

    /// The page, of all names within the folder.
    pub(super) fn select(&self, names: impl Iterator<Item = String>) -> Vec<String> {
        let mut names: Vec<String> = names.filter(|name| self.takes(name)).collect();
        names.sort_unstable();
        names.truncate(self.limit);
        names
    }
}

/// One attempt at one request. Once a put or a delete has succeeded it is durable. A read sees every write that
/// succeeded before it began.
pub trait ObjectClient: Send + Sync + fmt::Debug {
    /// Writes an object, whole or not at all.
    fn put<'a>(&'a self, name: &'a ObjectName, bytes: Bytes, mode: PutMode) -> BoxFuture<'a, Result<(), ClientError>>;

    /// Reads an object, or the part of it that lies in `range`; fewer bytes come where it ends earlier.
    fn get<'a>(&'a self, name: &'a ObjectName, range: Option<Range<u64>>) -> BoxFuture<'a, Result<Bytes, ClientError>>;

    /// Removes an object; one that does not exist counts as removed.
    fn delete<'a>(&'a self, name: &'a ObjectName) -> BoxFuture<'a, Result<(), ClientError>>;

    /// Removes objects, in as few requests as the store allows. After an error any of them may be there yet.
    fn delete_many<'a>(&'a self, names: &'a [ObjectName]) -> BoxFuture<'a, Result<(), ClientError>> {
        async move {
            for some in names.chunks(DELETES_AT_ONCE) {
                try_join_all(some.iter().map(|name| self.delete(name))).await?;
            }
            Ok(())
        }
        .boxed()
    }

    /// All objects below `prefix`, which names a folder.
    fn list<'a>(&'a self, prefix: &'a ObjectName) -> BoxFuture<'a, Result<Vec<Listed>, ClientError>>;

    /// The names, within `folder`, of the first objects right in it that `page` asks for, ascending.
    fn list_page<'a>(&'a self, folder: &'a ObjectName, page: PageRequest<'a>) -> BoxFuture<'a, Result<Vec<String>, ClientError>> {
        async move {
            let listed = self.list(folder).await?;
            Ok(page.select(listed.iter().filter_map(|listed| folder.relative(&listed.name)).map(ToOwned::to_owned)))
        }
        .boxed()
    }
}
