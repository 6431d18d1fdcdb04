//! What lists show, from the log alone: no timeline is opened for it. Heads and sizes are those that were known last.

use std::ops::Bound;

use varve_postgres::Lsn;

use super::TenantError;
use super::state::{TenantState, TimelineState};
use crate::ids::{BranchName, TimelineId};

impl TenantState {
    /// At most `limit` branches whose names begin with `prefix` and come after `after`, by name. Takes O(log n) for
    /// each.
    pub fn branches_page<'s>(
        &'s self,
        prefix: &'s str,
        after: Option<&str>,
        limit: usize,
    ) -> impl Iterator<Item = (&'s BranchName, TimelineId)> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let from_there = self.branches.range::<_, str>((start, Bound::Unbounded));
        let named = from_there.take_while(move |(name, _)| name.as_str().starts_with(prefix));
        named.take(limit).map(|(name, timeline)| (name, *timeline))
    }

    /// The end of a timeline's history, as far as the log knows it; nothing when it was written to and nobody has
    /// noted its end yet. One that was never written to ends where it begins.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn head_of(&self, timeline: TimelineId) -> Result<Option<Lsn>, TenantError> {
        let state = self.timeline(timeline)?;
        let noted = state.figures.map(|figures| figures.head);
        let closed = state.epochs.last().and_then(|epoch| epoch.closed);
        let pristine = state.epochs.is_empty().then_some(state.facts.start);
        Ok(noted.max(closed).max(pristine))
    }

    /// Bytes of all relations of a timeline, as last noted; of one that was never written to those of its nearest
    /// ancestor of which something is noted.
    ///
    /// # Errors
    /// [`TenantError::UnknownTimeline`].
    pub fn size_of(&self, timeline: TimelineId) -> Result<Option<u64>, TenantError> {
        let mut state = self.timeline(timeline)?;
        let was_written = |state: &TimelineState| !state.epochs.is_empty();
        if was_written(state) {
            return Ok(state.figures.map(|figures| figures.size_bytes));
        }
        loop {
            match (state.figures, state.facts.ancestor) {
                (Some(figures), _) => return Ok(Some(figures.size_bytes)),
                (None, Some(ancestor)) => state = self.timeline(ancestor.timeline)?,
                (None, None) => return Ok(None),
            }
        }
    }
}
