//! The block-state machine against a naive model: a vector of bytes.

use std::{
    io,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;
use rustix::fs::FallocateFlags;
use varve_postgres::{Fork, Lsn, Oid, RelFork, RelNode, slru::SlruKind};

use super::{
    base::Base,
    budget::{CacheBudget, Held},
    cache::CacheDir,
    cells::BLOCK_BYTES,
    file::{Counters, FileContext, FileData, Flight, Tally},
    room::Room,
    rule::Terms,
    source::{BaseSource, PatientSource},
    startup_set::StartupSet,
};

pub(super) const FORK: RelFork = RelFork { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: Fork::Main };

/// A base in which each byte says in which block it stands, until it moves on to other contents.
#[derive(Default)]
pub(super) struct PatternSource {
    delay_us: AtomicU64,
    moved: Mutex<Option<Vec<u8>>>,
}

impl PatternSource {
    fn blocks(&self, first: u32, count: u32) -> Vec<u8> {
        let (start, length) = (first as usize * BLOCK, count as usize * BLOCK);
        match &*self.moved.lock() {
            None => (first..first + count).flat_map(pattern).collect(),
            Some(contents) => contents.get(start..start + length).expect("a block that the base has").to_vec(),
        }
    }

    pub(super) fn move_to(&self, contents: Vec<u8>) {
        *self.moved.lock() = Some(contents);
    }
}

pub(super) const BLOCK: usize = BLOCK_BYTES as usize;

/// A page that may go, and no two are alike.
pub(super) fn page(block: u32, number: u32) -> Vec<u8> {
    let mut page = varve_postgres::page::ZERO_PAGE;
    varve_postgres::page::init(&mut page, 16);
    varve_postgres::page::set_lsn(&mut page, Lsn(0x1000));
    let word = [block.to_le_bytes(), number.to_le_bytes()].concat();
    // In both halves.
    page[100..108].copy_from_slice(&word);
    page[5000..5008].copy_from_slice(&word);
    page.to_vec()
}

pub(super) const TERMS: Terms = Terms { redo: Lsn(0x2000), oldest_running: 1000 };

fn pattern(block: u32) -> Vec<u8> {
    (0..BLOCK_BYTES as u32).map(|byte| (block.wrapping_mul(31) + byte / 512 + 1) as u8).collect()
}

impl BaseSource for PatternSource {
    fn relations(&self, _: Oid, _: Oid) -> io::Result<Vec<(Oid, Fork, u32)>> {
        Ok(Vec::new())
    }
    fn read_blocks(&self, _: RelFork, first: u32, count: u32) -> io::Result<Bytes> {
        std::thread::sleep(Duration::from_micros(self.delay_us.load(Relaxed)));
        Ok(self.blocks(first, count).into())
    }
    fn slru_segments(&self, _: SlruKind) -> io::Result<Vec<(u32, u32)>> {
        Ok(Vec::new())
    }
    fn read_slru(&self, _: SlruKind, _: u32, first: u32, count: u32) -> io::Result<Bytes> {
        Ok((first..first + count).flat_map(pattern).collect())
    }
    fn read_scattered(&self, blocks: &[(RelFork, u32)]) -> io::Result<Vec<Bytes>> {
        std::thread::sleep(Duration::from_micros(self.delay_us.load(Relaxed)));
        Ok(blocks.iter().map(|(_, block)| self.blocks(*block, 1).into()).collect())
    }
}

pub(super) fn context(dir: &Path, source: Arc<PatternSource>) -> FileContext {
    context_within(dir, source, None)
}

fn context_within(dir: &Path, source: Arc<PatternSource>, limit: Option<u64>) -> FileContext {
    FileContext {
        source: PatientSource::new(source, "test".to_owned(), Duration::ZERO),
        cache: CacheDir::create(dir).expect("a cache"),
        budget: CacheBudget::new(limit),
        room: Room::with_reserve(0),
        startup_set: StartupSet::record_for(Duration::ZERO),
        mark: AtomicU64::new(0),
        counters: Counters::default(),
        meanwhile: |_, _| {},
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
    /// Fetched blocks are dropped.
    Evict {
        limit: u32,
    },
    /// A page is written.
    Page {
        block: u32,
        number: u32,
    },
    /// A mark is set, and the database as it is then is the next base.
    Mark,
    /// The base moves there.
    HandOver,
}

pub(super) const FILE_BLOCKS: u32 = 12;

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
        3 => (1..FILE_BLOCKS).prop_map(|limit| Step::Evict { limit }),
        4 => (0..FILE_BLOCKS + 4, any::<u32>()).prop_map(|(block, number)| Step::Page { block, number }),
        2 => Just(Step::Mark),
        2 => Just(Step::HandOver),
    ]
}

