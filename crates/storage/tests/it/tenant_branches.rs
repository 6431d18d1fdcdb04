//! Branches and endpoints come and go as a naive model says: nothing that is referred to is ever removed, nothing
//! else stays. And what lists show of ten thousand branches.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use varve_postgres::Lsn;
use varve_storage::ids::{BranchName, EndpointId, TimelineId, WalLogId, WriterEpoch};
use varve_storage::tenant_log::{
    Ancestor, EndpointMoment, EndpointRow, TenantEdit, TenantError, TenantState, TimelineFacts, removed_timelines,
};

fn timeline_id(number: u32) -> TimelineId {
    TimelineId(u128::from(number).to_be_bytes())
}

fn name(text: &str) -> BranchName {
    text.parse().unwrap()
}

fn facts(number: u32, parent: Option<TimelineId>, lsn: u64) -> TimelineFacts {
    let ancestor = parent.map(|timeline| Ancestor { timeline, lsn: Lsn(lsn) });
    TimelineFacts { id: timeline_id(number), ancestor, tli: number, start: Lsn(lsn), created: 0 }
}

fn endpoint(id: u8, branch: &BranchName, moment: Option<TimelineId>) -> EndpointRow {
    let moment = moment.map(|timeline| EndpointMoment { timeline, lsn: Lsn(8) });
    let id = EndpointId([id; 16]);
    EndpointRow { id, branch: branch.clone(), moment, listen: String::new(), port: 0, wanted: true, host: None }
}

/// The state, and what it should say, kept without any cleverness.
struct World {
    state: TenantState,
    names: BTreeMap<BranchName, TimelineId>,
    parents: BTreeMap<TimelineId, Option<TimelineId>>,
    /// Branch and moment of each.
    endpoints: BTreeMap<EndpointId, (BranchName, Option<TimelineId>)>,
    next: u32,
}

impl World {
    fn new() -> World {
        let mut state = TenantState::default();
        let main = timeline_id(1);
        state.apply(&TenantEdit::Timeline(facts(1, None, 8))).unwrap();
        state.apply(&TenantEdit::Branch { name: name("main"), timeline: main }).unwrap();
        let (names, parents) = (BTreeMap::from([(name("main"), main)]), BTreeMap::from([(main, None)]));
        World { state, names, parents, endpoints: BTreeMap::new(), next: 2 }
    }

    fn branch(&self, pick: u8) -> (BranchName, TimelineId) {
        let (name, timeline) = self.names.iter().nth(usize::from(pick) % self.names.len()).unwrap();
        (name.clone(), *timeline)
    }

    /// The timeline or one of its ancestors.
    fn in_ancestry(&self, timeline: TimelineId, steps: u8) -> TimelineId {
        let mut at = timeline;
        for _ in 0..steps % 4 {
            at = self.parents[&at].unwrap_or(at);
        }
        at
    }

    fn commit(&mut self, edits: &[TenantEdit]) {
        edits.iter().for_each(|edit| self.state.apply(edit).unwrap());
        let before: BTreeSet<TimelineId> = self.parents.keys().copied().collect();
        let mut live = BTreeSet::new();
        let moments = self.endpoints.values().filter_map(|(_, moment)| *moment);
        for root in self.names.values().copied().chain(moments) {
            let mut next = Some(root);
            while let Some(timeline) = next.filter(|timeline| live.insert(*timeline)) {
                next = self.parents[&timeline];
            }
        }
        let known: BTreeSet<TimelineId> = self.state.timelines().map(|timeline| timeline.facts.id).collect();
        assert_eq!(known, live, "timelines that something refers to, and no others");
        let removed: BTreeSet<TimelineId> = removed_timelines(edits).collect();
        assert_eq!(removed, before.difference(&live).copied().collect(), "the edits name what they remove");
        self.parents.retain(|timeline, _| live.contains(timeline));
        let names: BTreeMap<BranchName, TimelineId> = self.state.branches().map(|(name, timeline)| (name.clone(), timeline)).collect();
        assert_eq!(names, self.names);
        let endpoints = self.state.endpoints().map(|row| (row.id, (row.branch.clone(), row.moment.map(|moment| moment.timeline))));
        assert_eq!(endpoints.collect::<BTreeMap<_, _>>(), self.endpoints);
        for (name, timeline) in &self.names {
            assert_eq!(self.state.branch_of(*timeline), Some(name));
            let of_branch: BTreeSet<EndpointId> = self.state.endpoints_of(name).map(|row| row.id).collect();
            let expected = self.endpoints.iter().filter(|(_, (branch, _))| branch == name).map(|(id, _)| *id);
            assert_eq!(of_branch, expected.collect());
        }
    }

