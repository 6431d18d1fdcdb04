//! Manifests: no object before the first layer, and no layer by one who was replaced.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use varve_postgres::Lsn;
use varve_storage::edit_log::{EditLogError, Ownership, dump, read_state};
use varve_storage::envelope::Codec;
use varve_storage::ids::{LayerId, TenantId, TimelineId};
use varve_storage::key::Key;
use varve_storage::manifest::{LayerOwner, LayerRow, Manifest, ManifestEdit, ManifestState, layer_object, timeline_folder};
use varve_storage::store::Store;
use varve_storage::tenant_log::{TenantLog, tenant_folder};
use varve_testing::sim_store::SimStore;

const TENANT: TenantId = TenantId([1; 16]);
const TIMELINE: TimelineId = TimelineId([2; 16]);

fn layer(owner: Ownership, lsn_start: u64, lsn_end: u64) -> LayerRow {
    let id = LayerId::random().unwrap();
    LayerRow {
        id,
        object: layer_object(TENANT, TIMELINE, owner.generation, id).unwrap(),
        offset: 0,
        length: 1000,
        first_key: Key::FIRST_BLOCK,
        last_key: Key::FIRST_BLOCK.next(),
        lsn_start: Lsn(lsn_start),
        lsn_end: Lsn(lsn_end),
        versions: 2,
        generation: owner.generation,
        codec: Codec::Lz4,
        key_id: 0,
        checksum: 7,
        owner: Some(LayerOwner { tenant: TENANT, timeline: TIMELINE }),
    }
}

fn flushed(owner: Ownership, lsn_start: u64, lsn_end: u64) -> Vec<ManifestEdit> {
    vec![ManifestEdit::add(layer(owner, lsn_start, lsn_end)), ManifestEdit::Layered { lsn: Lsn(lsn_end) }]
}

async fn owners(store: &Store) -> (Ownership, Ownership) {
    let folder = tenant_folder(TENANT).unwrap();
    let first = TenantLog::create(store, &folder, &[]).await.unwrap().ownership();
    let second = TenantLog::take_over(store, &folder).await.unwrap().unwrap().ownership();
    (first, second)
}

#[tokio::test]
async fn a_manifest_appears_with_the_first_layer_and_outlives_its_owners() {
    let sim = SimStore::new();
    let store = sim.reliable();
    let (first, second) = owners(&store).await;
    let folder = timeline_folder(TENANT, TIMELINE).unwrap();
    let before = sim.objects().len();
    let manifest = Manifest::open(&store, TENANT, TIMELINE, first).await.unwrap();
    assert_eq!((sim.objects().len(), manifest.state().layer_count()), (before, 0), "a timeline without layers costs no object");
    manifest.publish(flushed(first, 10, 20)).await.unwrap();
    manifest.publish(flushed(first, 20, 30)).await.unwrap();
    let state = manifest.state();
    assert_eq!((state.layer_count(), state.layered()), (2, Lsn(30)));
    manifest.publish(state.layers().map(|row| ManifestEdit::add(LayerRow::clone(row))).collect()).await.unwrap();
    assert_eq!(manifest.state(), state, "what the manifest says already is left out");

    // The same owner opens it again after the timeline was idle.
    let again = Manifest::open(&store, TENANT, TIMELINE, first).await.unwrap();
    assert_eq!(again.state(), state);
    again.publish(flushed(first, 30, 40)).await.unwrap();

    let next = Manifest::open(&store, TENANT, TIMELINE, second).await.unwrap();
    assert_eq!(next.state(), again.state());
    let error = again.publish(flushed(first, 40, 50)).await.unwrap_err();
    assert!(matches!(error, EditLogError::Fenced { .. }), "{error}");
    assert!(matches!(again.check_ownership().await, Err(EditLogError::Fenced { .. })));
    next.check_ownership().await.unwrap();
    next.publish(flushed(second, 40, 60)).await.unwrap();
    let (read, _) = read_state::<ManifestState>(&store, &folder).await.unwrap().unwrap();
    assert_eq!((read.layered(), &read), (Lsn(60), &*next.state()));
    let shown = serde_json::to_string(&dump::<ManifestState>(&store, &folder).await.unwrap()).unwrap();
    assert!(shown.contains(r#""layered":{"lsn":"0/3C"}"#), "{shown}");
}

#[tokio::test]
async fn one_who_was_replaced_cannot_begin_a_manifest() {
    let store = SimStore::new().reliable();
    let (first, second) = owners(&store).await;
    let sleeper = Manifest::open(&store, TENANT, TIMELINE, first).await.unwrap();
    let next = Manifest::open(&store, TENANT, TIMELINE, second).await.unwrap();
    // It may have ingested bytes that are void since.
    let error = sleeper.publish(flushed(first, 10, 20)).await.unwrap_err();
    assert!(matches!(error, EditLogError::Fenced { by, .. } if by == second.generation), "{error}");
    next.publish(flushed(second, 10, 15)).await.unwrap();
    let newest = Manifest::open(&store, TENANT, TIMELINE, second).await.unwrap();
    assert_eq!(newest.state().layered(), Lsn(15));
}

#[tokio::test]
async fn a_manifest_is_read_again_by_its_owner_without_writing() {
    let sim = SimStore::new();
    let store = sim.reliable();
    let (first, second) = owners(&store).await;
    let reopen = |owner| Manifest::reopen(&store, TENANT, TIMELINE, owner);
    let before = sim.objects().len();
    assert_eq!(reopen(first).await.unwrap().state().layer_count(), 0);
    assert_eq!(sim.objects().len(), before, "there was nothing, and is nothing");
    let manifest = reopen(second).await.unwrap();
    assert_eq!(sim.objects().len(), before + 1, "this owner never had it: it is claimed");
    manifest.publish(flushed(second, 10, 20)).await.unwrap();
    assert!(manifest.is_idle());
    let before = sim.objects().len();
    let again = reopen(second).await.unwrap();
    assert_eq!((again.state(), sim.objects().len()), (manifest.state(), before));
    again.publish(flushed(second, 20, 30)).await.unwrap();
    let error = reopen(first).await.map(drop).unwrap_err();
    assert!(matches!(error, EditLogError::Fenced { by, .. } if by == second.generation), "{error}");
}