/// Blocks on their way, with what the base had of them when they were asked for.
pub(super) struct Coming<'a>(Flight<'a>, Vec<Bytes>);

impl<'a> Coming<'a> {
    pub(super) fn of(source: &PatternSource, file: &FileData, flight: Flight<'a>) -> Coming<'a> {
        let contents = |run: &Range<u32>| match file.base() {
            Base::Memory(contents) => contents.slice(run.start as usize * BLOCK..contents.len().min(run.end as usize * BLOCK)),
            _ => source.blocks(run.start, run.end - run.start).into(),
        };
        let contents = flight.runs().iter().map(contents).collect();
        Coming(flight, contents)
    }
}

pub(super) fn land(context: &FileContext, Coming(mut flight, contents): Coming<'_>) {
    flight.land(contents);
    flight.keep(context).expect("it is kept");
    context.budget.make_room(context, true);
}

pub(super) fn read(context: &FileContext, file: &FileData, offset: u64, length: u64) -> Vec<u8> {
    file.read(context, offset, length, |read| read.expect("a read").to_vec())
}

fn check(base: Base, mut model: Vec<u8>, steps: &[Step]) -> Result<(), TestCaseError> {
    check_within(None, base, &mut model, steps)
}

/// What a file system may take to note where a small file with holes lies.
const EXTENTS_BYTES: u64 = 8192;

/// Bytes of disk that the cache takes.
fn allocated(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).expect("a folder of the cache").flatten();
    let bytes = |entry: std::fs::DirEntry| match entry.metadata().expect("metadata") {
        meta if meta.is_dir() => allocated(&entry.path()),
        meta => meta.blocks() * 512,
    };
    entries.map(bytes).sum()
}

