//! What broke off is gone on with, and what is asked at a bad moment decides nothing.

use std::time::Duration;

use varve_api::Code;
use varve_api::admin::NewCompute;
use varve_control::Call;
use varve_control::ports::Pageserver as _;
use varve_storage::tenant_log::TenantEdit;
use varve_testing::sim_store::{Faults, Link, SimStore};

use crate::host::FakeHost;
use crate::world::{World, code, server, server_that_reads};

/// The states of the computes of `acme/main`, asked of a server that was just started.
async fn states(world: &World) -> Vec<String> {
    let listed = world.plane.list_branch_computes("acme", "main").await.unwrap();
    listed.into_iter().map(|compute| compute.state).collect()
}

#[tokio::test(start_paused = true)]
async fn a_compute_that_was_listed_before_its_host_said_hello_is_started() {
    let mut world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.host.disconnect();
    world.host.kill_processes();
    (world.pageserver, world.plane) = server(&world.store, "a");
    assert_eq!(states(&world).await, ["unknown"]);
    world.host.connect(&world.plane).await;
    world.until("it serves again", |world| world.host.serves(&compute.id).is_some()).await;
    assert_eq!(states(&world).await, ["running"]);
}

#[tokio::test(start_paused = true)]
async fn a_compute_that_was_listed_and_attached_before_its_host_said_hello_is_started_after_its_next_crash() {
    let mut world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.host.disconnect();
    (world.pageserver, world.plane) = server(&world.store, "a");
    assert_eq!(states(&world).await, ["unknown"]);
    world.host.meet(&world.plane);
    world.until("it attached", |world| world.plane.list_computes()[0].state == "running").await;
    world.host.connect(&world.plane).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.host.did("start"), 1, "it was left alone");
    world.host.kill_processes();
    world.host.connect(&world.plane).await;
    world.until("it serves again", |world| world.host.serves(&compute.id).is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_broke_off_is_gone_on_with() {
    let mut world = World::with_tenant().await;
    let id = world.tenant_id().await;
    let named = |world: &World| world.objects.objects().into_keys().filter(|name| name.as_str().contains(&id.to_string())).count();
    // As if the server had been killed right after the commit.
    world.pageserver.owned(id).unwrap().push(vec![TenantEdit::TenantRemoved]).await.unwrap();
    world.restart().await;
    assert_eq!(code(world.plane.show_tenant("acme").await), Code::UnknownTenant);
    assert_eq!(world.plane.delete_tenant(&Call::default(), "acme").await.unwrap().deleted, "acme");
    assert_eq!(named(&world), 0, "its objects are gone");
    assert_eq!(code(world.plane.delete_tenant(&Call::default(), "acme").await), Code::UnknownTenant);
    assert_eq!(code(world.plane.delete_tenant(&Call::default(), &id.to_string()).await), Code::UnknownTenant);
    assert_ne!(world.create("acme").await, id.to_string(), "its name is free");
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_broke_off_behind_the_name_leaves_the_names_new_tenant_alone() {
    let mut world = World::with_tenant().await;
    let id = world.tenant_id().await;
    world.pageserver.owned(id).unwrap().push(vec![TenantEdit::TenantRemoved]).await.unwrap();
    world.objects.set(&"names/acme".parse().unwrap(), None);
    world.restart().await;
    let new = world.create("acme").await;
    world.plane.delete_tenant(&Call::default(), &id.to_string()).await.unwrap();
    assert_eq!(world.plane.show_tenant("acme").await.unwrap().id, new);
    assert!(world.objects.objects().into_keys().all(|name| !name.as_str().contains(&id.to_string())));
}

#[tokio::test(start_paused = true)]
async fn the_former_host_of_a_compute_that_moved_is_told_to_end_it() {
    let world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    let second = FakeHost::new(0xb2);
    second.connect(&world.plane).await;
    world.host.disconnect();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let new = NewCompute { replace: true, ..NewCompute::default() };
    let (moved, _) = world.start("main", new).await.unwrap();
    assert_eq!(moved.id, compute.id);
    let serves = second.serves(&compute.id).unwrap();
    world.host.connect(&world.plane).await;
    world.until("the former host ended it", |world| world.host.did("End") == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((world.host.did("start"), world.host.did("End")), (1, 1), "once and for all");
    assert!(world.host.has(&compute.id), "what it has is kept");
    assert_eq!(second.serves(&compute.id).unwrap(), serves, "the new host was not disturbed");
}

#[tokio::test(start_paused = true)]
async fn a_start_counts_more_than_what_was_read_of_the_log_before_it() {
    let world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.host.behave(|manners| manners.unclean = true);
    assert_eq!(code(world.plane.stop_compute(&Call::default(), &compute.id).await), Code::NotClean);
    world.host.behave(|manners| manners.unclean = false);
    let tenant = world.tenant_id().await;
    world.host.disconnect();
    // What the new control plane reads comes late, and is from before the start.
    let stale = SimStore::new();
    world.objects.objects().into_iter().for_each(|(name, bytes)| stale.set(&name, Some(bytes)));
    let slow = stale.client(1, Faults::default());
    slow.set_link(Link::Frozen);
    let (pageserver, plane) = server_that_reads(&slow.store(), &world.store, "a");
    let ended = |world: &World| world.host.did("End") + world.host.did("Remove");
    let before = ended(&world);
    world.host.connect(&plane).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    pageserver.own(tenant, "the test").await.unwrap();
    plane.ensure_running(&Call::default(), &tenant.to_string(), "main", &NewCompute::default()).await.unwrap();
    let serves = world.host.serves(&compute.id);
    assert!(serves.is_some());
    slow.set_link(Link::Up);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((ended(&world), world.host.serves(&compute.id)), (before, serves));
}

#[tokio::test(start_paused = true)]
async fn a_tenant_is_not_taken_for_a_compute_that_no_host_can_run() {
    let world = World::with_tenant().await;
    let (pageserver, plane) = server(&world.store, "b");
    let start = async || plane.ensure_running(&Call::default(), "acme", "main", &NewCompute::default()).await;
    assert_eq!(code(start().await), Code::HostUnfit);
    let branch = plane.ensure_running(&Call::default(), "acme", "nosuch", &NewCompute::default()).await;
    assert_eq!(code(branch), Code::UnknownBranch);
    assert_eq!(pageserver.times("own"), 0, "it was not taken");
    let host = FakeHost::new(0xb2);
    host.connect(&plane).await;
    start().await.unwrap();
    assert_eq!(pageserver.times("own"), 1);
}
