//! No record of B-tree or hash makes a page function panic, whatever is in it and on the page; and what succeeds on a
//! page whose header is sound leaves it so.
//!
//! Random bytes alone are refused at the first check, so most pages here look right from outside (header, line
//! pointers, tuples with sizes in their headers, special space), and most numbers are small.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use varve_postgres::wal::rmgr;
use varve_postgres::{BLCKSZ, Fork, Lsn, Major, Page, page};
use varve_redo::apply;
use varve_redo::change::{BlockRecord, Change, OtherBlock};

/// Numbers of two bytes, mostly such as counts and offset numbers are.
fn words(len_max: usize) -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![8 => 0u16..6, 4 => 0u16..64, 2 => any::<u16>(), 1 => Just(0xFFFF_u16), 1 => Just(0x2000 | 24)];
    (vec(word, 0..len_max / 2), any::<bool>()).prop_map(|(words, odd)| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        if odd {
            bytes.push(1);
        }
        bytes
    })
}

/// An index tuple; some have a posting list.
fn tuple() -> impl Strategy<Value = Vec<u8>> {
    (1usize..20, 0usize..8, any::<u8>(), 0u8..8).prop_map(|(words, tids, fill, kind)| {
        let mut tuple = vec![fill; words * 8];
        let (block, offset, flag) = if kind < 4 { (8 * (words / 2) as u32, 0x2000 | tids as u16, 0x2000) } else { (7, tids as u16, 0) };
        tuple[0..2].copy_from_slice(&((block >> 16) as u16).to_le_bytes());
        tuple[2..4].copy_from_slice(&(block as u16).to_le_bytes());
        tuple[4..6].copy_from_slice(&offset.to_le_bytes());
        let info = tuple.len() as u16 | flag;
        tuple[6..8].copy_from_slice(&info.to_le_bytes());
        tuple
    })
}

/// A page that looks right: tuples, and a special space of one of the usual sizes.
fn plausible_page() -> impl Strategy<Value = Box<Page>> {
    (prop_oneof![Just(0usize), Just(8), Just(16)], vec(tuple(), 0..30), vec(prop_oneof![0u8..16, any::<u8>()], 16), any::<bool>()).prop_map(
        |(special_size, tuples, special, is_hash)| {
            let mut bytes = Box::new(page::ZERO_PAGE);
            page::init(&mut bytes, special_size);
            let special_at = BLCKSZ - special_size;
            bytes[special_at..].copy_from_slice(&special[..special_size]);
            if is_hash && special_size == 16 {
                bytes[BLCKSZ - 2..].copy_from_slice(&0xFF80_u16.to_le_bytes());
            }
            let (mut lower, mut upper) = (page::PAGE_HEADER_SIZE, special_at);
            for tuple in &tuples {
                upper -= tuple.len();
                bytes[upper..upper + tuple.len()].copy_from_slice(tuple);
                let id = upper as u32 | 1 << 15 | (tuple.len() as u32) << 17;
                bytes[lower..lower + 4].copy_from_slice(&id.to_le_bytes());
                lower += 4;
            }
            page::set_lower(&mut bytes, lower as u16);
            page::set_upper(&mut bytes, upper as u16);
            bytes
        },
    )
}

/// A page that looked right until some bytes of its header or line pointers were overwritten.
fn damaged_page() -> impl Strategy<Value = Box<Page>> {
    (plausible_page(), vec((0usize..200, any::<u8>()), 1..6)).prop_map(|(mut page, damage)| {
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
    prop_oneof![12 => plausible_page(), 6 => damaged_page(), 1 => Just(Box::new(page::ZERO_PAGE)), 1 => noise]
}

/// A block's data: numbers, tuples, or numbers and then tuples.
fn data() -> impl Strategy<Value = Vec<u8>> {
    (words(24), vec(tuple(), 0..6)).prop_map(|(mut numbers, tuples)| {
        numbers.extend(tuples.concat());
        numbers
    })
}

prop_compose! {
    /// A record, as it is stored.
    fn record()(
        rmid in prop_oneof![Just(rmgr::BTREE), Just(rmgr::HASH)],
        info in (0u8..16).prop_map(|high| high << 4),
        block_id in 0u8..8,
        blkno in prop_oneof![0u32..4, any::<u32>()],
        main_data in words(60),
        data in data(),
        others in vec((0u8..8, 0u32..9), 0..5),
        will_init in any::<bool>(),
    ) -> Bytes {
        let record = BlockRecord {
            rmid,
            info,
            xid: 700,
            main_data: &main_data,
            block_id,
            fork: Fork::Main,
            blkno,
            will_init,
            has_data: !data.is_empty(),
            data: &data,
            others: others.into_iter().map(|(id, blkno)| OtherBlock { id, fork: Fork::Main, blkno }).collect(),
        };
        Change::Record(record).encode()
    }
}

fn is_sound(page: &Page) -> bool {
    let (lower, upper, special) = (page::lower(page), page::upper(page), page::special(page));
    usize::from(lower) >= page::PAGE_HEADER_SIZE && lower <= upper && upper <= special && usize::from(special) <= BLCKSZ
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100_000))]

    #[test]
    fn btree_and_hash_are_total(major in proptest::sample::select(Major::ALL.to_vec()), stored in record(), mut page in any_page(), blkno in prop_oneof![0u32..4, any::<u32>()]) {
        let change = Change::decode(&stored).expect("a stored record");
        let was_sound = is_sound(&page);
        let done = apply(major, Lsn(0x0123_4567), blkno, &change, &mut page);
        prop_assert!(done.is_err() || !was_sound || is_sound(&page), "a sound page came out unsound");
    }
}