fn check_within(limit: Option<u64>, base: Base, model: &mut Vec<u8>, steps: &[Step]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(PatternSource::default());
    let context = context_within(dir.path(), source.clone(), limit);
    let mut marked: Option<Vec<u8>> = None;
    // Room that was reserved where the file is still the base's is not counted.
    let reserves = steps.iter().any(|step| matches!(step, Step::Reserve { .. }));
    // Contents in memory are never taken for something to wait for.
    let at_hand = matches!(base, Base::Memory(_));
    let file = FileData::new(2, base);
    let mut flights: Vec<Coming<'_>> = Vec::new();
    for step in steps {
        match *step {
            Step::Read { offset, length } => {
                // A read waits for what is in flight, so it has to land before.
                flights.drain(..).for_each(|flight| land(&context, flight));
                let expected = &model[model.len().min(offset as usize)..model.len().min((offset + length) as usize)];
                let got = read(&context, &file, offset, length);
                prop_assert!(got == expected, "{:?} reads something else than what was written", step);
            }
            Step::Write { offset, length, fill } => {
                if at_hand || file.write_waits(offset, length) {
                    flights.drain(..).for_each(|flight| land(&context, flight));
                }
                let data: Vec<u8> = (0..length).map(|n| fill.wrapping_add((n / 100) as u8)).collect();
                file.write(&context, offset, &data).unwrap();
                let end = (offset + length) as usize;
                model.resize(model.len().max(end), 0);
                model[offset as usize..end].copy_from_slice(&data);
            }
            Step::Truncate { size } => {
                if at_hand || file.truncate_waits(size) {
                    flights.drain(..).for_each(|flight| land(&context, flight));
                }
                file.truncate(&context, size).unwrap();
                model.resize(size as usize, 0);
            }
            Step::Zero { offset, length, punch } => {
                if at_hand || file.write_waits(offset, length) {
                    flights.drain(..).for_each(|flight| land(&context, flight));
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
                flights.extend(file.claim(&wanted).map(|flight| Coming::of(&source, &file, flight)));
            }
            Step::Land if flights.is_empty() => {}
            Step::Land => land(&context, flights.remove(0)),
            Step::Evict { limit } => {
                file.evict(&context, 0, limit).unwrap();
            }
            Step::Page { block, number } => {
                let (start, page) = (block as usize * BLOCK, page(block, number));
                file.write(&context, start as u64, &page).unwrap();
                model.resize(model.len().max(start + BLOCK), 0);
                model[start..start + BLOCK].copy_from_slice(&page);
            }
            Step::Mark => {
                context.mark.fetch_add(1, Relaxed);
                marked = Some(model.clone());
            }
            Step::HandOver => {
                let Some(contents) = marked.take().filter(|_| file.base().main_fork().is_some()) else { continue };
                let mut contents: Vec<u8> = contents;
                let blocks = (contents.len() / BLOCK) as u32;
                contents.resize((FILE_BLOCKS as usize + 8) * BLOCK, 1);
                source.move_to(contents);
                file.hand_over(&context, &TERMS, blocks, &mut Tally::default()).unwrap();
                context.budget.make_room(&context, true);
            }
        }
        prop_assert_eq!(file.size(), model.len() as u64);
        let held = context.budget.held();
        let counted = held.fetched + held.written + EXTENTS_BYTES;
        prop_assert!(reserves || allocated(dir.path()) <= counted, "{:?}: {:?} does not count all", step, held);
        if let Some(limit) = limit
            && matches!(step, Step::Read { .. })
        {
            let floor = BLOCK_BYTES;
            prop_assert!(held.fetched + held.written <= limit || held.fetched <= floor, "{:?}: {:?} is too much", step, held);
        }
    }
    flights.drain(..).for_each(|flight| land(&context, flight));
    prop_assert!(file.read_all(&context).unwrap() == *model, "the whole file differs in the end");
    file.retire(&context);
    prop_assert_eq!(context.budget.held(), Held::default());
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
    fn so_is_one_of_which_a_part_has_room(steps in prop::collection::vec(step(), 1..40), blocks in 1..FILE_BLOCKS) {
        let base = Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS };
        check_within(Some(u64::from(blocks) * BLOCK_BYTES), base, &mut base_contents(), &steps)?;
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
    fn so_is_a_relation_that_was_created(steps in prop::collection::vec(step(), 1..60), blocks in 1..FILE_BLOCKS) {
        let base = Base::Relation { fork: FORK, segment: 0, blocks: 0 };
        check_within(Some(u64::from(blocks) * BLOCK_BYTES), base, &mut Vec::new(), &steps)?;
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
                            land(context, Coming::of(&PatternSource::default(), file, flight));
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

/// Readers and writers of a file of which everything that can go is dropped all the time: nobody ever sees a hole where
/// the base or a write should be.
#[test]
fn nobody_sees_a_hole_that_is_made() {
    const ROUNDS: u32 = 3000;
    let dir = tempfile::tempdir().unwrap();
    let context = context(dir.path(), Arc::default());
    let file = FileData::new(5, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (context, file, done) = (&context, &file, &done);
        // Blocks 0 and 1 are read; so are 4 to 7, in one read, which is partly here.
        for (first, count) in [(0, 1), (0, 2), (4, 4)] {
            scope.spawn(move || {
                let expected: Vec<u8> = (first..first + count).flat_map(pattern).collect();
                for round in 0..ROUNDS {
                    let got = read(context, file, u64::from(first) * BLOCK_BYTES, u64::from(count) * BLOCK_BYTES);
                    assert!(got == expected, "{count} blocks from {first} differ from the base in round {round}");
                }
                done.fetch_add(1, Relaxed);
            });
        }
        // Block 5 is fetched over and over besides; block 2 is written with what it holds, halves of it at times.
        scope.spawn(move || {
            let contents = pattern(2);
            for round in 0..ROUNDS {
                if round % 2 == 0 {
                    read(context, file, 5 * BLOCK_BYTES, 100);
                } else {
                    read(context, file, 2 * BLOCK_BYTES, BLOCK_BYTES);
                    file.write(context, 2 * BLOCK_BYTES + 100, &contents[100..5000]).expect("a write");
                }
                let got = read(context, file, 2 * BLOCK_BYTES, BLOCK_BYTES);
                assert!(got == contents, "block 2 lost a write in round {round}");
            }
            done.fetch_add(1, Relaxed);
        });
        scope.spawn(move || {
            while done.load(Relaxed) < 4 {
                file.evict(context, 0, 3).expect("holes are made");
            }
        });
    });
}

/// Whenever a thread has looked at the cells and not yet at the cache file, all that can go is dropped. Where something
/// can go each time, the reader takes the lock in the end.
#[test]
fn what_is_dropped_under_a_reader_is_no_hole_to_it() {
    for again in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut context = context(dir.path(), Arc::default());
        let file = FileData::new(5, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
        // Here are all blocks, or all but one.
        for blocks in [FILE_BLOCKS, FILE_BLOCKS - 1] {
            context.meanwhile = |_, _| {};
            read(&context, &file, 0, u64::from(blocks) * BLOCK_BYTES);
            context.meanwhile = if again {
                |context, file| {
                    // The last block is fetched anew by somebody else, and goes again.
                    if let Some(flight) = file.claim(std::slice::from_ref(&(FILE_BLOCKS - 1..FILE_BLOCKS))) {
                        land(context, Coming::of(&PatternSource::default(), file, flight));
                    }
                    file.evict(context, 0, 99).expect("holes are made");
                }
            } else {
                |context, file| {
                    file.evict(context, 0, 99).expect("holes are made");
                }
            };
            assert!(read(&context, &file, BLOCK_BYTES / 2, 4 * BLOCK_BYTES) == base_contents()[4096..4096 + 4 * BLOCK_BYTES as usize]);
            assert!(file.read_all(&context).unwrap() == base_contents());
            file.evict(&context, 0, 99).unwrap();
        }
    }
}

/// What was here when the reader looked is dropped while it fetches the rest: it fetches again, and keeps both.
#[test]
fn a_reader_fetches_twice_when_what_it_found_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut context = context(dir.path(), Arc::default());
    let file = FileData::new(5, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
    read(&context, &file, 0, u64::from(FILE_BLOCKS - 1) * BLOCK_BYTES);
    context.meanwhile = |context, file| {
        file.evict(context, 0, 99).expect("holes are made");
    };
    let fetches = context.counters.fetches.load(Relaxed);
    assert!(file.read_all(&context).unwrap() == base_contents());
    assert_eq!(context.counters.fetches.load(Relaxed), fetches + 2);
    assert_eq!(context.budget.held().fetched, u64::from(FILE_BLOCKS) * BLOCK_BYTES);
}

/// Whenever a thread is about to write blocks that are here, all that can go is dropped.
#[test]
fn what_is_dropped_under_a_writer_is_not_what_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut context = context(dir.path(), Arc::default());
    let file = FileData::new(5, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
    read(&context, &file, 0, 1 << 20);
    context.meanwhile = |context, file| {
        file.evict(context, 0, 99).expect("holes are made");
    };
    file.write(&context, 3 * BLOCK_BYTES - 10, &[77; 20]).unwrap();
    let mut expected = base_contents();
    expected[3 * BLOCK_BYTES as usize - 10..3 * BLOCK_BYTES as usize + 10].fill(77);
    assert!(file.read_all(&context).unwrap() == expected);
    assert_eq!(context.budget.held().written, 2 * BLOCK_BYTES);
}

/// What is written while others are dropped stays.
#[test]
fn what_was_written_never_goes() {
    let dir = tempfile::tempdir().unwrap();
    let context = context(dir.path(), Arc::default());
    let file = FileData::new(6, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
    read(&context, &file, 0, 4 * BLOCK_BYTES);
    let wanted: Vec<_> = (6..8).map(|block| block..block + 1).collect();
    let late = file.claim(&wanted).expect("they are absent");
    // A byte of one half of a block, a whole block, one half of a block that is on its way.
    file.write(&context, BLOCK_BYTES + 7, &[99]).unwrap();
    file.write(&context, 2 * BLOCK_BYTES, &[98; BLOCK_BYTES as usize]).unwrap();
    file.write(&context, 6 * BLOCK_BYTES, &[97; 4096]).unwrap();
    land(&context, Coming::of(&PatternSource::default(), &file, late));
    assert_eq!(file.evict(&context, 0, 99).unwrap(), 3, "blocks 0, 3 and 7 go");
    let mut expected = base_contents();
    expected[BLOCK_BYTES as usize + 7] = 99;
    expected[2 * BLOCK_BYTES as usize..3 * BLOCK_BYTES as usize].fill(98);
    expected[6 * BLOCK_BYTES as usize..6 * BLOCK_BYTES as usize + 4096].fill(97);
    assert!(file.read_all(&context).unwrap() == expected);
    let held = context.budget.held();
    assert_eq!((held.fetched, held.written), ((FILE_BLOCKS as u64 - 3) * BLOCK_BYTES, 3 * BLOCK_BYTES));
}

/// A fetch that began before the block was fetched by another, dropped, cut off and written anew lands over nothing.
#[test]
fn a_fetch_that_is_very_late_lands_over_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let context = context(dir.path(), Arc::default());
    let file = FileData::new(7, Base::Relation { fork: FORK, segment: 0, blocks: FILE_BLOCKS });
    let mut late = file.claim(&[3..4, 4..5]).expect("absent");
    late.land(vec![pattern(3).into(), pattern(4).into()]);
    let before = file.claim(std::slice::from_ref(&(5..6))).expect("absent");
    file.truncate(&context, 4 * BLOCK_BYTES).unwrap();
    file.write(&context, 4 * BLOCK_BYTES, &[50; 4096]).unwrap();
    file.truncate(&context, 6 * BLOCK_BYTES).unwrap();
    late.keep(&context).unwrap();
    land(&context, Coming::of(&PatternSource::default(), &file, before));
    file.evict(&context, 0, 99).unwrap();
    let mut expected = base_contents();
    expected.truncate(4 * BLOCK_BYTES as usize);
    expected.extend_from_slice(&[50; 4096]);
    expected.resize(6 * BLOCK_BYTES as usize, 0);
    assert!(file.read_all(&context).unwrap() == expected);
}

const TABLE_BLOCKS: u32 = 4096;

fn table(ino: u64) -> Arc<FileData> {
    FileData::new(ino, Base::Relation { fork: FORK, segment: 0, blocks: TABLE_BLOCKS })
}

fn read_block(context: &FileContext, file: &FileData, block: u32) {
    assert!(read(context, file, u64::from(block) * BLOCK_BYTES, BLOCK_BYTES) == pattern(block), "block {block}");
}

#[test]
fn a_scan_of_a_large_table_leaves_the_hot_set() {
    const HOT: u32 = 700;
    let dir = tempfile::tempdir().unwrap();
    let limit = 1024 * BLOCK_BYTES;
    let context = context_within(dir.path(), Arc::default(), Some(limit));
    let (index, large) = (table(8), table(9));
    for _ in 0..2 {
        (0..HOT).for_each(|block| read_block(&context, &index, block * 5));
    }
    for _ in 0..3 {
        for block in (0..TABLE_BLOCKS).step_by(32) {
            read(&context, &large, u64::from(block) * BLOCK_BYTES, 32 * BLOCK_BYTES);
            let held = context.budget.held();
            assert!(held.fetched <= limit, "{held:?}");
        }
    }
    assert!(allocated(dir.path()) <= limit + 2 * EXTENTS_BYTES);
    let fetched = context.counters.blocks_fetched.load(Relaxed);
    (0..HOT).for_each(|block| read_block(&context, &index, block * 5));
    assert_eq!(context.counters.blocks_fetched.load(Relaxed), fetched, "all of the hot set is here");
}

#[test]
fn another_hot_set_takes_the_place_of_the_first() {
    const HOT: u32 = 900;
    let dir = tempfile::tempdir().unwrap();
    let context = context_within(dir.path(), Arc::default(), Some(1024 * BLOCK_BYTES));
    let (first, second) = (table(10), table(11));
    for _ in 0..3 {
        (0..HOT).for_each(|block| read_block(&context, &first, block));
    }
    for _ in 0..20 {
        (0..HOT).for_each(|block| read_block(&context, &second, block));
    }
    let fetched = context.counters.blocks_fetched.load(Relaxed);
    (0..HOT).for_each(|block| read_block(&context, &second, block));
    let again = context.counters.blocks_fetched.load(Relaxed) - fetched;
    assert!(again < u64::from(HOT) / 10, "{again} of {HOT} blocks had to be fetched again");
}

#[test]
fn what_is_written_counts_and_leaves_a_small_rest_to_what_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 1024 * BLOCK_BYTES;
    let context = context_within(dir.path(), Arc::default(), Some(limit));
    let (table, created) = (table(12), FileData::new(13, Base::None));
    read(&context, &table, 0, 1000 * BLOCK_BYTES);
    for block in 0..1200 {
        created.write(&context, block * BLOCK_BYTES, &[7; BLOCK_BYTES as usize]).unwrap();
    }
    let held = context.budget.held();
    assert_eq!(held.written, 1200 * BLOCK_BYTES);
    assert!(held.fetched <= limit / 16, "{held:?}");
    (0..1000).for_each(|block| read_block(&context, &table, block));
    assert!(context.budget.held().fetched <= limit / 16, "{:?}", context.budget.held());
    created.truncate(&context, 0).unwrap();
    created.retire(&context);
    (0..1000).for_each(|block| read_block(&context, &table, block));
    assert_eq!(context.budget.held(), Held { fetched: 1000 * BLOCK_BYTES, written: 0 }, "there is room again");
}
