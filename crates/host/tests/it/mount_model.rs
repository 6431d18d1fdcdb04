//! The mount behaves as a plain directory that was copied: the same random calls on both give the same results, while
//! blocks of the base are fetched ahead all the time, and pages are dropped from the kernel's cache so that the mount
//! has to answer.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::support::{
    Mounted,
    cluster::copy_directory,
    scratch,
    synthetic::{relation, synthetic_cluster},
};
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use varve_testing::random::SeededRng;

const RELATIONS: [(&str, u32); 5] = [("16384", 40), ("16384_vm", 1), ("16385", 0), ("16386", 300), ("16387", 3)];
/// Names that are used; some are those of the base.
const PATHS: [&str; 14] = [
    "base/5/16384",
    "base/5/16384_vm",
    "base/5/16385",
    "base/5/16386",
    "base/5/16387",
    "base/5/16390",
    "base/5/t3_16391",
    "base/5/PG_VERSION",
    "pg_xact/0000",
    "pg_xact/0001",
    "one",
    "d/two",
    "d/e/three",
    "f/two",
];
const DIRECTORIES: [&str; 7] = ["d", "d/e", "f", "base/5", "pg_xact", ".", "base"];
const STEPS: usize = 1500;

#[derive(Debug)]
enum Call {
    Read {
        path: &'static str,
        offset: u64,
        length: usize,
    },
    Write {
        path: &'static str,
        create: bool,
        exclusive: bool,
        truncate: bool,
        offset: u64,
        data: Vec<u8>,
    },
    Truncate {
        path: &'static str,
        size: u64,
    },
    Allocate {
        path: &'static str,
        mode: FallocateFlags,
        offset: u64,
        length: u64,
    },
    Rename {
        from: &'static str,
        to: &'static str,
    },
    Link {
        from: &'static str,
        to: &'static str,
    },
    Unlink {
        path: &'static str,
    },
    MakeDirectory {
        path: &'static str,
    },
    RemoveDirectory {
        path: &'static str,
    },
    ReadDirectory {
        path: &'static str,
    },
    Stat {
        path: &'static str,
    },
    SetMode {
        path: &'static str,
        mode: u32,
    },
    Hold {
        path: &'static str,
    },
    ReadHeld {
        offset: u64,
        length: usize,
    },
    WriteHeld {
        offset: u64,
        data: Vec<u8>,
    },
    TruncateHeld {
        size: u64,
    },
    LetGo,
    /// Drops the kernel's pages of a file.
    Evict {
        path: &'static str,
    },
}

fn draw(rng: &mut SeededRng) -> Call {
    let mut rng = rng.fork();
    let rng = &mut rng;
    let mut path = || PATHS[rng.below(PATHS.len() as u64) as usize];
    let (path, other) = (path(), path());
    let directory = DIRECTORIES[rng.below(DIRECTORIES.len() as u64) as usize];
    let aligned = !rng.chance(250);
    let offset = if aligned { rng.below(60) * 8192 } else { rng.below(500_000) };
    let length = if aligned { rng.between(1, 20) * 8192 } else { rng.between(1, 60_000) };
    let data = || SeededRng::new(offset ^ length).bytes(length as usize);
    match rng.below(100) {
        0..18 => Call::Read { path, offset, length: length as usize },
        18..36 => {
            Call::Write { path, create: rng.chance(600), exclusive: rng.chance(100), truncate: rng.chance(100), offset, data: data() }
        }
        36..41 => Call::Truncate { path, size: offset },
        41..45 => {
            let modes = [FallocateFlags::empty(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE];
            Call::Allocate { path, mode: modes[rng.below(3) as usize], offset, length }
        }
        45..51 => Call::Rename { from: path, to: other },
        51..53 => Call::Rename { from: DIRECTORIES[rng.below(3) as usize], to: DIRECTORIES[rng.below(3) as usize] },
        53..56 => Call::Link { from: path, to: other },
        56..61 => Call::Unlink { path },
        61..65 => Call::MakeDirectory { path: directory },
        65..67 => Call::RemoveDirectory { path: DIRECTORIES[rng.below(4) as usize] },
        67..71 => Call::ReadDirectory { path: directory },
        71..76 => Call::Stat { path },
        76..78 => Call::SetMode { path, mode: 0o600 + rng.below(64) as u32 },
        78..81 => Call::Hold { path },
        81..86 => Call::ReadHeld { offset, length: length as usize },
        86..90 => Call::WriteHeld { offset, data: data() },
        90..92 => Call::TruncateHeld { size: offset },
        92..94 => Call::LetGo,
        _ => Call::Evict { path },
    }
}

/// What a call gave: bytes or a description; or the error number.
type Outcome = Result<Vec<u8>, Option<i32>>;

/// One of the two directories.
struct Side<'a> {
    root: &'a Path,
    held: Option<File>,
}

