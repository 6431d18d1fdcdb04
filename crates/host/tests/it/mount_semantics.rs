//! What Postgres relies on beyond reading and writing, one promise each.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};

use crate::support::{
    Mounted, scratch,
    synthetic::{BLOCK, block_contents, relation, synthetic_cluster},
};
use rustix::fs::{Advice, AtFlags, FlockOperation, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT};

const RELATIONS: [(&str, u32); 2] = [("16384", 64), ("16386", 1024)];

/// A mount of a small base. The scratch directory keeps the base.
fn mounted() -> (tempfile::TempDir, Mounted) {
    let dir = scratch("semantics");
    let source = synthetic_cluster(dir.path(), &RELATIONS);
    let mounted = Mounted::start(&source, |_| {});
    (dir, mounted)
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("it opens")
}

fn read_block(file: &File, block: u32) -> Vec<u8> {
    let mut page = vec![0; BLOCK];
    file.read_exact_at(&mut page, u64::from(block) * BLOCK as u64).expect("a block");
    page
}

#[test]
fn a_file_that_was_unlinked_while_open_lives_on() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("base/5/16384");
    let file = open(&path);
    fs::remove_file(&path).expect("unlink");
    assert!(!path.exists());
    assert_eq!(file.metadata().expect("fstat without a name").nlink(), 0);
    assert!(read_block(&file, 9) == block_contents(16384, 9), "blocks of the base can still be fetched");
    file.write_all_at(&[5; BLOCK], 70 * BLOCK as u64).expect("it can be written");
    assert_eq!(file.metadata().expect("fstat").len(), 71 * BLOCK as u64);
    fs::write(&path, b"new").expect("the name can be used again");
    assert_eq!(fs::read(&path).expect("the new file"), b"new");
    assert!(read_block(&file, 70) == [5; BLOCK]);
}

#[test]
fn a_name_that_is_used_again_never_shows_the_base() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("base/5/16384");
    fs::remove_file(&path).expect("unlink");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).expect("a new file of that name");
    file.write_all_at(&[1; BLOCK], 10 * BLOCK as u64).expect("a write beyond its start");
    mounted.mount().prefetch(&[(relation(16384), 3)]).expect("prefetch passes over it");
    file.sync_all().expect("fsync");
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("fadvise");
    assert!(read_block(&file, 3) == [0; BLOCK], "what was not written is zero");
    file.set_len(0).expect("truncate");
    file.set_len(64 * BLOCK as u64).expect("extend");
    assert!(read_block(&file, 10) == [0; BLOCK]);
}

#[test]
fn a_truncated_relation_extends_with_zeros() {
    let (_base, mounted) = mounted();
    let file = open(&mounted.data().join("base/5/16386"));
    file.set_len(10 * BLOCK as u64).expect("truncate");
    file.set_len(1024 * BLOCK as u64).expect("extend");
    mounted.mount().prefetch(&(0..20).map(|block| (relation(16386), block)).collect::<Vec<_>>()).expect("prefetch");
    assert!(read_block(&file, 9) == block_contents(16386, 9));
    assert!(read_block(&file, 10) == [0; BLOCK]);
    assert!(read_block(&file, 1023) == [0; BLOCK]);
}

#[test]
fn direct_io_and_buffered_io_see_the_same() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("base/5/16384");
    let direct = OpenOptions::new().read(true).write(true).custom_flags(OFlags::DIRECT.bits() as i32).open(&path).expect("O_DIRECT");
    let buffered = open(&path);
    assert!(read_block(&direct, 3) == block_contents(16384, 3));
    direct.write_all_at(&[8; BLOCK], 4 * BLOCK as u64).expect("a direct write");
    assert!(read_block(&buffered, 4) == [8; BLOCK]);
    buffered.write_all_at(&[9; BLOCK], 4 * BLOCK as u64).expect("a buffered write");
    assert!(read_block(&direct, 4) == [9; BLOCK]);
    assert!(read_block(&direct, 5) == block_contents(16384, 5));
}

#[test]
#[allow(unsafe_code, reason = "mapping memory is what is tested")]
fn a_shared_mapping_reads_and_writes_the_file() {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};
    let (_base, mounted) = mounted();
    let path = mounted.data().join("base/5/16384");
    let file = open(&path);
    let length = 64 * BLOCK;
    // SAFETY: a fresh mapping of a file that is not truncated while it is used.
    let map = unsafe {
        let at = rustix::mm::mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0);
        std::slice::from_raw_parts_mut(at.expect("mmap").cast::<u8>(), length)
    };
    assert!(map[BLOCK..2 * BLOCK] == block_contents(16384, 1));
    map[2 * BLOCK..3 * BLOCK].fill(3);
    // SAFETY: the mapping above.
    unsafe { rustix::mm::msync(map.as_mut_ptr().cast(), length, MsyncFlags::SYNC) }.expect("msync");
    assert!(read_block(&file, 2) == [3; BLOCK]);
    assert!(read_block(&file, 3) == block_contents(16384, 3));
    // SAFETY: nobody uses the mapping from here on.
    unsafe { rustix::mm::munmap(map.as_mut_ptr().cast(), length) }.expect("munmap");
}

