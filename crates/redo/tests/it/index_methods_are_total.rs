//! No record of GIN, GiST, SP-GiST or BRIN makes a page function panic, whatever is in it and on the page; and what
//! succeeds leaves a page whose header is sound.

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use varve_postgres::page::{self, BLCKSZ, PAGE_HEADER_SIZE};
use varve_postgres::wal::rmgr;
use varve_postgres::{Fork, Lsn, Major, Page};
use varve_redo::change::{BlockRecord, Change, OtherBlock};

/// What the special space of an initialised page holds: access methods by their page ids, GIN by its size and flags.
fn special_space() -> impl Strategy<Value = Vec<u8>> {
    let gin = (any::<u32>(), 0..900u16, 0..256u16)
        .prop_map(|(link, max_off, flags)| [&link.to_le_bytes()[..], &max_off.to_le_bytes(), &flags.to_le_bytes()].concat());
    let gist = (any::<u64>(), any::<u32>(), 0..32u16).prop_map(|(sequence, link, flags)| {
        [&sequence.to_le_bytes()[..], &link.to_le_bytes(), &flags.to_le_bytes(), &0xFF81u16.to_le_bytes()].concat()
    });
    let spgist = (0..16u16, 0..9u16, 0..9u16).prop_map(|(flags, redirections, placeholders)| {
        [flags, redirections, placeholders, 0xFF82].iter().flat_map(|field| field.to_le_bytes()).collect()
    });
    let brin = (0xF091..0xF094u16).prop_map(|kind| [&[0; 6][..], &kind.to_le_bytes()].concat());
    prop_oneof![gin, gist, spgist, brin]
}

/// An initialised page with tuples, the first words of which are mostly what access methods expect.
fn page_with_tuples() -> impl Strategy<Value = Page> {
    let header = prop_oneof![any::<u32>(), (0..4u32, 0..64u32).prop_map(|(state, size)| state | size << 3)];
    let tuple = (header, any::<[u8; 4]>(), 0..9u16, vec(any::<u8>(), 0..40));
    (special_space(), vec(tuple, 0..40)).prop_map(|(special, tuples)| {
        let mut page = page::ZERO_PAGE;
        page::init(&mut page, special.len());
        page[BLCKSZ - special.len()..].copy_from_slice(&special);
        let (mut lower, mut upper) = (PAGE_HEADER_SIZE, BLCKSZ - special.len());
        for (header, middle, info, rest) in tuples {
            let mut bytes = [&header.to_le_bytes()[..], &middle[..2], &(info * 8).to_le_bytes(), &rest].concat();
            bytes.resize(bytes.len().next_multiple_of(8).max(16), 0);
            upper -= bytes.len();
            page[upper..upper + bytes.len()].copy_from_slice(&bytes);
            let id = upper as u32 | 1 << 15 | (bytes.len() as u32) << 17;
            page[lower..lower + 4].copy_from_slice(&id.to_le_bytes());
            lower += 4;
        }
        page::set_lower(&mut page, lower as u16);
        page::set_upper(&mut page, upper as u16);
        page
    })
}

/// Any page: sound, of zeros, random, or sound with damage.
fn any_page() -> impl Strategy<Value = Page> {
    let random = vec(any::<u8>(), BLCKSZ).prop_map(|bytes| Page::try_from(bytes).expect("as many bytes as a page"));
    let damaged = (page_with_tuples(), vec((0..BLCKSZ, any::<u8>()), 1..8), vec((0..64usize, any::<u8>()), 0..4)).prop_map(
        |(mut page, anywhere, in_front)| {
            for (at, byte) in anywhere.into_iter().chain(in_front) {
                page[at] = byte;
            }
            page
        },
    );
    prop_oneof![8 => page_with_tuples(), 1 => Just(page::ZERO_PAGE), 1 => random, 4 => damaged]
}

/// Data of a record: small numbers, of which most fields consist, or anything.
fn data() -> impl Strategy<Value = Bytes> {
    let small = vec(prop_oneof![4 => 0..4u16, 4 => 0..48u16, 1 => any::<u16>()], 0..60)
        .prop_map(|words| Bytes::from(words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>()));
    prop_oneof![3 => small, 1 => vec(any::<u8>(), 0..200).prop_map(Bytes::from)]
}

/// A record, as it is stored.
fn record() -> impl Strategy<Value = Bytes> {
    let rmid = prop_oneof![Just(rmgr::GIN), Just(rmgr::GIST), Just(rmgr::SPGIST), Just(rmgr::BRIN)];
    (rmid, 0..16u8, data(), data(), 0..4u8, 0..3u32, vec(0..5u8, 0..4)).prop_map(
        |(rmid, kind, main_data, data, block_id, blkno, mut others)| {
            others.sort_unstable();
            others.dedup();
            others.retain(|id| *id != block_id);
            let record = BlockRecord {
                rmid,
                info: kind << 4,
                xid: 700,
                main_data: &main_data,
                block_id,
                fork: Fork::Main,
                blkno,
                will_init: false,
                has_data: !data.is_empty(),
                data: &data,
                others: others.into_iter().map(|id| OtherBlock { id, fork: Fork::Main, blkno: u32::from(id) + 7 }).collect(),
            };
            Change::Record(record).encode()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn any_record_on_any_page(stored in record(), mut page in any_page(), major in prop::sample::select(&Major::ALL[..])) {
        let was_sound = is_sound(&page);
        let change = Change::decode(&stored).expect("a stored record");
        let done = varve_redo::apply(major, Lsn(0x1234_5678), 0, &change, &mut page);
        if done.is_ok() && was_sound {
            prop_assert!(is_sound(&page), "{change:?} left lower {}, upper {}", page::lower(&page), page::upper(&page));
        }
    }
}

fn is_sound(page: &Page) -> bool {
    PAGE_HEADER_SIZE <= usize::from(page::lower(page))
        && page::lower(page) <= page::upper(page)
        && page::upper(page) <= page::special(page)
        && usize::from(page::special(page)) <= BLCKSZ
}
