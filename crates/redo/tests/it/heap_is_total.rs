//! No record of heap, sequences, generic WAL or XLOG, no change of a map or an SLRU page, and no masking panics,
//! whatever is in it and on the page; and what succeeds on a page whose header is sound leaves it so.
//!
//! Random bytes alone are refused at the first check, so most pages here look like heap pages, and most numbers are
//! small.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use varve_postgres::wal::{Record, RecordHeader, rmgr};
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, Page, RelNode, page, wal};
use varve_redo::change::{BlockRecord, Change, OtherBlock};
use varve_redo::visibility_map::visibility_map_clears;
use varve_redo::{apply, free_space_effect, free_space_map, mask};

/// Bytes in the fixed header of a heap tuple.
const TUPLE_HEADER_SIZE: usize = 23;

/// Numbers of two bytes, mostly such as counts, flags and offset numbers are.
fn words(len_max: usize) -> impl Strategy<Value = Vec<u8>> {
    let word =
        prop_oneof![8 => 0u16..6, 4 => 0u16..64, 2 => any::<u16>(), 1 => Just(0xFFFF_u16), 2 => (0u16..256).prop_map(|flags| flags << 8)];
    (vec(word, 0..len_max / 2), any::<bool>()).prop_map(|(words, odd)| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        if odd {
            bytes.push(1);
        }
        bytes
    })
}

/// A heap tuple: random transaction state, a header of about the usual length.
fn tuple() -> impl Strategy<Value = Vec<u8>> {
    (vec(any::<u8>(), TUPLE_HEADER_SIZE - 1), prop_oneof![6 => Just(24u8), 1 => any::<u8>()], vec(any::<u8>(), 1..60)).prop_map(
        |(mut tuple, hoff, values)| {
            tuple.push(hoff);
            tuple.extend(values);
            tuple
        },
    )
}

/// A heap page with tuples and with line pointers in every state.
fn heap_page() -> impl Strategy<Value = Box<Page>> {
    (vec((tuple(), 0u32..8), 0..40), 0u16..8).prop_map(|(tuples, flags)| {
        let mut bytes = Box::new(page::ZERO_PAGE);
        page::init(&mut bytes, 0);
        let (mut lower, mut upper) = (page::PAGE_HEADER_SIZE, BLCKSZ);
        for (tuple, state) in &tuples {
            let id = match state {
                0 => 0,
                1 => 3 << 15,
                2 => 2 << 15 | 1,
                _ => {
                    upper -= tuple.len().next_multiple_of(8);
                    bytes[upper..upper + tuple.len()].copy_from_slice(tuple);
                    upper as u32 | 1 << 15 | (tuple.len() as u32) << 17
                }
            };
            bytes[lower..lower + 4].copy_from_slice(&id.to_le_bytes());
            lower += 4;
        }
        page::set_lower(&mut bytes, lower as u16);
        page::set_upper(&mut bytes, upper as u16);
        page::set_flags(&mut bytes, flags);
        bytes
    })
}

/// A heap page some bytes of which were overwritten.
fn damaged_page() -> impl Strategy<Value = Box<Page>> {
    (heap_page(), vec((prop_oneof![3 => 0usize..200, 1 => 0usize..BLCKSZ], any::<u8>()), 1..6)).prop_map(|(mut page, damage)| {
        for (at, byte) in damage {
            page[at] = byte;
        }
        page
    })
}

fn any_page() -> impl Strategy<Value = Box<Page>> {
    let noise = vec(any::<u8>(), BLCKSZ).prop_map(|bytes| {
        let mut page = Box::new(page::ZERO_PAGE);
        page.copy_from_slice(&bytes);
        page
    });
    prop_oneof![12 => heap_page(), 6 => damaged_page(), 1 => Just(Box::new(page::ZERO_PAGE)), 1 => noise]
}

fn is_sound(page: &Page) -> bool {
    let (lower, upper, special) = (page::lower(page), page::upper(page), page::special(page));
    usize::from(lower) >= page::PAGE_HEADER_SIZE && lower <= upper && upper <= special && usize::from(special) <= BLCKSZ
}

/// A record in its stored form, and what it says.
#[derive(Debug, Clone)]
struct Stored(Bytes);

impl Stored {
    fn of(record: BlockRecord<'_>) -> Stored {
        Stored(Change::Record(record).encode())
    }

    fn record(&self) -> BlockRecord<'_> {
        match Change::decode(&self.0) {
            Ok(Change::Record(record)) => record,
            other => panic!("a stored record must be one: {other:?}"),
        }
    }
}

prop_compose! {
    /// A record, as it is stored.
    fn record()(
        rmid in prop_oneof![4 => Just(rmgr::HEAP), 4 => Just(rmgr::HEAP2), 1 => Just(rmgr::SEQ), 1 => Just(rmgr::GENERIC), 1 => Just(rmgr::XLOG)],
        info in (0u8..16).prop_map(|high| high << 4),
        block_id in 0u8..4,
        fork in prop_oneof![5 => Just(Fork::Main), 1 => Just(Fork::VisibilityMap)],
        blkno in prop_oneof![0u32..4, any::<u32>()],
        main_data in words(40),
        data in (words(40), vec(any::<u8>(), 0..80)).prop_map(|(mut numbers, rest)| { numbers.extend(rest); numbers }),
        others in vec((0u8..3, prop_oneof![0u32..9, any::<u32>()]), 0..3),
        will_init in any::<bool>(),
    ) -> Stored {
        Stored::of(BlockRecord {
            rmid,
            info,
            xid: 700,
            main_data: &main_data,
            block_id,
            fork,
            blkno,
            will_init,
            has_data: !data.is_empty(),
            data: &data,
            others: others.into_iter().map(|(id, blkno)| OtherBlock { id, fork: Fork::Main, blkno }).collect(),
        })
    }
}