#[test]
fn copying_between_files_works_in_the_kernel_too() {
    let (_base, mounted) = mounted();
    let from = File::open(mounted.data().join("base/5/16384")).expect("the source");
    let to = File::create_new(mounted.data().join("base/5/20000")).expect("the copy");
    let mut left = 64 * BLOCK;
    while left > 0 {
        let copied = rustix::fs::copy_file_range(&from, None, &to, None, left).expect("copy_file_range");
        assert!(copied > 0, "it ends {left} bytes early");
        left -= copied;
    }
    let copy = File::open(mounted.data().join("base/5/20000")).expect("the copy");
    for block in [0, 1, 30, 63] {
        assert!(read_block(&copy, block) == block_contents(16384, block), "block {block}");
    }
}

#[test]
fn locks_exclude_and_are_released() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("postmaster.pid");
    fs::write(&path, b"1").expect("a lock file");
    let (one, two) = (open(&path), open(&path));
    rustix::fs::flock(&one, FlockOperation::NonBlockingLockExclusive).expect("the first lock");
    let refused = rustix::fs::flock(&two, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(refused, Err(rustix::io::Errno::WOULDBLOCK));
    drop(one);
    rustix::fs::flock(&two, FlockOperation::NonBlockingLockExclusive).expect("free again");
    rustix::fs::fcntl_lock(&two, FlockOperation::NonBlockingLockExclusive).expect("a POSIX lock");
}

#[test]
fn renaming_replaces_a_file_that_others_have_open() {
    let (_base, mounted) = mounted();
    let dir = mounted.data();
    fs::write(dir.join("a"), b"old").expect("a file");
    fs::write(dir.join("a.tmp"), b"new").expect("its successor");
    let old = File::open(dir.join("a")).expect("the old one");
    fs::rename(dir.join("a.tmp"), dir.join("a")).expect("rename");
    assert_eq!(fs::read(dir.join("a")).expect("the new one"), b"new");
    let mut contents = [0; 3];
    old.read_exact_at(&mut contents, 0).expect("the old one is still read");
    assert_eq!(&contents, b"old");
    File::open(&dir).expect("the directory").sync_all().expect("fsync of a directory");

    fs::write(dir.join("b"), b"b").expect("another");
    let cwd = rustix::fs::CWD;
    let kept = rustix::fs::renameat_with(cwd, dir.join("b"), cwd, dir.join("a"), RenameFlags::NOREPLACE);
    assert_eq!(kept, Err(rustix::io::Errno::EXIST));
    let exchanged = rustix::fs::renameat_with(cwd, dir.join("b"), cwd, dir.join("a"), RenameFlags::EXCHANGE);
    assert_eq!(exchanged, Err(rustix::io::Errno::INVAL));
}

#[test]
fn a_directory_that_moves_takes_its_contents_along() {
    let (_base, mounted) = mounted();
    let dir = mounted.data();
    fs::create_dir_all(dir.join("x/y/z")).expect("directories");
    fs::write(dir.join("x/y/z/file"), b"1").expect("a file");
    fs::rename(dir.join("x/y"), dir.join("moved")).expect("rename");
    assert_eq!(fs::read(dir.join("moved/z/file")).expect("the file"), b"1");
    assert_eq!(fs::read(dir.join("moved/z/../../moved/z/file")).expect("through .."), b"1");
    assert_eq!(fs::metadata(dir.join("x")).expect("the old parent").nlink(), 2);
    assert!(fs::rename(dir.join("moved"), dir.join("moved/z/deeper")).is_err(), "not into itself");
    fs::create_dir(dir.join("full")).expect("a directory");
    fs::write(dir.join("full/file"), b"1").expect("a file in it");
    assert_eq!(
        fs::rename(dir.join("moved"), dir.join("full")).expect_err("not over a full one").kind(),
        std::io::ErrorKind::DirectoryNotEmpty
    );
}

