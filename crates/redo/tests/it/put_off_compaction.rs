//! Heap pages whose compaction is put off come to the same as those compacted at each prune, whatever is done to them
//! in between.

use proptest::collection::vec;
use proptest::prelude::*;
use varve_postgres::page::{self, BLCKSZ, PAGE_HEADER_SIZE};
use varve_postgres::wal::rmgr;
use varve_postgres::{Fork, Lsn, Major, Page};
use varve_redo::change::{BlockRecord, Change, Others};
use varve_redo::{HeapLayout, apply, apply_loosely, mask};

const BLKNO: u32 = 3;

/// What is done to the page. Numbers choose among what the page has.
#[derive(Debug, Clone)]
enum Step {
    Insert {
        len: usize,
    },
    Update {
        old: usize,
        len: usize,
        prefix: bool,
        suffix: bool,
    },
    Delete {
        tuple: usize,
    },
    /// Of each line pointer, two bits: left alone, dead, unused, or redirected to the next.
    Prune {
        fates: Vec<u8>,
        cleanup_lock: bool,
    },
    /// Makes unused what is dead (14 to 16).
    Vacuum,
    MultiInsert {
        lens: Vec<usize>,
    },
    /// A record of another kind.
    Image,
}

fn step() -> impl Strategy<Value = Step> {
    // Mostly of one length, as rows of a table that is updated are.
    let len = || prop_oneof![3 => Just(100usize), 1 => 1usize..300, 1 => 20usize..60];
    let fate = prop_oneof![12 => Just(0u8), 1 => Just(1), 3 => Just(2), 1 => Just(3)];
    prop_oneof![
        6 => len().prop_map(|len| Step::Insert { len }),
        8 => (any::<usize>(), len(), any::<bool>(), any::<bool>()).prop_map(|(old, len, prefix, suffix)| Step::Update { old, len, prefix, suffix }),
        2 => any::<usize>().prop_map(|tuple| Step::Delete { tuple }),
        5 => (vec(fate, 291), prop::bool::weighted(0.9)).prop_map(|(fates, cleanup_lock)| Step::Prune { fates, cleanup_lock }),
        1 => Just(Step::Vacuum),
        1 => vec(len(), 0..6).prop_map(|lens| Step::MultiInsert { lens }),
        1 => Just(Step::Image),
    ]
}

/// A line pointer's state (`LP_*`).
fn states(page: &Page) -> Vec<u32> {
    page[PAGE_HEADER_SIZE..usize::from(page::lower(page))].as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id) >> 15 & 3).collect()
}

fn chosen(states: &[u32], wanted: u32, choice: usize) -> Option<u16> {
    let with: Vec<u16> = (1..).zip(states).filter(|(_, state)| **state == wanted).map(|(offset, _)| offset).collect();
    with.get(choice % with.len().max(1)).copied()
}

/// The line pointer that Postgres would give the next tuple.
fn free_offset(states: &[u32], taken: &[u16]) -> u16 {
    let is_free = |offset: &u16| !taken.contains(offset) && states.get(usize::from(*offset) - 1).is_none_or(|state| *state == 0);
    (1..).find(is_free).expect("numbers do not end")
}

/// A record.
struct Made {
    rmid: u8,
    info: u8,
    main_data: Vec<u8>,
    data: Vec<u8>,
}

impl Made {
    fn change(&self) -> Change<'_> {
        Change::Record(BlockRecord {
            rmid: self.rmid,
            info: self.info,
            xid: 700,
            main_data: &self.main_data,
            block_id: 0,
            fork: Fork::Main,
            blkno: BLKNO,
            will_init: false,
            has_data: !self.data.is_empty(),
            data: &self.data,
            others: Others::new(),
        })
    }
}

fn heap(info: u8, main_data: Vec<u8>, data: Vec<u8>) -> Option<Made> {
    Some(Made { rmid: rmgr::HEAP, info, main_data, data })
}

fn bytes(numbers: impl IntoIterator<Item = u16>) -> Vec<u8> {
    numbers.into_iter().flat_map(u16::to_le_bytes).collect()
}

