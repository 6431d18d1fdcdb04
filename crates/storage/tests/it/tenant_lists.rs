//! Lists of tenants: page by page, in order of names, without taking anything over. With ten thousand tenants, what
//! the first page costs: `cargo test --release -p varve-storage --test tenant_lists -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use varve_postgres::Lsn;
use varve_storage::ids::{TenantId, TenantName, TimelineId};
use varve_storage::store::Store;
use varve_storage::tenant_log::{self, TenantEdit, TenantFacts, TenantLog, TimelineFacts, create_tenant, names, tenant_folder};
use varve_testbed::minio::Minio;

async fn create(store: &Store, name: &str) -> TenantId {
    let facts = TenantFacts {
        id: TenantId::random().unwrap(),
        name: name.parse().unwrap(),
        pg_version: 15,
        system_identifier: 1,
        created: 0,
        template: "templates/15".to_owned(),
        password: "secret".to_owned(),
        password_verifier: "SCRAM-SHA-256$4096:x$y:z".to_owned(),
    };
    let id = TimelineId::random().unwrap();
    let timeline = TimelineFacts { id, ancestor: None, tli: 1, start: Lsn(0x150_0000), created: 0 };
    let others = vec![TenantEdit::Timeline(timeline), TenantEdit::Branch { name: "main".parse().unwrap(), timeline: id }];
    create_tenant(store, facts, others).await.unwrap().state().facts().unwrap().id
}

/// Objects of all tenants.
async fn object_count(store: &Store) -> usize {
    store.list(&"tenants".parse().unwrap()).await.unwrap().len()
}

async fn lists_page_by_page(store: &Store) {
    assert_eq!(names::page(store, "", None, 10).await.unwrap(), names::NamesPage::default(), "no tenants, no folder");
    let mut ids = Vec::new();
    for name in ["acme", "acme-2", "acme.1", "beta", "zeta"] {
        ids.push(create(store, name).await);
    }
    let page = async |prefix: &str, after: Option<&str>, limit: usize| {
        let after: Option<TenantName> = after.map(|after| after.parse().unwrap());
        let page = names::page(store, prefix, after.as_ref(), limit).await.unwrap();
        let texts: Vec<String> = page.tenants.iter().map(|(name, _)| name.to_string()).collect();
        (texts.join(" "), page.next.map(|next| next.to_string()).unwrap_or_default())
    };
    let expect = |names: &str, next: &str| (names.to_owned(), next.to_owned());
    assert_eq!(page("", None, 2).await, expect("acme acme-2", "acme-2"));
    assert_eq!(page("", Some("acme-2"), 2).await, expect("acme.1 beta", "beta"));
    assert_eq!(page("", Some("beta"), 2).await, expect("zeta", ""));
    assert_eq!(page("", None, 5).await, expect("acme acme-2 acme.1 beta zeta", ""));
    assert_eq!(page("acme", None, 1).await, expect("acme", "acme"), "a prefix that is a name is one of them");
    assert_eq!(page("acme", Some("acme"), 9).await, expect("acme-2 acme.1", ""));
    assert_eq!(page("acme-", None, 9).await, expect("acme-2", ""));
    assert_eq!(page("b", Some("a"), 9).await, expect("beta", ""));
    assert_eq!(page("x", None, 9).await, expect("", ""));
    assert_eq!(page("", Some("zeta"), 9).await, expect("", ""));
    let owned = names::page(store, "", None, 5).await.unwrap().tenants;
    assert_eq!(owned.iter().map(|(_, id)| *id).collect::<Vec<_>>(), ids);

    let before = object_count(store).await;
    let nobody = TenantId::random().unwrap();
    let read = tenant_log::read_all(store, &[ids[3], nobody, ids[0]]).await;
    let read: Vec<Option<String>> =
        read.into_iter().map(|state| state.unwrap().map(|state| state.facts().unwrap().name.to_string())).collect();
    assert_eq!(read, [Some("beta".to_owned()), None, Some("acme".to_owned())]);
    assert_eq!(object_count(store).await, before, "a list writes nothing");
    let log = TenantLog::take_over(store, &tenant_folder(ids[0]).unwrap()).await.unwrap().unwrap();
    assert_eq!(log.ownership().generation.0, 2, "nobody had taken it over");
}

#[tokio::test]
async fn a_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    lists_page_by_page(&Store::open_folder(folder.path()).unwrap()).await;
}

#[tokio::test]
async fn minio() {
    let Some(minio) = Minio::start_unless_skipped() else { return };
    lists_page_by_page(&minio.store("lists-test").unwrap()).await;
}

/// Makes `count` tenants, and says what the first hundred cost to list with each one's state: the best of ten.
async fn measure(what: &str, store: &Store, count: usize) -> Duration {
    let began = Instant::now();
    stream::iter(0..count)
        .for_each_concurrent(64, |number| async move {
            let _id = create(store, &format!("tenant-{number:06}")).await;
        })
        .await;
    println!("{what}: {count} tenants made in {:?}", began.elapsed());
    let mut best = (Duration::MAX, Duration::MAX);
    for _ in 0..10 {
        let began = Instant::now();
        let page = names::page(store, "", None, 100).await.unwrap();
        let named = began.elapsed();
        let ids: Vec<TenantId> = page.tenants.iter().map(|(_, id)| *id).collect();
        let read = tenant_log::read_all(store, &ids).await;
        assert_eq!(read.into_iter().filter_map(Result::unwrap).filter(|state| state.branch_count() == 1).count(), 100);
        best = best.min((began.elapsed(), named));
    }
    println!("{what}: the first 100 of {count} in {:?}, of that their names in {:?}", best.0, best.1);
    best.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "makes ten thousand tenants"]
async fn the_first_page_of_ten_thousand_in_a_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    let took = measure("local folder", &Store::open_folder(folder.path()).unwrap(), 10_000).await;
    assert!(took < Duration::from_millis(50), "the first page took {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "makes ten thousand tenants"]
async fn the_first_page_of_ten_thousand_on_minio() {
    let Some(minio) = Minio::start_unless_skipped() else { return };
    let took = measure("MinIO", &minio.store("lists-test").unwrap(), 10_000).await;
    assert!(took < Duration::from_millis(300), "the first page took {took:?}");
}
