//! Branches: pointers into histories. Each mutation is one entry in the tenant's log.

use std::sync::Arc;

use varve_postgres::Lsn;
use varve_api::admin::{Branch, Moment as MomentAnswer, NewBranch, Restore, Restored};
use varve_api::host::Desired;
use varve_storage::ids::{BranchName, TimelineId};
use varve_storage::tenant_log::{Ancestor, TenantEdit, TenantState, TimelineFacts};

use super::Pageserver;
use super::moments::Resolved;
use crate::computes::Phase;
use crate::error::{Code, ServerError};
use crate::moment::{Moment, PostgresTime};
use crate::tenant::Tenant;
use crate::timeline::ServedTimeline;
use crate::timeline_pages::total_size;

/// How long an in-place restore waits until the branch's compute is back.
const COMPUTE_BACK_MAX: std::time::Duration = std::time::Duration::from_secs(120);
/// How long telling a size waits for ingest.
const SIZE_WAIT: std::time::Duration = std::time::Duration::from_secs(5);

fn branch_name(text: &str) -> Result<BranchName, ServerError> {
    text.parse().map_err(|error| ServerError::new(Code::InvalidArgument, format!("{error}")))
}

fn unknown_branch(tenant: &Tenant, name: &str) -> ServerError {
    let shown: String = name.chars().take(64).collect();
    ServerError::new(
        Code::UnknownBranch,
        format!("tenant {} has no branch '{shown}'; 'varve branch list {}' shows those there are", tenant.name(), tenant.name()),
    )
}

/// How much the API says of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    /// Everything; its history, or its ancestor's, is opened for that.
    Full,
    /// What is in memory, so that a new branch costs next to nothing: the size only of what is open.
    AtHand,
}

/// Bytes of all relations of `served` at `lsn`; nothing if that cannot be read now.
async fn size_at(served: Arc<ServedTimeline>, lsn: Lsn) -> Result<Option<u64>, ServerError> {
    let size = tokio::task::spawn_blocking(move || {
        served.wait_applied(lsn, SIZE_WAIT).ok()?;
        total_size(&**served.history(), lsn).ok()
    });
    size.await.map_err(ServerError::internal)
}

