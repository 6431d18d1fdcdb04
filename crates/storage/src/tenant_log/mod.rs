//! A tenant's log: which timelines, branches and writer epochs a tenant has, and which files of theirs have no WAL.
//!
//! [`TenantEdit`] is a row, [`TenantState`] what all rows together say. Creating a branch, restoring in place and beginning an epoch are one
//! entry each, whose edits count together; since all are ordered in one log, they cannot race.

mod edit;
mod log;
pub mod names;
mod state;

pub use edit::{Ancestor, AuditRow, FileContents, TenantEdit, TenantFacts, TimelineFacts};
pub use log::{CreateTenantError, TenantLog, create_tenant, delete_objects, tenant_folder};
pub use state::{EpochState, TenantError, TenantState, TimelineState};
