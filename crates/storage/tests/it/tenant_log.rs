//! A tenant's log in the store: unique names, one write for a branch, a hundred thousand branches, taking over.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::time::{Duration, Instant};

use futures::future::join_all;
use varve_postgres::Lsn;
use varve_storage::edit_log::{CommitError, EditLog, EditLogError};
use varve_storage::ids::{BranchName, Generation, TenantId, TenantName, TimelineId};
use varve_storage::store::Store;
use varve_storage::tenant_log::{
    Ancestor, CreateTenantError, FoundOwner, Owner, TenantEdit, TenantError, TenantFacts, TenantLog, TimelineFacts, create_tenant,
    delete_objects, find_owner, names, take_over, tenant_folder,
};
use varve_testbed::minio::Minio;
use varve_testing::sim_store::{Faults, SimStore};

fn facts(name: &str) -> TenantFacts {
    TenantFacts {
        id: TenantId::random().unwrap(),
        name: name.parse().unwrap(),
        pg_version: 15,
        system_identifier: 7_000_000_000_000_000_001,
        created: 0,
        template: "templates/15".to_owned(),
        password: "secret".to_owned(),
        password_verifier: "SCRAM-SHA-256$4096:x$y:z".to_owned(),
    }
}

fn first_timeline() -> (TimelineId, Vec<TenantEdit>) {
    let id = TimelineId::random().unwrap();
    let timeline = TimelineFacts { id, ancestor: None, tli: 1, start: Lsn(0x150_0000), created: 0 };
    (id, vec![TenantEdit::Timeline(timeline), TenantEdit::Branch { name: "main".parse().unwrap(), timeline: id }])
}

async fn create_branch(log: &TenantLog, name: &str, parent: TimelineId) -> Result<TimelineId, CommitError<TenantError>> {
    let (name, id): (BranchName, _) = (name.parse().unwrap(), TimelineId::random().unwrap());
    log.commit(|state| {
        state.check_free(&name)?;
        let start = Lsn(0x160_0000);
        let ancestor = Some(Ancestor { timeline: parent, lsn: start });
        let timeline = TimelineFacts { id, ancestor, tli: state.next_tli()?, start, created: 1 };
        Ok((vec![TenantEdit::Timeline(timeline), TenantEdit::Branch { name: name.clone(), timeline: id }], id))
    })
    .await
}

async fn lives_through_its_life(store: &Store) {
    let acme: TenantName = "acme".parse().unwrap();
    let (main, first_day) = first_timeline();
    let racers = (0..4).map(|_| create_tenant(store, facts("acme"), first_day.clone()));
    let mut logs = Vec::new();
    for outcome in join_all(racers).await {
        match outcome {
            Ok(log) => logs.push(log),
            Err(error) => assert_eq!(error, CreateTenantError::NameTaken(acme.clone())),
        }
    }
    assert_eq!(logs.len(), 1, "of tenants that are created with one name at the same time exactly one comes about");
    let log = logs.remove(0);
    let tenant = log.state().facts().unwrap().id;
    let error = create_tenant(store, facts("acme"), first_day).await.map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "there is a tenant 'acme' already: choose another name");
    assert_eq!(names::list(store).await.unwrap(), [(acme.clone(), tenant)]);
    assert_eq!(names::lookup(store, &acme).await.unwrap(), Some(tenant));
    assert_eq!(store.list(&"tenants".parse().unwrap()).await.unwrap().len(), 1, "those that lost leave nothing behind");

    let branches = join_all((0..8).map(|_| create_branch(&log, "dev", main))).await;
    assert_eq!(branches.iter().filter(|outcome| outcome.is_ok()).count(), 1, "of eight racing creates of branch 'dev' one succeeds");
    let refused = branches.into_iter().find_map(Result::err).unwrap();
    assert_eq!(refused.to_string(), "there is a branch 'dev' already: choose another name");

    let folder = tenant_folder(tenant).unwrap();
    let next = TenantLog::take_over(store, &folder).await.unwrap().unwrap();
    assert_eq!(next.state().edits(), log.state().edits());
    assert!(matches!(create_branch(&log, "late", main).await, Err(CommitError::Log(EditLogError::Fenced { .. }))));
    create_branch(&next, "late", main).await.unwrap();

    next.push(vec![TenantEdit::TenantRemoved]).await.unwrap();
    let other = TenantId::random().unwrap();
    names::free(store, &acme, other).await.unwrap();
    assert_eq!(names::lookup(store, &acme).await.unwrap(), Some(tenant), "a name is freed by its owner only");
    names::free(store, &acme, tenant).await.unwrap();
    delete_objects(store, tenant).await.unwrap();
    assert_eq!(names::lookup(store, &acme).await.unwrap(), None);
    assert!(EditLog::<varve_storage::tenant_log::TenantState>::take_over(store, &folder).await.unwrap().is_none());
    names::reserve(store, &acme, other).await.unwrap();
    names::reserve(store, &acme, other).await.unwrap();
    let error = names::reserve(store, &acme, tenant).await.unwrap_err().to_string();
    assert_eq!(error, format!("the name 'acme' is that of tenant {other}: choose another name"));
}