/// Header of a tuple as records have it, and `len` bytes of values.
fn tuple(len: usize, fill: u8) -> Vec<u8> {
    let mut tuple = vec![1, 0, 0, 8, 24];
    tuple.extend(vec![fill; len]);
    tuple
}

/// The record of a step, if the page has what it needs.
fn record(major: Major, step: &Step, page: &Page, fill: u8) -> Option<Made> {
    let states = states(page);
    match step {
        Step::Insert { len } => {
            let mut main = bytes([free_offset(&states, &[])]);
            main.push(0);
            heap(0x00, main, tuple(1 + len, fill))
        }
        Step::Update { old, len, prefix, suffix } => {
            let old = chosen(&states, 1, *old)?;
            let mut main = vec![9, 0, 0, 0];
            main.extend(bytes([old]));
            main.extend([0, u8::from(*prefix) << 5 | u8::from(*suffix) << 6, 0, 0, 0, 0]);
            main.extend(bytes([free_offset(&states, &[])]));
            let mut data = Vec::new();
            // Short enough that most old tuples have as many bytes.
            let (prefix_len, suffix_len) = (if *prefix { 10 } else { 0 }, if *suffix { 7 } else { 0 });
            data.extend(bytes([prefix_len, suffix_len].into_iter().filter(|len| *len > 0)));
            let rest = (1 + len).saturating_sub(usize::from(prefix_len + suffix_len));
            data.extend(tuple(rest.max(1), fill));
            heap(0x40, main, data)
        }
        Step::Delete { tuple } => {
            let mut main = vec![9, 0, 0, 0];
            main.extend(bytes([chosen(&states, 1, *tuple)?]));
            main.extend([0, 0]);
            heap(0x10, main, Vec::new())
        }
        Step::Prune { fates, cleanup_lock } => {
            let of_fate = |fate: u8| -> Vec<u16> {
                let is_meant = |(offset, state): &(u16, &u32)| fates[usize::from(*offset) - 1] == fate && **state != 0;
                (1..).zip(&states).filter(is_meant).map(|(offset, _)| offset).collect()
            };
            let (dead, unused) = (of_fate(1), of_fate(2));
            let dead: Vec<u16> = dead.into_iter().filter(|offset| states[usize::from(*offset) - 1] != 3).collect();
            let redirected: Vec<u16> = of_fate(3).into_iter().flat_map(|from| [from, from % states.len() as u16 + 1]).collect();
            if !major.has_one_prune_record() {
                let mut main = vec![9, 0, 0, 0];
                main.extend(bytes([redirected.len() as u16 / 2, dead.len() as u16]));
                let data = bytes(redirected.into_iter().chain(dead).chain(unused));
                return Some(Made { rmid: rmgr::HEAP2, info: 0x10, main_data: main, data });
            }
            // Without a cleanup lock tuples are not moved, and only what is dead becomes unused.
            let (redirected, dead, unused) = match cleanup_lock {
                true => (redirected, dead, unused),
                false => (vec![], vec![], unused.into_iter().filter(|offset| states[usize::from(*offset) - 1] == 3).collect()),
            };
            let mut flags = u8::from(*cleanup_lock) << 2;
            let mut data = Vec::new();
            for (part, items, size) in [(1 << 5, redirected, 2), (1 << 6, dead, 1), (1 << 7, unused, 1)] {
                if !items.is_empty() {
                    flags |= part;
                    data.extend(bytes([items.len() as u16 / size]));
                    data.extend(bytes(items));
                }
            }
            Some(Made { rmid: rmgr::HEAP2, info: 0x10, main_data: vec![0, flags], data })
        }
        Step::Vacuum if !major.has_one_prune_record() => {
            let dead: Vec<u16> = (1..).zip(&states).filter(|(_, state)| **state == 3).map(|(offset, _)| offset).collect();
            Some(Made { rmid: rmgr::HEAP2, info: 0x20, main_data: bytes([dead.len() as u16]), data: bytes(dead) })
        }
        Step::Vacuum | Step::Image => None,
        Step::MultiInsert { lens } => {
            let mut offsets = Vec::new();
            let mut data = Vec::new();
            for len in lens {
                offsets.push(free_offset(&states, &offsets));
                data.resize(data.len().next_multiple_of(2), 0);
                data.extend(bytes([1 + *len as u16]));
                data.extend(tuple(1 + len, fill));
            }
            let mut main = vec![0, 0];
            main.extend(bytes([lens.len() as u16]));
            main.extend(bytes(offsets));
            Some(Made { rmid: rmgr::HEAP2, info: 0x50, main_data: main, data })
        }
    }
}

