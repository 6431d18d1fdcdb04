//! Shared WAL over a local folder: what is put is found, whoever sealed is told of nothing later, damage has a name.

use varve_postgres::Lsn;

use super::*;
use crate::store::Store;

const LOG: WalLogId = WalLogId([1; 16]);
const OTHER: WalLogId = WalLogId([2; 16]);
const TENANT: TenantId = TenantId([3; 16]);

fn timeline(number: u8) -> TimelineId {
    TimelineId([number; 16])
}

/// The byte of WAL at a position is known from it, so that a wrong one is noticed.
fn wal(start: u64, end: u64) -> Bytes {
    (start..end).map(|at| (at ^ (at >> 8)) as u8).collect::<Vec<u8>>().into()
}

fn chunk(number: u8, start: u64, end: u64) -> Chunk {
    Chunk { tenant: TENANT, timeline: timeline(number), start: Lsn(start), bytes: wal(start, end) }
}

struct World {
    _folder: tempfile::TempDir,
    store: Store,
    archive: Archive,
}

impl World {
    fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_folder(&folder.path().join("store")).unwrap();
        World { _folder: folder, archive: Archive::new(store.clone()), store }
    }

    async fn put(&self, run: &mut Run, chunks: &[Chunk]) -> Put {
        let encoded = run.encode(chunks).unwrap();
        run.put(&self.store, &encoded).await.unwrap()
    }

    /// The end of what is found of a timeline, which must be the bytes that belong there.
    async fn found(&self, number: u8, from: u64) -> u64 {
        let found = self.archive.find(LOG, TENANT, timeline(number), Lsn(from)).await.unwrap();
        assert!(found.damaged.is_empty(), "{:?}", found.damaged);
        let mut at = from;
        for part in found.parts {
            assert_eq!(part.start, Lsn(at), "no gap, and nothing twice");
            assert_eq!(part.bytes, wal(at, at + part.bytes.len() as u64));
            at += part.bytes.len() as u64;
        }
        at
    }
}

#[tokio::test]
async fn what_was_put_is_found_from_any_position_in_any_order() {
    let world = World::new();
    let mut run = Run::begin(&world.store, LOG).await.unwrap();
    let first = [chunk(1, 100, 300), chunk(2, 50, 60)];
    assert_eq!(world.put(&mut run, &first).await, Put::Stored);
    assert_eq!(world.put(&mut run, &[chunk(1, 300, 9000)]).await, Put::Stored);
    // The process began anew, and ships from its layers on.
    let mut run = Run::begin(&world.store, LOG).await.unwrap();
    assert_eq!(run.number(), 2);
    assert_eq!(world.put(&mut run, &[chunk(1, 200, 400), chunk(1, 9000, 9100), chunk(2, 70, 80)]).await, Put::Stored);
    for from in [100, 101, 299, 300, 350, 8999, 9000, 9099] {
        assert_eq!(world.found(1, from).await, 9100, "from {from}");
    }
    assert_eq!(world.found(1, 9100).await, 9100, "nothing more");
    assert_eq!(world.found(1, 99).await, 99, "nothing joins on");
    assert_eq!(world.found(2, 50).await, 60, "what lies behind a gap does not count");
    assert_eq!(world.found(3, 0).await, 0, "nothing of a timeline that is not there");
}

