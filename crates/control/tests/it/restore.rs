//! Restores and deletions: one commit, which the compute follows whatever dies.

use std::sync::atomic::Ordering;
use std::time::Duration;

use varve_api::Code;
use varve_api::admin::{NewCompute, Restore};
use varve_control::Call;
use varve_control::arguments::Page;

use crate::world::{World, code};

fn back() -> Restore {
    Restore { lsn: Some("0/1000010".to_owned()), ..Restore::default() }
}

/// A running compute that wrote something.
async fn written() -> (World, String) {
    let world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    let timeline = world.timeline("main").await;
    world.pageserver.written.lock().insert(timeline, 0x100);
    (world, compute.id)
}

/// What must hold whatever happened: the compute serves the timeline that its branch's name points to, and only that
/// has a stream.
async fn the_name_is_what_is_served(world: &World, compute: &str) {
    let timeline = world.timeline("main").await;
    let followed = |world: &World| {
        let served = world.host.serves(compute).is_some_and(|(served, _)| served == timeline.to_string());
        served && world.pageserver.stream(timeline).is_some()
    };
    world.until("the compute serves its branch's timeline", followed).await;
    for branch in world.plane.list_branches("acme", &Page::default()).await.unwrap().items {
        let streams = world.pageserver.stream(branch.timeline_id.parse().unwrap()).is_some();
        assert_eq!(streams, branch.name == "main", "{} acknowledges", branch.name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_restore_is_one_commit_and_the_compute_follows() {
    let (world, compute) = written().await;
    let (old, objects) = (world.timeline("main").await, world.objects.objects().len());
    let restored = world.plane.restore_branch(&Call::default(), "acme", "main", &back()).await.unwrap();
    assert_eq!(world.objects.objects().len(), objects + 2, "the move, and the compute's next epoch");
    assert_eq!(restored.before.timeline_id, old.to_string());
    assert!(restored.before.name.starts_with("main_before_20"), "{}", restored.before.name);
    assert_eq!(restored.branch.branch_lsn.as_deref(), Some("0/1000010"));
    the_name_is_what_is_served(&world, &compute).await;
    assert_eq!(world.plane.show_compute(&compute).await.unwrap().state, "running");
}

#[tokio::test(start_paused = true)]
async fn killed_before_the_commit_nothing_has_moved() {
    let (mut world, compute) = written().await;
    let old = world.timeline("main").await;
    world.pageserver.dies_in_end_stream.store(true, Ordering::SeqCst);
    let (call, back) = (Call::default(), back());
    let restore = world.plane.restore_branch(&call, "acme", "main", &back);
    assert!(tokio::time::timeout(Duration::from_secs(5), restore).await.is_err());
    assert_eq!(world.pageserver.stream(old), None, "its stream was ended");
    world.restart().await;
    assert_eq!(world.timeline("main").await, old);
    the_name_is_what_is_served(&world, &compute).await;
}

#[tokio::test(start_paused = true)]
async fn killed_after_the_commit_the_compute_finds_its_branch_elsewhere() {
    let (mut world, compute) = written().await;
    let old = world.timeline("main").await;
    // The compute cannot be told: it is not connected. Then the server dies.
    world.host.disconnect();
    let (call, back) = (Call::default(), back());
    let restore = world.plane.restore_branch(&call, "acme", "main", &back);
    assert!(tokio::time::timeout(Duration::from_secs(5), restore).await.is_err());
    assert_ne!(world.timeline("main").await, old, "it is committed");
    assert_eq!(world.host.serves(&compute).unwrap().0, old.to_string(), "and the compute knows nothing of it");
    world.restart().await;
    the_name_is_what_is_served(&world, &compute).await;
}

#[tokio::test(start_paused = true)]
async fn after_a_commit_that_fails_the_compute_attaches_again() {
    let (world, compute) = written().await;
    let old = world.timeline("main").await;
    // Another server has claimed the log: the commit is fenced. This one does not know who it was, and asks again.
    let tenant = world.tenant_id().await;
    let attached = world.pageserver.times("attach");
    let taken = varve_storage::tenant_log::take_over(&world.store, tenant, "b", "http://b").await.unwrap().unwrap();
    let refused = world.plane.restore_branch(&Call::default(), "acme", "main", &back()).await;
    assert_eq!(code(refused), Code::NotOwner);
    assert_eq!(taken.state().branch("main").unwrap().facts.id, old, "nothing moved");
    assert_eq!(world.pageserver.stream(old), None, "what was ended stays ended until the compute attaches");
    world.until("it attached again", |world| world.pageserver.times("attach") > attached).await;
    assert_eq!(world.host.serves(&compute).unwrap().0, old.to_string());
}

#[tokio::test(start_paused = true)]
async fn the_last_branch_stays_and_old_histories_can_go() {
    let (world, compute) = written().await;
    assert_eq!(code(world.plane.delete_branch(&Call::default(), "acme", "main").await), Code::LastBranch);
    assert!(world.host.serves(&compute).is_some(), "nobody was stopped for that");
    let restored = world.plane.restore_branch(&Call::default(), "acme", "main", &back()).await.unwrap();
    world.plane.delete_branch(&Call::default(), "acme", &restored.before.name).await.unwrap();
    assert_eq!(world.pageserver.times("remove"), 0, "main's history stands on it: it stays without a name");
    assert_eq!(world.plane.list_branches("acme", &Page::default()).await.unwrap().items.len(), 1);
    the_name_is_what_is_served(&world, &compute).await;
    world.branch("dev").await.unwrap();
    world.plane.delete_branch(&Call::default(), "acme", "main").await.unwrap();
    assert!(!world.host.has(&compute), "a deleted branch's compute is gone with its folder");
    assert_eq!(code(world.plane.show_branch("acme", "main").await), Code::UnknownBranch);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_tenant_is_gone_and_its_name_free() {
    let (world, compute) = written().await;
    let tenant = world.tenant_id().await;
    world.plane.delete_tenant(&Call::default(), "acme").await.unwrap();
    assert!(!world.host.has(&compute));
    assert_eq!(world.objects.objects().len(), 0);
    assert_eq!(code(world.plane.show_tenant("acme").await), Code::UnknownTenant);
    assert_eq!(code(world.plane.show_tenant(&tenant.to_string()).await), Code::UnknownTenant);
    world.create("acme").await;
}
