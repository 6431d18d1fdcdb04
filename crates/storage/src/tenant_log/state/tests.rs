//! What a tenant's state makes of edits.

use super::*;
use crate::ids::HostId;
use crate::tenant_log::{Ancestor, EndpointMoment};

fn name(text: &str) -> BranchName {
    text.parse().unwrap()
}

fn timeline(id: u8, tli: u32, ancestor: Option<(u8, u64)>) -> TenantEdit {
    TenantEdit::Timeline(TimelineFacts {
        id: TimelineId([id; 16]),
        ancestor: ancestor.map(|(id, lsn)| Ancestor { timeline: TimelineId([id; 16]), lsn: Lsn(lsn) }),
        tli,
        start: Lsn(ancestor.map_or(8, |(_, lsn)| lsn)),
        created: 0,
    })
}

fn facts(id: u8, ancestor: Option<(u8, u64)>) -> TimelineFacts {
    match timeline(id, 0, ancestor) {
        TenantEdit::Timeline(facts) => facts,
        _ => unreachable!(),
    }
}

fn branch(text: &str, id: u8) -> TenantEdit {
    TenantEdit::Branch { name: name(text), timeline: TimelineId([id; 16]) }
}

fn endpoint(id: u8, branch: &str, moment: Option<(u8, u64)>) -> TenantEdit {
    TenantEdit::Endpoint(EndpointRow {
        id: EndpointId([id; 16]),
        branch: name(branch),
        moment: moment.map(|(id, lsn)| EndpointMoment { timeline: TimelineId([id; 16]), lsn: Lsn(lsn) }),
        listen: "127.0.0.1".to_owned(),
        port: 0,
        wanted: true,
        host: Some(HostId([id; 16])),
    })
}

fn state(edits: &[TenantEdit]) -> TenantState {
    let mut state = TenantState::default();
    edits.iter().for_each(|edit| state.apply(edit).unwrap());
    state
}

#[test]
fn files_are_those_of_the_moment_across_ancestors() {
    let file = |id: u8, lsn: u64, contents: FileContents| TenantEdit::File {
        timeline: TimelineId([id; 16]),
        path: "postgresql.auto.conf".to_owned(),
        lsn: Lsn(lsn),
        contents,
    };
    let inline = |text: &str| FileContents::Inline(text.as_bytes().to_vec());
    let state = state(&[
        timeline(1, 1, None),
        file(1, 20, inline("old")),
        file(1, 60, inline("new")),
        timeline(2, 2, Some((1, 50))),
        file(2, 90, FileContents::Removed),
    ]);
    let at = |id: u8, lsn: u64| state.files_at(TimelineId([id; 16]), Lsn(lsn)).unwrap().into_values().next().map(|f| (*f).clone());
    assert_eq!(at(1, 10), None);
    assert_eq!(at(1, 70), Some(inline("new")));
    assert_eq!(at(2, 70), Some(inline("old")), "what the parent wrote after the branch point does not count");
    assert_eq!(at(2, 90), None, "a removed file does not come back from an ancestor");
}

#[test]
fn files_written_behind_the_last_record_are_those_of_head_only() {
    let file = |path: &str, lsn: u64, contents: FileContents| TenantEdit::File {
        timeline: TimelineId([1; 16]),
        path: path.to_owned(),
        lsn: Lsn(lsn),
        contents,
    };
    let inline = |text: &str| FileContents::Inline(text.as_bytes().to_vec());
    let mut state = state(&[
        timeline(1, 1, None),
        file("kept", 20, inline("old")),
        file("gone", 20, inline("old")),
        file("same", 20, inline("old")),
        file("kept", 51, inline("new")),
        file("gone", 51, FileContents::Removed),
    ]);
    let of = |state: &TenantState, id: u8| -> Vec<(String, FileContents)> {
        let files = state.files_at(TimelineId([id; 16]), Lsn(50)).unwrap();
        files.into_iter().map(|(path, contents)| (path, FileContents::clone(&contents))).collect()
    };
    let old = |path: &str| (path.to_owned(), inline("old"));
    assert_eq!(of(&state, 1), [old("gone"), old("kept"), old("same")], "a moment has what was there before it");
    let edits = state.files_at_head(TimelineId([1; 16]), Lsn(50), TimelineId([2; 16])).unwrap();
    state.apply(&timeline(2, 2, Some((1, 50)))).unwrap();
    edits.iter().for_each(|edit| state.apply(edit).unwrap());
    assert_eq!(edits.len(), 2, "only what changed is written again");
    assert_eq!(of(&state, 2), [("kept".to_owned(), inline("new")), old("same")], "a branch at head has what head has");
}