fn major() -> impl Strategy<Value = Major> {
    proptest::sample::select(Major::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100_000))]

    #[test]
    fn records_are_total(major in major(), stored in record(), mut page in any_page(), restored in any::<bool>()) {
        let was_sound = is_sound(&page);
        let record = stored.record();
        let blkno = record.blkno;
        let change = Change::Record(record.clone());
        let done = apply(major, Lsn(0x0123_4567), blkno, &change, &mut page);
        prop_assert!(done.is_err() || !was_sound || is_sound(&page), "a sound page came out unsound");
        if let Some(space) = free_space_effect(major, &record, &page, restored) {
            prop_assert!(space <= BLCKSZ || !is_sound(&page));
        }
    }

    #[test]
    fn a_record_is_the_same_after_storing(stored in record()) {
        prop_assert_eq!(Change::Record(stored.record()).encode(), stored.0);
    }

    #[test]
    fn cleared_visibility_is_total(major in major(), stored in record()) {
        let record = stored.record();
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main);
        let mut ids: Vec<(u8, u32)> = record.others.iter().map(|other| (other.id, other.blkno)).chain([(record.block_id, record.blkno)]).collect();
        ids.sort_unstable();
        ids.dedup_by_key(|(id, _)| *id);
        let block = |(id, blkno)| wal::Block { id, rel, blkno, will_init: false, has_data: false, image: None, data: &[] };
        let record = Record {
            header: RecordHeader { total_len: 0, xid: 700, prev: Lsn(0), info: record.info, rmid: record.rmid, crc: 0 },
            start: Lsn(8),
            end: Lsn(16),
            blocks: ids.into_iter().map(block).collect(),
            main_data: record.main_data,
            origin: None,
            toplevel_xid: None,
        };
        for (map, blkno, change) in visibility_map_clears(&record) {
            prop_assert_eq!(map.fork, Fork::VisibilityMap);
            let mut page = page::ZERO_PAGE;
            prop_assert_eq!(apply(major, Lsn(16), blkno, &change, &mut page), Ok(()), "what a record clears is on the page that it is said to be on");
        }
    }

    #[test]
    fn masks_are_total(major in major(), rmid in 0u8..24, mut page in any_page(), blkno in any::<u32>()) {
        let _ = mask::mask_page(major, rmid, &mut page, blkno);
        let _ = mask::rmgr_of_page(&page);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn stored_changes_are_total(major in major(), tag in 0u8..8, bytes in words(120), mut page in any_page(), blkno in prop_oneof![0u32..3, any::<u32>()]) {
        let mut stored = vec![tag];
        stored.extend(bytes);
        if let Ok(change) = Change::decode(&stored) {
            let _ = apply(major, Lsn(0x0123_4567), blkno, &change, &mut page);
        }
    }

    #[test]
    fn free_space_maps_are_total(mut page in any_page(), slots in vec((prop_oneof![0u32..4100, any::<u32>()], any::<u8>()), 0..20), cut in any::<u32>()) {
        for (slot, category) in slots {
            free_space_map::set(&mut page, slot, category);
        }
        free_space_map::truncate(&mut page, cut);
        let (length, slot) = free_space_map::length_after_truncation(cut);
        prop_assert!(length > 0 || slot.is_none());
        free_space_map::update_upper_pages(cut, |blkno| (blkno < 4).then_some(*page), |_, _| ());
    }
}

/// The categories of slots that are set are those that are read, and the page's greatest is theirs.
#[test]
fn free_space_maps_keep_what_is_set() {
    proptest!(ProptestConfig::with_cases(500), |(slots in vec((0u32..free_space_map::SLOTS_PER_PAGE, any::<u8>()), 0..60), cut in 0u32..free_space_map::SLOTS_PER_PAGE)| {
        let mut page = page::ZERO_PAGE;
        page::init(&mut page, 0);
        let mut model = vec![0; free_space_map::SLOTS_PER_PAGE as usize];
        for (slot, category) in slots {
            prop_assert_eq!(free_space_map::set(&mut page, slot, category), model[slot as usize] != category);
            model[slot as usize] = category;
            prop_assert_eq!(free_space_map::greatest(&page), model.iter().copied().max().unwrap_or(0));
        }
        free_space_map::truncate(&mut page, cut);
        model[cut as usize..].fill(0);
        let got: Vec<u8> = (0..free_space_map::SLOTS_PER_PAGE).map(|slot| free_space_map::get(&page, slot)).collect();
        prop_assert_eq!(got, model.clone());
        prop_assert_eq!(free_space_map::greatest(&page), model.into_iter().max().unwrap_or(0));
    });
}