    fn step(&mut self, (action, a, b, c): (u8, u8, u8, u8)) {
        let (branch, timeline) = self.branch(a);
        let (number, new) = (self.next, timeline_id(self.next));
        let free = name(&format!("b{number}"));
        match action {
            0 => {
                let parent = self.in_ancestry(timeline, b);
                self.names.insert(free.clone(), new);
                self.parents.insert(new, Some(parent));
                self.next += 1;
                let tli = self.state.next_tli().unwrap();
                let facts = TimelineFacts { tli, ..facts(number, Some(parent), 8) };
                self.commit(&[TenantEdit::Timeline(facts), TenantEdit::Branch { name: free, timeline: new }]);
            }
            1 => {
                let parent = self.in_ancestry(timeline, b);
                let edits = self.state.restore_branch(branch.as_str(), &free, &facts(number, Some(parent), 8)).unwrap();
                assert!(!edits.iter().any(|edit| matches!(edit, TenantEdit::Endpoint(_) | TenantEdit::EndpointRemoved { .. })));
                self.names.extend([(free, timeline), (branch, new)]);
                self.parents.insert(new, Some(parent));
                self.next += 1;
                self.commit(&edits);
            }
            2 => {
                let edits = self.state.rename_branch(branch.as_str(), &free).unwrap();
                self.names.remove(&branch);
                self.names.insert(free.clone(), timeline);
                self.next += 1;
                for (owner, _) in self.endpoints.values_mut().filter(|(owner, _)| *owner == branch) {
                    *owner = free.clone();
                }
                self.commit(&edits);
            }
            3 => match self.state.delete_branch(branch.as_str()) {
                Ok(edits) => {
                    self.names.remove(&branch);
                    self.endpoints.retain(|_, (owner, _)| *owner != branch);
                    self.commit(&edits);
                }
                Err(error) => assert_eq!((error, self.names.len()), (TenantError::LastBranch(branch), 1)),
            },
            4 => {
                let moment = (c % 2 == 0).then(|| self.in_ancestry(timeline, b));
                let row = endpoint(c % 5, &branch, moment);
                let edits = self.state.put_endpoint(row.clone()).unwrap();
                self.endpoints.insert(row.id, (branch, moment));
                self.commit(&edits);
            }
            _ => {
                let id = EndpointId([c % 5; 16]);
                match self.state.remove_endpoint(id) {
                    Ok(edits) => {
                        assert!(self.endpoints.remove(&id).is_some());
                        self.commit(&edits);
                    }
                    Err(error) => assert_eq!((error, self.endpoints.get(&id)), (TenantError::UnknownEndpoint(id), None)),
                }
            }
        }
        let mut remembered = TenantState::default();
        self.state.edits().iter().for_each(|edit| remembered.apply(edit).unwrap());
        assert_eq!(remembered.edits(), self.state.edits(), "a snapshot makes the same state");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_is_referred_to_lives_and_nothing_else(
        steps in prop::collection::vec((0u8..6, any::<u8>(), any::<u8>(), any::<u8>()), 1..80)
    ) {
        let mut world = World::new();
        steps.into_iter().for_each(|step| world.step(step));
    }
}

#[test]
fn a_history_that_was_restored_away_can_be_deleted_and_goes_with_its_last_child() {
    let mut world = World::new();
    let commit = |world: &mut World, edits: Vec<TenantEdit>| {
        edits.iter().for_each(|edit| world.state.apply(edit).unwrap());
        removed_timelines(&edits).collect::<Vec<_>>()
    };
    let refused = world.state.delete_branch("main").unwrap_err();
    assert_eq!(refused.to_string(), "branch 'main' is the last of its tenant: create another first, or delete the tenant");
    let edits = world.state.restore_branch("main", &name("before"), &facts(2, Some(timeline_id(1)), 50)).unwrap();
    commit(&mut world, edits);
    assert_eq!(world.state.branch("main").unwrap().facts.id, timeline_id(2));
    assert_eq!(world.state.branch_of(timeline_id(1)), Some(&name("before")));
    let refused = world.state.restore_branch("main", &name("before"), &facts(3, Some(timeline_id(1)), 50)).unwrap_err();
    assert_eq!(refused, TenantError::BranchExists(name("before")));
    let edits = world.state.put_endpoint(endpoint(1, &name("main"), Some(timeline_id(1)))).unwrap();
    commit(&mut world, edits);
    let edits = world.state.delete_branch("before").unwrap();
    assert_eq!(commit(&mut world, edits), [], "main comes from it");
    let restored = TimelineFacts { tli: world.state.next_tli().unwrap(), ..facts(3, None, 8) };
    commit(&mut world, vec![TenantEdit::Timeline(restored), TenantEdit::Branch { name: name("other"), timeline: timeline_id(3) }]);
    let edits = world.state.delete_branch("main").unwrap();
    assert_eq!(commit(&mut world, edits), [timeline_id(2), timeline_id(1)], "its child first, its endpoint's moment with it");
    assert_eq!(world.state.next_tli(), Ok(4), "a TLI is never given again");
}

#[test]
fn ten_thousand_branches_are_listed_page_by_page_without_walking_them() {
    let mut state = TenantState::default();
    let add = |state: &mut TenantState, number: u32, branch: &str| {
        let parent = (number > 1).then(|| timeline_id(number - 1));
        state.apply(&TenantEdit::Timeline(facts(number, parent, 8))).unwrap();
        state.apply(&TenantEdit::Branch { name: name(branch), timeline: timeline_id(number) }).unwrap();
    };
    add(&mut state, 1, "main");
    for number in 2..=10_000 {
        add(&mut state, number, &format!("dev-{number:05}"));
    }
    add(&mut state, 10_001, "dev");
    let page = |prefix: &str, after: Option<&str>, limit: usize| {
        let page = state.branches_page(prefix, after, limit);
        page.map(|(name, _)| name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(page("", None, 3), ["dev", "dev-00002", "dev-00003"]);
    assert_eq!(page("", Some("dev-09999"), 3), ["dev-10000", "main"]);
    assert_eq!(page("dev-", None, 2), ["dev-00002", "dev-00003"]);
    assert_eq!(page("dev-", Some("a"), 1), ["dev-00002"], "a page never begins before its prefix");
    assert_eq!(page("dev-", Some("dev-10000"), 2), [] as [&str; 0]);
    assert_eq!(page("dev-", Some("x"), 2), [] as [&str; 0]);
    let (mut listed, mut after, began) = (0, None::<String>, Instant::now());
    loop {
        let names = page("", after.as_deref(), 100);
        listed += names.len();
        let Some(last) = names.into_iter().next_back() else { break };
        after = Some(last);
    }
    assert_eq!(listed, 10_001);
    // Walking all of them for each page would take a hundred times as long.
    let took = began.elapsed();
    assert!(took < Duration::from_millis(100), "a hundred pages took {took:?}");
}

#[test]
fn lists_know_heads_and_sizes_without_opening_anything() {
    let mut state = TenantState::default();
    let (one, two, three) = (timeline_id(1), timeline_id(2), timeline_id(3));
    let epoch = |timeline, lsn| TenantEdit::Epoch { timeline, epoch: WriterEpoch(1), lsn: Lsn(lsn), wal_log: WalLogId([1; 16]) };
    for edit in [
        TenantEdit::Timeline(facts(1, None, 8)),
        TenantEdit::Timeline(facts(2, Some(one), 50)),
        TenantEdit::Timeline(facts(3, Some(two), 50)),
    ] {
        state.apply(&edit).unwrap();
    }
    let known = |state: &TenantState, timeline| (state.head_of(timeline).unwrap(), state.size_of(timeline).unwrap());
    assert_eq!(known(&state, three), (Some(Lsn(50)), None), "nothing was written: it ends where it begins");
    state.apply(&epoch(one, 8)).unwrap();
    assert_eq!(known(&state, one), (None, None), "it was written to, and nobody has noted anything");
    state.apply(&TenantEdit::Figures { timeline: one, head: Lsn(70), size_bytes: 7 }).unwrap();
    assert_eq!(known(&state, one), (Some(Lsn(70)), Some(7)));
    assert_eq!(known(&state, three), (Some(Lsn(50)), Some(7)), "as large as what it comes from");
    state.apply(&TenantEdit::EpochClosed { timeline: one, epoch: WriterEpoch(1), lsn: Lsn(90) }).unwrap();
    assert_eq!(known(&state, one), (Some(Lsn(90)), Some(7)), "a clean end is known exactly");
    state.apply(&epoch(three, 50)).unwrap();
    assert_eq!(known(&state, three), (None, None), "written to since: the ancestor's size says nothing any more");
    assert_eq!(state.size_of(timeline_id(9)), Err(TenantError::UnknownTimeline(timeline_id(9))));
}
