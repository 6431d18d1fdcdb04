//! What the log promises, on a real folder. What crashes and faults do to it: `tests/it/wal_log.rs`.

use super::*;

const TENANT: TenantId = TenantId([1; 16]);
const TIMELINE: TimelineId = TimelineId([2; 16]);
const BASE: Lsn = Lsn(0x100_0000);

fn bytes(from: Lsn, n: usize) -> Vec<u8> {
    (0..n as u64).map(|i| ((from.0 + i) % 251) as u8).collect()
}

fn read_all(log: &WalLog, from: Lsn) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let more = log.read(TENANT, TIMELINE, from + out.len() as u64, 100_000).unwrap();
        if more.is_empty() {
            return out;
        }
        out.extend_from_slice(&more);
    }
}

fn append(log: &WalLog, epoch: u32, from: Lsn, n: usize) -> Lsn {
    let position = log.append(TENANT, TIMELINE, WriterEpoch(epoch), from, &bytes(from, n)).unwrap();
    log.sync(position).unwrap();
    from + n as u64
}

#[test]
fn what_was_synced_is_read_back_after_a_restart_and_segments_are_recycled() {
    let folder = tempfile::tempdir().unwrap();
    let epochs = [(WriterEpoch(1), BASE)];
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    assert_eq!(log.attach(TENANT, TIMELINE, &epochs, BASE).unwrap(), BASE);
    let mut end = BASE;
    while end.0 - BASE.0 < 3 * SEGMENT_SIZE {
        end = append(&log, 1, end, 300_001);
    }
    assert!(read_all(&log, BASE) == bytes(BASE, (end.0 - BASE.0) as usize), "the bytes read are those appended");
    assert!(matches!(WalLog::open(folder.path(), 0), Err(WalLogError::InUse { .. })), "a second process is refused");
    drop(log);
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    assert_eq!(log.unattached(), vec![Unattached { tenant: TENANT, timeline: TIMELINE, newest: WriterEpoch(1) }]);
    assert_eq!(log.attach(TENANT, TIMELINE, &epochs, BASE).unwrap(), end);
    assert!(read_all(&log, BASE) == bytes(BASE, (end.0 - BASE.0) as usize), "the bytes are there after a restart");
    let before = log.bytes();
    log.release(TENANT, TIMELINE, end);
    assert!(log.bytes() < before, "segments below the layers are freed");
    assert!(matches!(log.read(TENANT, TIMELINE, BASE, 10), Err(WalLogError::NotHeld { .. })));
    assert_eq!(append(&log, 1, end, 1000), end + 1000);
}

#[test]
fn bytes_of_an_older_epoch_are_void_from_the_next_ones_start() {
    let folder = tempfile::tempdir().unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    log.attach(TENANT, TIMELINE, &[(WriterEpoch(1), BASE)], BASE).unwrap();
    append(&log, 1, BASE, 1000);
    log.start_epoch(TENANT, TIMELINE, WriterEpoch(2), BASE + 600).unwrap();
    let refused = log.append(TENANT, TIMELINE, WriterEpoch(1), BASE + 600, &[0; 8]);
    assert!(matches!(refused, Err(WalLogError::Fenced { current: 2, .. })));
    let refused = log.append(TENANT, TIMELINE, WriterEpoch(2), BASE + 608, &[0; 8]);
    assert!(matches!(refused, Err(WalLogError::Gap { .. })), "bytes that do not join on are refused");
    let position = log.append(TENANT, TIMELINE, WriterEpoch(2), BASE + 600, &[7; 100]).unwrap();
    log.sync(position).unwrap();
    let expected = [bytes(BASE, 600), vec![7; 100]].concat();
    assert!(read_all(&log, BASE) == expected);
    drop(log);
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    let end = log.attach(TENANT, TIMELINE, &[(WriterEpoch(1), BASE), (WriterEpoch(2), BASE + 600)], BASE).unwrap();
    assert_eq!(end, BASE + 700);
    assert!(read_all(&log, BASE) == expected, "void bytes stay void after a restart");
}

