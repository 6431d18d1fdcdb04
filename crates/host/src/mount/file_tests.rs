//! The block-state machine against a naive model: a vector of bytes.

use std::{
    io,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use proptest::prelude::*;
use rustix::fs::FallocateFlags;
use varve_postgres::{Fork, Oid, RelFork, RelNode, slru::SlruKind};

use super::{
    base::Base,
    cache::CacheDir,
    cells::BLOCK_BYTES,
    file::{Counters, FileContext, FileData, Flight},
    source::{BaseSource, PatientSource},
    startup_set::StartupSet,
};

const FORK: RelFork = RelFork { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: Fork::Main };

/// A base in which each byte says in which block it stands.
#[derive(Default)]
struct PatternSource {
    delay_us: AtomicU64,
}

fn pattern(block: u32) -> Vec<u8> {
    (0..BLOCK_BYTES as u32).map(|byte| (block.wrapping_mul(31) + byte / 512 + 1) as u8).collect()
}

impl BaseSource for PatternSource {
    fn relations(&self, _: Oid, _: Oid) -> io::Result<Vec<(Oid, Fork, u32)>> {
        Ok(Vec::new())
    }
    fn read_blocks(&self, _: RelFork, first: u32, count: u32) -> io::Result<Bytes> {
        std::thread::sleep(Duration::from_micros(self.delay_us.load(Relaxed)));
        Ok((first..first + count).flat_map(pattern).collect())
    }
    fn slru_segments(&self, _: SlruKind) -> io::Result<Vec<(u32, u32)>> {
        Ok(Vec::new())
    }
    fn read_slru(&self, _: SlruKind, _: u32, first: u32, count: u32) -> io::Result<Bytes> {
        Ok((first..first + count).flat_map(pattern).collect())
    }
    fn read_scattered(&self, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
        std::thread::sleep(Duration::from_micros(self.delay_us.load(Relaxed)));
        Ok(blocks.iter().map(|(_, block)| pattern(*block).into()).collect())
    }
}

fn context(dir: &Path, source: Arc<PatternSource>) -> FileContext {
    FileContext {
        source: PatientSource::new(source, "test".to_owned(), Duration::ZERO),
        cache: CacheDir::create(dir).expect("a cache"),
        startup_set: StartupSet::record_for(Duration::ZERO),
        counters: Counters::default(),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read {
        offset: u64,
        length: u64,
    },
    Write {
        offset: u64,
        length: u64,
        fill: u8,
    },
    Truncate {
        size: u64,
    },
    Zero {
        offset: u64,
        length: u64,
        punch: bool,
    },
    Reserve {
        offset: u64,
        length: u64,
    },
    /// Blocks are asked for; they land and are kept some steps later.
    TakeOff {
        first: u32,
        count: u32,
    },
    Land,
}

const FILE_BLOCKS: u32 = 12;

/// Offsets are often those of blocks and cells, as the kernel's are.
fn offset() -> impl Strategy<Value = u64> {
    let end = u64::from(FILE_BLOCKS + 4) * BLOCK_BYTES;
    prop_oneof![4 => (0..end / 4096).prop_map(|cell| cell * 4096), 1 => 0..end]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![4 => (1u64..12).prop_map(|cells| cells * 4096), 1 => 1u64..20_000]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (offset(), length()).prop_map(|(offset, length)| Step::Read { offset, length }),
        4 => (offset(), length(), any::<u8>()).prop_map(|(offset, length, fill)| Step::Write { offset, length, fill }),
        1 => offset().prop_map(|size| Step::Truncate { size }),
        1 => (offset(), length(), any::<bool>()).prop_map(|(offset, length, punch)| Step::Zero { offset, length, punch }),
        1 => (offset(), length()).prop_map(|(offset, length)| Step::Reserve { offset, length }),
        2 => (0..FILE_BLOCKS, 1u32..6).prop_map(|(first, count)| Step::TakeOff { first, count }),
        2 => Just(Step::Land),
    ]
}

fn land(context: &FileContext, file: &FileData, mut flight: Flight<'_>) {
    let base_bytes = file.base().bytes();
    let contents = |run: &Range<u32>| {
        let bytes = base_bytes - u64::from(run.start) * BLOCK_BYTES;
        run.clone().flat_map(pattern).take(bytes as usize).collect()
    };
    let contents = flight.runs().iter().map(contents).collect();
    flight.land(contents);
    flight.keep(context).expect("it is kept");
}

fn read(context: &FileContext, file: &FileData, offset: u64, length: u64) -> Vec<u8> {
    file.read(context, offset, length, |read| read.expect("a read").to_vec())
}

fn check(base: Base, mut model: Vec<u8>, steps: &[Step]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let context = context(dir.path(), Arc::default());
    // Contents in memory are never taken for something to wait for.
    let at_hand = matches!(base, Base::Memory(_));
    let file = FileData::new(2, base);
    let mut flights: Vec<Flight<'_>> = Vec::new();
    for step in steps {
        match *step {
            Step::Read { offset, length } => {
                // A read waits for what is in flight, so it has to land before.
                flights.drain(..).for_each(|flight| land(&context, &file, flight));
                let expected = &model[model.len().min(offset as usize)..model.len().min((offset + length) as usize)];
                let got = read(&context, &file, offset, length);
                prop_assert!(got == expected, "{:?} reads something else than what was written", step);
            }
            Step::Write { offset, length, fill } => {
                if at_hand || file.write_waits(offset, length) {
                    flights.drain(..).for_each(|flight| land(&context, &file, flight));
                }
                let data: Vec<u8> = (0..length).map(|n| fill.wrapping_add((n / 100) as u8)).collect();
                file.write(&context, offset, &data).unwrap();
                let end = (offset + length) as usize;
                model.resize(model.len().max(end), 0);
                model[offset as usize..end].copy_from_slice(&data);
            }
            Step::Truncate { size } => {
                if at_hand || file.truncate_waits(size) {
                    flights.drain(..).for_each(|flight| land(&context, &file, flight));
                }
                file.truncate(&context, size).unwrap();
                model.resize(size as usize, 0);
            }
            Step::Zero { offset, length, punch } => {
                if at_hand || file.write_waits(offset, length) {
                    flights.drain(..).for_each(|flight| land(&context, &file, flight));
                }
                let mode = if punch { FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE } else { FallocateFlags::ZERO_RANGE };
                file.allocate(&context, mode, offset, length).unwrap();
                if !punch {
                    model.resize(model.len().max((offset + length) as usize), 0);
                }
                let end = model.len().min((offset + length) as usize);
                model[end.min(offset as usize)..end].fill(0);
            }
            Step::Reserve { offset, length } => {
                file.allocate(&context, FallocateFlags::empty(), offset, length).unwrap();
                model.resize(model.len().max((offset + length) as usize), 0);
            }
            Step::TakeOff { first, count } => {
                let wanted: Vec<_> = (first..first + count).map(|block| block..block + 1).collect();
                flights.extend(file.claim(&wanted));
            }
            Step::Land if flights.is_empty() => {}
            Step::Land => land(&context, &file, flights.remove(0)),
        }
        prop_assert_eq!(file.size(), model.len() as u64);
    }
    flights.drain(..).for_each(|flight| land(&context, &file, flight));
    prop_assert!(file.read_all(&context).unwrap() == model, "the whole file differs in the end");
    Ok(())
}

fn base_contents() -> Vec<u8> {
    (0..FILE_BLOCKS).flat_map(pattern).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_file_of_the_base_is_like_one_that_was_copied(steps in prop::collection::vec(step(), 1..40)) {
        check(Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS }, base_contents(), &steps)?;
    }

    #[test]
    fn so_is_an_slru_segment(steps in prop::collection::vec(step(), 1..40)) {
        check(Base::Slru { kind: SlruKind::Clog, segno: 0, pages: FILE_BLOCKS }, base_contents(), &steps)?;
    }

    #[test]
    fn so_is_one_in_memory_of_any_length(steps in prop::collection::vec(step(), 1..40), length in 0usize..30_000) {
        let contents: Vec<u8> = base_contents().into_iter().take(length).collect();
        check(Base::Memory(contents.clone().into()), contents, &steps)?;
    }

    #[test]
    fn and_one_that_was_created(steps in prop::collection::vec(step(), 1..40)) {
        check(Base::None, Vec::new(), &steps)?;
    }
}

