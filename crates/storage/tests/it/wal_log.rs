//! The WAL log loses no acknowledged byte and invents none: whatever a power failure leaves of what was not fsynced,
//! whichever write or fsync fails, however full the disk is. `VARVE_TEST_SEEDS=n` runs n seeds, `VARVE_TEST_SEED=n`
//! runs seed n alone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must panic")]

use std::collections::HashMap;
use std::sync::Arc;

use varve_postgres::Lsn;
use varve_storage::ids::{TenantId, TimelineId, WriterEpoch};
use varve_storage::wal_log::{LogPosition, Unattached, WalLog, WalLogError, WalLogOptions};
use varve_testing::random::SeededRng;
use varve_testing::sim_disk::{DiskFaults, SimDisk};

const TENANT: TenantId = TenantId([1; 16]);

fn seeds(default: u64) -> std::ops::Range<u64> {
    let variable = |name| std::env::var(name).ok().and_then(|n: String| n.parse().ok());
    match variable("VARVE_TEST_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("VARVE_TEST_SEEDS").unwrap_or(default),
    }
}

/// A timeline as the world outside of the log knows it.
struct Timeline {
    id: TimelineId,
    base: Lsn,
    epochs: Vec<(WriterEpoch, Lsn)>,
    layered: Lsn,
    /// Bytes from `base` on that somebody was told are safe.
    acknowledged: Vec<u8>,
    /// What was appended beyond, by the stream that runs.
    stream: Vec<u8>,
    /// What streams before it had appended beyond, and it is to replace.
    replaced: Vec<Vec<u8>>,
    attached: bool,
}

impl Timeline {
    fn new(random: &mut SeededRng) -> Timeline {
        let base = Lsn(random.below(1 << 40));
        let mut id = [0; 16];
        id.copy_from_slice(&random.bytes(16));
        Timeline {
            id: TimelineId(id),
            base,
            epochs: vec![(WriterEpoch(1), base)],
            layered: base,
            acknowledged: Vec::new(),
            stream: Vec::new(),
            replaced: Vec::new(),
            attached: false,
        }
    }

    fn acknowledged_end(&self) -> Lsn {
        self.base + self.acknowledged.len() as u64
    }

    fn epoch(&self) -> WriterEpoch {
        self.epochs.last().unwrap().0
    }

    /// The stream ends; the next one begins at what was acknowledged.
    fn reconnect(&mut self) {
        self.replaced.push(std::mem::take(&mut self.stream));
    }

    /// What the stream has appended is durable, and the first `bytes` of it are acknowledged.
    fn acknowledge(&mut self, bytes: usize) {
        if !self.stream.is_empty() {
            self.replaced.clear();
        }
        self.acknowledged.extend(self.stream.drain(..bytes));
    }

    /// Attaches to a log that was opened anew, and checks what it has.
    fn attach(&mut self, log: &WalLog, random: &mut SeededRng, seed: u64) {
        let attached = log.attach(TENANT, self.id, &self.epochs, self.layered);
        let end = attached.unwrap_or_else(|error| panic!("seed {seed}: a timeline cannot be attached: {error}"));
        assert!(
            end >= self.acknowledged_end(),
            "seed {seed}: timeline {} is acknowledged to {} and ends at {end}",
            self.id,
            self.acknowledged_end()
        );
        let skip = (self.layered.0 - self.base.0) as usize;
        let found = read_all(log, self.id, self.layered, 1 + random.below(20_000) as usize);
        assert_eq!(self.layered + found.len() as u64, end, "seed {seed}: all up to the end can be read");
        let (known, beyond) = found.split_at(self.acknowledged.len() - skip);
        assert!(known == &self.acknowledged[skip..], "seed {seed}: acknowledged bytes have changed");
        let is_beginning = |of: &Vec<u8>| of.starts_with(beyond);
        let somebody_wrote_it = is_beginning(&self.stream) || self.replaced.iter().any(is_beginning);
        assert!(somebody_wrote_it, "seed {seed}: {} bytes beyond what was acknowledged are no stream's beginning", beyond.len());
        // Some of it are whole records. The next stream replaces the rest.
        self.replaced = Vec::new();
        self.stream = beyond.to_vec();
        self.acknowledge(random.below(beyond.len() as u64 + 1) as usize);
        self.reconnect();
        self.attached = true;
    }
}

