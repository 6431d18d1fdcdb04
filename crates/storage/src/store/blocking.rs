//! The store for plain threads.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::{Created, Listed, ObjectName, Store, StoreError};
use crate::threads::Threads;

/// [`Store`] for work that [`Threads`] runs (on a runtime's own workers the calls would panic rather than block them).
#[derive(Clone, Debug)]
pub struct BlockingStore {
    store: Store,
    threads: Arc<dyn Threads>,
}

impl BlockingStore {
    pub(super) fn new(store: Store, threads: Arc<dyn Threads>) -> BlockingStore {
        BlockingStore { store, threads }
    }

    /// The threads that its calls may block.
    pub fn threads(&self) -> &Arc<dyn Threads> {
        &self.threads
    }

    /// The store itself.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// See [`Store::put_if_absent`].
    pub fn put_if_absent(&self, name: &ObjectName, bytes: Bytes) -> Result<Created, StoreError> {
        self.threads.wait(self.store.put_if_absent(name, bytes))
    }

    /// See [`Store::put`].
    pub fn put(&self, name: &ObjectName, bytes: Bytes) -> Result<(), StoreError> {
        self.threads.wait(self.store.put(name, bytes))
    }

    /// See [`Store::get`].
    pub fn get(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        self.threads.wait(self.store.get(name))
    }

    /// See [`Store::get_range`].
    pub fn get_range(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.threads.wait(self.store.get_range(name, range))
    }

    /// See [`Store::delete`].
    pub fn delete(&self, name: &ObjectName) -> Result<(), StoreError> {
        self.threads.wait(self.store.delete(name))
    }

    /// See [`Store::list`].
    pub fn list(&self, prefix: &ObjectName) -> Result<Vec<Listed>, StoreError> {
        self.threads.wait(self.store.list(prefix))
    }
}