#[test]
fn a_torn_tail_is_dropped_and_damage_before_it_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    log.attach(TENANT, TIMELINE, &[], BASE).unwrap();
    let mut end = BASE;
    for _ in 0..3 {
        end = append(&log, 0, end, 1000);
    }
    drop(log);
    let path = folder.path().join("0000000000000000.wal");
    let whole = std::fs::read(&path).unwrap();
    let mut torn = whole.clone();
    torn[2 * chunk_size(1000) + 500] ^= 1;
    std::fs::write(&path, &torn).unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    assert_eq!(log.attach(TENANT, TIMELINE, &[], BASE).unwrap(), BASE + 2000, "the last chunk may have been torn by a crash");
    drop(log);
    let mut damaged = whole;
    damaged[chunk_size(1000) + 500] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    match WalLog::open(folder.path(), u64::MAX) {
        Err(WalLogError::Damaged { file, offset, .. }) => {
            assert_eq!((file.as_str(), offset), ("0000000000000000.wal", chunk_size(1000) as u64));
        }
        other => panic!("a damaged chunk that had been acknowledged must be refused, got {other:?}"),
    }
}

#[test]
fn bytes_of_an_epoch_that_the_tenant_log_lost_are_refused_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    let epochs = [(WriterEpoch(1), BASE), (WriterEpoch(2), BASE + 600)];
    log.attach(TENANT, TIMELINE, &epochs[..1], BASE).unwrap();
    append(&log, 1, BASE, 600);
    log.start_epoch(TENANT, TIMELINE, WriterEpoch(2), BASE + 600).unwrap();
    append(&log, 2, BASE + 600, 100);
    drop(log);
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    for (known, layered) in [(&epochs[..1], BASE), (&epochs[..0], BASE), (&epochs[..1], BASE + 5000)] {
        let error = log.attach(TENANT, TIMELINE, known, layered).unwrap_err();
        assert!(matches!(error, WalLogError::UnknownEpoch { found: 2, .. }), "{error}");
        let told =
            [format!("epoch 2 of timeline {TIMELINE}"), format!("tenants/{TENANT}/log are missing"), format!("up to {}", known.len())];
        assert!(told.iter().all(|part| error.to_string().contains(part.as_str())), "{error}");
    }
    assert_eq!(log.attach(TENANT, TIMELINE, &epochs, BASE).unwrap(), BASE + 700, "the log is whole again, and so is the history");
    drop(log);
    // One that knows a newer epoch, and not this one, says that its bytes are void.
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    assert_eq!(log.attach(TENANT, TIMELINE, &[epochs[0], (WriterEpoch(3), BASE + 500)], BASE).unwrap(), BASE + 500);
}

#[test]
fn a_segment_file_that_goes_missing_is_noticed_the_newest_too() {
    let folder = tempfile::tempdir().unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    log.attach(TENANT, TIMELINE, &[], BASE).unwrap();
    let mut end = BASE;
    while end.0 - BASE.0 < 2 * SEGMENT_SIZE + 1000 {
        end = append(&log, 0, end, 900_000);
    }
    drop(log);
    let aside = tempfile::tempdir().unwrap();
    for number in [1, 2] {
        let name = format!("{number:016x}.wal");
        let (here, there) = (folder.path().join(&name), aside.path().join(&name));
        std::fs::rename(&here, &there).unwrap();
        match WalLog::open(folder.path(), u64::MAX) {
            Err(WalLogError::MissingSegment { file, .. }) => assert_eq!(file, name),
            other => panic!("without {name} the log must be refused, got {other:?}"),
        }
        std::fs::rename(&there, &here).unwrap();
    }
    // Everything is released, and the newest file stays: the log may be opened again.
    for layered in [BASE, end, end] {
        let log = WalLog::open(folder.path(), u64::MAX).unwrap();
        assert_eq!(log.attach(TENANT, TIMELINE, &[], layered).unwrap(), end);
        log.release(TENANT, TIMELINE, end);
    }
    // A folder of an older release has no note; one that says nothing is none.
    for contents in [None, Some(vec![0; 1024]), Some(vec![7; 1024])] {
        let note = folder.path().join("newest");
        contents.map_or_else(|| std::fs::remove_file(&note), |contents| std::fs::write(&note, contents)).unwrap();
        WalLog::open(folder.path(), u64::MAX).unwrap();
    }
}