#[test]
fn links_symbolic_links_sockets_and_pipes_can_be_made() {
    let (_base, mounted) = mounted();
    let dir = mounted.data();
    fs::write(dir.join("a"), b"1").expect("a file");
    fs::hard_link(dir.join("a"), dir.join("b")).expect("a hard link");
    assert_eq!(fs::metadata(dir.join("a")).expect("a").nlink(), 2);
    fs::remove_file(dir.join("a")).expect("unlink");
    assert_eq!(fs::read(dir.join("b")).expect("the other name"), b"1");
    std::os::unix::fs::symlink("/somewhere", dir.join("link")).expect("a symbolic link");
    assert_eq!(fs::read_link(dir.join("link")).expect("its target"), Path::new("/somewhere"));
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("a socket");
    std::os::unix::net::UnixStream::connect(dir.join("s")).expect("a connection to it");
    rustix::fs::mknodat(rustix::fs::CWD, dir.join("p"), rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0)
        .expect("a pipe");
}

#[test]
fn modes_owners_and_times_are_kept() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("base/5/16384");
    assert_eq!(fs::metadata(&path).expect("stat").mode() & 0o7777, 0o600);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
    std::os::unix::fs::chown(&path, Some(4242), Some(4343)).expect("chown");
    let time = Timespec { tv_sec: 1_000_000_000, tv_nsec: 5 };
    let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty()).expect("utimens");
    let meta = fs::metadata(&path).expect("stat");
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 4242, 4343));
    assert_eq!(meta.modified().expect("a time"), SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 5));
    let space = rustix::fs::statvfs(mounted.data()).expect("statfs");
    assert!(space.f_blocks > 0 && space.f_bavail > 0);
}

#[test]
fn permissions_are_checked() {
    let (_base, mounted) = mounted();
    fs::write(mounted.data().join("secret"), b"1").expect("a file");
    let other = std::process::Command::new("cat")
        .arg(mounted.data().join("secret"))
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .status_as(65_534);
    assert!(!other, "another user must not read what lies in a directory of mode 0700");
}

trait StatusAs {
    fn status_as(&mut self, uid: u32) -> bool;
}

impl StatusAs for std::process::Command {
    fn status_as(&mut self, uid: u32) -> bool {
        use std::os::unix::process::CommandExt;
        self.uid(uid).gid(uid).status().expect("it runs").success()
    }
}

#[test]
fn what_is_not_supported_says_so() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("base/5/16384");
    let set = rustix::fs::setxattr(&path, "user.x", b"1", rustix::fs::XattrFlags::empty());
    assert_eq!(set, Err(rustix::io::Errno::OPNOTSUPP));
    let file = open(&path);
    let collapse = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::COLLAPSE_RANGE, 0, 8192);
    assert_eq!(collapse, Err(rustix::io::Errno::OPNOTSUPP));
    let device = rustix::fs::FileType::CharacterDevice;
    let made = rustix::fs::mknodat(rustix::fs::CWD, mounted.data().join("dev"), device, rustix::fs::Mode::from_raw_mode(0o600), 259);
    assert_eq!(made, Err(rustix::io::Errno::PERM));
    let long = fs::write(mounted.data().join("x".repeat(300)), b"").expect_err("a long name");
    assert_eq!(long.raw_os_error(), Some(rustix::io::Errno::NAMETOOLONG.raw_os_error()));
}

#[test]
fn a_directory_of_100_000_files_is_read_whole_while_it_is_emptied() {
    const FILES: u32 = 100_000;
    let dir = scratch("many");
    let source = synthetic_cluster(dir.path(), &[]);
    for rel in 0..FILES {
        File::create(source.data_dir().join(format!("base/5/{}", 20_000 + rel))).expect("an empty relation");
    }
    let mounted = Mounted::start(&source, |_| {});
    let path = mounted.data().join("base/5");
    let mut seen = 0;
    for entry in fs::read_dir(&path).expect("the directory") {
        let entry = entry.expect("an entry");
        if entry.file_name() != "PG_VERSION" {
            fs::remove_file(entry.path()).expect("unlink");
            seen += 1;
        }
    }
    assert_eq!(seen, FILES, "each file is listed once although others go");
    assert_eq!(fs::read_dir(&path).expect("the directory").count(), 1, "only PG_VERSION is left");
    for n in 0..1000 {
        fs::write(path.join(format!("t{n}")), b"").expect("a file");
    }
    let with_metadata = fs::read_dir(&path).expect("the directory").flatten().filter(|entry| entry.metadata().is_ok()).count();
    assert_eq!(with_metadata, 1001);
}