fn read_all(log: &WalLog, timeline: TimelineId, from: Lsn, at_once: usize) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let more = log.read(TENANT, timeline, from + out.len() as u64, at_once).unwrap();
        if more.is_empty() {
            return out;
        }
        out.extend_from_slice(&more);
    }
}

struct World {
    seed: u64,
    random: SeededRng,
    disk: SimDisk,
    options: WalLogOptions,
    log: WalLog,
    timelines: Vec<Timeline>,
    appended: LogPosition,
    seen: HashMap<&'static str, u64>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = SeededRng::new(seed);
        let disk = SimDisk::new(random.bits());
        let segment_bytes = 1024 << random.below(6);
        let options = WalLogOptions { limit_bytes: 6 * segment_bytes, segment_bytes, make_spares: false };
        let log = WalLog::open_on(Arc::new(disk.clone()), options).unwrap();
        let mut world = World {
            seed,
            timelines: (0..random.between(1, 5)).map(|_| Timeline::new(&mut random)).collect(),
            random,
            disk,
            options,
            appended: LogPosition::default(),
            log,
            seen: HashMap::new(),
        };
        world.attach_all(1000);
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn attach_all(&mut self, per_mille: u32) {
        for timeline in &mut self.timelines {
            if !timeline.attached && self.random.chance(per_mille) {
                timeline.attach(&self.log, &mut self.random, self.seed);
            }
        }
    }

    /// The process, or the machine, ends and comes back.
    fn restart(&mut self, power: bool) {
        self.disk = if power { self.disk.cut_power() } else { self.disk.crash_process() };
        self.saw(if power { "power cuts" } else { "crashes" });
        let seed = self.seed;
        let opened = WalLog::open_on(Arc::new(self.disk.clone()), self.options);
        self.log = opened.unwrap_or_else(|error| panic!("seed {seed}: the log cannot be opened: {error}"));
        self.appended = LogPosition::default();
        for timeline in &mut self.timelines {
            timeline.attached = false;
        }
        self.attach_all(700);
    }

    fn choose(&mut self) -> Option<usize> {
        let i = self.random.below(self.timelines.len() as u64) as usize;
        self.timelines[i].attached.then_some(i)
    }

    fn append(&mut self, i: usize) {
        let length = match self.random.below(10) {
            0 => self.random.below(3 * self.options.segment_bytes),
            _ => self.random.below(300),
        };
        let bytes = self.random.bytes(length as usize);
        let timeline = &mut self.timelines[i];
        let start = timeline.acknowledged_end() + timeline.stream.len() as u64;
        match self.log.append(TENANT, timeline.id, timeline.epoch(), start, &bytes) {
            Ok(position) => {
                self.appended = self.appended.max(position);
                timeline.stream.extend_from_slice(&bytes);
            }
            Err(WalLogError::SyncFailed { .. }) => self.restart_after_failure(),
            Err(WalLogError::Io { error, .. }) => {
                // A part of it may be there.
                timeline.stream.extend_from_slice(&bytes);
                timeline.reconnect();
                let full = error.kind() == std::io::ErrorKind::StorageFull;
                self.saw(if full { "full disks" } else { "failed writes" });
            }
            Err(error) => panic!("seed {}: {error}", self.seed),
        }
    }

    fn sync(&mut self) -> bool {
        match self.log.sync(self.appended) {
            Ok(()) => {
                self.saw("syncs");
                true
            }
            Err(error @ WalLogError::SyncFailed { .. }) => {
                self.saw("failed syncs");
                let again = self.log.sync(self.appended).unwrap_err();
                assert_eq!(again.to_string(), error.to_string(), "seed {}: after a failed fsync nothing is acknowledged", self.seed);
                self.restart_after_failure();
                false
            }
            Err(error) => panic!("seed {}: {error}", self.seed),
        }
    }

