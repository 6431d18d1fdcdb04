//! Idempotency keys: done once, answered alike, over restarts, too.

use std::collections::BTreeSet;

use varve_api::Code;
use varve_api::admin::{NewBranch, NewCompute, NewTenant, Restore};
use varve_control::Call;
use varve_control::arguments::Page;

use crate::world::{World, code, keyed, server};

#[tokio::test(start_paused = true)]
async fn a_branch_is_made_once_and_answered_alike_after_a_restart() {
    let mut world = World::with_tenant().await;
    let new = NewBranch { name: "dev".to_owned(), ..NewBranch::default() };
    let first = world.plane.create_branch(&keyed("k1", "dev"), "acme", &new).await.unwrap();
    for _ in 0..2 {
        let again = world.plane.create_branch(&keyed("k1", "dev"), "acme", &new).await.unwrap();
        assert_eq!(again.timeline_id, first.timeline_id);
        world.restart().await;
    }
    assert_eq!(code(world.plane.create_branch(&keyed("k1", "other"), "acme", &new).await), Code::KeyReused);
    assert_eq!(code(world.plane.create_branch(&keyed("k2", "dev"), "acme", &new).await), Code::NameTaken);
}

#[tokio::test(start_paused = true)]
async fn calls_at_once_with_one_key_do_it_once() {
    let world = World::with_tenant().await;
    let timeline = world.timeline("main").await;
    world.pageserver.written.lock().insert(timeline, 0x100);
    let back = Restore { lsn: Some("0/1000010".to_owned()), ..Restore::default() };
    let call = keyed("k", "restore");
    let all = futures::future::join_all((0..5).map(|_| world.plane.restore_branch(&call, "acme", "main", &back))).await;
    let befores: BTreeSet<String> = all.into_iter().map(|done| done.unwrap().before.name).collect();
    assert_eq!(befores.len(), 1);
    assert_eq!(world.plane.list_branches("acme", &Page::default()).await.unwrap().items.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_is_made_once_even_where_the_first_try_broke_off() {
    let mut world = World::new().await;
    let new = |name: &str| NewTenant { name: name.to_owned(), pg_version: Some(15) };
    let first = world.plane.create_tenant(&keyed("k", "acme"), &new("acme")).await.unwrap();
    world.restart().await;
    let again = world.plane.create_tenant(&keyed("k", "acme"), &new("acme")).await.unwrap();
    assert_eq!((&again.id, &again.created_at), (&first.id, &first.created_at));
    assert_eq!(code(world.plane.create_tenant(&keyed("k", "other"), &new("acme")).await), Code::KeyReused);
    assert_eq!(code(world.plane.create_tenant(&keyed("k2", "acme"), &new("acme")).await), Code::NameTaken);
    // As if the first try had been killed between the log and the name.
    world.objects.set(&"names/acme".parse().unwrap(), None);
    world.restart().await;
    assert_eq!(code(world.plane.show_tenant("acme").await), Code::UnknownTenant);
    let second = world.plane.create_tenant(&keyed("k", "acme"), &new("acme")).await.unwrap();
    assert_eq!(world.plane.create_tenant(&keyed("k", "acme"), &new("acme")).await.unwrap().id, second.id);
    assert_eq!(world.plane.show_tenant("acme").await.unwrap().id, second.id);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_is_made_once_by_two_servers_at_once() {
    let world = World::new().await;
    let (_, other) = server(&world.store, "b");
    let new = NewTenant { name: "acme".to_owned(), pg_version: Some(15) };
    let call = keyed("k", "acme");
    let (one, two) = futures::future::join(world.plane.create_tenant(&call, &new), other.create_tenant(&call, &new)).await;
    assert_eq!(one.unwrap().id, two.unwrap().id);
}

#[tokio::test(start_paused = true)]
async fn a_key_makes_no_tenant_that_was_deleted_again() {
    let mut world = World::new().await;
    let new = NewTenant { name: "acme".to_owned(), pg_version: Some(15) };
    let first = world.plane.create_tenant(&keyed("k", "acme"), &new).await.unwrap();
    world.plane.delete_tenant(&Call::default(), "acme").await.unwrap();
    world.restart().await;
    let second = world.plane.create_tenant(&keyed("k", "acme"), &new).await.unwrap();
    assert_ne!(second.id, first.id);
}

#[tokio::test(start_paused = true)]
async fn a_throw_away_compute_is_started_once_a_key() {
    let world = World::with_tenant().await;
    let past = NewCompute { lsn: Some("0/1000000".to_owned()), ..NewCompute::default() };
    let start = async |key: &str| world.plane.ensure_running(&keyed(key, "past"), "acme", "main", &past).await.unwrap().compute;
    let (first, again, other) = (start("k").await, start("k").await, start("k2").await);
    assert_eq!((&first.id, &first.conninfo), (&again.id, &again.conninfo));
    assert_ne!(other.id, first.id);
    assert_eq!(world.host.did("start"), 2);
}

#[tokio::test(start_paused = true)]
async fn deletions_and_stops_are_answered_alike() {
    let world = World::with_tenant().await;
    world.branch("dev").await.unwrap();
    let deleted = world.plane.delete_branch(&keyed("k", "dev"), "acme", "dev").await.unwrap();
    assert_eq!(world.plane.delete_branch(&keyed("k", "dev"), "acme", "dev").await.unwrap(), deleted);
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.plane.stop_compute(&keyed("s", "stop"), &compute.id).await.unwrap();
    let gone = world.plane.delete_tenant(&keyed("t", "acme"), "acme").await.unwrap();
    assert_eq!(world.plane.delete_tenant(&keyed("t", "acme"), "acme").await.unwrap(), gone);
    assert_eq!(code(world.plane.delete_tenant(&keyed("t", "other"), "acme").await), Code::KeyReused);
}