impl Pageserver {
    /// Lists a tenant's branches.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn list_branches(&self, tenant: &str) -> Result<Vec<Branch>, ServerError> {
        let tenant = self.tenant(tenant).await?;
        let state = tenant.log().state();
        let mut branches = Vec::with_capacity(state.branch_count());
        for (name, timeline) in state.branches() {
            branches.push(self.describe(&tenant, &state, name, timeline, Detail::Full).await?);
        }
        Ok(branches)
    }

    /// Shows a branch.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn show_branch(&self, tenant: &str, branch: &str) -> Result<Branch, ServerError> {
        let tenant = self.tenant(tenant).await?;
        let (name, timeline) = Self::find_branch(&tenant, branch)?;
        let state = tenant.log().state();
        self.describe(&tenant, &state, &name, timeline, Detail::Full).await
    }

    /// The branch's name and timeline.
    pub(super) fn find_branch(tenant: &Tenant, branch: &str) -> Result<(BranchName, TimelineId), ServerError> {
        let state = tenant.log().state();
        let timeline = state.branch(branch).map_err(|_| unknown_branch(tenant, branch))?.facts.id;
        Ok((branch_name(branch)?, timeline))
    }

    /// What the API says of a branch.
    pub(super) async fn describe(
        &self,
        tenant: &Arc<Tenant>,
        state: &TenantState,
        name: &BranchName,
        timeline: TimelineId,
        detail: Detail,
    ) -> Result<Branch, ServerError> {
        let known = state.timeline(timeline)?;
        let facts = known.facts.clone();
        // What no compute has ever written ends where it begins, and is as large as its ancestor was there: it need not be opened.
        let pristine = facts.ancestor.filter(|_| known.epochs.is_empty());
        let served = match (detail, pristine) {
            (Detail::Full, None) => Some(tenant.timeline(timeline).await?),
            (Detail::Full | Detail::AtHand, _) => tenant.opened(timeline).await,
        };
        let (mut last_lsn, mut size_bytes, mut stopped) = (facts.start, None, None);
        if let Some(served) = served {
            last_lsn = served.head();
            stopped = served.stopped();
            let at = served.applied();
            size_bytes = size_at(served, at).await?;
        } else if let (Detail::Full, Some(ancestor)) = (detail, pristine) {
            size_bytes = tenant.known_size(timeline);
            if size_bytes.is_none() {
                size_bytes = size_at(tenant.timeline(ancestor.timeline).await?, ancestor.lsn).await?;
                size_bytes.inspect(|size| tenant.know_size(timeline, *size));
            }
        }
        Ok(Branch {
            tenant: tenant.name().to_string(),
            name: name.to_string(),
            timeline_id: timeline.to_string(),
            tli: facts.tli,
            parent: facts.ancestor.and_then(|ancestor| state.branch_of(ancestor.timeline)).map(ToString::to_string),
            branch_lsn: facts.ancestor.map(|ancestor| ancestor.lsn.to_string()),
            last_lsn: last_lsn.to_string(),
            size_bytes,
            created_at: PostgresTime(facts.created).to_rfc3339(),
            compute: self.computes().writer_of(tenant.id(), timeline).map(|entry| entry.id().to_owned()),
            stopped,
        })
    }

    /// Creates a branch.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn create_branch(&self, tenant: &str, new: NewBranch) -> Result<Branch, ServerError> {
        let name = branch_name(&new.name)?;
        let moment = Moment::parse(new.lsn.as_deref(), new.at.as_deref())?;
        let tenant = self.tenant(tenant).await?;
        tenant.log().state().check_free(&name)?;
        let (_, parent) = Self::find_branch(&tenant, new.from.as_deref().unwrap_or("main"))?;
        let at = self.resolve(&tenant, parent, moment).await?;
        let facts = new_timeline(&at)?;
        let id = facts.id;
        let action = format!("created branch {name} from timeline {} at {}", at.timeline, at.lsn);
        tenant
            .log()
            .commit(|state| {
                state.check_free(&name)?;
                let facts = TimelineFacts { tli: state.next_tli()?, ..facts };
                let edits =
                    vec![TenantEdit::Timeline(facts), TenantEdit::Branch { name: name.clone(), timeline: id }, super::audit(action)];
                Ok::<_, ServerError>((edits, ()))
            })
            .await?;
        tracing::info!(tenant = %tenant.name(), branch = %name, timeline = %id, lsn = %at.lsn, "branch created");
        let state = tenant.log().state();
        self.describe(&tenant, &state, &name, id, Detail::AtHand).await
    }

    /// Gives a branch another name.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn rename_branch(&self, tenant: &str, branch: &str, to: &str) -> Result<Branch, ServerError> {
        let to = branch_name(to)?;
        let tenant = self.tenant(tenant).await?;
        let (from, _) = Self::find_branch(&tenant, branch)?;
        let timeline = tenant
            .log()
            .commit(|state| {
                let timeline = state.branch(from.as_str()).map_err(|_| unknown_branch(&tenant, branch))?.facts.id;
                state.check_free(&to)?;
                let edits = vec![
                    TenantEdit::BranchRemoved { name: from.clone() },
                    TenantEdit::Branch { name: to.clone(), timeline },
                    super::audit(format!("renamed branch {from} to {to}")),
                ];
                Ok::<_, ServerError>((edits, timeline))
            })
            .await?;
        let state = tenant.log().state();
        self.describe(&tenant, &state, &to, timeline, Detail::AtHand).await
    }

    /// Deletes a branch that has no children: its computes stop, its layers go.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn delete_branch(&self, tenant: &str, branch: &str) -> Result<(), ServerError> {
        let tenant = self.tenant(tenant).await?;
        let (name, timeline) = Self::find_branch(&tenant, branch)?;
        tenant.log().state().delete_branch(name.as_str())?;
        self.stop_computes(self.computes().of_timeline(tenant.id(), timeline), Desired::Fenced).await?;
        tenant
            .log()
            .commit(|state| {
                let mut edits = state.delete_branch(name.as_str())?;
                edits.push(super::audit(format!("deleted branch {name}")));
                Ok::<_, ServerError>((edits, ()))
            })
            .await?;
        tenant.remove_timeline(timeline).await;
        tracing::info!(tenant = %tenant.name(), branch = %name, %timeline, "branch deleted");
        Ok(())
    }

    /// Takes a branch back to a moment: the name moves to a new timeline, the old one stays under another name, the compute follows.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn restore_branch(&self, tenant: &str, branch: &str, restore: Restore) -> Result<Restored, ServerError> {
        let moment = Moment::parse(restore.lsn.as_deref(), restore.at.as_deref())?;
        if moment == Moment::Head {
            return Err(ServerError::new(Code::InvalidArgument, "say where to go back to: give an LSN or a time"));
        }
        let tenant = self.tenant(tenant).await?;
        let (name, old) = Self::find_branch(&tenant, branch)?;
        let at = self.resolve(&tenant, old, moment).await?;
        let compute = self.computes().writer_of(tenant.id(), old);
        let turn = match &compute {
            Some(compute) => Some(compute.turn.lock().await),
            None => None,
        };
        // From here on the old timeline acknowledges nothing.
        tenant.timeline(old).await?.end_epoch().await?;
        let facts = new_timeline(&at)?;
        let new = facts.id;
        let now = PostgresTime::now();
        let stamp: String = now.to_rfc3339().chars().filter(char::is_ascii_digit).take(14).collect();
        let action = format!("restored branch {name} to timeline {} at {}", at.timeline, at.lsn);
        let before = tenant
            .log()
            .commit(|state| {
                let current = state.branch(name.as_str()).map_err(|_| unknown_branch(&tenant, branch))?;
                if current.facts.id != old {
                    return Err(ServerError::unavailable(format!(
                        "branch {name} was restored by someone else just now; look and try again"
                    )));
                }
                let before = free_name(state, &name, &stamp)?;
                let facts = TimelineFacts { tli: state.next_tli()?, ..facts };
                let edits = vec![
                    TenantEdit::BranchRemoved { name: name.clone() },
                    TenantEdit::Branch { name: before.clone(), timeline: old },
                    TenantEdit::Timeline(facts),
                    TenantEdit::Branch { name: name.clone(), timeline: new },
                    super::audit(action),
                ];
                Ok((edits, before))
            })
            .await?;
        if let Some(compute) = &compute {
            compute.change(|record| record.timeline_id = new)?;
            compute.update(|status| {
                status.incarnation += 1;
                status.phase = Phase::Starting;
            });
        }
        drop(turn);
        tracing::info!(tenant = %tenant.name(), branch = %name, from = %old, to = %new, lsn = %at.lsn, "restored in place");
        if let Some(compute) = &compute {
            let status = compute.wait(COMPUTE_BACK_MAX, |status| !matches!(status.phase, Phase::Starting)).await;
            if !status.is_some_and(|status| status.phase == Phase::Running) {
                return Err(compute.failure(
                    &format!("{}/{name} is restored, but its compute did not come back", tenant.name()),
                    &self.computes().home(compute.id()),
                ));
            }
        }
        let state = tenant.log().state();
        Ok(Restored {
            branch: self.describe(&tenant, &state, &name, new, Detail::AtHand).await?,
            before: self.describe(&tenant, &state, &before, old, Detail::AtHand).await?,
        })
    }

    /// Says which LSN a moment of a branch is, and when the last transaction before it ended.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn moment(&self, tenant: &str, branch: &str, lsn: Option<&str>, at: Option<&str>) -> Result<MomentAnswer, ServerError> {
        let moment = Moment::parse(lsn, at)?;
        let tenant = self.tenant(tenant).await?;
        let (name, timeline) = Self::find_branch(&tenant, branch)?;
        let at = self.resolve(&tenant, timeline, moment).await?;
        let time = self.time_at(&tenant, &at).await?;
        Ok(MomentAnswer { branch: format!("{}/{name}", tenant.name()), lsn: at.lsn.to_string(), time: time.map(PostgresTime::to_rfc3339) })
    }
}

/// A timeline that leaves history at `at`; its TLI is given when the log's order is known.
fn new_timeline(at: &Resolved) -> Result<TimelineFacts, ServerError> {
    Ok(TimelineFacts {
        id: TimelineId::random().map_err(ServerError::internal)?,
        ancestor: Some(Ancestor { timeline: at.timeline, lsn: at.lsn }),
        tli: 0,
        start: at.lsn,
        created: PostgresTime::now().0,
    })
}

/// A free name for the history that `name` pointed to until now: `main_before_20261124083000`.
fn free_name(state: &TenantState, name: &BranchName, stamp: &str) -> Result<BranchName, ServerError> {
    let kept: String = name.as_str().chars().take(30).collect();
    for suffix in 0..1000u32 {
        let text = if suffix == 0 { format!("{kept}_before_{stamp}") } else { format!("{kept}_before_{stamp}_{suffix}") };
        let candidate = branch_name(&text)?;
        if state.check_free(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(ServerError::new(Code::NameTaken, format!("no free name is left for what was {name}")))
}

/// Lowest LSN that is also an upper bound, for readers of errors.
pub(super) fn range_of(first: Lsn, last: Lsn) -> String {
    format!("its history goes from {first} to {last}")
}