    fn restart_after_failure(&mut self) {
        let power = self.random.chance(300);
        self.restart(power);
    }

    fn step(&mut self) {
        let Some(i) = self.choose() else { return self.attach_all(300) };
        match self.random.below(100) {
            0..50 => self.append(i),
            50..75 => {
                if self.sync() {
                    for timeline in self.timelines.iter_mut().filter(|timeline| timeline.attached) {
                        let whole = timeline.stream.len() as u64;
                        let bytes = if self.random.chance(500) { whole } else { self.random.below(whole + 1) };
                        timeline.acknowledge(bytes as usize);
                    }
                }
            }
            75..79 => self.timelines[i].reconnect(),
            79..83 => {
                // The order of the design: no more of the old stream, all of it durable, the epoch durable, then it
                // begins.
                if self.sync() && self.timelines[i].attached {
                    let timeline = &mut self.timelines[i];
                    let whole = timeline.stream.len() as u64;
                    timeline.acknowledge(self.random.below(whole + 1) as usize);
                    let (old, next, lsn) = (timeline.epoch(), WriterEpoch(timeline.epoch().0 + 1), timeline.acknowledged_end());
                    timeline.epochs.push((next, lsn));
                    (timeline.stream, timeline.replaced) = (Vec::new(), vec![Vec::new()]);
                    let id = timeline.id;
                    if self.random.chance(100) {
                        // It never gets to hear of it.
                        return self.restart_after_failure();
                    }
                    self.log.start_epoch(TENANT, id, next, lsn).unwrap();
                    let refused = self.log.append(TENANT, id, old, lsn, b"late").unwrap_err();
                    assert!(matches!(refused, WalLogError::Fenced { .. }), "seed {}: {refused}", self.seed);
                    self.saw("epochs");
                }
            }
            83..90 => {
                let timeline = &mut self.timelines[i];
                let layered = timeline.layered + self.random.below(timeline.acknowledged_end().0 - timeline.layered.0 + 1);
                timeline.layered = layered;
                self.log.release(TENANT, timeline.id, layered);
                self.saw("releases");
            }
            90..93 => match self.log.copy_laggards() {
                Ok(0) => {}
                Ok(_) => self.saw("copied laggards"),
                Err(WalLogError::Io { .. }) => {}
                Err(WalLogError::SyncFailed { .. }) => self.restart_after_failure(),
                Err(error) => panic!("seed {}: {error}", self.seed),
            },
            93..96 => self.check_reads(i),
            96 => {
                let gone = self.timelines.swap_remove(i);
                self.log.forget(TENANT, gone.id).ok();
                self.timelines.push(Timeline::new(&mut self.random));
                self.attach_all(1000);
            }
            97 => self.restart(false),
            98 => self.restart(true),
            _ => {
                let capacity = self.random.between(2, 40) * self.options.segment_bytes;
                let faults = DiskFaults {
                    sync_fails: self.random.below(60) as u32,
                    write_fails: self.random.below(40) as u32,
                    capacity_bytes: self.random.chance(500).then_some(capacity),
                };
                self.disk.set_faults(faults);
            }
        }
    }

    fn check_reads(&mut self, i: usize) {
        let timeline = &self.timelines[i];
        let from = timeline.layered + self.random.below(timeline.acknowledged_end().0 - timeline.layered.0 + 1);
        let max = self.random.below(5_000) as usize;
        let skip = (from.0 - timeline.base.0) as usize;
        let known: Vec<u8> = timeline.acknowledged[skip..].iter().chain(&timeline.stream).copied().take(max).collect();
        match self.log.read(TENANT, timeline.id, from, max) {
            // Beyond the stream may still stand what it has not replaced yet.
            Ok(read) => {
                let both = read.len().min(known.len());
                assert!(read[..both] == known[..both], "seed {}: wrong bytes read", self.seed);
            }
            Err(error) => panic!("seed {}: acknowledged bytes cannot be read: {error}", self.seed),
        }
    }
}