#[tokio::test]
async fn nothing_comes_after_a_seal() {
    let world = World::new();
    let mut run = Run::begin(&world.store, LOG).await.unwrap();
    assert_eq!(world.put(&mut run, &[chunk(1, 100, 300)]).await, Put::Stored);
    let late = run.encode(&[chunk(1, 300, 400)]).unwrap();
    world.archive.seal(LOG, OTHER).await.unwrap();
    world.archive.seal(LOG, OTHER).await.unwrap();
    assert_eq!(run.put(&world.store, &late).await.unwrap(), Put::Sealed);
    assert_eq!(run.put(&world.store, &late).await.unwrap(), Put::Sealed);
    assert_eq!(world.found(1, 100).await, 300);
    // Its next run is open, until it is sealed, too.
    let mut next = Run::begin(&world.store, LOG).await.unwrap();
    assert_eq!(world.put(&mut next, &[chunk(1, 300, 350)]).await, Put::Stored);
    assert_eq!(world.found(1, 100).await, 350);
    world.archive.seal(LOG, OTHER).await.unwrap();
    assert_eq!(world.put(&mut next, &[chunk(1, 350, 360)]).await, Put::Sealed);
    // Who heard nothing of its own put puts it again, and hears that it is there.
    let mut third = Run::begin(&world.store, LOG).await.unwrap();
    let unheard = third.encode(&[chunk(1, 350, 500)]).unwrap();
    let object = unheard.object.clone();
    assert_eq!(third.put(&world.store, &unheard).await.unwrap(), Put::Stored);
    let mut sleeper = Run::begin(&world.store, LOG).await.unwrap();
    let mine = sleeper.encode(&[chunk(1, 1, 2)]).unwrap();
    assert_eq!(sleeper.put(&world.store, &mine).await.unwrap(), Put::Stored);
    assert_eq!(world.archive.directory(&object, unheard.stored_bytes()).await.unwrap().rows(), &unheard.rows[..]);
    assert_eq!(Archive::place(&object), Some((LOG, Place { run: 3, number: 1 })));
}

#[tokio::test]
async fn another_process_on_a_copy_of_the_log_is_noticed() {
    let world = World::new();
    let mut run = Run::begin(&world.store, LOG).await.unwrap();
    let theirs = run.encode(&[chunk(1, 100, 200)]).unwrap();
    assert_eq!(run.put(&world.store, &theirs).await.unwrap(), Put::Stored);
    run.next.number -= 1;
    let ours = run.encode(&[chunk(1, 100, 201)]).unwrap();
    let error = run.put(&world.store, &ours).await.unwrap_err();
    assert!(matches!(error, SharedWalError::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("two servers must not run on copies of one data folder"), "{error}");
}

#[tokio::test]
async fn a_large_directory_is_read_whole_and_damage_is_named() {
    let world = World::new();
    let mut run = Run::begin(&world.store, LOG).await.unwrap();
    let mut chunks: Vec<Chunk> = (0..4000u64)
        .map(|number| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(number.wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_be_bytes());
            Chunk { timeline: TimelineId(id), ..chunk(1, number, number + 8) }
        })
        .collect();
    chunks.push(chunk(9, 100, 5000));
    let encoded = run.encode(&chunks).unwrap();
    assert_eq!(run.put(&world.store, &encoded).await.unwrap(), Put::Stored);
    assert_eq!(world.found(9, 100).await, 5000);
    let whole = world.store.get(&encoded.object).await.unwrap();
    for at in [6, 21, 40, whole.len() / 2, whole.len() - 1] {
        let mut damaged = whole.to_vec();
        damaged[at] ^= 4;
        world.store.put(&encoded.object, damaged.into()).await.unwrap();
        let archive = Archive::new(world.store.clone());
        let found = archive.find(LOG, TENANT, timeline(9), Lsn(100)).await.unwrap();
        let of_another_chunk = at == whole.len() / 2;
        match found.damaged.first() {
            Some(error) => assert!(error.to_string().contains(encoded.object.as_str()) && found.parts.is_empty(), "byte {at}: {error}"),
            None => assert!(of_another_chunk, "a flipped bit of byte {at} goes unnoticed"),
        }
    }
    world.store.put(&encoded.object, whole.slice(..whole.len() - 1)).await.unwrap();
    let found = Archive::new(world.store.clone()).find(LOG, TENANT, timeline(9), Lsn(100)).await.unwrap();
    assert!(found.damaged[0].to_string().contains("is damaged"), "{:?}", found.damaged);
}
