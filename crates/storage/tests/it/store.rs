//! The object store keeps its promises: in a local folder, on MinIO, and over a client that fails as seeds say.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use varve_storage::store::{ClientError, Created, Failure, Listed, ObjectClient, ObjectName, PutMode, Store, StoreConfig, StoreError};
use varve_storage::threads::RuntimeThreads;
use varve_testbed::minio::Minio;
use varve_testing::sim_store::{Faults, Link, SimStore};

fn name(text: &str) -> ObjectName {
    text.parse().unwrap()
}

/// What every store must do.
async fn keeps_its_promises(store: &Store) {
    store.probe().await.expect("a good store passes the probe");
    assert_eq!(store.list(&name("probe")).await.unwrap(), [], "the probe leaves nothing behind");

    let object = name("a/b/c");
    assert!(store.get(&object).await.unwrap_err().is_not_found());
    assert_eq!(store.get_optional(&object).await.unwrap(), None);
    assert_eq!(store.put_if_absent(&object, Bytes::from_static(b"first")).await.unwrap(), Created::Ours);
    assert_eq!(store.put_if_absent(&object, Bytes::from_static(b"first")).await.unwrap(), Created::Ours, "our own write, found again");
    let taken = store.put_if_absent(&object, Bytes::from_static(b"second")).await.unwrap();
    assert_eq!(taken, Created::Taken(Bytes::from_static(b"first")));
    store.put(&object, Bytes::from_static(b"0123456789")).await.unwrap();
    assert_eq!(store.get(&object).await.unwrap(), "0123456789");
    assert_eq!(store.get_range(&object, 3..6).await.unwrap(), "345");
    assert_eq!(store.get_range(&object, 3..3).await.unwrap(), "");
    let error = store.get_range(&object, 8..12).await.unwrap_err();
    assert!(matches!(error, StoreError::Short { got: 2, .. }), "{error}");

    store.put(&name("a/b/d"), Bytes::from(vec![7; 3 << 20])).await.unwrap();
    store.put(&name("a/bb"), Bytes::new()).await.unwrap();
    let listed: Vec<_> = store.list(&name("a/b")).await.unwrap().into_iter().map(|l| (l.name.to_string(), l.bytes)).collect();
    assert_eq!(listed, [("a/b/c".to_owned(), 10), ("a/b/d".to_owned(), 3 << 20)]);
    for gone in ["a/b/c", "a/b/d", "a/bb", "never/was"] {
        store.delete(&name(gone)).await.unwrap();
    }
    assert_eq!(store.list(&name("a")).await.unwrap(), []);

    for race in 0..8 {
        let object = name(&format!("race/{race}"));
        let bodies: Vec<_> = (0..8).map(|racer| Bytes::from(format!("racer {racer}"))).collect();
        let outcomes = join_all(bodies.iter().map(|body| store.put_if_absent(&object, body.clone()))).await;
        let winner = store.get(&object).await.unwrap();
        for (body, outcome) in bodies.iter().zip(outcomes) {
            let expected = if *body == winner { Created::Ours } else { Created::Taken(winner.clone()) };
            assert_eq!(outcome.unwrap(), expected, "exactly the racer whose bytes are stored must be told that it won");
        }
    }
}

#[tokio::test]
async fn a_local_folder_keeps_the_promises() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let store = Store::open(root.to_str().unwrap(), &StoreConfig::default()).unwrap();
    keeps_its_promises(&store).await;

    store.put(&name("layers/x"), Bytes::from_static(b"in place")).await.unwrap();
    let path = store.local_path(&name("layers/x")).expect("objects of a folder can be read in place");
    assert_eq!(std::fs::read(path).unwrap(), b"in place");
    let again = Store::open(&format!("file://{}", root.display()), &StoreConfig::default()).unwrap();
    assert_eq!(again.get(&name("layers/x")).await.unwrap(), "in place");
}

#[tokio::test]
async fn minio_keeps_the_promises() {
    let Some(mut minio) = Minio::start_unless_skipped() else { return };
    keeps_its_promises(&minio.store("some/prefix").unwrap()).await;
    keeps_its_promises(&minio.store("").unwrap()).await;

    let bucket = Store::open("s3://no-such-bucket/x", &StoreConfig::from_variables(minio.variables())).unwrap();
    let error = bucket.probe().await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::StoreMissing), "{error}");
    assert!(error.to_string().contains("the bucket or root folder does not exist; create it"), "{error}");
    let missing = bucket.get(&name("a")).await.unwrap_err();
    assert_eq!(missing.failure(), Some(Failure::StoreMissing), "a read of a bucket that is not there: {missing}");

    let wrong_key = minio.variables().into_iter().map(|(k, v)| if k == "AWS_SECRET_ACCESS_KEY" { (k, "wrong".to_owned()) } else { (k, v) });
    let denied = Store::open(&minio.url("x"), &StoreConfig::from_variables(wrong_key)).unwrap();
    let error = denied.probe().await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::AccessDenied), "{error}");
    assert!(!error.is_uncertain() && error.to_string().contains("check the credentials"), "{error}");

    let store = minio.store("x").unwrap();
    minio.kill();
    let error = store.probe().await.unwrap_err();
    assert_eq!(error.failure(), Some(Failure::Unreachable), "{error}");
    assert!(error.to_string().contains("check its address (AWS_ENDPOINT_URL)"), "{error}");
}