#[test]
fn no_acknowledged_byte_is_lost_and_none_invented() {
    let mut seen: HashMap<&str, u64> = HashMap::new();
    for seed in seeds(400) {
        let mut world = World::new(seed);
        for _ in 0..400 {
            world.step();
        }
        world.restart(true);
        world.attach_all(1000);
        world.restart(false);
        world.attach_all(1000);
        for (what, times) in world.seen {
            *seen.entry(what).or_default() += times;
        }
    }
    println!("{seen:?}");
    let all = ["syncs", "failed syncs", "failed writes", "full disks", "epochs", "releases", "copied laggards", "crashes", "power cuts"];
    for what in all {
        assert!(seen.get(what).is_some_and(|times| *times > 20), "the schedules must reach {what}: {seen:?}");
    }
}

#[test]
fn a_flipped_bit_is_never_served() {
    let mut refused = 0;
    for seed in seeds(300) {
        let mut random = SeededRng::new(seed);
        let disk = SimDisk::new(seed);
        let options = WalLogOptions { limit_bytes: u64::MAX, segment_bytes: 8192, make_spares: false };
        let mut timeline = Timeline::new(&mut random);
        let log = WalLog::open_on(Arc::new(disk.clone()), options).unwrap();
        timeline.attach(&log, &mut random, seed);
        for _ in 0..60 {
            let (bytes, start) = (random.bytes(600), timeline.acknowledged_end());
            let position = log.append(TENANT, timeline.id, WriterEpoch(1), start, &bytes).unwrap();
            log.sync(position).unwrap();
            timeline.acknowledged.extend(bytes);
        }
        let files: Vec<String> = disk.files().into_keys().filter(|name| name.ends_with(".wal")).collect();
        let name = &files[random.below(files.len() as u64) as usize];
        disk.flip(name, random.below(8192) as usize);
        match WalLog::open_on(Arc::new(disk.crash_process()), options) {
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains(name.as_str()), "seed {seed}: the damaged file must be named: {error}");
            }
            Ok(log) => {
                // In padding, in what nothing stands in, or in the last chunk, which may be one that was torn.
                let end = log.attach(TENANT, timeline.id, &timeline.epochs, timeline.layered).unwrap();
                assert!(end + 600 >= timeline.acknowledged_end(), "seed {seed}: only the very last chunk may go unnoticed");
                let found = read_all(&log, timeline.id, timeline.layered, 1 << 20);
                assert!(timeline.acknowledged.starts_with(&found), "seed {seed}: damaged bytes were served");
            }
        }
    }
    assert!(refused > 100, "most flips are in what counts, {refused} were refused");
}

#[test]
fn a_full_disk_is_told_and_goes_on_when_there_is_space() {
    let disk = SimDisk::new(0);
    let options = WalLogOptions { limit_bytes: 8192, segment_bytes: 4096, make_spares: false };
    let log = WalLog::open_on(Arc::new(disk.clone()), options).unwrap();
    let (timeline, base) = (TimelineId([2; 16]), Lsn(8));
    log.attach(TENANT, timeline, &[(WriterEpoch(1), base)], base).unwrap();
    disk.set_faults(DiskFaults { capacity_bytes: Some(3 * 4096 + 1024), ..DiskFaults::default() });
    let mut end = base;
    let error = loop {
        match log.append(TENANT, timeline, WriterEpoch(1), end, &[7; 1000]) {
            Ok(position) => log.sync(position).unwrap(),
            Err(error) => break error,
        }
        end += 1000;
    };
    assert!(error.to_string().contains("nothing of it was acknowledged: free space"), "{error}");
    assert!(log.is_over_limit());
    disk.set_faults(DiskFaults::default());
    let position = log.append(TENANT, timeline, WriterEpoch(1), end, &[7; 1000]).unwrap();
    log.sync(position).unwrap();
    assert!(read_all(&log, timeline, base, 10_000).iter().all(|byte| *byte == 7));
    assert_eq!(log.end(TENANT, timeline).unwrap(), end + 1000);
    log.release(TENANT, timeline, end + 1000);
    assert!(!log.is_over_limit());
}

