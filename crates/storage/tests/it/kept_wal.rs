//! WAL that is kept: the very bytes that count, in pieces, and the same objects when it is tried again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use bytes::Bytes;
use std::sync::Arc;
use varve_postgres::Lsn;
use varve_storage::ids::{Generation, TenantId, TimelineId, WriterEpoch};
use varve_storage::kept_wal::{Keeper, KeptWal, KeptWalError, PIECE_BYTES_MAX};
use varve_storage::store::{Failure, Store};
use varve_storage::threads::RuntimeThreads;
use varve_storage::wal_log::WalLog;
use varve_testing::sim_store::{Faults, Link, SimStore};

const TENANT: TenantId = TenantId([1; 16]);
const TIMELINE: TimelineId = TimelineId([2; 16]);
const BASE: Lsn = Lsn(0x100_0028);

/// Bytes that say where they are and which epoch wrote them.
fn bytes(epoch: u32, from: Lsn, n: usize) -> Vec<u8> {
    (0..n as u64).map(|i| ((from.0 + i) / 8 % 251) as u8 ^ (epoch as u8) << 7).collect()
}

struct Log {
    wal: WalLog,
    _folder: tempfile::TempDir,
}

impl Log {
    fn open() -> Log {
        let folder = tempfile::tempdir().unwrap();
        let wal = WalLog::open(folder.path(), u64::MAX).unwrap();
        wal.attach(TENANT, TIMELINE, &[(WriterEpoch(1), BASE)], BASE).unwrap();
        Log { wal, _folder: folder }
    }

    fn append(&self, epoch: u32, from: Lsn, n: usize) -> Lsn {
        let position = self.wal.append(TENANT, TIMELINE, WriterEpoch(epoch), from, &bytes(epoch, from, n)).unwrap();
        self.wal.sync(position).unwrap();
        from + n as u64
    }

    fn keep(&self, store: &Store, runtime: &tokio::runtime::Runtime, range: (Lsn, Lsn)) -> Result<Vec<KeptWal>, KeptWalError> {
        let store = store.blocking(Arc::new(RuntimeThreads::new(runtime.handle().clone())));
        let keeper = Keeper { tenant: TENANT, timeline: TIMELINE, generation: Generation(3), store: &store };
        keeper.keep(range, &mut |from, max| self.wal.read(TENANT, TIMELINE, from, max))
    }
}

fn read(store: &Store, runtime: &tokio::runtime::Runtime, piece: &KeptWal, from: Lsn) -> Result<Bytes, KeptWalError> {
    piece.read(&store.blocking(Arc::new(RuntimeThreads::new(runtime.handle().clone()))), from)
}

#[test]
fn a_range_is_kept_in_pieces_without_what_is_void() {
    let (runtime, sim, log) = (tokio::runtime::Runtime::new().unwrap(), SimStore::new(), Log::open());
    let store = sim.reliable();
    let fenced = log.append(1, BASE, PIECE_BYTES_MAX / 2);
    let epoch_start = Lsn(fenced.0 - 1000);
    log.wal.start_epoch(TENANT, TIMELINE, WriterEpoch(2), epoch_start).unwrap();
    let end = log.append(2, epoch_start, PIECE_BYTES_MAX);
    let start = BASE + 24;
    let expected = [bytes(1, BASE, epoch_start.distance_from(BASE) as usize), bytes(2, epoch_start, PIECE_BYTES_MAX)].concat();

    let pieces = log.keep(&store, &runtime, (start, Lsn(end.0 - 8))).unwrap();
    assert_eq!(pieces.len(), 2, "one and a half times what a piece holds: {pieces:?}");
    let mut at = start;
    for piece in &pieces {
        assert_eq!(piece.lsn_start, at, "pieces join on");
        let content = read(&store, &runtime, piece, at).unwrap();
        let offset = at.distance_from(BASE) as usize;
        assert!(content[..] == expected[offset..offset + content.len()], "{piece:?} holds the bytes that count");
        assert!(content.len() <= PIECE_BYTES_MAX && piece.length < content.len() as u64, "pieces are bounded and compressed: {piece:?}");
        at = piece.lsn_end;
        let tail = read(&store, &runtime, piece, Lsn(at.0 - 3)).unwrap();
        assert_eq!(tail[..], content[content.len() - 3..], "a piece is read from within");
    }
    assert_eq!(at, Lsn(end.0 - 8), "nothing beyond the range is kept");
    let beyond = log.keep(&store, &runtime, (start, end + 8)).unwrap_err();
    assert!(beyond.to_string().contains(&format!("holds no bytes at {end}")), "bytes that are not there: {beyond}");
    log.wal.release(TENANT, TIMELINE, end);
    let released = log.keep(&store, &runtime, (start, end)).unwrap_err();
    assert!(matches!(released, KeptWalError::WalLog(_)), "what the log let go of cannot be kept: {released}");
}

#[test]
fn a_failed_upload_is_repeated_with_the_same_objects() {
    let (runtime, sim, log) = (tokio::runtime::Runtime::new().unwrap(), SimStore::new(), Log::open());
    let client = sim.client(1, Faults::default());
    let end = log.append(1, BASE, PIECE_BYTES_MAX + 100);
    client.set_link(Link::Failing(Failure::NoSpace));
    let error = log.keep(&client.store(), &runtime, (BASE, end)).unwrap_err();
    assert!(matches!(error, KeptWalError::Store(_)) && sim.objects().is_empty(), "the store takes nothing: {error}");
    client.set_link(Link::Up);
    let pieces = log.keep(&client.store(), &runtime, (BASE, end)).unwrap();
    let objects = sim.objects();
    assert_eq!(objects.len(), 2);
    assert_eq!(log.keep(&client.store(), &runtime, (BASE, end)).unwrap(), pieces, "the same rows when it is repeated");
    assert_eq!(sim.objects(), objects, "and the same objects");
}

#[test]
fn an_object_that_is_not_the_manifests_is_refused() {
    let (runtime, sim, log) = (tokio::runtime::Runtime::new().unwrap(), SimStore::new(), Log::open());
    let store = sim.reliable();
    let end = log.append(1, BASE, 4096);
    let piece = log.keep(&store, &runtime, (BASE, end)).unwrap().pop().unwrap();
    let sound = sim.objects()[&piece.object].clone();
    for at in 0..sound.len() {
        let mut damaged = sound.to_vec();
        damaged[at] ^= 1;
        sim.set(&piece.object, Some(damaged.into()));
        let error = read(&store, &runtime, &piece, BASE).unwrap_err().to_string();
        assert!(error.contains(piece.object.as_str()), "a flipped bit in byte {at} is noticed, and the object named: {error}");
    }
    sim.set(&piece.object, Some(sound));
    let longer = KeptWal { lsn_end: piece.lsn_end + 8, ..piece };
    assert!(read(&store, &runtime, &longer, BASE).is_err(), "a piece with fewer bytes than the manifest says");
}