#[test]
fn a_branch_begins_without_the_slots_of_its_ancestor() {
    let file = |id: u8, path: &str| TenantEdit::File {
        timeline: TimelineId([id; 16]),
        path: path.to_owned(),
        lsn: Lsn(20),
        contents: FileContents::Inline(Vec::new()),
    };
    let slots = ["pg_replslot/s/state", "pg_logical/snapshots/0-1.snap", "pg_logical/mappings/map-1"];
    let mut edits = vec![timeline(1, 1, None), file(1, "pg_hba.conf"), timeline(2, 2, Some((1, 50)))];
    edits.extend(slots.map(|path| file(1, path)));
    let of =
        |edits: &[TenantEdit], id| -> Vec<String> { state(edits).files_at(TimelineId([id; 16]), Lsn(70)).unwrap().into_keys().collect() };
    assert_eq!(of(&edits, 1).len(), 4);
    assert_eq!(of(&edits, 2), ["pg_hba.conf"]);
    assert_eq!([1, 2].map(|id| state(&edits).has_slots(TimelineId([id; 16]))), [true, false]);
    edits.push(TenantEdit::File {
        timeline: TimelineId([2; 16]),
        path: slots[0].to_owned(),
        lsn: Lsn(60),
        contents: FileContents::Removed,
    });
    assert!(!state(&edits).has_slots(TimelineId([2; 16])));
    edits.push(file(2, "pg_replslot/own/state"));
    assert_eq!(of(&edits, 2), ["pg_hba.conf", "pg_replslot/own/state"]);
}

#[test]
fn a_snapshot_makes_the_same_state() {
    let before = state(&[
        timeline(1, 1, None),
        branch("main", 1),
        TenantEdit::Epoch { timeline: TimelineId([1; 16]), epoch: WriterEpoch(1), lsn: Lsn(8), wal_log: WalLogId([7; 16]) },
        TenantEdit::EpochClosed { timeline: TimelineId([1; 16]), epoch: WriterEpoch(1), lsn: Lsn(80) },
        timeline(2, 2, Some((1, 50))),
        branch("dev", 2),
        TenantEdit::Figures { timeline: TimelineId([1; 16]), head: Lsn(80), size_bytes: 9 },
        TenantEdit::Owner { generation: Generation(2), server: "b".to_owned(), url: "http://b".to_owned() },
        endpoint(7, "dev", Some((1, 40))),
        TenantEdit::Audit(AuditRow { time: 1, action: "made a branch".to_owned() }),
        TenantEdit::Password(PasswordRow { number: 2, password: "p".to_owned(), verifier: "v".to_owned() }),
    ]);
    let after = state(&before.edits());
    assert_eq!(after.edits(), before.edits());
    assert_eq!(after.password().map(|row| row.number), Some(2));
    assert_eq!(after.owner().map(|owner| owner.server.as_str()), Some("b"));
    assert_eq!(after.endpoints_of(&name("dev")).count(), 1, "the snapshot has the endpoint");
}

#[test]
fn an_endpoint_goes_with_its_branch_and_keeps_what_it_shows() {
    let before = state(&[timeline(1, 1, None), branch("main", 1), endpoint(7, "main", None), endpoint(8, "main", Some((1, 9)))]);
    let error = |edit: &TenantEdit| before.clone().apply(edit).unwrap_err();
    assert_eq!(error(&endpoint(9, "dev", None)), TenantError::UnknownBranch("dev".to_owned()));
    assert_eq!(error(&endpoint(9, "main", Some((5, 9)))), TenantError::UnknownTimeline(TimelineId([5; 16])));
    assert_eq!(error(&TenantEdit::EndpointRemoved { id: EndpointId([9; 16]) }), TenantError::UnknownEndpoint(EndpointId([9; 16])));
    let mut after = before.clone();
    after.apply(&TenantEdit::BranchRemoved { name: name("main") }).unwrap();
    assert_eq!((before.endpoints().count(), after.endpoints().count()), (2, 0));
    after.apply(&TenantEdit::TimelineRemoved { timeline: TimelineId([1; 16]) }).unwrap();
}

