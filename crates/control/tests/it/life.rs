//! A compute's life: started once, left alone, replaced on purpose, stopped and nothing lost.

use std::sync::atomic::Ordering;
use std::time::Duration;

use varve_api::Code;
use varve_api::admin::{NewCompute, NewTenant};
use varve_control::Call;

use crate::host::FakeHost;
use crate::world::{World, code, server};

fn port(port: u16) -> NewCompute {
    NewCompute { port: Some(port), ..NewCompute::default() }
}

#[tokio::test(start_paused = true)]
async fn running_already_is_an_answer_and_other_arguments_are_refused() {
    let world = World::with_tenant().await;
    let (first, fresh) = world.start("main", port(6001)).await.unwrap();
    assert!(fresh && first.state == "running" && first.port == 6001 && first.conninfo.contains(":6001/"), "{first:?}");
    for new in [NewCompute::default(), port(6001)] {
        let (again, fresh) = world.start("main", new).await.unwrap();
        assert_eq!((again.id, fresh), (first.id.clone(), false));
    }
    let error = world.start("main", port(6002)).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyRunning);
    assert!(error.to_string().contains("--replace") && error.to_string().contains("6001"), "{error}");
    assert_eq!(world.pageserver.times("begin"), 1, "nobody was fenced");
}

#[tokio::test(start_paused = true)]
async fn many_at_once_start_it_once() {
    let world = World::with_tenant().await;
    let all = futures::future::join_all((0..20).map(|_| world.start("main", NewCompute::default()))).await;
    let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
    assert_eq!(all.iter().filter(|(_, fresh)| *fresh).count(), 1);
    assert!(all.iter().all(|(compute, _)| compute.id == all[0].0.id));
    assert_eq!(world.host.did("start"), 1);
}

#[tokio::test(start_paused = true)]
async fn replacing_keeps_the_id_and_looks_at_the_arguments_first() {
    let world = World::with_tenant().await;
    let (first, _) = world.start("main", port(6001)).await.unwrap();
    let before = world.host.serves(&first.id).unwrap();
    world.host.behave(|manners| manners.taken = vec![6002]);
    let replace = |port| NewCompute { replace: true, port: Some(port), ..NewCompute::default() };
    assert_eq!(code(world.start("main", replace(6002)).await), Code::PortInUse);
    assert_eq!(world.host.serves(&first.id).unwrap(), before, "the running one was left alone");
    assert_eq!(world.plane.show_compute(&first.id).await.unwrap().port, 6001);
    let (second, fresh) = world.start("main", replace(6003)).await.unwrap();
    assert_eq!((&second.id, second.port, fresh), (&first.id, 6003, true));
    assert!(world.host.serves(&first.id).unwrap().1 > before.1, "another incarnation");
    assert_eq!(world.host.did("start"), 1, "in the same process");
}

