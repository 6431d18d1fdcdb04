//! What a tenant's log says, all edits taken together. Pure: no I/O, no clock. Clones share structure, so that one
//! costs next to nothing whatever the number of branches.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::{HashMap, OrdMap, OrdSet, Vector};

use varve_postgres::Lsn;

use super::TenantError;
use super::edit::{
    AuditRow, EndpointRow, FileContents, HistoryRow, LeaseRow, PasswordRow, SizeRow, SnapshotRow, TenantEdit, TenantFacts, TimelineFacts,
};
use super::verification::Verification;
use crate::ids::{BranchName, EndpointId, Generation, SnapshotName, TimelineId, WalLogId, WriterEpoch};

/// Audit rows that are kept; older ones are in older entries of the log.
const AUDIT_ROWS_MAX: usize = 1000;
/// Idempotency keys that are kept.
const IDEMPOTENCY_KEYS_MAX: usize = 1000;
/// Removed timelines that are remembered, for WAL logs that hold something of them.
const GONE_MAX: usize = 1000;
/// Greatest Postgres timeline.
const TLI_MAX: u32 = i32::MAX as u32;

/// One writer epoch of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochState {
    /// Its number.
    pub epoch: WriterEpoch,
    /// Where it began.
    pub lsn: Lsn,
    /// Its compute reads the timeline here and above; none: where the epoch began, and nowhere else.
    pub base: Option<Lsn>,
    /// Where it ended, if it ended cleanly.
    pub closed: Option<Lsn>,
    /// The WAL log that holds what of it the store does not have yet.
    pub wal_log: WalLogId,
}

/// A timeline as its tenant's log has it.
#[derive(Clone, Debug)]
pub struct TimelineState {
    /// What it is from its first day.
    pub facts: TimelineFacts,
    /// Writer epochs, ascending.
    pub epochs: Vec<EpochState>,
    /// Versions of files without WAL, by path, oldest first.
    pub files: BTreeMap<String, Vec<(Lsn, Arc<FileContents>)>>,
    /// What was known of it when it was last flushed or closed.
    pub figures: Option<Figures>,
    /// What lies before this in its own history is collected, but for what something holds.
    pub cutoff: Lsn,
    /// Timelines that come from it.
    pub(super) children: OrdSet<TimelineId>,
    /// The branch that points to it; none for an ancestor that lost its name, and lives for its children, for a moment
    /// or for a snapshot.
    pub(super) branch: Option<BranchName>,
    /// Endpoints that show a moment of it.
    pub(super) moments: OrdSet<EndpointId>,
    /// Snapshots of it.
    pub(super) snapshots: OrdSet<SnapshotName>,
    /// Leases of it, with their ends.
    pub(super) leases: BTreeMap<Lsn, i64>,
}

/// What was known of a timeline at some time: a hint for lists, never a source of truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// The end of its history then.
    pub head: Lsn,
    /// Bytes of all its relations then.
    pub size_bytes: u64,
}

/// Who took the tenant over last, and said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// By which generation.
    pub generation: Generation,
    /// Name of the server.
    pub server: String,
    /// Where it is reached.
    pub url: String,
}

impl TimelineState {
    /// Whether nothing refers to it: no name, no child, no endpoint's moment, no snapshot.
    pub(super) fn is_dead(&self) -> bool {
        self.children.is_empty() && self.branch.is_none() && self.moments.is_empty() && self.snapshots.is_empty()
    }
}

/// See the module's doc.
#[derive(Clone, Debug, Default)]
pub struct TenantState {
    facts: Option<Arc<TenantFacts>>,
    owner: Option<Arc<Owner>>,
    /// The newest, if there ever was another one than the first.
    password: Option<Arc<PasswordRow>>,
    pub(super) branches: OrdMap<BranchName, TimelineId>,
    /// The branch of each exists.
    endpoints: OrdMap<EndpointId, Arc<EndpointRow>>,
    /// The same, by branch.
    endpoints_by_branch: OrdSet<(BranchName, EndpointId)>,
    /// Of endpoints that have one.
    sizes: OrdMap<EndpointId, SizeRow>,
    history: Option<HistoryRow>,
    pub(super) verification: Verification,
    pub(super) snapshots: OrdMap<SnapshotName, Arc<SnapshotRow>>,
    timelines: HashMap<TimelineId, Arc<TimelineState>>,
    /// Removed timelines that had writers, oldest first.
    gone: Vector<TimelineId>,
    tli_max: u32,
    removed: bool,
    audit: Vector<AuditRow>,
    idempotency: Vector<(String, String)>,
}