#[test]
fn an_older_owner_does_not_replace_a_newer_one() {
    let owner =
        |generation, server: &str| TenantEdit::Owner { generation: Generation(generation), server: server.to_owned(), url: String::new() };
    let state = state(&[owner(2, "a"), owner(3, "b"), owner(2, "a")]);
    assert_eq!(state.owner().map(|owner| owner.server.as_str()), Some("b"));
}

#[test]
fn removed_timelines_that_had_writers_are_remembered_in_snapshots() {
    let id = |n: u32| TimelineId(u128::from(n).to_le_bytes());
    let timeline = |n: u32, ancestor| TimelineFacts { id: id(n), ancestor, tli: n, start: Lsn(0x100), created: 0 };
    let main = name("main");
    let mut state = TenantState::default();
    let mut apply = |edit: TenantEdit| state.apply(&edit).unwrap();
    apply(TenantEdit::Timeline(timeline(1, None)));
    apply(TenantEdit::Branch { name: main, timeline: id(1) });
    let child = Some(Ancestor { timeline: id(1), lsn: Lsn(0x100) });
    for n in 2..(GONE_MAX as u32 + 10) {
        apply(TenantEdit::Timeline(timeline(n, child)));
        if n > 2 {
            apply(TenantEdit::Epoch { timeline: id(n), epoch: WriterEpoch(1), lsn: Lsn(0x100), wal_log: WalLogId([9; 16]) });
        }
        apply(TenantEdit::TimelineRemoved { timeline: id(n) });
    }
    let mut again = TenantState::default();
    state.edits().iter().for_each(|edit| again.apply(edit).unwrap());
    for state in [&state, &again] {
        assert!(!state.was_removed(id(1)) && !state.was_removed(id(2)), "one lives, one never wrote");
        assert!(state.was_removed(id(GONE_MAX as u32 + 9)) && state.was_removed(id(10)), "the last thousand are remembered");
        assert!(!state.was_removed(id(9)), "and no more");
    }
}

#[test]
fn a_size_goes_with_its_endpoint() {
    use super::super::edit::{SizeRange, SizeRow};

    let id = EndpointId([9; 16]);
    let size = SizeRow { id, cpu_milli: Some(SizeRange { min: 250, max: 2000 }), memory_bytes: None };
    assert!(TenantState::default().apply(&TenantEdit::Size(size)).is_err(), "of an endpoint that is there");
    let edits = [timeline(1, 1, None), branch("main", 1), timeline(2, 2, None), branch("other", 2), endpoint(9, "main", None)];
    let mut state = state(&edits);
    state.apply(&TenantEdit::Size(size)).unwrap();
    state.apply(&endpoint(9, "main", None)).unwrap();
    assert_eq!(state.size(id), Some(size), "an endpoint that changes keeps its size");
    let mut again = TenantState::default();
    state.edits().iter().for_each(|edit| again.apply(edit).unwrap());
    assert_eq!(again.size(id), Some(size), "a snapshot has it");
    let renamed = state.rename_branch("main", &name("trunk")).unwrap();
    renamed.iter().for_each(|edit| state.apply(edit).unwrap());
    assert_eq!(state.size(id), Some(size), "so has a branch with another name");
    state.apply(&TenantEdit::EndpointRemoved { id }).unwrap();
    assert_eq!(state.size(id), None);
}

fn snapshot(text: &str, id: u8, lsn: u64, expires: Option<i64>) -> SnapshotRow {
    let name = text.parse().unwrap();
    SnapshotRow { name, branch: self::name("main"), timeline: TimelineId([id; 16]), lsn: Lsn(lsn), created: 0, expires }
}

fn cutoff(id: u8, lsn: u64) -> TenantEdit {
    TenantEdit::Cutoff { timeline: TimelineId([id; 16]), lsn: Lsn(lsn) }
}

