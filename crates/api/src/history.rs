//! How far back a tenant can go, and what is kept beyond that.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

/// How far back a tenant's branches can go. Where both are given, what comes first ends the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct History {
    /// Seconds; null: for ever.
    pub seconds: Option<u64>,
    /// Bytes of WAL of each branch; null: however many the time brings.
    pub wal_bytes: Option<u64>,
}

/// Body of `PATCH /v1/tenants/{tenant}`: what is left out stays.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantChange {
    /// Seconds that its branches can go back; null: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub history_seconds: Option<Option<u64>>,
    /// Bytes of WAL that each can go back; null: however many the time brings.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub history_wal_bytes: Option<Option<u64>>,
    /// Seconds after which it is verified again that a restore works: 0 is never, null as the tenant's server says.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub verify_restore_seconds: Option<Option<u64>>,
}

/// A value that is there, null among them.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::<u64>::deserialize(deserializer).map(Some)
}

/// Body of `POST /v1/tenants/{tenant}/snapshots`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSnapshot {
    /// Name, unique in the tenant; same rules as a tenant's.
    pub name: String,
    /// The branch; `main` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The LSN to keep; the branch's head by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// The time to keep, as `recovery_target_time` means it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// Seconds after which it goes by itself; never by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_seconds: Option<u64>,
}

/// A moment that has a name, and stays readable however long the tenant's history is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Tenant name.
    pub tenant: String,
    /// Its name.
    pub name: String,
    /// The branch that it was made of.
    pub branch: String,
    /// The timeline in whose own history it lies.
    pub timeline_id: String,
    /// The position.
    pub lsn: String,
    /// When it was made.
    pub created_at: String,
    /// When it goes by itself; null: never.
    pub expires_at: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_told_from_nothing() {
        let change: TenantChange = serde_json::from_str(r#"{"history_seconds": null}"#).unwrap();
        assert_eq!((change.history_seconds, change.history_wal_bytes), (Some(None), None));
        let change: TenantChange = serde_json::from_str(r#"{"history_seconds": 60, "history_wal_bytes": 9}"#).unwrap();
        assert_eq!((change.history_seconds, change.history_wal_bytes), (Some(Some(60)), Some(Some(9))));
        assert_eq!(
            serde_json::to_string(&TenantChange { history_seconds: Some(None), ..TenantChange::default() }).unwrap(),
            r#"{"history_seconds":null}"#
        );
        assert!(serde_json::from_str::<TenantChange>(r#"{"history": 60}"#).is_err());
    }
}
