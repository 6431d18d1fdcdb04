//! Files that have no WAL reach the observer, whichever way they were written.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    sync::Arc,
    time::Duration,
};

use crate::support::{Mounted, scratch, synthetic::synthetic_cluster};
use parking_lot::Mutex;
use varve_host::mount::FileObserver;

/// What would be kept by now, and how often it was told.
#[derive(Default)]
struct Kept {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    calls: Mutex<u32>,
}

impl FileObserver for Kept {
    fn written(&self, path: &str, contents: Vec<u8>) {
        *self.calls.lock() += 1;
        self.files.lock().insert(path.to_owned(), contents);
    }

    fn removed(&self, path: &str) {
        *self.calls.lock() += 1;
        self.files.lock().remove(path);
    }

    fn not_kept(&self, path: &str, why: String) {
        *self.calls.lock() += 1;
        self.files.lock().insert(path.to_owned(), why.into_bytes());
    }
}

fn observed() -> (tempfile::TempDir, Arc<Kept>, Mounted) {
    let dir = scratch("observer");
    let source = synthetic_cluster(dir.path(), &[("16384", 2)]);
    let kept: Arc<Kept> = Arc::default();
    let observer = kept.clone();
    let mounted = Mounted::start(&source, move |config| config.observer = Some(observer));
    (dir, kept, mounted)
}

fn kept(kept: &Kept, mounted: &Mounted, path: &str) -> Option<Vec<u8>> {
    mounted.mount().flush_observer().expect("nothing is lost");
    kept.files.lock().get(path).cloned()
}

#[test]
fn a_file_renamed_into_place_is_kept() {
    let (_base, observer, mounted) = observed();
    let dir = mounted.data();
    for n in 0..3 {
        fs::write(dir.join("postgresql.auto.conf.tmp"), format!("work_mem = '{n}MB'\n")).expect("a write");
        fs::rename(dir.join("postgresql.auto.conf.tmp"), dir.join("postgresql.auto.conf")).expect("rename");
    }
    assert_eq!(kept(&observer, &mounted, "postgresql.auto.conf").as_deref(), Some(b"work_mem = '2MB'\n".as_slice()));
    assert_eq!(kept(&observer, &mounted, "postgresql.auto.conf.tmp"), None);
    fs::remove_file(dir.join("postgresql.auto.conf")).expect("unlink");
    assert_eq!(kept(&observer, &mounted, "postgresql.auto.conf"), None);
}

#[test]
fn a_file_edited_in_place_is_kept() {
    let (_base, observer, mounted) = observed();
    let mut file = OpenOptions::new().append(true).open(mounted.data().join("pg_hba.conf")).expect("it is there");
    writeln!(file, "host all all all scram-sha-256").expect("a write");
    drop(file);
    let expected = b"local all all trust\nhost all all all scram-sha-256\n";
    assert_eq!(kept(&observer, &mounted, "pg_hba.conf").as_deref(), Some(expected.as_slice()));
    fs::write(mounted.data().join("pg_hba.conf"), b"").expect("emptied");
    assert_eq!(kept(&observer, &mounted, "pg_hba.conf").as_deref(), Some(b"".as_slice()));
}

#[test]
fn replication_slots_come_and_go_as_postgres_makes_them() {
    let (_base, observer, mounted) = observed();
    let slots = mounted.data().join("pg_replslot");
    fs::create_dir(slots.join("s.tmp")).expect("mkdir");
    fs::write(slots.join("s.tmp/state"), b"one").expect("a write");
    assert_eq!(kept(&observer, &mounted, "pg_replslot/s.tmp/state"), None);
    fs::rename(slots.join("s.tmp"), slots.join("s")).expect("rename");
    assert_eq!(kept(&observer, &mounted, "pg_replslot/s/state").as_deref(), Some(b"one".as_slice()));
    fs::write(slots.join("s/state.tmp"), b"two").expect("a write");
    fs::rename(slots.join("s/state.tmp"), slots.join("s/state")).expect("rename");
    assert_eq!(kept(&observer, &mounted, "pg_replslot/s/state").as_deref(), Some(b"two".as_slice()));
    fs::rename(slots.join("s"), slots.join("s.tmp")).expect("rename");
    fs::remove_dir_all(slots.join("s.tmp")).expect("rmtree");
    assert_eq!(kept(&observer, &mounted, "pg_replslot/s/state"), None);
}

#[test]
fn what_tenants_put_beside_postgress_files_is_kept() {
    let (_base, observer, mounted) = observed();
    let dir = mounted.data();
    fs::create_dir(dir.join("conf.d")).expect("mkdir");
    for path in ["server.key", "conf.d/more.conf", "autoprewarm.blocks.tmp", "base/mine", "postmaster.pid"] {
        fs::write(dir.join(path), path).expect("a write");
    }
    fs::rename(dir.join("autoprewarm.blocks.tmp"), dir.join("autoprewarm.blocks")).expect("rename");
    for path in ["server.key", "conf.d/more.conf"] {
        assert_eq!(kept(&observer, &mounted, path).as_deref(), Some(path.as_bytes()));
    }
    assert_eq!(kept(&observer, &mounted, "autoprewarm.blocks").as_deref(), Some(b"autoprewarm.blocks.tmp".as_slice()));
    for path in ["autoprewarm.blocks.tmp", "base/mine", "postmaster.pid"] {
        assert_eq!(kept(&observer, &mounted, path), None, "{path}");
    }
    fs::rename(dir.join("conf.d"), dir.join("settings")).expect("rename");
    assert_eq!(kept(&observer, &mounted, "conf.d/more.conf"), None);
    assert_eq!(kept(&observer, &mounted, "settings/more.conf").as_deref(), Some(b"conf.d/more.conf".as_slice()));
    let large = fs::File::create(dir.join("large")).expect("a file");
    large.set_len((64 << 20) + 1).expect("a hole");
    let told = kept(&observer, &mounted, "large").expect("it is told of");
    assert!(told.starts_with(b"it has 67108865 bytes"), "{}", String::from_utf8_lossy(&told));
}

#[test]
fn what_changes_is_told_without_being_asked_for_and_bursts_are_one() {
    let (_base, observer, mounted) = observed();
    for n in 0..200 {
        fs::write(mounted.data().join("pg_stat/pgstat.stat"), format!("{n}")).expect("a write");
    }
    for _ in 0..200 {
        if observer.files.lock().get("pg_stat/pgstat.stat").is_some_and(|contents| contents == b"199") {
            let calls = *observer.calls.lock();
            assert!(calls < 100, "200 writes in a row were told {calls} times");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the last write should have been told by now");
}

#[test]
fn what_was_written_last_is_told_before_the_mount_ends() {
    let (_base, observer, mut mounted) = observed();
    fs::write(mounted.data().join("postgresql.conf"), b"port = 1\n").expect("a write");
    mounted.mount.take().expect("mounted").unmount().expect("unmount");
    assert_eq!(observer.files.lock().get("postgresql.conf").map(Vec::as_slice), Some(b"port = 1\n".as_slice()));
}
