//! The template that simulated tenants begin with, made once by hand: a checkpoint, a place in the WAL index.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use varve_engine::cluster::ClusterFacts;
use varve_engine::template::TemplateFacts;
use varve_postgres::control::Parameters;
use varve_postgres::{Lsn, Timestamp};
use varve_storage::checkpoint_fields::CheckpointFields;
use varve_storage::history::{HistoryError, HistoryWriter};
use varve_storage::ids::{Generation, TenantId, TimelineId};
use varve_storage::key::Key;
use varve_storage::retained::Retained;
use varve_storage::store::ObjectName;
use varve_storage::threads::{RuntimeThreads, Threads};
use varve_storage::timeline::{Timeline, TimelineSpec};
use varve_storage::value::Value;
use varve_storage::wal_index::{Boundary, WalIndexBuilder, page_of};
use varve_testing::naive_history::NaiveHistory;
use varve_testing::sim_store::SimStore;

use crate::wal::{FIRST_XID, MAJOR, START, checkpoint};

/// Name of the template.
pub const NAME: &str = "16-simulated";

/// Puts what an ingest needs to begin into an empty history.
fn begin(history: &dyn HistoryWriter) -> Result<(), HistoryError> {
    let fields = CheckpointFields::of_checkpoint(&checkpoint(FIRST_XID, 1), Parameters::default());
    history.put(Key::checkpoint(), START, Value::Image(fields.encode()))?;
    let next_xid = u64::from(FIRST_XID);
    let before = Boundary { end: Lsn(0), record_start: Lsn(0), next_xid, time_max: Timestamp::MIN, time: None };
    let mut index = WalIndexBuilder::new(page_of(START), before);
    index.push(START, Lsn(START.0 - 0x28), next_xid, None);
    history.put(Key::wal_index(index.page()), START, Value::Image(index.encode()))?;
    history.advance(START);
    Ok(())
}

/// A naive history that has nothing but the template.
pub fn naive_start() -> NaiveHistory {
    let naive = NaiveHistory::new(MAJOR, Lsn(8));
    begin(&naive).unwrap_or_else(|error| unreachable!("the template: {error}"));
    naive
}

/// Names and contents of the template's objects.
fn objects() -> anyhow::Result<Vec<(ObjectName, Bytes)>> {
    #[derive(Debug)]
    struct Zeros;
    impl varve_storage::chance::Source for Zeros {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(0);
        }
    }
    // Of its own, with time that runs: made once, it is the same for every run.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let store = SimStore::new();
    let threads: Arc<dyn Threads> = Arc::new(RuntimeThreads::new(runtime.handle().clone()));
    let folder = tempfile::tempdir()?;
    let resources = varve_engine::histories::resources(&store.reliable(), &threads, folder.path().to_owned(), 1 << 20, 64 << 20);
    let spec = TimelineSpec {
        tenant: TenantId([0; 16]),
        id: TimelineId([0; 16]),
        major: MAJOR,
        generation: Generation(1),
        ancestor: None,
        start: Lsn::INVALID,
        layered: Lsn::INVALID,
        collected: Retained::default(),
    };
    let made = std::thread::spawn(move || -> anyhow::Result<Vec<varve_storage::manifest::LayerRow>> {
        varve_storage::chance::give(Some(Arc::new(Zeros)));
        let timeline = Timeline::open(spec, Arc::new(resources), Vec::new());
        begin(&*timeline)?;
        timeline.freeze_if(0, std::time::Duration::ZERO);
        let mut layers = Vec::new();
        timeline.flush(&mut |change| {
            layers.extend(change.add.iter().cloned());
            Ok(())
        })?;
        Ok(layers)
    });
    let layers = made.join().map_err(|_| anyhow::anyhow!("the template could not be made"))??;
    let cluster = ClusterFacts { major: MAJOR, catalog_version: 202_307_071, data_checksum_version: 0, default_char_signedness: true };
    let facts = serde_json::to_vec(&TemplateFacts { cluster, end: START, layers })?;
    let mut objects: Vec<(ObjectName, Bytes)> = store.objects().into_iter().collect();
    objects.push((format!("templates/{NAME}/template").parse()?, facts.into()));
    objects.push((format!("templates/current-{}", MAJOR.number()).parse()?, Bytes::from_static(NAME.as_bytes())));
    Ok(objects)
}

static OBJECTS: OnceLock<Vec<(ObjectName, Bytes)>> = OnceLock::new();

/// Makes the template, if it is not made yet. Not to be called on a runtime.
///
/// # Errors
/// When it cannot be made.
pub fn make() -> anyhow::Result<()> {
    if OBJECTS.get().is_none() {
        // Of two that make it at the same time one counts; they are the same.
        let _made_meanwhile = OBJECTS.set(objects()?);
    }
    Ok(())
}

/// Puts the template, which is made, into a store.
pub fn put_into(store: &SimStore) {
    for (name, bytes) in OBJECTS.get().into_iter().flatten() {
        store.set(name, Some(bytes.clone()));
    }
}
