//! The edits of what people do with branches and endpoints: renames, deletions, restores. Each gives edits that fit
//! the state it is asked of.
//!
//! **What lives.** A timeline lives as long as something refers to it: a branch's name, a child, or the moment that an
//! endpoint shows, or a snapshot. Each of these plans removes what it leaves without any, and then the ancestors that
//! lived only for that. So a branch with children can be deleted: its name goes, and its timeline stays without a name
//! until its last child goes.

use super::TenantError;
use super::edit::{EndpointRow, TenantEdit, TimelineFacts};
use super::state::TenantState;
use crate::ids::{BranchName, EndpointId, TimelineId};

/// The timelines that `edits` remove: their layers and WAL can go once the edits are durable.
pub fn removed_timelines(edits: &[TenantEdit]) -> impl Iterator<Item = TimelineId> {
    edits.iter().filter_map(|edit| match edit {
        TenantEdit::TimelineRemoved { timeline } => Some(*timeline),
        _ => None,
    })
}

impl TenantState {
    /// The edits that give a branch another name; its endpoints go along.
    ///
    /// # Errors
    /// [`TenantError::UnknownBranch`], [`TenantError::BranchExists`].
    pub fn rename_branch(&self, from: &str, to: &BranchName) -> Result<Vec<TenantEdit>, TenantError> {
        let (from, timeline) = self.named(from)?;
        self.check_free(to)?;
        let endpoints = self.endpoints_of(&from).map(|row| EndpointRow { branch: to.clone(), ..EndpointRow::clone(row) });
        let endpoints: Vec<EndpointRow> = endpoints.collect();
        // A timeline has one name, so the old one goes first; the endpoints go with it, and come back under the new
        // one.
        let mut edits = vec![TenantEdit::BranchRemoved { name: from }, TenantEdit::Branch { name: to.clone(), timeline }];
        let sizes: Vec<TenantEdit> = endpoints.iter().filter_map(|row| self.size(row.id)).map(TenantEdit::Size).collect();
        edits.extend(endpoints.into_iter().map(TenantEdit::Endpoint));
        edits.extend(sizes);
        Ok(edits)
    }

    /// The edits that delete a branch with its endpoints, and all timelines that nothing refers to afterwards: see
    /// [`removed_timelines`].
    ///
    /// # Errors
    /// [`TenantError::UnknownBranch`], [`TenantError::LastBranch`].
    pub fn delete_branch(&self, name: &str) -> Result<Vec<TenantEdit>, TenantError> {
        let (name, timeline) = self.named(name)?;
        // One that verifies a restore goes soon, and may not be what is left.
        if !self.branches().any(|(other, timeline)| *other != name && !self.is_verifying(timeline)) {
            return Err(TenantError::LastBranch(name));
        }
        let mut left: Vec<TimelineId> = self.endpoints_of(&name).filter_map(|row| Some(row.moment?.timeline)).collect();
        left.push(timeline);
        let endpoints = self.endpoints_of(&name).map(|row| TenantEdit::EndpointRemoved { id: row.id });
        let mut edits: Vec<TenantEdit> = endpoints.collect();
        edits.push(TenantEdit::BranchRemoved { name });
        self.with_removals(edits, &left)
    }

    /// The edits that take a branch back: its name moves to the new timeline `facts`, whose TLI is filled in here,
    /// and the timeline that it had gets the name `before`. An endpoint belongs to the name, so nothing is written of
    /// those.
    ///
    /// # Errors
    /// [`TenantError::UnknownBranch`], [`TenantError::UnknownTimeline`] of the new one's ancestor,
    /// [`TenantError::Collected`], [`TenantError::BranchExists`], [`TenantError::NoTliLeft`].
    pub fn restore_branch(&self, name: &str, before: &BranchName, facts: &TimelineFacts) -> Result<Vec<TenantEdit>, TenantError> {
        let (name, old) = self.named(name)?;
        self.check_free(before)?;
        if let Some(ancestor) = facts.ancestor {
            self.check_retained(ancestor.timeline, ancestor.lsn)?;
        }
        let facts = TimelineFacts { tli: self.next_tli()?, ..facts.clone() };
        let new = facts.id;
        // The name is never away meanwhile: its endpoints would go with it.
        Ok(vec![
            TenantEdit::Timeline(facts),
            TenantEdit::Branch { name, timeline: new },
            TenantEdit::Branch { name: before.clone(), timeline: old },
        ])
    }

    /// The edits that make a branch at a moment, whose TLI is filled in here.
    ///
    /// # Errors
    /// [`TenantError::BranchExists`], [`TenantError::UnknownTimeline`] of its ancestor, [`TenantError::Collected`],
    /// [`TenantError::NoTliLeft`].
    pub fn create_branch(&self, name: &BranchName, facts: &TimelineFacts) -> Result<Vec<TenantEdit>, TenantError> {
        self.check_free(name)?;
        if let Some(ancestor) = facts.ancestor {
            self.check_retained(ancestor.timeline, ancestor.lsn)?;
        }
        let timeline = facts.id;
        let facts = TimelineFacts { tli: self.next_tli()?, ..facts.clone() };
        Ok(vec![TenantEdit::Timeline(facts), TenantEdit::Branch { name: name.clone(), timeline }])
    }

    /// The edits that make or change an endpoint, and remove the timelines that only its former moment referred to.
    ///
    /// # Errors
    /// [`TenantError::UnknownBranch`], [`TenantError::UnknownTimeline`], [`TenantError::Collected`].
    pub fn put_endpoint(&self, row: EndpointRow) -> Result<Vec<TenantEdit>, TenantError> {
        if let Some(moment) = row.moment {
            self.check_retained(moment.timeline, moment.lsn)?;
        }
        let left = self.endpoint(row.id).ok().and_then(|old| Some(old.moment?.timeline));
        self.with_removals(vec![TenantEdit::Endpoint(row)], left.as_slice())
    }

    /// The edits that remove an endpoint, and the timelines that only its moment referred to.
    ///
    /// # Errors
    /// [`TenantError::UnknownEndpoint`].
    pub fn remove_endpoint(&self, id: EndpointId) -> Result<Vec<TenantEdit>, TenantError> {
        let left = self.endpoint(id)?.moment.map(|moment| moment.timeline);
        self.with_removals(vec![TenantEdit::EndpointRemoved { id }], left.as_slice())
    }

    /// A branch's name and timeline.
    fn named(&self, name: &str) -> Result<(BranchName, TimelineId), TenantError> {
        let found = self.branches.get_key_value(name);
        let (name, timeline) = found.ok_or_else(|| TenantError::UnknownBranch(name.chars().take(64).collect()))?;
        Ok((name.clone(), *timeline))
    }

    /// `edits`, and then the removal of those of the timelines `left` that nothing refers to after them, and of their
    /// ancestors that lived for them alone.
    pub(super) fn with_removals(&self, mut edits: Vec<TenantEdit>, left: &[TimelineId]) -> Result<Vec<TenantEdit>, TenantError> {
        // Shares structure with this state: a clone costs next to nothing.
        let mut after = self.clone();
        edits.iter().try_for_each(|edit| after.apply(edit))?;
        for timeline in left {
            let mut next = Some(*timeline);
            while let Some(timeline) = next {
                let Some(dead) = after.timeline(timeline).ok().filter(|state| state.is_dead()) else { break };
                next = dead.facts.ancestor.map(|ancestor| ancestor.timeline);
                let edit = TenantEdit::TimelineRemoved { timeline };
                after.apply(&edit)?;
                edits.push(edit);
            }
        }
        Ok(edits)
    }
}
