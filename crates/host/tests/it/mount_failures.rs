//! What happens when something around the mount fails.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::support::{
    Mounted, scratch,
    synthetic::{BLOCK, block_contents, synthetic_cluster},
};
use parking_lot::Mutex;
use rustix::fs::Advice;
use varve_host::mount::{Mount, MountError, remove_stale_mount};

fn read_block(file: &File, block: u32) -> std::io::Result<Vec<u8>> {
    let mut page = vec![0; BLOCK];
    file.read_exact_at(&mut page, u64::from(block) * BLOCK as u64)?;
    Ok(page)
}

/// Opens a relation without read-ahead, which would touch more than the test does.
fn open(mounted: &Mounted, rel: u32) -> File {
    let file = OpenOptions::new().read(true).write(true).open(mounted.data().join(format!("base/5/{rel}"))).expect("it opens");
    rustix::fs::fadvise(&file, 0, None, Advice::Random).expect("fadvise");
    file
}

#[test]
fn while_the_pageserver_is_away_first_touches_wait_and_all_else_goes_on() {
    let dir = scratch("away");
    let source = synthetic_cluster(dir.path(), &[("16384", 64), ("16386", 256)]);
    let mounted = Mounted::start(&source, |_| {});
    let known = open(&mounted, 16384);
    assert!(read_block(&known, 1).expect("a read") == block_contents(16384, 1));
    let other = open(&mounted, 16386);
    source.away.store(true, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let touches: Vec<_> = (0..32)
            .map(|n| {
                scope.spawn({
                    let other = &other;
                    move || read_block(other, n * 8)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let started = Instant::now();
        for round in 0..50u8 {
            rustix::fs::fadvise(&known, 0, None, Advice::DontNeed).expect("fadvise");
            assert!(read_block(&known, 1).expect("a read of what is here") == block_contents(16384, 1));
            other.write_all_at(&[round; BLOCK], 5 * BLOCK as u64).expect("a write");
            other.sync_all().expect("it reaches the mount");
            fs::write(mounted.data().join(format!("new-{round}")), b"1").expect("a new file");
        }
        assert!(started.elapsed() < Duration::from_secs(10), "what is here takes {:?} while others wait", started.elapsed());
        assert!(touches.iter().all(|touch| !touch.is_finished()), "first touches wait");
        source.away.store(false, Ordering::Relaxed);
        for (n, touch) in (0..).zip(touches) {
            assert!(touch.join().expect("no panic").expect("it is read in the end") == block_contents(16386, n * 8));
        }
    });
    assert!(read_block(&other, 5).expect("a read") == [49; BLOCK]);
}

#[test]
fn when_patience_ends_the_read_fails_and_the_next_may_succeed() {
    let dir = scratch("patience");
    let source = synthetic_cluster(dir.path(), &[("16384", 64)]);
    let mounted = Mounted::start(&source, |config| config.source_patience = Duration::from_millis(300));
    let file = open(&mounted, 16384);
    source.away.store(true, Ordering::Relaxed);
    let error = read_block(&file, 3).expect_err("nobody answers");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    source.away.store(false, Ordering::Relaxed);
    assert!(read_block(&file, 3).expect("a read") == block_contents(16384, 3));
    assert!(mounted.mount().failure().is_none());
}

#[test]
fn a_full_cache_fails_the_mount_rather_than_lose_a_write_in_silence() {
    let dir = scratch("full");
    let source = synthetic_cluster(dir.path(), &[("16384", 64)]);
    let small = dir.path().join("small");
    fs::create_dir(&small).expect("a directory");
    rustix::mount::mount("tmpfs", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=2m")).expect("a small file system");
    let _unmount = UnmountOnDrop(&small);
    let reasons: Arc<Mutex<Vec<String>>> = Arc::default();
    let mounted = Mounted::start(&source, |config| {
        config.cache_dir = small.join("cache");
        let reasons = reasons.clone();
        config.on_failure = Some(Box::new(move |reason| reasons.lock().push(reason.to_owned())));
    });
    let known = open(&mounted, 16384);
    read_block(&known, 0).expect("a read");
    let file = File::create(mounted.data().join("big")).expect("a file");
    let written = file.write_all_at(&vec![1; 8 << 20], 0);
    let synced = file.sync_all();
    assert!(written.is_err() || synced.is_err(), "8 MB do not fit into 2");
    assert_eq!(reasons.lock().len(), 1, "the supervisor is told once: {:?}", reasons.lock());
    assert!(mounted.mount().failure().is_some_and(|reason| reason.contains("make room")));
    assert!(read_block(&known, 40).is_err(), "a mount that lost a write answers no more");
    drop((known, file));
    drop(mounted);
}

struct UnmountOnDrop<'a>(&'a Path);

impl Drop for UnmountOnDrop<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_cache_still_serves_reads() {
    let dir = scratch("full-reads");
    let source = synthetic_cluster(dir.path(), &[("16384", 512)]);
    let small = dir.path().join("small");
    fs::create_dir(&small).expect("a directory");
    rustix::mount::mount("tmpfs", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=1m")).expect("a small file system");
    let _unmount = UnmountOnDrop(&small);
    let mounted = Mounted::start(&source, |config| config.cache_dir = small.join("cache"));
    let file = open(&mounted, 16384);
    for block in 0..512 {
        assert!(read_block(&file, block).expect("a read") == block_contents(16384, block), "block {block}");
    }
    assert!(mounted.mount().failure().is_none());
    drop(file);
    drop(mounted);
}

const CHILD: &str = "VARVE_TEST_MOUNT_AT";

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "run by another test, as a process of its own"]
fn child_that_mounts() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let dir = Path::new(&dir);
    let source = synthetic_cluster(dir, &[("16384", 64)]);
    let config = source.mount_config(&dir.join("data"), &dir.join("cache"), &dir.join("wal"));
    let _mount = Mount::start(config).expect("the mount starts");
    println!("\nmounted");
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_lives_is_not() {
    let dir = scratch("killed");
    let mountpoint = dir.path().join("data");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "mount_failures::child_that_mounts", "--nocapture"])
        .env(CHILD, dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process of its own");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    assert!(output.lines().map_while(Result::ok).any(|line| line == "mounted"), "the child mounts");
    assert_eq!(fs::read(mountpoint.join("PG_VERSION")).expect("it is served"), b"15\n");

    let error = remove_stale_mount(&mountpoint).expect_err("its process lives");
    assert!(matches!(error, MountError::InUse { .. }), "{error}");
    child.kill().expect("kill");
    child.wait().expect("it ends");
    // What the kernel has it still gives: here, PG_VERSION.
    let error = fs::read(mountpoint.join("pg_hba.conf")).expect_err("nobody serves it");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOTCONN.raw_os_error()));

    assert!(remove_stale_mount(&mountpoint).expect("it is removed"), "there was something to remove");
    assert!(!remove_stale_mount(&mountpoint).expect("nothing is left"));
    let again = dir.path().join("again");
    let source = synthetic_cluster(&again, &[("16384", 64)]);
    let config = source.mount_config(&mountpoint, &dir.path().join("cache"), &dir.path().join("wal2"));
    let mount = Mount::start(config).expect("the place can be used again");
    assert_eq!(fs::read(mountpoint.join("PG_VERSION")).expect("it is served"), b"15\n");
    mount.unmount().expect("unmount");
}