#[test]
fn one_laggard_does_not_hold_the_whole_log() {
    let disk = SimDisk::new(0);
    let options = WalLogOptions { limit_bytes: 16 * 4096, segment_bytes: 4096, make_spares: false };
    let log = WalLog::open_on(Arc::new(disk.clone()), options).unwrap();
    let (laggard, busy, base) = (TimelineId([2; 16]), TimelineId([3; 16]), Lsn(0x100));
    let epochs = [(WriterEpoch(1), base)];
    for timeline in [laggard, busy] {
        log.attach(TENANT, timeline, &epochs, base).unwrap();
    }
    log.append(TENANT, laggard, WriterEpoch(1), base, &[1; 500]).unwrap();
    let mut end = base;
    for _ in 0..100 {
        let position = log.append(TENANT, busy, WriterEpoch(1), end, &[2; 1000]).unwrap();
        log.sync(position).unwrap();
        end += 1000;
        log.release(TENANT, busy, end);
        while log.copy_laggards().unwrap() > 0 {}
        assert!(log.bytes() <= 10 * 4096, "the log has {} bytes for 500 that count", log.bytes());
    }
    assert_eq!(read_all(&log, laggard, base, 1000), [1; 500]);
    let log = WalLog::open_on(Arc::new(disk.cut_power()), options).unwrap();
    assert_eq!(log.attach(TENANT, laggard, &epochs, base).unwrap(), base + 500);
    assert_eq!(read_all(&log, laggard, base, 1000), [1; 500]);
}

/// A log with small segments, and two timelines that an epoch began at 0 of.
fn log_of_two() -> (WalLog, TimelineId, TimelineId) {
    let options = WalLogOptions { limit_bytes: 1 << 20, segment_bytes: 4096, make_spares: false };
    let log = WalLog::open_on(Arc::new(SimDisk::new(1)), options).unwrap();
    let timelines = (TimelineId([1; 16]), TimelineId([2; 16]));
    for timeline in [timelines.0, timelines.1] {
        log.attach(TENANT, timeline, &[(WriterEpoch(1), Lsn(0))], Lsn(0)).unwrap();
        let position = log.append(TENANT, timeline, WriterEpoch(1), Lsn(0), &[timeline.0[0]; 200]).unwrap();
        log.sync(position).unwrap();
    }
    (log, timelines.0, timelines.1)
}

#[test]
fn a_timeline_that_comes_back_frees_nothing_of_others() {
    let (log, moved, other) = log_of_two();
    log.release(TENANT, moved, Lsn(200));
    // Another server had it for an epoch. What was released does not count a second time.
    let epochs = [(WriterEpoch(1), Lsn(0)), (WriterEpoch(2), Lsn(200))];
    log.attach(TENANT, moved, &epochs, Lsn(200)).unwrap();
    let position = log.append(TENANT, moved, WriterEpoch(2), Lsn(200), &[3; 20_000]).unwrap();
    log.sync(position).unwrap();
    log.release(TENANT, moved, Lsn(20_200));
    assert_eq!(read_all(&log, other, Lsn(0), 1000), [2; 200]);
}

#[test]
fn a_timeline_that_comes_back_in_its_epoch_ends_where_its_layers_do() {
    let (log, moved, _) = log_of_two();
    // Another server had it, in the same epoch, and put more into layers than this log ever held.
    let end = log.attach(TENANT, moved, &[(WriterEpoch(1), Lsn(0))], Lsn(800)).unwrap();
    assert_eq!(end, Lsn(800));
    assert!(log.read(TENANT, moved, Lsn(800), 1000).unwrap().is_empty());
    let position = log.append(TENANT, moved, WriterEpoch(1), Lsn(800), &[4; 100]).unwrap();
    log.sync(position).unwrap();
    assert_eq!(read_all(&log, moved, Lsn(800), 1000), [4; 100]);
}

