//! What of a tenant's history must stay readable, and the edits of what people do about it.
//!
//! Who makes a branch, a restore, a snapshot, a lease or an endpoint of the past asks [`TenantState::check_retained`]
//! within its commit: cutoffs are rows of the same log, so that neither can overtake the other.

use std::sync::Arc;

use varve_postgres::Lsn;

use super::TenantError;
use super::edit::{LeaseRow, SnapshotRow, TenantEdit};
use super::state::{EpochState, TenantState, TimelineState};
use crate::ids::{SnapshotName, TimelineId, WriterEpoch};
use crate::retained::Retained;

impl TenantState {
    /// What of a timeline's own history must stay readable.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn retained(&self, timeline: TimelineId) -> Result<Retained, TenantError> {
        let state = self.timeline(timeline)?;
        let pins = self.pins(state);
        // Nobody goes on with what has no name: all that counts of it is what others hold.
        let top = if state.branch.is_some() { Lsn::MAX } else { pins.iter().copied().max().unwrap_or(Lsn::INVALID) };
        Ok(Retained::new(state.cutoff, top, pins))
    }

    fn pins(&self, state: &TimelineState) -> Vec<Lsn> {
        let children = state.children.iter().filter_map(|child| Some(self.timeline(*child).ok()?.facts.ancestor?.lsn));
        let moments = state.moments.iter().filter_map(|id| Some(self.endpoint(*id).ok()?.moment?.lsn));
        let snapshots = state.snapshots.iter().filter_map(|name| Some(self.snapshots.get(name)?.lsn));
        let leases = state.leases.keys().copied();
        // What it has fetched it asks for once more, until it reads further up.
        // Whether its branch has an endpoint does not matter here: that may come later, and a pin must not come back.
        let open = state.epochs.last().filter(|epoch| epoch.closed.is_none() && state.branch.is_some());
        let compute = open.filter(|epoch| epoch.base.is_none_or(|base| base <= epoch.lsn)).map(|epoch| epoch.lsn);
        children.chain(moments).chain(snapshots).chain(leases).chain(compute).collect()
    }

    /// The newest epoch of a timeline, if its compute may still run: it did not end cleanly, and its branch has an
    /// endpoint that follows it. What a branch was before a restore has none.
    fn running<'s>(&self, state: &'s TimelineState) -> Option<&'s EpochState> {
        let newest = state.epochs.last().filter(|epoch| epoch.closed.is_none())?;
        let has_endpoint = self.endpoints_of(state.branch.as_ref()?).any(|endpoint| endpoint.moment.is_none());
        has_endpoint.then_some(newest)
    }

    /// Behind what no cutoff of a timeline may move: where a compute whose base moves on reads it.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn cutoff_max(&self, timeline: TimelineId) -> Result<Lsn, TenantError> {
        Ok(self.running(self.timeline(timeline)?).and_then(|epoch| epoch.base).unwrap_or(Lsn::MAX))
    }

    /// The edits that say that the compute of the newest epoch reads its timeline at `bases` from now on; none where
    /// the log says enough.
    ///
    /// # Errors
    /// [`TenantError::Collected`] when one of these is not retained, [`TenantError::UnknownTimeline`].
    pub fn move_base(&self, timeline: TimelineId, epoch: WriterEpoch, bases: &[Lsn]) -> Result<Vec<TenantEdit>, TenantError> {
        let state = self.timeline(timeline)?;
        bases.iter().try_for_each(|base| self.check_retained(timeline, *base))?;
        let newest = state.epochs.last().filter(|newest| newest.epoch == epoch);
        match (newest, bases.iter().min()) {
            (Some(newest), Some(lsn)) if newest.base < Some(*lsn) => Ok(vec![TenantEdit::EpochBase { timeline, epoch, lsn: *lsn }]),
            _ => Ok(Vec::new()),
        }
    }

    /// That a timeline can be read at `lsn`, which may lie in the part of an ancestor that it shows.
    ///
    /// # Errors
    /// [`TenantError::Collected`], [`TenantError::UnknownTimeline`].
    pub fn check_retained(&self, timeline: TimelineId, lsn: Lsn) -> Result<(), TenantError> {
        let owner = self.owner_of(timeline, lsn)?;
        let state = self.timeline(owner)?;
        // Of most it is clear without a look at what else holds it.
        if state.branch.is_some() && lsn >= state.cutoff || self.retained(owner)?.holds(lsn) {
            return Ok(());
        }
        Err(TenantError::Collected { timeline, lsn, earliest: self.earliest(timeline)? })
    }

    /// The timeline in whose own history a position of `timeline` lies: itself or an ancestor.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn owner_of(&self, timeline: TimelineId, lsn: Lsn) -> Result<TimelineId, TenantError> {
        let mut state = self.timeline(timeline)?;
        while let Some(ancestor) = state.facts.ancestor.filter(|ancestor| lsn <= ancestor.lsn) {
            state = self.timeline(ancestor.timeline)?;
        }
        Ok(state.facts.id)
    }

    /// From where on a timeline's history can be read without a gap, its ancestors' parts included.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn earliest(&self, timeline: TimelineId) -> Result<Lsn, TenantError> {
        let mut state = self.timeline(timeline)?;
        loop {
            if state.cutoff > state.facts.start {
                return Ok(state.cutoff);
            }
            // Where it left its ancestor can always be read.
            let Some(ancestor) = state.facts.ancestor else { return Ok(state.facts.start) };
            let above = self.timeline(ancestor.timeline)?;
            if above.cutoff >= ancestor.lsn {
                return Ok(ancestor.lsn);
            }
            state = above;
        }
    }

    /// All snapshots, by name.
    pub fn snapshots(&self) -> impl Iterator<Item = &Arc<SnapshotRow>> {
        self.snapshots.values()
    }

    /// A snapshot.
    ///
    /// # Errors
    /// [`TenantError::UnknownSnapshot`].
    pub fn snapshot(&self, name: &str) -> Result<&Arc<SnapshotRow>, TenantError> {
        self.snapshots.get(name).ok_or_else(|| TenantError::UnknownSnapshot(name.chars().take(64).collect()))
    }

    /// The edits that make a snapshot.
    ///
    /// # Errors
    /// [`TenantError::SnapshotExists`], [`TenantError::Collected`], [`TenantError::UnknownTimeline`].
    pub fn add_snapshot(&self, row: SnapshotRow) -> Result<Vec<TenantEdit>, TenantError> {
        if self.snapshots.contains_key(&row.name) {
            return Err(TenantError::SnapshotExists(row.name));
        }
        self.check_retained(row.timeline, row.lsn)?;
        Ok(vec![TenantEdit::Snapshot(row)])
    }

    /// The edits that remove a snapshot, and the timelines that only it referred to.
    ///
    /// # Errors
    /// [`TenantError::UnknownSnapshot`].
    pub fn remove_snapshot(&self, name: &SnapshotName) -> Result<Vec<TenantEdit>, TenantError> {
        let timeline = self.snapshot(name.as_str())?.timeline;
        self.with_removals(vec![TenantEdit::SnapshotRemoved { name: name.clone() }], &[timeline])
    }

    /// The edits that keep a position readable until `expires`; none where it is kept as long already.
    ///
    /// # Errors
    /// [`TenantError::Collected`], [`TenantError::UnknownTimeline`].
    pub fn lease(&self, timeline: TimelineId, lsn: Lsn, expires: i64) -> Result<Vec<TenantEdit>, TenantError> {
        self.check_retained(timeline, lsn)?;
        let timeline = self.owner_of(timeline, lsn)?;
        let known = self.timeline(timeline)?.leases.get(&lsn);
        if known.is_some_and(|known| *known >= expires) {
            return Ok(Vec::new());
        }
        Ok(vec![TenantEdit::Lease(LeaseRow { timeline, lsn, expires })])
    }

    /// The edits that cut a timeline's own history off at `cutoff`, with the versions of files that no retained moment
    /// shows then; none where it is cut off there already.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn cut_off(&self, timeline: TimelineId, cutoff: Lsn) -> Result<Vec<TenantEdit>, TenantError> {
        let state = self.timeline(timeline)?;
        let cutoff = cutoff.min(self.cutoff_max(timeline)?);
        if cutoff <= state.cutoff {
            return Ok(Vec::new());
        }
        let points = self.retained(timeline)?.from(cutoff).points_upto(cutoff);
        let mut edits = vec![TenantEdit::Cutoff { timeline, lsn: cutoff }];
        for (path, versions) in &state.files {
            // What a point shows is the newest version at or before it.
            let is_shown = |number: usize, lsn: Lsn| {
                let next = versions.get(number + 1).map_or(Lsn::MAX, |(next, _)| *next);
                lsn > cutoff || points.iter().any(|point| lsn <= *point && *point < next)
            };
            let gone = versions.iter().enumerate().filter(|(number, (lsn, _))| !is_shown(*number, *lsn));
            edits.extend(gone.map(|(_, (lsn, _))| TenantEdit::FileForgotten { timeline, path: path.clone(), lsn: *lsn }));
        }
        Ok(edits)
    }

    /// When a lease on a position of a timeline ends; none where there is none.
    pub fn leased_until(&self, timeline: TimelineId, lsn: Lsn) -> Option<i64> {
        self.timeline(self.owner_of(timeline, lsn).ok()?).ok()?.leases.get(&lsn).copied()
    }

    /// The edits that remove what has expired by `now`, snapshots and leases, and the timelines that only these
    /// referred to.
    ///
    /// # Errors
    /// None in practice: all that is removed is there.
    pub fn expire(&self, now: i64) -> Result<Vec<TenantEdit>, TenantError> {
        let snapshots = self.snapshots.values().filter(|row| row.expires.is_some_and(|expires| expires <= now));
        let (mut edits, mut left) = (Vec::new(), Vec::new());
        for row in snapshots {
            edits.push(TenantEdit::SnapshotRemoved { name: row.name.clone() });
            left.push(row.timeline);
        }
        for state in self.timelines() {
            let over = state.leases.iter().filter(|(_, expires)| **expires <= now);
            edits.extend(over.map(|(lsn, _)| TenantEdit::LeaseRemoved { timeline: state.facts.id, lsn: *lsn }));
        }
        if edits.is_empty() { Ok(edits) } else { self.with_removals(edits, &left) }
    }
}
