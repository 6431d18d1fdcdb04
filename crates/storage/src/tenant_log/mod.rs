//! A tenant's log: which timelines, branches and writer epochs a tenant has, and which files of theirs have no WAL.
//!
//! [`TenantEdit`] is a row, [`TenantState`] what all rows together say. Creating a branch, restoring in place and
//! beginning an epoch are one entry each, whose edits count together; since all are ordered in one log, they cannot
//! race.

mod edit;
mod error;
mod lists;
mod log;
pub mod names;
mod plan;
mod retention;
mod state;
mod verification;

pub use edit::{
    Ancestor, AuditRow, EndpointMoment, EndpointRow, FileContents, HistoryRow, LeaseRow, PasswordRow, SizeRange, SizeRow, SnapshotRow,
    TenantEdit, TenantFacts, TimelineFacts, VerifiedMoment, VerifiedOutcome, VerifiedRow, VerifyEveryRow, VerifyingRow,
};
pub use error::TenantError;
pub use log::{
    CreateTenantError, FoundOwner, TenantLog, create_tenant, delete_objects, find_owner, read, read_all, take_over, tenant_folder,
};
pub use plan::removed_timelines;
pub use state::{EpochState, Figures, Owner, PAGES_FOLDER, TenantState, TimelineState, is_of_slots};