#[test]
fn unmounting_does_not_wait_for_ever_for_those_who_use_it() {
    let dir = scratch("in-use");
    let source = synthetic_cluster(dir.path(), &[("16384", 64)]);
    let mut mounted = Mounted::start(&source, |_| {});
    let file = open(&mounted, 16384);
    read_block(&file, 1).expect("a read");
    let started = Instant::now();
    mounted.mount.take().expect("mounted").unmount().expect("it is taken away");
    assert!(started.elapsed() < Duration::from_secs(20), "it took {:?}", started.elapsed());
    assert!(read_block(&file, 2).is_err(), "whoever still uses it gets an error");
    assert!(fs::read_dir(mounted.data()).expect("the bare mountpoint").next().is_none());
    assert!(!mounted.dir.path().join("cache/files").exists(), "the cache is deleted");
}

#[test]
fn a_mount_that_somebody_else_unmounts_is_reported() {
    let dir = scratch("foreign");
    let source = synthetic_cluster(dir.path(), &[("16384", 64)]);
    let reasons: Arc<Mutex<Vec<String>>> = Arc::default();
    let mounted = Mounted::start(&source, |config| {
        let reasons = reasons.clone();
        config.on_failure = Some(Box::new(move |reason| reasons.lock().push(reason.to_owned())));
    });
    rustix::mount::unmount(mounted.data(), rustix::mount::UnmountFlags::empty()).expect("somebody unmounts it");
    for _ in 0..200 {
        if !reasons.lock().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("the supervisor should have been told");
}
