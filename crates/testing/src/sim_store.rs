//! An object store in memory that fails as a seed says.
//!
//! A [`SimStore`] holds the objects; each server of a test reaches them through a [`SimClient`] of its own, with faults
//! of its own:
//!
//! - requests take a random time before they have their effect, and again before the answer arrives;
//! - a request fails before it has its effect, or after it;
//! - a put fails, and has its effect a long time later;
//! - a client is frozen (SIGSTOP), or cut off.
//!
//! Time is tokio's: under `start_paused` a whole schedule runs in no time, and one seed gives one schedule.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use varve_storage::store::{ClientError, Failure, Listed, ObjectClient, ObjectName, PutMode, Store};

use crate::random::SeededRng;

/// How often what goes wrong, in a thousand requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Fails and does nothing.
    pub before: u32,
    /// Does what it should, and fails.
    pub after: u32,
    /// A put fails, and has its effect later, within [`Faults::late_ms_max`].
    pub late: u32,
    /// Longest time until the effect, and again until the answer.
    pub delay_ms_max: u64,
    /// Longest time until a late put has its effect.
    pub late_ms_max: u64,
}

/// How often a client's requests met with a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Struck {
    /// Failed and did nothing.
    pub before: u64,
    /// Did what they should, and failed.
    pub after: u64,
    /// Puts that failed, and had their effect later.
    pub late: u64,
}

/// The objects. Cheap to clone; clones share them.
#[derive(Clone, Default)]
pub struct SimStore {
    objects: Arc<Mutex<BTreeMap<ObjectName, Bytes>>>,
}

impl SimStore {
    /// An empty store.
    pub fn new() -> SimStore {
        SimStore::default()
    }

    /// A client that fails as `faults` and `seed` say.
    pub fn client(&self, seed: u64, faults: Faults) -> Arc<SimClient> {
        let random = Mutex::new(SeededRng::new(seed));
        Arc::new(SimClient {
            store: self.clone(),
            random,
            faults: Mutex::new(faults),
            struck: Mutex::default(),
            link: Mutex::new(Link::Up),
            link_changed: Notify::new(),
        })
    }

    /// A store without faults.
    pub fn reliable(&self) -> Store {
        Store::with_client(self.client(0, Faults::default()), "sim")
    }

    /// All objects as they are now.
    pub fn objects(&self) -> BTreeMap<ObjectName, Bytes> {
        self.objects.lock().clone()
    }

    /// Puts an object there, whatever was there: to damage it, or to lose it (`None`).
    pub fn set(&self, name: &ObjectName, bytes: Option<Bytes>) {
        let mut objects = self.objects.lock();
        match bytes {
            Some(bytes) => objects.insert(name.clone(), bytes),
            None => objects.remove(name),
        };
    }

    fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<(), ClientError> {
        let mut objects = self.objects.lock();
        if mode == PutMode::Create && objects.contains_key(name) {
            return Err(error(Failure::AlreadyExists));
        }
        objects.insert(name.clone(), bytes);
        Ok(())
    }
}

impl fmt::Debug for SimStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimStore({} objects)", self.objects.lock().len())
    }
}

/// How a client is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Requests go through.
    Up,
    /// Requests and answers hang until the link is up again.
    Frozen,
    /// Requests fail at once with this.
    Failing(Failure),
}

/// One server's way to the store.
pub struct SimClient {
    store: SimStore,
    random: Mutex<SeededRng>,
    faults: Mutex<Faults>,
    struck: Mutex<Struck>,
    link: Mutex<Link>,
    /// Wakes in the order in which requests came; a `watch` would wake in any.
    link_changed: Notify,
}

impl SimClient {
    /// Changes how the client is connected.
    pub fn set_link(&self, link: Link) {
        *self.link.lock() = link;
        self.link_changed.notify_waiters();
    }

    /// Changes how often what goes wrong.
    pub fn set_faults(&self, faults: Faults) {
        *self.faults.lock() = faults;
    }

    /// How often its requests met with a fault.
    pub fn struck(&self) -> Struck {
        *self.struck.lock()
    }

    /// A store over this client.
    pub fn store(self: &Arc<Self>) -> Store {
        Store::with_client(self.clone(), "sim")
    }

    async fn delay(&self) -> Result<(), ClientError> {
        let delay_ms = {
            let max = self.faults.lock().delay_ms_max;
            self.random.lock().below(max + 1)
        };
        if delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        }
        loop {
            let changed = self.link_changed.notified();
            if *self.link.lock() != Link::Frozen {
                break;
            }
            changed.await;
        }
        let link = *self.link.lock();
        match link {
            Link::Failing(failure) => Err(error(failure)),
            Link::Up | Link::Frozen => Ok(()),
        }
    }

    fn strikes(&self, per_mille: impl Fn(&Faults) -> u32) -> bool {
        let per_mille = per_mille(&self.faults.lock());
        self.random.lock().chance(per_mille)
    }

    async fn request<T>(&self, effect: impl FnOnce(&SimStore) -> Result<T, ClientError>) -> Result<T, ClientError> {
        self.delay().await?;
        if self.strikes(|faults| faults.before) {
            self.struck.lock().before += 1;
            return Err(error(Failure::Other));
        }
        let answer = effect(&self.store);
        self.delay().await?;
        if self.strikes(|faults| faults.after) {
            self.struck.lock().after += 1;
            return Err(error(Failure::Other));
        }
        answer
    }
}

impl fmt::Debug for SimClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimClient({:?})", self.store)
    }
}

fn error(failure: Failure) -> ClientError {
    ClientError { failure, message: format!("simulated: {failure:?}") }
}

impl ObjectClient for SimClient {
    fn put<'a>(&'a self, name: &'a ObjectName, bytes: Bytes, mode: PutMode) -> BoxFuture<'a, Result<(), ClientError>> {
        async move {
            if self.strikes(|faults| faults.late) {
                self.struck.lock().late += 1;
                let (store, name) = (self.store.clone(), name.clone());
                let late_ms = self.random.lock().below(self.faults.lock().late_ms_max + 1);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(late_ms)).await;
                    let _nobody_hears_of_it = store.put(&name, bytes, mode);
                });
                return Err(error(Failure::Other));
            }
            self.request(|store| store.put(name, bytes, mode)).await
        }
        .boxed()
    }

    fn get<'a>(&'a self, name: &'a ObjectName, range: Option<Range<u64>>) -> BoxFuture<'a, Result<Bytes, ClientError>> {
        let read = move |store: &SimStore| {
            let bytes = store.objects.lock().get(name).cloned().ok_or_else(|| error(Failure::NotFound))?;
            let Some(range) = range else { return Ok(bytes) };
            let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(bytes.len());
            Ok(bytes.slice(usize::try_from(range.start).unwrap_or(usize::MAX).min(end)..end))
        };
        self.request(read).boxed()
    }

    fn delete<'a>(&'a self, name: &'a ObjectName) -> BoxFuture<'a, Result<(), ClientError>> {
        self.request(move |store| {
            store.objects.lock().remove(name);
            Ok(())
        })
        .boxed()
    }

    fn list<'a>(&'a self, prefix: &'a ObjectName) -> BoxFuture<'a, Result<Vec<Listed>, ClientError>> {
        self.request(move |store| {
            let objects = store.objects.lock();
            let below = objects.iter().filter(|(name, _)| prefix.relative(name).is_some());
            Ok(below.map(|(name, bytes)| Listed { name: name.clone(), bytes: bytes.len() as u64, written: None }).collect())
        })
        .boxed()
    }
}
