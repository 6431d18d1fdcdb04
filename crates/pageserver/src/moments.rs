//! From a moment as a person gives it to a record boundary in one timeline's own history.

use std::sync::Arc;
use std::time::Duration;

use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::TimelineId;

use super::Pageserver;
use super::branches::range_of;
use crate::error::{Code, ServerError};
use crate::moment::{Moment, PostgresTime};
use crate::tenant::Tenant;
use crate::time::{self, TimeError};
use crate::timeline::ServedTimeline;

/// How long a question about the past waits for ingest.
const INGEST_WAIT_MAX: Duration = Duration::from_secs(60);

/// A record boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    /// The timeline in whose own history it lies.
    pub(super) timeline: TimelineId,
    /// Where.
    pub(super) lsn: Lsn,
}

impl From<TimeError> for ServerError {
    fn from(error: TimeError) -> ServerError {
        let code = match &error {
            TimeError::Future { .. } => Code::InTheFuture,
            TimeError::BeforeHistory { .. } => Code::NotRetained,
            TimeError::History(_) => Code::Internal,
        };
        ServerError::new(code, error.to_string())
    }
}

impl Pageserver {
    /// Finds the boundary that `moment` means on a timeline, or on the ancestor in whose history it lies.
    pub(super) async fn resolve(&self, tenant: &Arc<Tenant>, timeline: TimelineId, moment: Moment) -> Result<Resolved, ServerError> {
        let served = tenant.timeline(timeline).await?;
        // What is known already stays as it is, whatever the newest writer may have besides.
        if !matches!(moment, Moment::Lsn(lsn) if lsn <= served.head()) {
            served.wait_tail().await?;
        }
        let head = served.head();
        match moment {
            Moment::Head => Ok(Resolved { timeline, lsn: head }),
            Moment::Lsn(lsn) => {
                if lsn > head {
                    return Err(ServerError::new(
                        Code::InTheFuture,
                        format!("{lsn} is in the future of this branch: {}", range_of(served.first_lsn(), head)),
                    ));
                }
                if lsn < served.first_lsn() {
                    return Err(ServerError::new(
                        Code::NotRetained,
                        format!("{lsn} is before what this branch keeps: {}", range_of(served.first_lsn(), head)),
                    ));
                }
                for (owner, limit) in self.owners(tenant, timeline, head).await? {
                    if lsn >= owner.facts().start {
                        let lsn = lsn.min(limit);
                        // What comes later does not matter: ingest may lag, or have stopped there.
                        return in_history(owner, lsn, move |owner| {
                            let known = limit.min(owner.applied());
                            let boundary = time::round_down(&**owner.history(), lsn, owner.facts().start, known)?;
                            Ok(Resolved { timeline: owner.id(), lsn: boundary.end })
                        })
                        .await;
                    }
                }
                Err(ServerError::new(Code::NotRetained, format!("{lsn} is before the history of this branch")))
            }
            Moment::Time(at) => self.resolve_time(tenant, timeline, head, at).await,
        }
    }

    async fn resolve_time(&self, tenant: &Arc<Tenant>, timeline: TimelineId, head: Lsn, at: PostgresTime) -> Result<Resolved, ServerError> {
        if at > PostgresTime::now() {
            return Err(ServerError::new(Code::InTheFuture, format!("{} is in the future", at.to_rfc3339())));
        }
        for (owner, limit) in self.owners(tenant, timeline, head).await? {
            let found = in_history(owner.clone(), limit, move |owner| {
                Ok(time::moment(&**owner.history(), Timestamp(at.0), owner.facts().start, limit)?)
            })
            .await?;
            match found {
                time::Moment::Before => {}
                time::Moment::At(boundary) | time::Moment::AllOfIt(boundary) => {
                    return self.check_after_creation(tenant, owner.id(), boundary.end, at);
                }
            }
        }
        Err(self.before_history(tenant, at))
    }

    fn before_history(&self, tenant: &Tenant, at: PostgresTime) -> ServerError {
        ServerError::new(
            Code::NotRetained,
            format!(
                "{} is before the history of this branch: tenant {} was created at {}",
                at.to_rfc3339(),
                tenant.name(),
                PostgresTime(tenant.facts().created).to_rfc3339()
            ),
        )
    }

    /// A time before the tenant was there is before history, even where no transaction says so.
    fn check_after_creation(&self, tenant: &Tenant, timeline: TimelineId, lsn: Lsn, at: PostgresTime) -> Result<Resolved, ServerError> {
        if at.0 < tenant.facts().created {
            return Err(self.before_history(tenant, at));
        }
        Ok(Resolved { timeline, lsn })
    }

    /// The timeline and its ancestors, nearest first, each with the end of the part of its own history that counts.
    pub(super) async fn owners(
        &self,
        tenant: &Arc<Tenant>,
        timeline: TimelineId,
        head: Lsn,
    ) -> Result<Vec<(Arc<ServedTimeline>, Lsn)>, ServerError> {
        let ids: Vec<(TimelineId, Lsn)> = {
            let state = tenant.log().state();
            state.ancestry(timeline)?.into_iter().map(|(state, limit)| (state.facts.id, limit.min(head))).collect()
        };
        let mut owners = Vec::with_capacity(ids.len());
        for (id, limit) in ids {
            owners.push((tenant.timeline(id).await?, limit));
        }
        Ok(owners)
    }

    /// When the last transaction before a boundary ended.
    pub(super) async fn time_at(&self, tenant: &Arc<Tenant>, at: &Resolved) -> Result<Option<PostgresTime>, ServerError> {
        let owner = tenant.timeline(at.timeline).await?;
        let lsn = at.lsn;
        in_history(owner, lsn, move |owner| {
            let boundary = time::round_down(&**owner.history(), lsn, owner.facts().start, lsn)?;
            Ok((boundary.time_max != Timestamp::MIN).then_some(PostgresTime(boundary.time_max.0)))
        })
        .await
    }
}

/// Runs `work` on a thread that may block, once the timeline is applied up to `lsn`.
async fn in_history<T: Send + 'static>(
    timeline: Arc<ServedTimeline>,
    lsn: Lsn,
    work: impl FnOnce(&ServedTimeline) -> Result<T, ServerError> + Send + 'static,
) -> Result<T, ServerError> {
    tokio::task::spawn_blocking(move || {
        timeline.wait_applied(lsn, INGEST_WAIT_MAX).map_err(ServerError::unavailable)?;
        work(&timeline)
    })
    .await
    .map_err(ServerError::internal)?
}
