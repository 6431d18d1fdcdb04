//! The WAL of a branch, over its ancestors: where there is some of which redo can be checked, and its bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_api::admin::{Wal, WalPlace, WalRange};
use varve_storage::kept_wal::KeptWalError;

use super::Pageserver;
use super::branches::range_of;
use crate::error::{Code, ServerError};
use crate::timeline::ServedTimeline;

/// How long the list waits for ingest, which knows which records carry their pages.
const INGEST_WAIT_MAX: Duration = Duration::from_secs(60);
/// Ranges that an error names at most.
const RANGES_NAMED_MAX: usize = 8;

impl From<KeptWalError> for ServerError {
    fn from(error: KeptWalError) -> ServerError {
        match error {
            KeptWalError::Store(error) => error.into(),
            error => ServerError::internal(error),
        }
    }
}

impl Pageserver {
    /// Says which WAL of a branch can be had.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn branch_wal(&self, tenant: &str, branch: &str) -> Result<Wal, ServerError> {
        let tenant = self.tenant(tenant).await?;
        let (_, timeline) = Self::find_branch(&tenant, branch)?;
        let written = self.computes().writer_of(tenant.id(), timeline).is_some();
        let served = tenant.timeline(timeline).await?;
        let head = served.head();
        tokio::task::spawn_blocking(move || match served.wait_applied(head, INGEST_WAIT_MAX) {
            // What stopped ingest may be the very thing that is looked for.
            Err(error) if served.stopped().is_none() => Err(ServerError::unavailable(error)),
            _ => Ok(()),
        })
        .await
        .map_err(ServerError::internal)??;
        let owners = self.owners(&tenant, timeline, head).await?;
        Ok(Wal { head: head.to_string(), written, ranges: ranges(&owners) })
    }

    /// The branch's WAL from `from` on: at least a byte, and at most [`varve_storage::kept_wal::PIECE_BYTES_MAX`].
    ///
    /// # Errors
    /// [`ServerError`]; [`Code::NotRetained`] where it is not kept.
    pub async fn branch_wal_bytes(&self, tenant: &str, branch: &str, from: &str) -> Result<Bytes, ServerError> {
        let from: Lsn = from.parse().map_err(|error| ServerError::new(Code::InvalidArgument, format!("{error}")))?;
        let tenant = self.tenant(tenant).await?;
        let (_, timeline) = Self::find_branch(&tenant, branch)?;
        let served = tenant.timeline(timeline).await?;
        let head = served.head();
        if from >= head {
            let history = range_of(served.first_lsn(), head);
            return Err(ServerError::new(Code::InTheFuture, format!("there is no WAL at {from} yet: {history}")));
        }
        let owners = self.owners(&tenant, timeline, head).await?;
        if let Some((owner, limit)) = owners.iter().find(|(owner, _)| owner.facts().start <= from).cloned() {
            let bytes = tokio::task::spawn_blocking(move || owner.wal_bytes(from, limit)).await.map_err(ServerError::internal)??;
            if let Some(bytes) = bytes {
                return Ok(bytes);
            }
        }
        Err(ServerError::new(
            Code::NotRetained,
            format!(
                "the WAL at {from} is not kept: layers have what it did to pages, and only WAL written with wal_consistency_checking is kept besides; there is {}",
                named(&ranges(&owners))
            ),
        ))
    }
}

/// The ranges of a timeline and its ancestors, ascending.
fn ranges(owners: &[(Arc<ServedTimeline>, Lsn)]) -> Vec<WalRange> {
    let of_owner = |(owner, limit): &(Arc<ServedTimeline>, Lsn)| {
        let timeline_id = owner.id().to_string();
        let range = |range: crate::timeline::WalRange| WalRange {
            start: range.start.to_string(),
            end: range.end.to_string(),
            timeline_id: timeline_id.clone(),
            place: if range.in_store { WalPlace::Store } else { WalPlace::WalLog },
        };
        owner.wal_ranges(*limit).into_iter().map(range).collect::<Vec<_>>()
    };
    owners.iter().rev().flat_map(of_owner).collect()
}

/// Ranges in words.
fn named(ranges: &[WalRange]) -> String {
    let shown: Vec<String> = ranges.iter().take(RANGES_NAMED_MAX).map(|range| format!("{} to {}", range.start, range.end)).collect();
    match ranges.len().saturating_sub(RANGES_NAMED_MAX) {
        _ if ranges.is_empty() => "none of that".to_owned(),
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
