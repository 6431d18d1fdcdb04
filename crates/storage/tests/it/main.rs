//! What `varve-storage` promises, one module for each promise, mostly on a simulated disk and a simulated store.

mod edit_log;
mod kept_wal;
mod layer_fixture;
mod manifest;
mod store;
mod tenant_branches;
mod tenant_lists;
mod tenant_log;
mod timeline_layers;
mod timeline_model;
mod wal_log;