impl Side<'_> {
    fn call(&mut self, call: &Call) -> Outcome {
        self.try_call(call).map_err(|error| error.raw_os_error())
    }

    fn try_call(&mut self, call: &Call) -> io::Result<Vec<u8>> {
        let at = |path: &str| self.root.join(path);
        match call {
            Call::Read { path, offset, length } => read(&File::open(at(path))?, *offset, *length),
            Call::Write { path, create, exclusive, truncate, offset, data } => {
                let mut options = OpenOptions::new();
                options.write(true).truncate(*truncate);
                if *exclusive {
                    options.create_new(true)
                } else {
                    options.create(*create)
                };
                options.open(at(path))?.write_all_at(data, *offset)?;
                Ok(Vec::new())
            }
            Call::Truncate { path, size } => OpenOptions::new().write(true).open(at(path))?.set_len(*size).map(|()| Vec::new()),
            Call::Allocate { path, mode, offset, length } => {
                fallocate(OpenOptions::new().write(true).open(at(path))?, *mode, *offset, *length)?;
                Ok(Vec::new())
            }
            Call::Rename { from, to } => fs::rename(at(from), at(to)).map(|()| Vec::new()),
            Call::Link { from, to } => fs::hard_link(at(from), at(to)).map(|()| Vec::new()),
            Call::Unlink { path } => fs::remove_file(at(path)).map(|()| Vec::new()),
            Call::MakeDirectory { path } => fs::create_dir(at(path)).map(|()| Vec::new()),
            Call::RemoveDirectory { path } => fs::remove_dir(at(path)).map(|()| Vec::new()),
            Call::ReadDirectory { path } => Ok(format!("{:?}", names(&at(path))?).into_bytes()),
            Call::Stat { path } => Ok(describe(&at(path))?.into_bytes()),
            Call::SetMode { path, mode } => fs::set_permissions(at(path), fs::Permissions::from_mode(*mode)).map(|()| Vec::new()),
            Call::Hold { path } => {
                self.held = Some(OpenOptions::new().read(true).write(true).open(at(path))?);
                Ok(Vec::new())
            }
            Call::ReadHeld { offset, length } => self.held.as_ref().map_or(Ok(Vec::new()), |file| read(file, *offset, *length)),
            Call::WriteHeld { offset, data } => match &self.held {
                Some(file) => file.write_all_at(data, *offset).and_then(|()| Ok(file.metadata()?.len().to_le_bytes().to_vec())),
                None => Ok(Vec::new()),
            },
            Call::TruncateHeld { size } => self.held.as_ref().map_or(Ok(Vec::new()), |file| {
                file.set_len(*size)?;
                Ok(file.metadata()?.len().to_le_bytes().to_vec())
            }),
            Call::LetGo => {
                self.held = None;
                Ok(Vec::new())
            }
            Call::Evict { path } => {
                if let Ok(file) = File::open(at(path)) {
                    file.sync_all()?;
                    fadvise(&file, 0, None, Advice::DontNeed)?;
                }
                Ok(Vec::new())
            }
        }
    }
}

fn read(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut data[filled..], offset + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    data.truncate(filled);
    Ok(data)
}

fn names(dir: &Path) -> io::Result<BTreeMap<String, bool>> {
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let twice = names.insert(entry.file_name().to_string_lossy().into_owned(), entry.file_type()?.is_dir());
        assert!(twice.is_none(), "{:?} is listed twice in {}", entry.file_name(), dir.display());
    }
    // The model has it as a directory, the mount as a link to plain disk.
    names.remove("pg_wal");
    Ok(names)
}

