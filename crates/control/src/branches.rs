//! Branches: pointers into histories. Each mutation is one commit in the tenant's log.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use varve_api::admin::{Branch, BranchMoment, Deleted, NewBranch, Restore, Restored, Wal, WalPart, WalPlace};
use varve_api::host::Desired;
use varve_postgres::{Lsn, Timestamp};
use varve_storage::ids::{BranchName, TenantId, TimelineId};
use varve_storage::tenant_log::{Ancestor, TenantLog, TenantState, TimelineFacts, removed_timelines};

use crate::arguments::{Listed, Page};
use crate::call::Call;
use crate::error::Error;
use crate::history::Wanted;
use crate::logs::{Plan, branch, facts};
use crate::ports::{Moment, Pageserver, Resolved};
use crate::registry::{Entry, Phase};
use crate::{Control, arguments, moment};

/// How long an in-place restore waits until the branch's compute is back.
const COMPUTE_BACK_MAX: Duration = Duration::from_secs(120);
/// Names that are tried for what a restored branch was.
const BEFORE_NAMES_MAX: u32 = 1000;

impl<P: Pageserver> Control<P> {
    /// Lists a tenant's branches, by name. Takes nothing over and opens nothing: heads and sizes are those of timelines
    /// that are open, else those that the log knows.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn list_branches(&self, tenant: &str, page: &Page) -> Result<Listed<Branch>, Error> {
        let id = self.find(tenant).await?;
        let state = self.read_for_list(id, page.after.is_some()).await?;
        let found: Vec<(&BranchName, TimelineId)> = state.branches_page(&page.prefix, page.after.as_deref(), page.limit + 1).collect();
        let shown = found.iter().take(page.limit);
        let items = shown.map(|(name, timeline)| self.describe_branch(&state, id, name, *timeline)).collect::<Result<Vec<_>, _>>()?;
        let next = items.last().filter(|_| found.len() > page.limit).map(|last| Page::cursor(&last.name));
        Ok(Listed { items, next })
    }

    /// Shows a branch. Takes nothing over and opens nothing.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn show_branch(&self, tenant: &str, branch_text: &str) -> Result<Branch, Error> {
        let id = self.find(tenant).await?;
        let state = self.read(id).await?;
        let (name, timeline) = branch(&state, branch_text)?;
        self.describe_branch(&state, id, &name, timeline)
    }

    /// What the API says of a branch.
    fn describe_branch(&self, state: &TenantState, tenant: TenantId, name: &BranchName, timeline: TimelineId) -> Result<Branch, Error> {
        let known = state.timeline(timeline)?;
        let facts = &known.facts;
        let live = self.pageserver.live(tenant, timeline);
        // Of one that was written to and whose end nobody noted it is only known where the last writer began.
        let begun = || known.epochs.last().map_or(facts.start, |epoch| epoch.lsn);
        let logged = state.head_of(timeline)?.unwrap_or_else(begun);
        let writer = state.endpoints_of(name).find(|row| row.moment.is_none() && row.wanted);
        Ok(Branch {
            tenant: crate::logs::facts(state, tenant)?.name.to_string(),
            name: name.to_string(),
            timeline_id: timeline.to_string(),
            tli: facts.tli,
            parent: facts.ancestor.and_then(|ancestor| state.branch_of(ancestor.timeline)).map(ToString::to_string),
            branch_lsn: facts.ancestor.map(|ancestor| ancestor.lsn.to_string()),
            earliest_lsn: state.earliest(timeline)?.to_string(),
            last_lsn: live.as_ref().map_or(logged, |live| live.head.max(logged)).to_string(),
            size_bytes: match live.as_ref().and_then(|live| live.size_bytes) {
                Some(size) => Some(size),
                None => state.size_of(timeline)?,
            },
            created_at: moment::rfc3339(Timestamp(facts.created)),
            compute: writer.map(|row| row.id.to_string()),
            stopped: live.and_then(|live| live.stopped),
        })
    }

    /// A timeline that leaves history at `at`; its TLI is given when the log's order is known.
    fn new_timeline(&self, at: Resolved) -> Result<TimelineFacts, Error> {
        Ok(TimelineFacts {
            id: TimelineId(self.environment.random()?),
            ancestor: Some(Ancestor { timeline: at.timeline, lsn: at.lsn }),
            tli: 0,
            start: at.lsn,
            created: self.environment.now().0,
        })
    }

    /// Creates a branch.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_branch(&self, call: &Call, tenant: &str, new: &NewBranch) -> Result<Branch, Error> {
        let name = arguments::new_branch_name(&new.name)?;
        moment::parse(new.lsn.as_deref(), new.at.as_deref())?;
        let id = self.find(tenant).await?;
        let log = self.own(id, "a branch is made").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        log.state().check_free(&name)?;
        let asked = Wanted::parse(&log.state(), new.snapshot.as_deref(), new.lsn.as_deref(), new.at.as_deref())?;
        let is_of_head = matches!(asked, Wanted::OnBranch(Moment::Head));
        let at = match asked {
            Wanted::Snapshot(_) if new.from.is_some() => {
                return Err(Error::argument("from", "both a branch and a snapshot to start from were given: give one of them"));
            }
            Wanted::Snapshot(at) => at,
            Wanted::OnBranch(moment) => {
                let (_, parent) = branch(&log.state(), new.from.as_deref().unwrap_or("main"))?;
                self.resolve(id, parent, moment).await?
            }
        };
        let facts = self.new_timeline(at)?;
        let timeline = facts.id;
        let action = format!("created branch {name} from timeline {} at {}", at.timeline, at.lsn);
        let created = self.commit(&log, call, |state| {
            let mut edits = state.create_branch(&name, &facts)?;
            if is_of_head {
                edits.extend(state.files_at_head(at.timeline, at.lsn, timeline)?);
            }
            Ok(Plan { edits, action, answer: |after: &TenantState| self.describe_branch(after, id, &name, timeline) })
        });
        let created = created.await?;
        tracing::info!(tenant = %id, branch = %name, %timeline, lsn = %at.lsn, "branch created");
        Ok(created)
    }

    /// Gives a branch another name; its computes go along.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn rename_branch(&self, call: &Call, tenant: &str, branch_text: &str, to: &str) -> Result<Branch, Error> {
        let to = arguments::new_branch_name(to)?;
        let id = self.find(tenant).await?;
        let log = self.own(id, "a branch is renamed").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        let (from, _) = branch(&log.state(), branch_text)?;
        let renamed = self.commit(&log, call, |state| {
            let (from, timeline) = branch(state, from.as_str())?;
            let edits = state.rename_branch(from.as_str(), &to)?;
            let action = format!("renamed branch {from} to {to}");
            let to = &to;
            Ok(Plan { edits, action, answer: move |after: &TenantState| self.describe_branch(after, id, to, timeline) })
        });
        let renamed = renamed.await?;
        self.computes.refresh(id, &log.state());
        Ok(renamed)
    }

    /// Deletes a branch: its computes end, and what no other branch needs of its history goes.
    ///
    /// # Errors
    /// [`Error`]; of the last branch [`varve_api::Code::LastBranch`].
    pub async fn delete_branch(&self, call: &Call, tenant: &str, branch_text: &str) -> Result<Deleted, Error> {
        let id = self.find(tenant).await?;
        let log = self.own(id, "a branch is deleted").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        let (name, _) = branch(&log.state(), branch_text)?;
        let tenant_name = facts(&log.state(), id)?.name.clone();
        let computes = self.computes.of_branch(id, &name);
        let mut gone = Vec::new();
        let deleted = self.commit(&log, call, |state| {
            let edits = state.delete_branch(name.as_str())?;
            gone = removed_timelines(&edits).collect();
            let answer = Deleted { deleted: format!("{tenant_name}/{name}") };
            Ok(Plan { edits, action: format!("deleted branch {name}"), answer: move |_: &TenantState| Ok(answer) })
        });
        let deleted = deleted.await?;
        self.end_for_good(computes).await;
        if !gone.is_empty() {
            self.pageserver.remove_timelines(id, gone).await;
        }
        tracing::info!(tenant = %tenant_name, branch = %name, "branch deleted");
        Ok(deleted)
    }

    /// Takes a branch back to a moment: the name moves to a new timeline, the old one stays under another name, the
    /// compute follows.
    ///
    /// The move is one commit. Before it the old stream is ended, so that nothing is acknowledged that the commit then
    /// leaves behind. Whatever dies after it: a compute that still runs on the old timeline finds its branch elsewhere
    /// when it attaches, and begins anew.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn restore_branch(&self, call: &Call, tenant: &str, branch_text: &str, restore: &Restore) -> Result<Restored, Error> {
        let moment = moment::parse(restore.lsn.as_deref(), restore.at.as_deref())?;
        if moment == Moment::Head && restore.snapshot.is_none() {
            return Err(Error::argument("at", "say where to go back to: give an LSN, a time or a snapshot"));
        }
        let id = self.find(tenant).await?;
        let log = self.own(id, "a branch is restored").await?;
        if let Some(prior) = call.prior(&log.state())? {
            return Ok(prior);
        }
        let (name, old) = branch(&log.state(), branch_text)?;
        let at = match Wanted::parse(&log.state(), restore.snapshot.as_deref(), restore.lsn.as_deref(), restore.at.as_deref())? {
            Wanted::Snapshot(at) => at,
            Wanted::OnBranch(moment) => self.resolve(id, old, moment).await?,
        };
        let writer = self.computes.of_branch(id, &name).into_iter().find(|entry| entry.writes());
        let restored = match &writer {
            Some(entry) => {
                let _turn = entry.turn.lock().await;
                let restored = self.move_branch(call, &log, (id, &name), old, at).await;
                match &restored {
                    Ok(_) if entry.status().desired == Desired::Run => self.begin_anew(entry),
                    Ok(_) => {}
                    // Its stream was ended: it attaches again, and learns then which timeline its branch has.
                    Err(_) => entry.update(|status| status.attach_again += 1),
                }
                restored
            }
            None => self.move_branch(call, &log, (id, &name), old, at).await,
        };
        let restored = restored?;
        tracing::info!(tenant = %id, branch = %name, from = %old, lsn = %at.lsn, "restored in place");
        if let Some(entry) = writer {
            self.wait_back(&entry).await?;
        }
        Ok(restored)
    }

    /// Ends the old stream and commits the move.
    async fn move_branch(
        &self,
        call: &Call,
        log: &TenantLog,
        (id, name): (TenantId, &BranchName),
        old: TimelineId,
        at: Resolved,
    ) -> Result<Restored, Error> {
        self.pageserver.end_stream(id, old).await?;
        let facts = self.new_timeline(at)?;
        let new = facts.id;
        let now = moment::rfc3339(self.environment.now());
        let stamp: String = now.chars().filter(char::is_ascii_digit).take(14).collect();
        let action = format!("restored branch {name} to timeline {} at {}", at.timeline, at.lsn);
        self.commit(log, call, |state| {
            let (_, current) = branch(state, name.as_str())?;
            if current != old {
                return Err(Error::Moved(name.to_string()));
            }
            let before = free_name(state, name, &stamp)?;
            let edits = state.restore_branch(name.as_str(), &before, &facts)?;
            let answer = move |after: &TenantState| {
                let branch = self.describe_branch(after, id, name, new)?;
                Ok(Restored { branch, before: self.describe_branch(after, id, &before, old)? })
            };
            Ok(Plan { edits, action, answer })
        })
        .await
    }

    /// Waits until a compute that was told to follow its branch has done so.
    async fn wait_back(&self, entry: &Arc<Entry>) -> Result<(), Error> {
        if entry.status().desired != Desired::Run || matches!(entry.status().phase, Phase::Unknown | Phase::Failed(_)) {
            return Ok(()); // nothing runs that could come back
        }
        let is_over = |status: &crate::registry::Status| status.phase != Phase::Starting || status.desired != Desired::Run;
        let status = entry.wait(&self.environment, COMPUTE_BACK_MAX, is_over).await;
        match status.map(|status| (status.phase, status.desired)) {
            Some((Phase::Running, _)) => Ok(()),
            Some((_, Desired::Stop | Desired::Fenced)) => Ok(()), // somebody stopped it meanwhile
            Some((Phase::Failed(reason), _)) => Err(Error::NotBack { branch: entry.branch(), reason }),
            _ => {
                let reason = format!("it does not take connections after {} s; see its log on its host", COMPUTE_BACK_MAX.as_secs());
                Err(Error::NotBack { branch: entry.branch(), reason })
            }
        }
    }

    /// Says which LSN a moment of a branch is, and when the last transaction before it ended.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn moment(&self, tenant: &str, branch_text: &str, lsn: Option<&str>, at: Option<&str>) -> Result<BranchMoment, Error> {
        let asked = moment::parse(lsn, at)?;
        let (id, state) = self.to_read(tenant).await?;
        let (name, timeline) = branch(&state, branch_text)?;
        let at = self.resolve(id, timeline, asked).await?;
        let time = self.pageserver.time_at(id, at).await?;
        let tenant_name = facts(&state, id)?.name.clone();
        Ok(BranchMoment { branch: format!("{tenant_name}/{name}"), lsn: at.lsn.to_string(), time: time.map(moment::rfc3339) })
    }

    /// A tenant whose history is read, by its log: it is not taken for that. Whose history cannot be read here is told
    /// by the pageserver.
    async fn to_read(&self, tenant: &str) -> Result<(TenantId, Arc<TenantState>), Error> {
        let id = self.find(tenant).await?;
        Ok((id, self.read(id).await?))
    }

    /// Says which WAL of a branch can be had.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn branch_wal(&self, tenant: &str, branch_text: &str) -> Result<Wal, Error> {
        let (id, state) = self.to_read(tenant).await?;
        let (name, timeline) = branch(&state, branch_text)?;
        let (head, ranges) = self.pageserver.kept_wal(id, timeline).await?;
        let written = self.computes.of_branch(id, &name).iter().any(|entry| entry.writes() && entry.status().desired == Desired::Run);
        let ranges = ranges.into_iter().map(|range| WalPart {
            start: range.start.to_string(),
            end: range.end.to_string(),
            timeline_id: range.timeline.to_string(),
            place: if range.in_store { WalPlace::Store } else { WalPlace::WalLog },
        });
        Ok(Wal { head: head.to_string(), written, ranges: ranges.collect() })
    }

    /// The branch's WAL from `from` on: at least a byte.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn branch_wal_bytes(&self, tenant: &str, branch_text: &str, from: &str) -> Result<Bytes, Error> {
        let from: Lsn = moment::lsn("from", from)?;
        let (id, state) = self.to_read(tenant).await?;
        let (_, timeline) = branch(&state, branch_text)?;
        Ok(self.pageserver.kept_wal_bytes(id, timeline, from).await?)
    }
}

/// A free name for the history that `name` pointed to until now: `main_before_20261124083000`.
fn free_name(state: &TenantState, name: &BranchName, stamp: &str) -> Result<BranchName, Error> {
    let kept: String = name.as_str().chars().take(30).collect();
    for suffix in 0..BEFORE_NAMES_MAX {
        let text = if suffix == 0 { format!("{kept}_before_{stamp}") } else { format!("{kept}_before_{stamp}_{suffix}") };
        let candidate: BranchName = text.parse().map_err(|error| Error::argument("name", error))?;
        if state.check_free(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(Error::NoNameLeft(name.to_string()))
}