#[test]
fn what_is_behind_the_cutoff_can_be_read_only_where_something_holds_it() {
    let mut state =
        state(&[timeline(1, 1, None), branch("main", 1), endpoint(1, "main", None), timeline(2, 2, Some((1, 50))), branch("child", 2)]);
    let main = TimelineId([1; 16]);
    let holds = |state: &TenantState, lsn: u64| state.check_retained(main, Lsn(lsn)).is_ok();
    state.apply(&TenantEdit::Snapshot(snapshot("before", 1, 70, Some(9)))).unwrap();
    state.apply(&TenantEdit::Epoch { timeline: main, epoch: WriterEpoch(1), lsn: Lsn(90), wal_log: WalLogId([1; 16]) }).unwrap();
    state.lease(main, Lsn(80), 5).unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    state.apply(&cutoff(1, 100)).unwrap();
    for (lsn, held) in [(49, false), (50, true), (51, false), (70, true), (80, true), (90, true), (99, false), (100, true), (500, true)] {
        assert_eq!(holds(&state, lsn), held, "{lsn}");
    }
    assert_eq!(state.earliest(main).unwrap(), Lsn(100));
    assert!(state.apply(&cutoff(1, 99)).is_err(), "a cutoff only grows");
    let error = state.lease(main, Lsn(60), 5).unwrap_err();
    assert_eq!(error, TenantError::Collected { timeline: main, lsn: Lsn(60), earliest: Lsn(100) });
    assert_eq!(state.add_snapshot(snapshot("late", 1, 60, None)).unwrap_err(), error);
    assert!(state.create_branch(&name("late"), &facts(3, Some((1, 60)))).is_err());
    assert!(state.restore_branch("main", &name("old"), &facts(3, Some((1, 60)))).is_err());
    assert!(state.create_branch(&name("late"), &facts(3, Some((1, 70)))).is_ok(), "a branch of the snapshot");
    // The child shows what lies before it through its ancestor.
    assert!(state.check_retained(TimelineId([2; 16]), Lsn(60)).is_ok() && state.check_retained(TimelineId([2; 16]), Lsn(45)).is_err());
    assert_eq!(state.earliest(TimelineId([2; 16])).unwrap(), Lsn(50));

    // All of it is in a snapshot of the log.
    let copy = self::state(&state.edits());
    assert_eq!((copy.retained(main).unwrap(), copy.edits()), (state.retained(main).unwrap(), state.edits()));

    // Time takes the lease and the snapshot; a clean end the compute's position; the child's end its own.
    state.expire(5).unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    assert!(!holds(&state, 80) && holds(&state, 70));
    state.expire(9).unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    state.apply(&TenantEdit::EpochClosed { timeline: main, epoch: WriterEpoch(1), lsn: Lsn(95) }).unwrap();
    state.delete_branch("child").unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    assert!([50, 70, 80, 90].into_iter().all(|lsn| !holds(&state, lsn)));
    assert!(state.expire(i64::MAX).unwrap().is_empty());
}

#[test]
fn a_cutoff_stays_behind_a_compute_whose_base_moves_on() {
    let mut state = state(&[timeline(1, 1, None), branch("main", 1), endpoint(1, "main", None)]);
    let (main, epoch) = (TimelineId([1; 16]), WriterEpoch(1));
    state.apply(&TenantEdit::Epoch { timeline: main, epoch, lsn: Lsn(20), wal_log: WalLogId([1; 16]) }).unwrap();
    let cut = |state: &mut TenantState, lsn: u64| {
        state.cut_off(main, Lsn(lsn)).unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
        state.timeline(main).unwrap().cutoff.0
    };
    let moves = |state: &mut TenantState, bases: &[u64]| {
        let bases: Vec<Lsn> = bases.iter().copied().map(Lsn).collect();
        let edits = state.move_base(main, epoch, &bases)?;
        edits.iter().for_each(|edit| state.apply(edit).unwrap());
        Ok::<_, TenantError>(edits.len())
    };
    assert_eq!(cut(&mut state, 50), 50, "where it began is held alone");
    assert!(moves(&mut state, &[20, 40]).is_err(), "that is collected already");
    assert_eq!(moves(&mut state, &[20, 60]), Ok(1));
    assert_eq!(cut(&mut state, 80), 50, "it reads somewhere above its beginning");
    assert!(state.check_retained(main, Lsn(20)).is_ok() && state.check_retained(main, Lsn(60)).is_ok());
    assert_eq!(moves(&mut state, &[60]), Ok(1));
    assert_eq!(cut(&mut state, 80), 60);
    assert!(state.check_retained(main, Lsn(20)).is_err(), "nobody reads there any more");
    assert_eq!(self::state(&state.edits()).edits(), state.edits());
    state.apply(&TenantEdit::EpochClosed { timeline: main, epoch, lsn: Lsn(90) }).unwrap();
    assert_eq!(cut(&mut state, 80), 80);
}

