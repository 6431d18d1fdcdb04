//! A store, a server of it, and a host.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use varve_api::Code;
use varve_api::admin::{Branch, Compute, NewBranch, NewCompute, NewTenant};
use varve_control::{Call, Config, Control, Environment, Error, Key, NoRandom, Surroundings};
use varve_postgres::Timestamp;
use varve_storage::chance;
use varve_storage::ids::{TenantId, TimelineId};
use varve_storage::store::Store;
use varve_testing::sim_store::SimStore;

use crate::host::FakeHost;
use crate::pageserver::FakePageserver;

/// See the module's doc.
pub(crate) struct World {
    pub(crate) objects: SimStore,
    pub(crate) store: Store,
    pub(crate) pageserver: Arc<FakePageserver>,
    pub(crate) plane: Arc<Control<FakePageserver>>,
    pub(crate) host: FakeHost,
}

/// The real surroundings, but for a wall clock that goes with the tests' clock.
struct TestSurroundings {
    started: tokio::time::Instant,
    started_at: Timestamp,
}

impl Surroundings for TestSurroundings {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_micros(self.started_at.unix_micros() + self.started.elapsed().as_micros() as i64)
    }

    fn fill(&self, bytes: &mut [u8]) -> Result<(), NoRandom> {
        chance::fill(bytes).map_err(|error| NoRandom(error.to_string()))
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }
}

/// A server over a store.
pub(crate) fn server(store: &Store, name: &str) -> (Arc<FakePageserver>, Arc<Control<FakePageserver>>) {
    server_that_reads(store, store, name)
}

/// A server whose control plane reads another store than its pageserver has.
pub(crate) fn server_that_reads(read: &Store, store: &Store, name: &str) -> (Arc<FakePageserver>, Arc<Control<FakePageserver>>) {
    let pageserver = FakePageserver::new(store.clone(), name);
    let surroundings = TestSurroundings { started: tokio::time::Instant::now(), started_at: Environment::system().now() };
    let config = Config { server: name.to_owned(), url: format!("http://{name}:9898"), version: "0".to_owned() };
    let plane = Control::new(pageserver.clone(), read.clone(), config, Environment::new(surroundings)).unwrap();
    (pageserver, plane)
}

impl World {
    pub(crate) async fn new() -> World {
        let objects = SimStore::new();
        let store = objects.reliable();
        let (pageserver, plane) = server(&store, "a");
        let host = FakeHost::new(0xa1);
        host.connect(&plane).await;
        World { objects, store, pageserver, plane, host }
    }

    /// The same with a tenant `acme`.
    pub(crate) async fn with_tenant() -> World {
        let world = World::new().await;
        world.create("acme").await;
        world
    }

    pub(crate) async fn create(&self, name: &str) -> String {
        let new = NewTenant { name: name.to_owned(), pg_version: Some(15) };
        self.plane.create_tenant(&Call::default(), &new).await.unwrap().id
    }

    /// The server is killed and started again: what was only in its memory is lost, computes live on.
    pub(crate) async fn restart(&mut self) {
        self.host.disconnect();
        let (pageserver, plane) = server(&self.store, "a");
        *pageserver.written.lock() = self.pageserver.written.lock().clone();
        (self.pageserver, self.plane) = (pageserver, plane);
        self.host.connect(&self.plane).await;
    }

    pub(crate) async fn start(&self, branch: &str, new: NewCompute) -> Result<(Compute, bool), Error> {
        let started = self.plane.ensure_running(&Call::default(), "acme", branch, &new).await?;
        Ok((started.compute, started.fresh))
    }

    pub(crate) async fn branch(&self, name: &str) -> Result<Branch, Error> {
        let new = NewBranch { name: name.to_owned(), ..NewBranch::default() };
        self.plane.create_branch(&Call::default(), "acme", &new).await
    }

    pub(crate) async fn timeline(&self, branch: &str) -> TimelineId {
        self.plane.show_branch("acme", branch).await.unwrap().timeline_id.parse().unwrap()
    }

    pub(crate) async fn tenant_id(&self) -> TenantId {
        self.plane.show_tenant("acme").await.unwrap().id.parse().unwrap()
    }

    /// Waits until something holds; the tests' clock runs as fast as it can.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&World) -> bool) {
        for _ in 0..2000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("this never came to be: {what}");
    }
}

/// A call with a key.
pub(crate) fn keyed(key: &str, request: &str) -> Call {
    Call { key: Some(Key::parse(key, &[request.as_bytes()]).unwrap()), ..Call::default() }
}

/// The code of a refusal.
pub(crate) fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> Code {
    result.unwrap_err().code()
}