fn masked(major: Major, page: &Page) -> Page {
    let mut page = *page;
    mask::mask_page(major, rmgr::HEAP, &mut page, BLKNO).expect("the page can be masked");
    page
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_series_comes_to_the_same(major in proptest::sample::select(Major::ALL.to_vec()), steps in vec(step(), 1..120)) {
        let mut at_once = page::ZERO_PAGE;
        page::init(&mut at_once, 0);
        let (mut loose, mut layout) = (at_once, HeapLayout::default());
        let mut pruned = 0;
        for (number, step) in (1u64..).zip(&steps) {
            if matches!(step, Step::Image) {
                (loose, layout) = (at_once, HeapLayout::default());
            }
            let Some(made) = record(major, step, &at_once, number as u8) else { continue };
            let change = made.change();
            let lsn = Lsn(number * 8);
            let (before, before_loose, before_layout) = (at_once, loose, layout.clone());
            let done = apply(major, lsn, BLKNO, &change, &mut at_once);
            let done_loosely = apply_loosely(major, lsn, BLKNO, &change, &mut loose, &mut layout);
            prop_assert_eq!(done.is_ok(), done_loosely.is_ok(), "{:?}: {:?} and {:?}", step, done, done_loosely);
            if done.is_err() {
                // A record that does not fit: neither page is to be used.
                (at_once, loose, layout) = (before, before_loose, before_layout);
                continue;
            }
            pruned += usize::from(matches!(step, Step::Prune { .. }));
            let mut settled = loose;
            layout.clone().settle(&mut settled, BLKNO).expect("a page that was redone can be settled");
            prop_assert!(masked(major, &settled) == masked(major, &at_once), "after step {} ({:?}) and {} prunes the pages differ", number, step, pruned);
            prop_assert_eq!(page::lsn(&loose), lsn);
        }
    }
}

/// The common case does what it is for: after the first, a prune moves nothing.
#[test]
fn a_prune_moves_nothing_after_the_first() {
    let major = Major::V15;
    let mut page = page::ZERO_PAGE;
    page::init(&mut page, 0);
    let mut layout = HeapLayout::default();
    let apply = |step: &Step, page: &mut Page, layout: &mut HeapLayout, fill: u8| {
        let made = record(major, step, page, fill).expect("the page has what it takes");
        let change = made.change();
        apply_loosely(major, Lsn(8), BLKNO, &change, page, layout).expect("it fits");
    };
    for fill in 1..=40 {
        apply(&Step::Insert { len: 100 }, &mut page, &mut layout, fill);
    }
    let prune =
        |doomed: usize| Step::Prune { fates: (1..=291).map(|offset| if offset == doomed { 2 } else { 0 }).collect(), cleanup_lock: true };
    apply(&prune(1), &mut page, &mut layout, 0);
    let (tuples, upper) = (page[usize::from(page::upper(&page))..].to_vec(), page::upper(&page));
    apply(&prune(20), &mut page, &mut layout, 0);
    assert_eq!(usize::from(page::upper(&page)), usize::from(upper) + 128, "the header says already that there is more room");
    assert_eq!(page[BLCKSZ - tuples.len()..], tuples, "tuples lie where they lay");
    apply(&Step::Insert { len: 100 }, &mut page, &mut layout, 77);
    let place =
        tuples.iter().zip(&page[BLCKSZ - tuples.len()..]).position(|(old, new)| old != new).expect("the new tuple lies among the others");
    layout.settle(&mut page, BLKNO).expect("it can be settled");
    assert!(
        page[usize::from(page::upper(&page))..].iter().filter(|byte| **byte == 77).count() > 90,
        "the new tuple is there, once before at {place}"
    );
}