fn describe(path: &Path) -> io::Result<String> {
    let meta = fs::symlink_metadata(path)?;
    let size = if meta.is_file() { meta.len() } else { 0 };
    Ok(format!("{:?} mode {:o} links {} size {size}", meta.file_type(), meta.mode(), meta.nlink()))
}

/// Everything in a directory: paths with descriptions and contents.
fn everything(root: &Path, path: &Path, all: &mut BTreeMap<String, (String, Vec<u8>)>) {
    for name in names(&root.join(path)).expect("a directory").into_keys() {
        let path = path.join(OsStr::new(&name));
        let full = root.join(&path);
        let description = describe(&full).expect("it is there");
        if full.is_dir() {
            everything(root, &path, all);
        }
        let contents = if full.is_file() { fs::read(&full).expect("a file") } else { Vec::new() };
        all.insert(path.to_string_lossy().into_owned(), (description, contents));
    }
}

fn compare(seed: u64, cache_bytes: Option<u64>) {
    let dir = scratch("model");
    let source = synthetic_cluster(dir.path(), &RELATIONS);
    source.delay_us.store(50, Ordering::Relaxed);
    let plain = dir.path().join("plain");
    copy_directory(source.data_dir(), &plain, 0, 0);
    let mounted = Mounted::start(&source, |config| config.cache_bytes = cache_bytes);
    let data = mounted.data();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = SeededRng::new(seed ^ 1);
            while !done.load(Ordering::Relaxed) {
                let blocks: Vec<_> =
                    (0..8)
                        .map(|_| {
                            if rng.chance(500) { (relation(16384), rng.below(40) as u32) } else { (relation(16386), rng.below(300) as u32) }
                        })
                        .collect();
                mounted.mount().prefetch(&blocks).expect("prefetch");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let _stop = StopOnDrop(&done);
        let mut rng = SeededRng::new(seed);
        let (mut model, mut mount) = (Side { root: &plain, held: None }, Side { root: &data, held: None });
        let mut succeeded = 0;
        for step in 0..STEPS {
            let call = draw(&mut rng);
            let (expected, got) = (model.call(&call), mount.call(&call));
            succeeded += usize::from(expected.is_ok());
            if expected != got {
                let shown = format!("{call:?}");
                panic!(
                    "seed {seed}, step {step}: {:.300}\n  a plain directory gives {}\n  the mount gives       {}",
                    shown,
                    show(&expected),
                    show(&got)
                );
            }
        }
        assert!(succeeded > STEPS / 2, "seed {seed}: only {succeeded} of {STEPS} calls do something");
    });
    let (mut expected, mut got) = (BTreeMap::new(), BTreeMap::new());
    everything(&plain, Path::new(""), &mut expected);
    everything(&data, Path::new(""), &mut got);
    let paths =
        |all: &BTreeMap<String, (String, Vec<u8>)>| all.iter().map(|(path, (what, _))| format!("{path}: {what}")).collect::<Vec<_>>();
    assert_eq!(paths(&expected), paths(&got), "seed {seed}");
    for (path, (_, contents)) in &expected {
        assert!(got[path].1 == *contents, "seed {seed}: {path} differs in the end");
    }
    assert!(mounted.mount().failure().is_none());
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn show(outcome: &Outcome) -> String {
    match outcome {
        Ok(bytes) if bytes.len() < 400 => format!("{:?}", String::from_utf8_lossy(bytes)),
        Ok(bytes) => {
            format!("{} bytes, checksum {}", bytes.len(), bytes.iter().fold(0u32, |sum, byte| sum.wrapping_mul(31) + u32::from(*byte)))
        }
        Err(code) => code.map_or("an error".to_owned(), |code| io::Error::from_raw_os_error(code).to_string()),
    }
}

#[test]
fn random_calls_give_what_a_plain_directory_gives() {
    let seeds = std::env::var("VARVE_TEST_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(6);
    for seed in 1..=seeds {
        compare(seed, None);
    }
}

#[test]
fn so_do_calls_on_a_cache_with_room_for_a_part() {
    let seeds = std::env::var("VARVE_TEST_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(6);
    for seed in 101..=100 + seeds {
        compare(seed, Some(64 * 8192));
    }
}