#[test]
fn many_threads_share_their_fsyncs() {
    let folder = tempfile::tempdir().unwrap();
    let log = Arc::new(WalLog::open(folder.path(), u64::MAX).unwrap());
    let threads: Vec<_> = (0..16u8)
        .map(|number| {
            let (log, timeline) = (log.clone(), TimelineId([number; 16]));
            std::thread::spawn(move || {
                log.attach(TENANT, timeline, &[(WriterEpoch(1), Lsn(0))], Lsn(0)).unwrap();
                let mut end = Lsn(0);
                for _ in 0..100 {
                    let position = log.append(TENANT, timeline, WriterEpoch(1), end, &[number; 777]).unwrap();
                    log.sync(position).unwrap();
                    end += 777;
                    let last = log.read(TENANT, timeline, Lsn(end.0 - 777), 10_000).unwrap();
                    assert!(last.len() == 777 && last.iter().all(|byte| *byte == number), "what was synced is read at once");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    drop(log);
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    assert_eq!(log.unattached().len(), 16);
    for number in 0..16u8 {
        let end = log.attach(TENANT, TimelineId([number; 16]), &[(WriterEpoch(1), Lsn(0))], Lsn(0)).unwrap();
        assert_eq!(end, Lsn(77_700), "all that 16 threads had synced is there after a restart");
    }
}

#[test]
fn only_what_no_open_timeline_needs_can_be_let_go_of() {
    let folder = tempfile::tempdir().unwrap();
    let log = WalLog::open(folder.path(), u64::MAX).unwrap();
    let timeline = TimelineId([7; 16]);
    let held = Unattached { tenant: TENANT, timeline, newest: WriterEpoch(1) };
    let epochs = [(WriterEpoch(1), Lsn(0))];
    log.attach(TENANT, timeline, &epochs, Lsn(0)).unwrap();
    let position = log.append(TENANT, timeline, WriterEpoch(1), Lsn(0), &[1; 1000]).unwrap();
    log.sync(position).unwrap();
    assert!(log.unattached().is_empty(), "it is open");
    assert!(!log.forget_unattached(held).unwrap(), "it is open");
    // Twice open, as while one that is being closed is opened again.
    log.attach(TENANT, timeline, &epochs, Lsn(0)).unwrap();
    log.detach(TENANT, timeline);
    assert!(!log.forget_unattached(held).unwrap(), "it is still open");
    assert_eq!(log.read(TENANT, timeline, Lsn(0), 10).unwrap().len(), 10);
    log.detach(TENANT, timeline);
    assert_eq!(log.unattached().iter().map(|held| (held.timeline, held.newest)).collect::<Vec<_>>(), [(timeline, WriterEpoch(1))]);
    assert!(log.forget_unattached(held).unwrap());
    assert!(log.unattached().is_empty());
    drop(log);
    assert!(WalLog::open(folder.path(), u64::MAX).unwrap().unattached().is_empty(), "nor does it come back");
}

#[test]
fn a_full_log_is_freed_though_much_of_its_oldest_segments_still_counts() {
    let options = WalLogOptions { limit_bytes: 20 * 4096, segment_bytes: 4096, make_spares: false };
    let log = WalLog::open_on(Arc::new(SimDisk::new(1)), options).unwrap();
    let (held, busy) = (TimelineId([1; 16]), TimelineId([2; 16]));
    for timeline in [held, busy] {
        log.attach(TENANT, timeline, &[(WriterEpoch(1), Lsn(0))], Lsn(0)).unwrap();
    }
    let mut end = Lsn(0);
    while !log.is_over_limit() {
        // About half of each segment is of the one that lags: too much to be copied while there is room.
        assert_eq!(log.copy_laggards().unwrap(), 0, "with {} bytes", log.bytes());
        for timeline in [held, busy] {
            let position = log.append(TENANT, timeline, WriterEpoch(1), end, &[timeline.0[0]; 500]).unwrap();
            log.sync(position).unwrap();
        }
        end += 500;
        log.release(TENANT, busy, end);
    }
    while log.copy_laggards().unwrap() > 0 {}
    assert!(!log.is_over_limit(), "everybody waits for {} bytes, of which {} count", log.bytes(), end.0);
    assert_eq!(read_all(&log, held, Lsn(0), end.0 as usize), vec![1; end.0 as usize], "what was copied is what it was");
}