#[tokio::test]
async fn who_lost_a_tenant_learns_who_has_it() {
    let sim = SimStore::new();
    let store = sim.reliable();
    let log = create_tenant(&store, facts("acme"), first_timeline().1).await.unwrap();
    let tenant = log.state().facts().unwrap().id;
    let found = async || find_owner(&store, tenant).await.unwrap().unwrap();
    assert_eq!(found().await, FoundOwner { generation: Generation(1), owner: None });
    let before = sim.objects().len();
    let next = take_over(&store, tenant, "b", "https://b:7400").await.unwrap().unwrap();
    assert_eq!(sim.objects().len(), before + 2, "a claim that says who it is, and a seal");
    let error = create_branch(&log, "dev", log.state().branch("main").unwrap().facts.id).await.unwrap_err();
    assert!(matches!(error, CommitError::Log(EditLogError::Fenced { .. })) && log.lost() == Some(Generation(2)));
    let owner = Owner { generation: Generation(2), server: "b".to_owned(), url: "https://b:7400".to_owned() };
    assert_eq!(found().await, FoundOwner { generation: Generation(2), owner: Some(owner) });
    assert_eq!(next.state().owner(), found().await.owner.as_ref());
    drop(TenantLog::take_over(&store, &tenant_folder(tenant).unwrap()).await.unwrap());
    assert_eq!(found().await, FoundOwner { generation: Generation(3), owner: None }, "one that says nothing is not the one before");
    let last = take_over(&store, tenant, "c", "").await.unwrap().unwrap();
    last.push(vec![TenantEdit::TenantRemoved]).await.unwrap();
    let after = take_over(&store, tenant, "d", "").await.unwrap().unwrap();
    assert!(after.state().is_removed(), "a deleted tenant can be taken over, to delete what is left");
    assert_eq!(find_owner(&store, TenantId::random().unwrap()).await.unwrap(), None);
}

#[tokio::test]
async fn a_tenant_in_a_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    lives_through_its_life(&Store::open_folder(folder.path()).unwrap()).await;
}

#[tokio::test]
async fn a_tenant_on_minio() {
    let Some(minio) = Minio::start_unless_skipped() else { return };
    lives_through_its_life(&minio.store("tenants-test").unwrap()).await;
}

/// Servers that create tenants of the same few names through clients with every fault, and crash (drop what they do) at
/// any time.
#[tokio::test(start_paused = true)]
async fn a_name_has_one_owner_whatever_fails() {
    for seed in 0..200 {
        let sim = SimStore::new();
        let faults = Faults { before: 150, after: 150, late: 50, delay_ms_max: 100, late_ms_max: 1_000 };
        let racers = (0..4).map(|racer| {
            let store = sim.client(seed * 4 + racer, faults).store();
            async move {
                let patience = Duration::from_millis(if racer == 0 { 400 } else { 100_000 });
                let created = tokio::time::timeout(patience, create_tenant(&store, facts("acme"), first_timeline().1)).await;
                created.ok().map(|created| created.map(|log| log.state().facts().unwrap().id))
            }
        });
        let outcomes = join_all(racers).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let store = sim.reliable();
        let owner = names::lookup(&store, &"acme".parse().unwrap()).await.unwrap();
        for outcome in outcomes.into_iter().flatten() {
            match outcome {
                Ok(tenant) => assert_eq!(owner, Some(tenant), "seed {seed}: a tenant that was reported as created has its name"),
                Err(CreateTenantError::NameTaken(_)) => assert!(owner.is_some(), "seed {seed}: the name was said to be taken"),
                Err(_) => {}
            }
        }
        if let Some(owner) = owner {
            let log = TenantLog::take_over(&store, &tenant_folder(owner).unwrap()).await.unwrap();
            assert!(log.is_some_and(|log| log.state().branch_count() == 1), "seed {seed}: whose name exists, exists whole");
        }
    }
}

#[tokio::test]
async fn ten_thousand_branches() {
    many_branches(10_000).await;
}

#[tokio::test]
#[ignore = "takes half a minute: cargo test -p varve-storage --test it tenant_log:: -- --ignored --nocapture"]
async fn a_hundred_thousand_branches() {
    many_branches(100_000).await;
}

async fn many_branches(count: usize) {
    let sim = SimStore::new();
    let (main, first_day) = first_timeline();
    let log = create_tenant(&sim.reliable(), facts("acme"), first_day).await.unwrap();
    let mut slowest = Duration::ZERO;
    let began = Instant::now();
    for number in 1..count {
        let one = Instant::now();
        create_branch(&log, &format!("branch-{number}"), main).await.unwrap();
        slowest = slowest.max(one.elapsed());
    }
    let each = began.elapsed() / count as u32;
    let began = Instant::now();
    let next = TenantLog::take_over(&sim.reliable(), &tenant_folder(log.state().facts().unwrap().id).unwrap()).await.unwrap().unwrap();
    let opened = began.elapsed();
    assert_eq!(next.state().branch_count(), count);
    assert_eq!(next.state().next_tli().unwrap() as usize, count + 1);
    let stored: usize = sim.objects().values().map(bytes::Bytes::len).sum();
    println!("{count} branches: {each:?} each with all snapshots, slowest {slowest:?}, opened in {opened:?}, {stored} bytes stored");
    assert!(each < Duration::from_millis(1), "creating a branch must take less than 1 ms of CPU, it took {each:?}");
    assert!(sim.objects().len() < 3_000, "snapshots bound the log's length, there are {} objects", sim.objects().len());
}

/// Prints what creating costs in a local folder with fsync.
#[tokio::test]
async fn creating_is_quick_in_a_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open_folder(folder.path()).unwrap();
    let (mut tenants, mut branches) = (Vec::new(), Vec::new());
    for number in 0..20 {
        let (main, first_day) = first_timeline();
        let began = Instant::now();
        let log = create_tenant(&store, facts(&format!("tenant{number}")), first_day).await.unwrap();
        tenants.push(began.elapsed());
        for branch in 0..5 {
            let began = Instant::now();
            create_branch(&log, &format!("b{branch}"), main).await.unwrap();
            branches.push(began.elapsed());
        }
    }
    tenants.sort();
    branches.sort();
    println!("local folder: a tenant in {:?} (median), a branch in {:?}", tenants[tenants.len() / 2], branches[branches.len() / 2]);
}
