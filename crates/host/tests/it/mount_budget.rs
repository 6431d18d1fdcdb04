//! The cache keeps to its budget, and what was dropped comes back as it was.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use rustix::fs::{Advice, fadvise};
use varve_testing::random::SeededRng;

use crate::{
    mount_postgres::{check_with_amcheck, cluster, pgbench_tables},
    support::{
        Mounted, scratch,
        synthetic::{BLOCK, block_contents, synthetic_cluster},
    },
};

const LIMIT: u64 = 16 << 20;
/// What the cache's folder may take beyond what is counted: what threads have fetched and are about to make room for,
/// 1 MiB each, and what the file system notes about files with holes.
const SLACK: u64 = (5 << 20) + BALLAST;
/// What the mount keeps free for a full disk, in a file of the cache.
const BALLAST: u64 = 8 << 20;

/// Bytes of disk that a folder takes.
fn allocated(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0, // gone meanwhile
    };
    entries.into_iter().map(bytes).sum()
}

/// The files of relations in a folder.
fn files(dir: &Path) -> Vec<PathBuf> {
    let is_relation = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit());
    fs::read_dir(dir).expect("a folder").flatten().map(|entry| entry.path()).filter(is_relation).collect()
}

/// The kernel forgets what it knows of these files, where it was written back.
fn forget(dir: &Path) {
    for path in files(dir) {
        if let Ok(file) = File::open(path) {
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
        }
    }
}

/// Checks what the cache takes. What is written may grow while it is looked, so it is asked before and after.
fn check_budget(mounted: &Mounted) {
    let before = mounted.mount().statistics();
    let taken = allocated(&mounted.dir.path().join("cache"));
    let after = mounted.mount().statistics();
    let dirty = before.dirty_bytes.max(after.dirty_bytes);
    let allowed = LIMIT.max(dirty + LIMIT / 16) + SLACK;
    assert!(taken <= allowed, "the cache takes {taken} bytes, {allowed} allowed: {after:?}");
}

#[test]
fn blocks_that_were_dropped_are_read_again_as_they_are_in_the_base() {
    const BLOCKS: u32 = 8_000;
    let dir = scratch("budget");
    let source = synthetic_cluster(dir.path(), &[("16384", BLOCKS)]);
    let mounted = Mounted::start(&source, |config| config.cache_bytes = Some(LIMIT));
    let path = mounted.data().join("base/5/16384");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut rng = SeededRng::new(7);
    let mut written = vec![false; BLOCKS as usize];
    let changed = |block: u32| -> Vec<u8> { block_contents(16384, block).iter().map(|byte| !byte).collect() };
    for round in 0..3 {
        for n in 0..BLOCKS {
            let block = if round == 1 { n } else { rng.below(BLOCKS.into()) as u32 };
            let mut page = vec![0; BLOCK];
            file.read_exact_at(&mut page, u64::from(block) * BLOCK as u64).unwrap();
            let expected = if written[block as usize] { changed(block) } else { block_contents(16384, block) };
            assert!(page == expected, "block {block} in round {round}");
            if rng.chance(10) {
                file.write_all_at(&changed(block), u64::from(block) * BLOCK as u64).unwrap();
                written[block as usize] = true;
            }
            if n % 1000 == 0 {
                forget(path.parent().unwrap());
                check_budget(&mounted);
            }
        }
        file.sync_all().unwrap();
    }
    let statistics = mounted.mount().statistics();
    assert!(statistics.blocks_evicted > u64::from(BLOCKS), "{statistics:?}");
    assert!(statistics.dirty_bytes < LIMIT && allocated(&mounted.dir.path().join("cache")) <= LIMIT + SLACK, "{statistics:?}");
    drop(file);
    fs::remove_file(&path).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while mounted.mount().statistics().cached_bytes > 0 {
        assert!(Instant::now() < deadline, "what was removed counts still: {:?}", mounted.mount().statistics());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends the watch even where the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

const BOOKS_BALANCE: &str = "SELECT sum(abalance) = (SELECT sum(bbalance) FROM pgbench_branches)
       AND sum(abalance) = (SELECT sum(tbalance) FROM pgbench_tellers)
       AND sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";

#[test]
fn a_database_ten_times_the_budget_is_served_through_kills() {
    let (_origin, source) = cluster(|origin| pgbench_tables(origin, 12));
    let mounted = Mounted::start(&source, |config| config.cache_bytes = Some(LIMIT));
    let database = mounted.data().join("base/5");
    assert!(files(&database).iter().map(|path| path.metadata().unwrap().len()).sum::<u64>() >= 10 * LIMIT);
    // Without full-page writes a page that the kill tore would stay torn: a compute starts anew instead.
    let mut server =
        mounted.postgres(&[("full_page_writes", "on"), ("shared_buffers", "8MB"), ("max_wal_size", "2GB"), ("autovacuum", "off")]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !done.load(Relaxed) {
                check_budget(&mounted);
                forget(&database);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let stop = StopOnDrop(&done);
        // Reading only: the budget alone holds.
        server.run("pgbench", &["-n", "-S", "-c", "4", "-T", "5"]);
        assert_eq!(server.psql("postgres", "SELECT count(*), count(DISTINCT bid) FROM pgbench_accounts"), "1200000|12");
        let reading = mounted.mount().statistics();
        assert!(reading.dirty_bytes < LIMIT, "{reading:?}");
        for round in 0..2 {
            let mut load =
                server.command("pgbench").args(["-n", "-T", "60", "-c", "4"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_secs(3));
            server.kill();
            let _ = load.kill();
            let _ = load.wait();
            server.start_again();
            assert_eq!(server.psql("postgres", BOOKS_BALANCE), "t", "the books balance after kill {round}");
        }
        check_with_amcheck(&server);
        drop(stop);
        watch.join().expect("the cache keeps to its budget");
    });
    assert_ne!(server.psql("postgres", "SELECT count(*) FROM pgbench_history"), "0", "the load did something");
    let statistics = mounted.mount().statistics();
    assert!(statistics.blocks_evicted > 10_000 && mounted.mount().failure().is_none(), "{statistics:?}");
}
