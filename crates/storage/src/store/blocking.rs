//! The store for plain threads.

use std::ops::Range;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{Created, Listed, ObjectName, Store, StoreError};

/// [`Store`] for threads that are not a runtime's workers (on one of those the calls would panic rather than block it).
#[derive(Clone, Debug)]
pub struct BlockingStore {
    store: Store,
    handle: Handle,
}

impl BlockingStore {
    pub(super) fn new(store: Store, handle: Handle) -> BlockingStore {
        BlockingStore { store, handle }
    }

    /// The store itself.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// See [`Store::put_if_absent`].
    pub fn put_if_absent(&self, name: &ObjectName, bytes: Bytes) -> Result<Created, StoreError> {
        self.handle.block_on(self.store.put_if_absent(name, bytes))
    }

    /// See [`Store::put`].
    pub fn put(&self, name: &ObjectName, bytes: Bytes) -> Result<(), StoreError> {
        self.handle.block_on(self.store.put(name, bytes))
    }

    /// See [`Store::get`].
    pub fn get(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        self.handle.block_on(self.store.get(name))
    }

    /// See [`Store::get_range`].
    pub fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.handle.block_on(self.store.get_range(name, range))
    }

    /// See [`Store::delete`].
    pub fn delete(&self, name: &ObjectName) -> Result<(), StoreError> {
        self.handle.block_on(self.store.delete(name))
    }

    /// See [`Store::list`].
    pub fn list(&self, prefix: &ObjectName) -> Result<Vec<Listed>, StoreError> {
        self.handle.block_on(self.store.list(prefix))
    }
}