#[test]
fn plain_threads_use_the_store() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open_folder(folder.path()).unwrap().blocking(Arc::new(RuntimeThreads::new(runtime.handle().clone())));
    let object = name("a/b");
    assert_eq!(store.put_if_absent(&object, Bytes::from_static(b"x")).unwrap(), Created::Ours);
    store.put(&object, Bytes::from_static(b"xyz")).unwrap();
    assert_eq!((store.get(&object).unwrap(), store.get_range(&object, 1..2).unwrap()), (Bytes::from("xyz"), Bytes::from("y")));
    assert_eq!(store.list(&name("a")).unwrap().len(), 1);
    store.delete(&object).unwrap();
    assert!(store.get(&object).unwrap_err().is_not_found());
}

#[test]
fn what_is_no_store_is_refused_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let nowhere = folder.path().join("no/parent");
    for (location, said) in [
        (file.to_str().unwrap(), "it is a file; name a folder"),
        (nowhere.to_str().unwrap(), "make it, or name another"),
        ("ftp://x/y", "expected the path of a folder, or s3://bucket/prefix"),
        ("s3:///prefix", "no bucket is named"),
        ("s3://bucket/../x y", "is not an object name"),
    ] {
        let error = Store::open(location, &StoreConfig::default()).unwrap_err().to_string();
        assert!(error.contains(location) && error.contains(said), "{location}: {error}");
    }
}

#[tokio::test]
async fn a_read_only_store_is_told_from_an_unreachable_one() {
    let sim = SimStore::new();
    for (failure, said) in [
        (Failure::ReadOnly, "the store is read-only"),
        (Failure::AccessDenied, "access was denied"),
        (Failure::NoSpace, "no space is left"),
        (Failure::Unsupported, "does not support conditional creates"),
    ] {
        let client = sim.client(0, Faults::default());
        client.set_link(Link::Failing(failure));
        let error = client.store().probe().await.unwrap_err();
        assert!(error.to_string().contains(said), "{failure:?}: {error}");
    }
}

/// A store whose create overwrites, as some that claim to speak S3 do.
#[derive(Debug)]
struct Careless(Arc<varve_testing::sim_store::SimClient>, AtomicUsize);

impl ObjectClient for Careless {
    fn put<'a>(&'a self, name: &'a ObjectName, bytes: Bytes, _mode: PutMode) -> BoxFuture<'a, Result<(), ClientError>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.put(name, bytes, PutMode::Overwrite)
    }
    fn get<'a>(&'a self, name: &'a ObjectName, range: Option<std::ops::Range<u64>>) -> BoxFuture<'a, Result<Bytes, ClientError>> {
        self.0.get(name, range)
    }
    fn delete<'a>(&'a self, name: &'a ObjectName) -> BoxFuture<'a, Result<(), ClientError>> {
        self.0.delete(name)
    }
    fn list<'a>(&'a self, _prefix: &'a ObjectName) -> BoxFuture<'a, Result<Vec<Listed>, ClientError>> {
        async { Ok(Vec::new()) }.boxed()
    }
}

#[tokio::test]
async fn a_store_that_lets_two_racing_creates_succeed_is_refused() {
    let careless = Careless(SimStore::new().client(0, Faults::default()), AtomicUsize::new(0));
    let error = Store::with_client(Arc::new(careless), "careless").probe().await.unwrap_err();
    assert_eq!(error, StoreError::NotConditional { store: "careless".to_owned(), winners: 2 });
    assert!(error.to_string().contains("must not be used"), "{error}");
}

/// Racing creators with every kind of fault: each that gets an answer gets the right one.
#[tokio::test(start_paused = true)]
async fn racing_creates_under_faults_have_one_winner() {
    let (mut ours, mut taken, mut unclear) = (0, 0, 0);
    for seed in 0..500 {
        let sim = SimStore::new();
        let faults = Faults { before: 150, after: 200, late: 100, delay_ms_max: 200, late_ms_max: 2_000 };
        let object = name("x");
        let racers = (0..3).map(|racer| {
            let (store, object) = (sim.client(seed * 10 + racer, faults).store(), object.clone());
            async move { store.put_if_absent(&object, Bytes::from(format!("racer {racer}"))).await }
        });
        let outcomes = join_all(racers).await;
        // Late puts land now.
        tokio::time::sleep(std::time::Duration::from_secs(10)).await;
        let stored = sim.objects().get(&object).cloned();
        for (racer, outcome) in outcomes.into_iter().enumerate() {
            let own = Bytes::from(format!("racer {racer}"));
            match outcome {
                Ok(Created::Ours) => {
                    ours += 1;
                    assert_eq!(stored, Some(own), "seed {seed}: racer {racer} was told that it won");
                }
                Ok(Created::Taken(other)) => {
                    taken += 1;
                    assert_eq!(stored, Some(other), "seed {seed}: racer {racer} was told who won");
                    assert_ne!(stored, Some(own), "seed {seed}: racer {racer} won and was told otherwise");
                }
                Err(error) => {
                    unclear += 1;
                    assert!(error.is_uncertain(), "seed {seed}: {error}");
                }
            }
        }
    }
    assert!(ours > 300 && taken > 500 && unclear > 0, "the faults must reach all outcomes: {ours} {taken} {unclear}");
}