#[test]
fn versions_of_files_go_that_no_retained_moment_shows() {
    let file = |lsn: u64, text: &str| TenantEdit::File {
        timeline: TimelineId([1; 16]),
        path: "postgresql.auto.conf".to_owned(),
        lsn: Lsn(lsn),
        contents: FileContents::Inline(text.as_bytes().to_vec()),
    };
    let mut state = state(&[timeline(1, 1, None), branch("main", 1), timeline(2, 2, Some((1, 25))), branch("child", 2)]);
    [(10, "a"), (20, "b"), (30, "c"), (40, "d"), (60, "e")].iter().for_each(|(lsn, text)| state.apply(&file(*lsn, text)).unwrap());
    let at = |state: &TenantState, id: u8, lsn: u64| state.files_at(TimelineId([id; 16]), Lsn(lsn)).unwrap();
    let main = TimelineId([1; 16]);
    let shown: Vec<_> = [25, 50, 59, 60].iter().map(|lsn| at(&state, 1, *lsn)).collect();
    let of_child = at(&state, 2, 25);
    state.cut_off(main, Lsn(50)).unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    let left: Vec<u64> = state.timeline(main).unwrap().files["postgresql.auto.conf"].iter().map(|(lsn, _)| lsn.0).collect();
    assert_eq!(left, [20, 40, 60], "those of the child, of the cutoff, and after it");
    assert_eq!([25, 50, 59, 60].iter().map(|lsn| at(&state, 1, *lsn)).collect::<Vec<_>>(), shown);
    assert_eq!(at(&state, 2, 25), of_child);
    assert!(state.cut_off(main, Lsn(50)).unwrap().is_empty());
}

#[test]
fn of_a_timeline_without_a_name_only_what_others_hold_is_retained() {
    let mut state = state(&[timeline(1, 1, None), branch("main", 1), timeline(2, 2, Some((1, 50))), branch("child", 2)]);
    let main = TimelineId([1; 16]);
    state.apply(&TenantEdit::Snapshot(snapshot("kept", 1, 70, None))).unwrap();
    state.delete_branch("main").unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    assert_eq!(state.retained(main).unwrap().top, Lsn(70));
    assert!(state.check_retained(main, Lsn(60)).is_ok() && state.check_retained(main, Lsn(71)).is_err());
    state.apply(&cutoff(1, 60)).unwrap();
    assert!(state.check_retained(main, Lsn(55)).is_err(), "the window goes on");
    let removed = state.remove_snapshot(&"kept".parse().unwrap()).unwrap();
    assert_eq!(removed.len(), 1, "the child still needs it");
    removed.iter().for_each(|edit| state.apply(edit).unwrap());
    assert_eq!(state.retained(main).unwrap().top, Lsn(50));
}

#[test]
fn a_snapshot_keeps_the_timeline_of_a_branch_that_is_deleted() {
    let mut state = state(&[timeline(1, 1, None), branch("main", 1), timeline(2, 2, Some((1, 50))), branch("child", 2)]);
    state.apply(&TenantEdit::Snapshot(snapshot("kept", 2, 70, None))).unwrap();
    state.delete_branch("child").unwrap().iter().for_each(|edit| state.apply(edit).unwrap());
    assert!(state.check_retained(TimelineId([2; 16]), Lsn(70)).is_ok());
    let edits = state.remove_snapshot(&"kept".parse().unwrap()).unwrap();
    assert_eq!(crate::tenant_log::removed_timelines(&edits).collect::<Vec<_>>(), [TimelineId([2; 16])]);
}