impl TenantState {
    /// What the tenant is, unless the log is empty.
    pub fn facts(&self) -> Option<&Arc<TenantFacts>> {
        self.facts.as_ref()
    }

    /// Who took the tenant over last, unless nobody has said so yet.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_deref()
    }

    /// The superuser's password, as Varve gave it last; none of a log that is empty.
    pub fn password(&self) -> Option<PasswordRow> {
        let first = |facts: &Arc<TenantFacts>| PasswordRow {
            number: 1,
            password: facts.password.clone(),
            verifier: facts.password_verifier.clone(),
        };
        self.password.as_deref().cloned().or_else(|| self.facts.as_ref().map(first))
    }

    /// How far back the tenant can go.
    pub fn history(&self) -> HistoryRow {
        self.history.unwrap_or_default()
    }

    /// Whether the tenant was deleted.
    pub fn is_removed(&self) -> bool {
        self.removed
    }

    /// The branches by name.
    pub fn branches(&self) -> impl Iterator<Item = (&BranchName, TimelineId)> {
        self.branches.iter().map(|(name, timeline)| (name, *timeline))
    }

    /// Number of branches.
    pub fn branch_count(&self) -> usize {
        self.branches.len()
    }

    /// The timeline that a branch points to.
    ///
    /// # Errors
    /// [`TenantError::UnknownBranch`].
    pub fn branch(&self, name: &str) -> Result<&TimelineState, TenantError> {
        let unknown = || TenantError::UnknownBranch(name.chars().take(64).collect());
        let name: BranchName = name.parse().map_err(|_| unknown())?;
        let timeline = self.branches.get(&name).ok_or_else(unknown)?;
        self.timeline(*timeline)
    }

    /// A timeline.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn timeline(&self, id: TimelineId) -> Result<&TimelineState, TenantError> {
        self.timelines.get(&id).map(|state| &**state).ok_or(TenantError::UnknownTimeline(id))
    }

    /// All timelines.
    pub fn timelines(&self) -> impl Iterator<Item = &TimelineState> {
        self.timelines.values().map(|state| &**state)
    }

    /// Whether a timeline that had writers was removed: one of the last thousand.
    pub fn was_removed(&self, id: TimelineId) -> bool {
        self.gone.contains(&id)
    }

    /// The branch that points to a timeline.
    pub fn branch_of(&self, timeline: TimelineId) -> Option<&BranchName> {
        self.timelines.get(&timeline)?.branch.as_ref()
    }

    /// A timeline and its ancestors, nearest first, each with the position up to which its own history counts here.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn ancestry(&self, timeline: TimelineId) -> Result<Vec<(&TimelineState, Lsn)>, TenantError> {
        let mut chain = vec![(self.timeline(timeline)?, Lsn::MAX)];
        let mut next = chain[0].0.facts.ancestor;
        while let Some(ancestor) = next {
            let state = self.timeline(ancestor.timeline)?;
            let limit = chain.last().map_or(Lsn::MAX, |(_, limit)| *limit).min(ancestor.lsn);
            chain.push((state, limit));
            next = state.facts.ancestor;
        }
        Ok(chain)
    }

    /// The newest version at or before `lsn` of each file without WAL, by path; a timeline's own versions before its
    /// ancestors'. Replication slots are no ancestor's: who reads a history through a slot reads none that branches
    /// off, as a stock server's backup has none.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn files_at(&self, timeline: TimelineId, lsn: Lsn) -> Result<BTreeMap<String, Arc<FileContents>>, TenantError> {
        let mut files: BTreeMap<String, Arc<FileContents>> = BTreeMap::new();
        for (state, limit) in self.ancestry(timeline)? {
            let is_own = state.facts.id == timeline;
            for (path, versions) in state.files.iter().filter(|(path, _)| is_own || !is_of_slots(path)) {
                let newest = versions.iter().rev().find(|(at, _)| *at <= lsn.min(limit));
                if let Some((_, contents)) = newest {
                    files.entry(path.clone()).or_insert_with(|| contents.clone());
                }
            }
        }
        files.retain(|_, contents| !matches!(**contents, FileContents::Removed));
        Ok(files)
    }

    /// The newest version of each file without WAL, by path: what goes on at head has, though some were written behind
    /// the last record. Their LSN is past head's.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn newest_files(&self, timeline: TimelineId) -> Result<BTreeMap<String, Arc<FileContents>>, TenantError> {
        self.files_at(timeline, Lsn::MAX)
    }

    /// The edits that give a new timeline, which leaves another one at its head `lsn`, the files that were written
    /// there behind the last record.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`] of the ancestor.
    pub fn files_at_head(&self, ancestor: TimelineId, lsn: Lsn, timeline: TimelineId) -> Result<Vec<TenantEdit>, TenantError> {
        let (newest, known) = (self.newest_files(ancestor)?, self.files_at(ancestor, lsn)?);
        let removed = known.keys().filter(|path| !newest.contains_key(*path)).map(|path| (path.clone(), FileContents::Removed));
        let written = newest.iter().filter(|(path, contents)| known.get(*path) != Some(*contents));
        let written = written.map(|(path, contents)| (path.clone(), FileContents::clone(contents)));
        let edits = written.chain(removed).map(|(path, contents)| TenantEdit::File { timeline, path, lsn, contents });
        Ok(edits.collect())
    }

    /// Whether a timeline has a replication slot of its tenant's, or had one that was not dropped.
    pub fn has_slots(&self, timeline: TimelineId) -> bool {
        let is_slot = |(path, versions): (&String, &Vec<(Lsn, Arc<FileContents>)>)| {
            path.starts_with(SLOTS) && versions.last().is_some_and(|(_, newest)| !matches!(**newest, FileContents::Removed))
        };
        self.timeline(timeline).is_ok_and(|state| state.files.iter().any(is_slot))
    }

    /// A Postgres timeline that is above all that this tenant ever had.
    ///
    /// # Errors
    /// [`TenantError::NoTliLeft`].
    pub fn next_tli(&self) -> Result<u32, TenantError> {
        if self.tli_max < TLI_MAX { Ok(self.tli_max + 1) } else { Err(TenantError::NoTliLeft) }
    }

    /// Whether a new branch may have this name.
    ///
    /// # Errors
    /// [`TenantError::BranchExists`].
    pub fn check_free(&self, name: &BranchName) -> Result<(), TenantError> {
        if self.branches.contains_key(name) { Err(TenantError::BranchExists(name.clone())) } else { Ok(()) }
    }

    /// All endpoints, by id.
    pub fn endpoints(&self) -> impl Iterator<Item = &Arc<EndpointRow>> {
        self.endpoints.values()
    }

    /// An endpoint.
    ///
    /// # Errors
    /// [`TenantError::UnknownEndpoint`].
    pub fn endpoint(&self, id: EndpointId) -> Result<&Arc<EndpointRow>, TenantError> {
        self.endpoints.get(&id).ok_or(TenantError::UnknownEndpoint(id))
    }

    /// The size of an endpoint, if it has one.
    pub fn size(&self, id: EndpointId) -> Option<SizeRow> {
        self.sizes.get(&id).copied()
    }

    /// The endpoints of a branch, by id.
    pub fn endpoints_of(&self, branch: &BranchName) -> impl Iterator<Item = &Arc<EndpointRow>> {
        let (first, last) = (EndpointId([0; 16]), EndpointId([255; 16]));
        let ids = self.endpoints_by_branch.range((branch.clone(), first)..=(branch.clone(), last));
        ids.filter_map(|(_, id)| self.endpoints.get(id))
    }

    /// What a mutation with this idempotency key answered.
    pub fn answer_to(&self, key: &str) -> Option<&str> {
        self.idempotency.iter().find(|(known, _)| known == key).map(|(_, answer)| answer.as_str())
    }

    /// The newest audit rows, oldest first.
    pub fn audit(&self) -> impl Iterator<Item = &AuditRow> {
        self.audit.iter()
    }

    /// Takes an edit in.
    ///
    /// # Errors
    /// [`TenantError`] when it contradicts what came before; the state is then unchanged.
    pub fn apply(&mut self, edit: &TenantEdit) -> Result<(), TenantError> {
        let contradiction = |what: String| Err(TenantError::Contradiction(what));
        // A claim says who it is before it has read that the tenant is deleted.
        if self.removed && !matches!(edit, TenantEdit::Owner { .. }) {
            return Err(TenantError::Removed);
        }
        match edit {
            TenantEdit::Tenant(facts) => {
                if self.facts.is_some() {
                    return contradiction(format!("tenant {} is created twice", facts.id));
                }
                self.facts = Some(Arc::new(facts.clone()));
            }
            TenantEdit::Timeline(facts) => {
                if self.timelines.contains_key(&facts.id) {
                    return contradiction(format!("timeline {} is created twice", facts.id));
                }
                if facts.tli <= self.tli_max {
                    return contradiction(format!("timeline {} has TLI {}, and {} was given before", facts.id, facts.tli, self.tli_max));
                }
                if let Some(ancestor) = facts.ancestor {
                    self.change(ancestor.timeline)?.children.insert(facts.id);
                }
                self.tli_max = facts.tli;
                let state = TimelineState {
                    facts: facts.clone(),
                    epochs: Vec::new(),
                    files: BTreeMap::new(),
                    figures: None,
                    cutoff: Lsn::INVALID,
                    children: OrdSet::new(),
                    branch: None,
                    moments: OrdSet::new(),
                    snapshots: OrdSet::new(),
                    leases: BTreeMap::new(),
                };
                self.timelines.insert(facts.id, Arc::new(state));
            }
            TenantEdit::Branch { name, timeline } => {
                let Some(state) = self.timelines.get(timeline) else { return Err(TenantError::UnknownTimeline(*timeline)) };
                if let Some(other) = state.branch.as_ref().filter(|other| *other != name) {
                    return contradiction(format!("timeline {timeline} gets the name {name} and has the name {other}"));
                }
                if let Some(old) = self.branches.insert(name.clone(), *timeline) {
                    self.set_branch(old, None);
                }
                self.set_branch(*timeline, Some(name.clone()));
            }
            TenantEdit::BranchRemoved { name } => match self.branches.remove(name) {
                Some(timeline) => {
                    self.set_branch(timeline, None);
                    let gone: Vec<EndpointId> = self.endpoints_of(name).map(|endpoint| endpoint.id).collect();
                    for id in gone {
                        self.take_endpoint(id);
                        self.sizes.remove(&id);
                    }
                }
                None => return Err(TenantError::UnknownBranch(name.to_string())),
            },
            TenantEdit::TimelineRemoved { timeline } => {
                let state = self.timeline(*timeline)?;
                if !state.is_dead() {
                    return contradiction(format!("timeline {timeline} is removed while others refer to it"));
                }
                let had_writers = !state.epochs.is_empty();
                if let Some(ancestor) = state.facts.ancestor {
                    self.change(ancestor.timeline)?.children.remove(timeline);
                }
                self.timelines.remove(timeline);
                if had_writers {
                    self.remember_gone(*timeline);
                }
            }
            TenantEdit::TimelineGone { timeline } => self.remember_gone(*timeline),
            TenantEdit::Password(row) => {
                let known = self.password().map_or(0, |row| row.number);
                if row.number <= known {
                    return contradiction(format!("password {} follows password {known}", row.number));
                }
                self.password = Some(Arc::new(row.clone()));
            }
            TenantEdit::Epoch { timeline, epoch, lsn, wal_log } => {
                let state = self.change(*timeline)?;
                if let Some(last) = state.epochs.last().filter(|last| last.epoch >= *epoch || last.lsn > *lsn) {
                    return contradiction(format!(
                        "timeline {timeline}: epoch {} at {lsn} follows epoch {} at {}",
                        epoch.0, last.epoch.0, last.lsn
                    ));
                }
                state.epochs.push(EpochState { epoch: *epoch, lsn: *lsn, base: None, closed: None, wal_log: *wal_log });
            }
            TenantEdit::EpochClosed { timeline, epoch, lsn } => {
                let state = self.change(*timeline)?;
                match state.epochs.last_mut().filter(|last| last.epoch == *epoch) {
                    Some(last) => last.closed = Some(*lsn),
                    None => return contradiction(format!("timeline {timeline}: epoch {} ends and is not the newest", epoch.0)),
                }
            }
            TenantEdit::EpochMoved { timeline, epoch, wal_log } => {
                let state = self.change(*timeline)?;
                match state.epochs.last_mut().filter(|last| last.epoch == *epoch) {
                    Some(last) => last.wal_log = *wal_log,
                    None => return contradiction(format!("timeline {timeline}: epoch {} moves and is not the newest", epoch.0)),
                }
            }
            TenantEdit::File { timeline, path, lsn, contents } => {
                let state = self.change(*timeline)?;
                let versions = state.files.entry(path.clone()).or_default();
                let contents = Arc::new(contents.clone());
                match versions.last_mut().filter(|(at, _)| at == lsn) {
                    Some(last) => last.1 = contents,
                    None => versions.push((*lsn, contents)),
                }
            }
            TenantEdit::FileForgotten { timeline, path, lsn } => {
                let state = self.change(*timeline)?;
                if let Some(versions) = state.files.get_mut(path) {
                    versions.retain(|(at, _)| at != lsn);
                    if versions.is_empty() {
                        state.files.remove(path);
                    }
                }
            }
            TenantEdit::Endpoint(row) => {
                if !self.branches.contains_key(&row.branch) {
                    return Err(TenantError::UnknownBranch(row.branch.to_string()));
                }
                if let Some(moment) = row.moment {
                    self.timeline(moment.timeline)?;
                }
                self.take_endpoint(row.id);
                if let Some(moment) = row.moment {
                    self.change(moment.timeline)?.moments.insert(row.id);
                }
                self.endpoints_by_branch.insert((row.branch.clone(), row.id));
                self.endpoints.insert(row.id, Arc::new(row.clone()));
            }
            TenantEdit::EndpointRemoved { id } => {
                self.endpoint(*id)?;
                self.take_endpoint(*id);
                self.sizes.remove(id);
            }
            TenantEdit::Size(row) => {
                self.endpoint(row.id)?;
                self.sizes.insert(row.id, *row);
            }
            TenantEdit::Figures { timeline, head, size_bytes } => {
                self.change(*timeline)?.figures = Some(Figures { head: *head, size_bytes: *size_bytes });
            }
            TenantEdit::History(row) => self.history = Some(*row),
            TenantEdit::Verifying(_) | TenantEdit::Verified(_) | TenantEdit::VerifyEvery(_) => self.verification.apply(edit),
            TenantEdit::Cutoff { timeline, lsn } => {
                let state = self.change(*timeline)?;
                if *lsn < state.cutoff {
                    return contradiction(format!("timeline {timeline} is cut off at {lsn} after {}", state.cutoff));
                }
                state.cutoff = *lsn;
            }
            TenantEdit::Snapshot(row) => {
                if self.snapshots.contains_key(&row.name) {
                    return Err(TenantError::SnapshotExists(row.name.clone()));
                }
                self.change(row.timeline)?.snapshots.insert(row.name.clone());
                self.snapshots.insert(row.name.clone(), Arc::new(row.clone()));
            }
            TenantEdit::SnapshotRemoved { name } => {
                let row = self.snapshots.remove(name).ok_or_else(|| TenantError::UnknownSnapshot(name.to_string()))?;
                self.change(row.timeline)?.snapshots.remove(name);
            }
            TenantEdit::Lease(LeaseRow { timeline, lsn, expires }) => {
                self.change(*timeline)?.leases.insert(*lsn, *expires);
            }
            TenantEdit::LeaseRemoved { timeline, lsn } => {
                self.change(*timeline)?.leases.remove(lsn);
            }
            TenantEdit::EpochBase { timeline, epoch, lsn } => {
                let state = self.change(*timeline)?;
                match state.epochs.last_mut().filter(|last| last.epoch == *epoch && last.base <= Some(*lsn)) {
                    Some(last) => last.base = Some(*lsn),
                    None => return contradiction(format!("timeline {timeline}: epoch {} reads at {lsn}, and is not the newest", epoch.0)),
                }
            }
            TenantEdit::Owner { generation, server, url } => {
                // Who was replaced may not say so after its successor.
                if self.owner.as_ref().is_none_or(|known| known.generation <= *generation) {
                    let owner = Owner { generation: *generation, server: server.clone(), url: url.clone() };
                    self.owner = Some(Arc::new(owner));
                }
            }
            TenantEdit::TenantRemoved => self.removed = true,
            TenantEdit::TliGiven { tli } => self.tli_max = self.tli_max.max(*tli),
            TenantEdit::Audit(row) => {
                self.audit.push_back(row.clone());
                if self.audit.len() > AUDIT_ROWS_MAX {
                    self.audit.pop_front();
                }
            }
            TenantEdit::Idempotency { key, answer } => {
                self.idempotency.push_back((key.clone(), answer.clone()));
                if self.idempotency.len() > IDEMPOTENCY_KEYS_MAX {
                    self.idempotency.pop_front();
                }
            }
        }
        Ok(())
    }

    fn change(&mut self, timeline: TimelineId) -> Result<&mut TimelineState, TenantError> {
        self.timelines.get_mut(&timeline).map(Arc::make_mut).ok_or(TenantError::UnknownTimeline(timeline))
    }

    fn set_branch(&mut self, timeline: TimelineId, name: Option<BranchName>) {
        if let Ok(state) = self.change(timeline) {
            state.branch = name;
        }
    }

    /// Takes an endpoint out, if it is there.
    fn take_endpoint(&mut self, id: EndpointId) {
        let Some(row) = self.endpoints.remove(&id) else { return };
        self.endpoints_by_branch.remove(&(row.branch.clone(), id));
        if let Some(state) = row.moment.and_then(|moment| self.timelines.get_mut(&moment.timeline)) {
            Arc::make_mut(state).moments.remove(&id);
        }
    }

    fn remember_gone(&mut self, timeline: TimelineId) {
        self.gone.push_back(timeline);
        if self.gone.len() > GONE_MAX {
            self.gone.pop_front();
        }
    }

    /// The edits that make this state from nothing: a snapshot.
    pub fn edits(&self) -> Vec<TenantEdit> {
        let mut edits = Vec::new();
        edits.extend(self.facts.iter().map(|facts| TenantEdit::Tenant((**facts).clone())));
        edits.extend(self.owner.iter().map(|owner| {
            let Owner { generation, server, url } = Owner::clone(owner);
            TenantEdit::Owner { generation, server, url }
        }));
        edits.extend(self.password.iter().map(|row| TenantEdit::Password(PasswordRow::clone(row))));
        edits.extend(self.history.map(TenantEdit::History));
        edits.extend(self.verification.edits());
        // By TLI: an ancestor's is below its children's.
        let mut timelines: Vec<&TimelineState> = self.timelines().collect();
        timelines.sort_by_key(|timeline| timeline.facts.tli);
        for state in timelines {
            let timeline = state.facts.id;
            edits.push(TenantEdit::Timeline(state.facts.clone()));
            for epoch in &state.epochs {
                edits.push(TenantEdit::Epoch { timeline, epoch: epoch.epoch, lsn: epoch.lsn, wal_log: epoch.wal_log });
                edits.extend(epoch.base.map(|lsn| TenantEdit::EpochBase { timeline, epoch: epoch.epoch, lsn }));
                edits.extend(epoch.closed.map(|lsn| TenantEdit::EpochClosed { timeline, epoch: epoch.epoch, lsn }));
            }
            if state.cutoff > Lsn::INVALID {
                edits.push(TenantEdit::Cutoff { timeline, lsn: state.cutoff });
            }
            edits.extend(state.leases.iter().map(|(lsn, expires)| TenantEdit::Lease(LeaseRow { timeline, lsn: *lsn, expires: *expires })));
            edits.extend(state.figures.map(|Figures { head, size_bytes }| TenantEdit::Figures { timeline, head, size_bytes }));
            for (path, versions) in &state.files {
                edits.extend(versions.iter().map(|(lsn, contents)| TenantEdit::File {
                    timeline,
                    path: path.clone(),
                    lsn: *lsn,
                    contents: (**contents).clone(),
                }));
            }
        }
        // After the timelines, whose own are not above it.
        edits.push(TenantEdit::TliGiven { tli: self.tli_max });
        edits.extend(self.branches.iter().map(|(name, timeline)| TenantEdit::Branch { name: name.clone(), timeline: *timeline }));
        // After the branches that they belong to.
        edits.extend(self.endpoints.values().map(|endpoint| TenantEdit::Endpoint(EndpointRow::clone(endpoint))));
        edits.extend(self.sizes.values().copied().map(TenantEdit::Size));
        edits.extend(self.snapshots.values().map(|row| TenantEdit::Snapshot(SnapshotRow::clone(row))));
        edits.extend(self.gone.iter().map(|timeline| TenantEdit::TimelineGone { timeline: *timeline }));
        edits.extend(self.audit.iter().cloned().map(TenantEdit::Audit));
        let answers = self.idempotency.iter();
        edits.extend(answers.map(|(key, answer)| TenantEdit::Idempotency { key: key.clone(), answer: answer.clone() }));
        if self.removed {
            edits.push(TenantEdit::TenantRemoved);
        }
        edits
    }
}

/// The folder of slots.
const SLOTS: &str = "pg_replslot/";

/// Whether a file is a replication slot's state, or what logical decoding keeps for one.
pub fn is_of_slots(path: &str) -> bool {
    [SLOTS, "pg_logical/snapshots/", "pg_logical/mappings/"].iter().any(|folder| path.starts_with(folder))
}

/// The folder of lists of pages that WAL does not give back. No data directory has it.
pub const PAGES_FOLDER: &str = "varve_pages/";

#[cfg(test)]
mod tests;