/// Writers own a block each and count up in it; all the while everything is fetched over and over, late. A reader must
/// never see a number go down, nor the base again.
#[test]
fn late_fetches_never_overwrite() {
    const WRITERS: u32 = 4;
    const ROUNDS: u32 = 300;
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(PatternSource::default());
    source.delay_us.store(200, Relaxed);
    let context = context(dir.path(), source);
    for _ in 0..10 {
        let file = FileData::new(3, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (context, file, done) = (&context, &file, &done);
            for writer in 0..WRITERS {
                scope.spawn(move || {
                    let offset = u64::from(writer * 3) * BLOCK_BYTES;
                    let mut last = None;
                    for round in 0..ROUNDS {
                        let first = u32::from_le_bytes(read(context, file, offset, 4).try_into().expect("4 bytes"));
                        match last {
                            None => assert_eq!(first, u32::from_le_bytes(pattern(writer * 3)[..4].try_into().expect("4 bytes"))),
                            Some(last) => assert_eq!(first, last, "block {} went back in round {round}", writer * 3),
                        }
                        file.write(context, offset, &[round.to_le_bytes().as_slice(), &[9; 8188]].concat()).expect("a write");
                        last = Some(round);
                    }
                    done.fetch_add(1, Relaxed);
                });
            }
            for _ in 0..2 {
                scope.spawn(move || {
                    while done.load(Relaxed) < u64::from(WRITERS) {
                        read(context, file, 0, u64::from(FILE_BLOCKS) * BLOCK_BYTES);
                        if let Some(flight) = file.claim(&[0..1, 3..4, 6..7, 9..10]) {
                            std::thread::sleep(Duration::from_micros(300));
                            land(context, file, flight);
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn one_block_is_fetched_once_however_many_want_it() {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(PatternSource::default());
    source.delay_us.store(50_000, Relaxed);
    let context = context(dir.path(), source);
    let file = FileData::new(4, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert!(read(&context, &file, 4 * BLOCK_BYTES, BLOCK_BYTES) == pattern(4)));
        }
    });
    assert_eq!(context.counters.fetches.load(Relaxed), 1);
    assert!(read(&context, &file, 0, 1 << 20) == base_contents());
    assert_eq!(context.counters.fetches.load(Relaxed), 2, "a large read is one fetch, although one block of it is here");
    assert!(read(&context, &file, 0, 1 << 20) == base_contents());
    assert_eq!(context.counters.fetches.load(Relaxed), 2, "what was fetched is kept");
}