#[test]
fn one_fetch_serves_what_the_kernel_reads_at_once() {
    let (_base, mounted) = mounted();
    let before = mounted.mount().statistics();
    let file = File::open(mounted.data().join("base/5/16386")).expect("it opens");
    for block in 0..1024 {
        assert!(read_block(&file, block) == block_contents(16386, block), "block {block}");
    }
    let after = mounted.mount().statistics();
    assert_eq!(after.blocks_fetched - before.blocks_fetched, 1024, "each block is fetched once");
    let fetches = after.fetches - before.fetches;
    assert!(fetches <= 40, "1024 blocks in sequence took {fetches} fetches, at most 40 expected");
}

#[test]
fn blocks_fetched_ahead_are_not_fetched_again() {
    let (_base, mounted) = mounted();
    let source = &mounted.source;
    let file = open(&mounted.data().join("base/5/16386"));
    file.write_all_at(&[1; BLOCK], 7 * BLOCK as u64).expect("a write");
    file.sync_all().expect("it reaches the mount");
    let blocks: Vec<_> =
        [(relation(16384), 5), (relation(16386), 7), (relation(16386), 600), (relation(99_999), 1), (relation(16386), 5000)].into();
    mounted.mount().prefetch(&blocks).expect("prefetch");
    source.count_blocks.store(true, Ordering::Relaxed);
    rustix::fs::fadvise(&file, 0, None, Advice::Random).expect("fadvise");
    assert!(read_block(&file, 600) == block_contents(16386, 600));
    assert!(read_block(&file, 7) == [1; BLOCK], "the newer block stays");
    assert!(source.asked.lock().is_empty(), "nothing is asked again, but {:?} was", source.asked.lock());
}

#[test]
fn the_blocks_of_a_start_are_noted() {
    let (_base, mounted) = mounted();
    let file = open(&mounted.data().join("base/5/16386"));
    rustix::fs::fadvise(&file, 0, None, Advice::Random).expect("fadvise");
    for block in [900, 17, 900, 3] {
        read_block(&file, block);
    }
    assert_eq!(mounted.mount().touched_blocks(), [(relation(16386), 900), (relation(16386), 17), (relation(16386), 3)]);
}

#[test]
fn appending_from_two_handles_keeps_the_size_right() {
    let (_base, mounted) = mounted();
    let path = mounted.data().join("log");
    let append = || OpenOptions::new().append(true).create(true).open(&path).expect("it opens");
    let (mut one, mut two) = (append(), append());
    for n in 0..500u32 {
        one.write_all(&n.to_le_bytes()).expect("append");
        two.write_all(&n.to_le_bytes()).expect("append");
        assert_eq!(fs::metadata(&path).expect("stat").len(), u64::from(n + 1) * 8);
    }
}

#[test]
fn a_relation_of_several_gigabytes_is_cut_into_files() {
    const BLOCKS_PER_FILE: u32 = 131_072;
    let dir = scratch("large");
    let source = synthetic_cluster(dir.path(), &[]);
    for (name, blocks) in [("16384", BLOCKS_PER_FILE), ("16384.1", BLOCKS_PER_FILE), ("16384.2", 5)] {
        let file = File::create(source.data_dir().join(format!("base/5/{name}"))).expect("a sparse file");
        file.set_len(u64::from(blocks) * BLOCK as u64).expect("its size");
        file.write_all_at(&block_contents(16384, blocks), 4 * BLOCK as u64).expect("one block of it");
    }
    let mounted = Mounted::start(&source, |_| {});
    let size = |name: &str| fs::metadata(mounted.data().join(format!("base/5/{name}"))).map(|meta| meta.len());
    assert_eq!(size("16384").expect("the first"), 1 << 30);
    assert_eq!(size("16384.1").expect("the second"), 1 << 30);
    assert_eq!(size("16384.2").expect("the last"), 5 * BLOCK as u64);
    assert!(size("16384.3").is_err());
    let second = open(&mounted.data().join("base/5/16384.1"));
    rustix::fs::fadvise(&second, 0, None, Advice::Random).expect("fadvise");
    assert!(read_block(&second, 4) == block_contents(16384, BLOCKS_PER_FILE));
    assert!(read_block(&open(&mounted.data().join("base/5/16384.2")), 4) == block_contents(16384, 5));
    assert!(read_block(&second, BLOCKS_PER_FILE - 1) == [0; BLOCK]);
    let last = (relation(16384), 2 * BLOCKS_PER_FILE + 3);
    mounted.mount().prefetch(&[last, (relation(16384), 7)]).expect("prefetch");
    assert!(mounted.mount().touched_blocks().contains(&(relation(16384), BLOCKS_PER_FILE + 4)), "numbered within the whole fork");
}