#[tokio::test(start_paused = true)]
async fn a_refused_start_leaves_nothing_behind() {
    let world = World::with_tenant().await;
    let objects = world.objects.objects();
    world.host.behave(|manners| manners.taken = vec![6002]);
    assert_eq!(code(world.start("main", port(6002)).await), Code::PortInUse);
    let listen = NewCompute { listen: Some("no address".to_owned()), ..NewCompute::default() };
    assert_eq!(code(world.start("main", listen).await), Code::InvalidArgument);
    assert_eq!(code(world.start("main", port(0)).await), Code::InvalidArgument);
    assert_eq!(world.objects.objects(), objects, "nothing was written");
    assert_eq!(world.pageserver.times("begin"), 0, "nobody was fenced");
    assert!(world.plane.list_computes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_stays_the_same_over_stop_start_rename_and_restart() {
    let mut world = World::with_tenant().await;
    let (first, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.plane.stop_compute(&Call::default(), &first.id).await.unwrap();
    assert!(!world.host.has(&first.id), "it ended cleanly, so its folder goes");
    let (second, _) = world.start("main", NewCompute::default()).await.unwrap();
    assert_eq!((&second.id, second.port), (&first.id, first.port));
    world.plane.rename_branch(&Call::default(), "acme", "main", "trunk").await.unwrap();
    assert_eq!(world.plane.show_compute(&first.id).await.unwrap().branch, "acme/trunk");
    world.restart().await;
    let id = first.id.clone();
    let runs = move |world: &World| world.plane.list_computes().iter().any(|compute| compute.id == id && compute.state == "running");
    world.until("it attached to the new server", runs).await;
    let (third, fresh) = world.start("trunk", NewCompute::default()).await.unwrap();
    assert_eq!((third.id, third.port, fresh), (first.id, first.port, false));
    assert_eq!(world.host.did("start"), 2, "the restart started nothing");
    assert_eq!(world.pageserver.times("begin"), 0, "and fenced nobody");
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_is_not_clean_is_no_success_and_keeps_the_folder() {
    let world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.host.behave(|manners| manners.unclean = true);
    let error = world.plane.stop_compute(&Call::default(), &compute.id).await.unwrap_err();
    assert_eq!(error.code(), Code::NotClean);
    assert!(error.to_string().contains("pg_wal"), "{error}");
    assert!(world.host.has(&compute.id) && world.host.did("Remove") == 0, "its pg_wal is kept");
    world.host.behave(|manners| manners.unclean = false);
    let (again, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.pageserver.cannot_close.store(true, Ordering::SeqCst);
    let stopped = world.plane.stop_compute(&Call::default(), &again.id).await;
    assert_eq!(code(stopped), Code::NotClean, "Postgres' word is not enough");
    assert!(world.host.has(&compute.id) && world.host.did("Remove") == 0);
}

#[tokio::test(start_paused = true)]
async fn a_compute_at_a_moment_is_thrown_away() {
    let world = World::with_tenant().await;
    let timeline = world.timeline("main").await;
    world.pageserver.written.lock().insert(timeline, 0x100);
    let past = NewCompute { lsn: Some("0/1000010".to_owned()), ..NewCompute::default() };
    let (one, _) = world.start("main", past.clone()).await.unwrap();
    let (two, _) = world.start("main", past).await.unwrap();
    assert_ne!(one.id, two.id);
    assert_eq!(one.lsn.as_deref(), Some("0/1000010"));
    assert_eq!(world.pageserver.times("begin"), 0, "it writes nothing");
    world.host.behave(|manners| manners.unclean = true);
    world.plane.stop_compute(&Call::default(), &one.id).await.unwrap();
    assert!(!world.host.has(&one.id) && world.host.has(&two.id));
    let left = world.plane.list_branch_computes("acme", "main").await.unwrap();
    assert_eq!(left.len(), 1);
    assert!(left[0].conninfo.starts_with("postgresql://postgres@"), "lists have no passwords: {}", left[0].conninfo);
    assert!(world.plane.show_compute(&two.id).await.unwrap().conninfo.starts_with("postgresql://postgres:"));
}

#[tokio::test(start_paused = true)]
async fn a_compute_that_does_not_start_says_why_and_is_not_wanted() {
    let mut world = World::with_tenant().await;
    world.host.behave(|manners| manners.broken = true);
    let error = world.start("main", NewCompute::default()).await.unwrap_err();
    assert!(error.to_string().contains("Postgres does not start"), "{error}");
    assert_eq!(world.host.did("Remove"), 0, "who began and did not end cleanly keeps its pg_wal");
    world.host.behave(|manners| manners.broken = false);
    world.restart().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(world.host.did("start"), 1, "nobody starts it by himself");
    world.start("main", NewCompute::default()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_tenant_that_was_lost_is_not_taken_back_and_nothing_of_it_removed() {
    let world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    let (other, plane) = server(&world.store, "b");
    let dev = varve_api::admin::NewBranch { name: "dev".to_owned(), ..Default::default() };
    let tenant = world.tenant_id().await;
    plane.create_branch(&Call::default(), "acme", &dev).await.unwrap();
    world.pageserver.loses(tenant, &other);
    world.plane.end_what_was_lost();
    world.until("the compute is ended", |world| world.host.serves(&compute.id).is_none()).await;
    let listed = world.plane.list_computes();
    assert_eq!(listed[0].state, "failed");
    assert!(listed[0].error.as_ref().unwrap().contains("http://b:9898"), "{listed:?}");
    let error = world.plane.stop_compute(&Call::default(), &compute.id).await.unwrap_err();
    assert_eq!(error.code(), Code::NotOwner);
    assert!(error.to_string().contains("http://b:9898"), "{error}");
    assert!(world.host.has(&compute.id) && world.host.did("Remove") == 0, "its pg_wal is kept");
    assert_eq!(world.plane.server().lost.len(), 1);
    assert!(world.plane.ready().await.unwrap().ready, "it is ready for other tenants");
    let shown = world.plane.show_tenant("acme").await.unwrap().owner.unwrap();
    assert_eq!((shown.server.as_str(), shown.here), ("b", false));
    assert_eq!(world.pageserver.times("own"), 0, "it was not taken back");
}

#[tokio::test(start_paused = true)]
async fn a_second_host_does_not_keep_what_moved() {
    let world = World::with_tenant().await;
    let (compute, _) = world.start("main", NewCompute::default()).await.unwrap();
    world.host.disconnect();
    // The host is away for so long that it counts as gone; its clock is the real one's.
    let (_, plane) = server(&world.store, "a");
    let second = FakeHost::new(0xb2);
    second.connect(&plane).await;
    let (moved, _) = {
        let new = NewCompute { replace: true, ..NewCompute::default() };
        let started = plane.ensure_running(&Call::default(), "acme", "main", &new).await.unwrap();
        (started.compute, started.fresh)
    };
    assert_eq!(moved.id, compute.id);
    let serves = second.serves(&compute.id).unwrap();
    world.host.connect(&plane).await;
    world.until("the old host ended its own", |world| world.host.did("End") == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(second.serves(&compute.id).unwrap(), serves, "the new one was not disturbed");
    assert!(world.host.has(&compute.id), "what the old one has is kept");
}

#[tokio::test(start_paused = true)]
async fn templates_are_made_by_a_host_once() {
    let world = World::new().await;
    let call = Call::default();
    let new = |name: &str, pg_version| NewTenant { name: name.to_owned(), pg_version };
    world.host.behave(|manners| manners.broken = true);
    let error = world.plane.create_tenant(&call, &new("a", Some(14))).await.unwrap_err();
    assert!(error.to_string().contains("no space left"), "{error}");
    world.host.behave(|manners| manners.broken = false);
    let news = ["a", "b", "c"].map(|name| new(name, Some(14)));
    let made = futures::future::join_all(news.iter().map(|new| world.plane.create_tenant(&call, new))).await;
    assert!(made.iter().all(Result::is_ok), "{made:?}");
    assert_eq!(world.pageserver.times("import 14"), 1);
    let error = world.plane.create_tenant(&call, &new("d", Some(9))).await.unwrap_err();
    assert!(error.code() == Code::HostUnfit && error.to_string().contains("PostgreSQL 9"), "{error}");
    assert_eq!(world.plane.create_tenant(&call, &new("d", None)).await.unwrap().pg_version, 15, "the newest that there is");
}
