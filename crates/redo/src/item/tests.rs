//! Page item functions against a model: a list of line pointers, each with its tuple, and the order in which tuples lie
//! on the page.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A page whose special space is `special_size` bytes and whose tuples, added in this order, have these lengths.
fn page_of(special_size: usize, lengths: &[usize]) -> Page {
    let mut page = page::ZERO_PAGE;
    page::init(&mut page, special_size);
    for (i, len) in lengths.iter().enumerate() {
        add_item(&mut page, &vec![(i % 255) as u8 + 1; *len], 0, false, false).unwrap();
    }
    page
}

/// What is behind each line pointer.
fn tuples(page: &Page) -> Vec<Option<Vec<u8>>> {
    (1..=max_offset(page)).map(|offset| item(page, offset).ok().map(<[u8]>::to_vec)).collect()
}

/// Line pointers with storage in the order of their tuples on the page, from its end downwards, and whether there are
/// gaps between them.
fn layout(page: &Page) -> (Vec<OffsetNumber>, bool) {
    let mut ids: Vec<(ItemId, OffsetNumber)> =
        (1..=max_offset(page)).map(|offset| (item_id(page, offset).unwrap(), offset)).filter(|(id, _)| id.has_storage()).collect();
    ids.sort_by_key(|(id, _)| std::cmp::Reverse(id.off()));
    let mut end = usize::from(special(page));
    let mut gaps = false;
    for (id, _) in &ids {
        gaps |= usize::from(id.off()) + max_align(usize::from(id.len())) != end;
        end = usize::from(id.off());
    }
    (ids.into_iter().map(|(_, offset)| offset).collect(), gaps || end != usize::from(upper(page)))
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    vec(1usize..120, 1..50)
}

/// Numbers from 1 to `max`, ascending, by the bits of `choice`.
fn chosen(max: usize, choice: u64) -> Vec<OffsetNumber> {
    (1..=max as OffsetNumber).filter(|offset| choice.rotate_right(u32::from(*offset)) & 1 != 0).collect()
}

proptest! {
    #[test]
    fn deleted_index_tuples_leave_the_others_in_order(lengths in lengths(), choice in any::<u64>(), special_size in prop_oneof![Just(0usize), Just(8), Just(16)]) {
        let mut page = page_of(special_size, &lengths);
        let doomed = chosen(lengths.len(), choice);
        let mut expected = tuples(&page);
        doomed.iter().rev().for_each(|offset| { expected.remove(usize::from(*offset) - 1); });
        let mut one_by_one = page;
        index_multi_delete(&mut page, &doomed).unwrap();
        prop_assert_eq!(tuples(&page), &expected[..]);
        prop_assert_eq!(layout(&page), ((1..=expected.len() as OffsetNumber).collect(), false));
        for offset in doomed.iter().rev() {
            index_tuple_delete(&mut one_by_one, *offset).unwrap();
        }
        prop_assert_eq!(tuples(&one_by_one), expected);
        prop_assert!(!layout(&one_by_one).1, "no gaps");
    }

    #[test]
    fn line_pointers_stay_when_tuples_are_deleted_without_compaction(lengths in lengths(), choice in any::<u64>()) {
        let mut page = page_of(16, &lengths);
        let mut expected = tuples(&page);
        for offset in chosen(lengths.len(), choice).into_iter().rev() {
            index_tuple_delete_no_compact(&mut page, offset).unwrap();
            if usize::from(offset) == expected.len() { expected.pop(); } else { expected[usize::from(offset) - 1] = None; }
        }
        prop_assert_eq!(tuples(&page), expected);
        prop_assert!(!layout(&page).1, "no gaps");
    }

    #[test]
    fn an_overwritten_tuple_keeps_its_place_among_the_others(lengths in lengths(), at in any::<prop::sample::Index>(), len in 1usize..200) {
        let mut page = page_of(8, &lengths);
        let offset = at.index(lengths.len()) as OffsetNumber + 1;
        let mut expected = tuples(&page);
        expected[usize::from(offset) - 1] = Some(vec![0xEE; len]);
        index_tuple_overwrite(&mut page, offset, &vec![0xEE; len]).unwrap();
        prop_assert_eq!(tuples(&page), expected);
        prop_assert_eq!(layout(&page), ((1..=lengths.len() as OffsetNumber).collect(), false));
    }

    #[test]
    fn repaired_heap_pages_have_no_gaps_and_tell_of_free_lines(lengths in lengths(), choice in any::<u64>(), again in lengths(), truncate in any::<bool>()) {
        let mut page = page_of(0, &lengths);
        // Twice, so that the second time tuples do not lie in the order of their line pointers.
        for added in [again, Vec::new()] {
            for offset in chosen(usize::from(max_offset(&page)), choice) {
                set_item_id(&mut page, offset, ItemId::UNUSED).unwrap();
            }
            let mut expected = tuples(&page);
            repair_fragmentation(&mut page, truncate).unwrap();
            while truncate && expected.last() == Some(&None) { expected.pop(); }
            let order: Vec<OffsetNumber> = (1..=expected.len() as OffsetNumber).filter(|offset| expected[usize::from(*offset) - 1].is_some()).collect();
            prop_assert_eq!(layout(&page), (order, false));
            prop_assert_eq!(flags(&page) & PD_HAS_FREE_LINES != 0, expected.contains(&None));
            prop_assert_eq!(tuples(&page), &expected[..]);
            for len in &added {
                let first_free = expected.iter().position(Option::is_none);
                let offset = add_item(&mut page, &vec![0xAA; *len], 0, false, true).unwrap();
                match first_free {
                    Some(free) => { prop_assert_eq!(usize::from(offset), free + 1); expected[free] = Some(vec![0xAA; *len]); }
                    None => { prop_assert_eq!(usize::from(offset), expected.len() + 1); expected.push(Some(vec![0xAA; *len])); }
                }
            }
            prop_assert_eq!(tuples(&page), expected);
        }
    }
}

#[test]
fn a_tuple_put_before_others_moves_their_line_pointers() {
    let mut page = page_of(16, &[8, 16, 24]);
    assert_eq!(add_item(&mut page, &[9; 5], 2, false, false).unwrap(), 2);
    assert_eq!(tuples(&page), [Some(vec![1; 8]), Some(vec![9; 5]), Some(vec![2; 16]), Some(vec![3; 24])]);
    assert_eq!(layout(&page), (vec![1, 3, 4, 2], false), "the new tuple lies before all others");
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut page = page_of(0, &[8]);
    let refused = |result: Result<OffsetNumber, Fault>| assert!(matches!(result, Err(Fault::Inconsistent(_))), "must be refused");
    refused(add_item(&mut page, &[0; 8161], 0, false, true));
    refused(add_item(&mut page, &[0; 8], 3, true, true));
    refused(add_item(&mut page, &[0; 8], 1, true, true));
    assert_eq!(add_item(&mut page, &[0; 8], 2, true, true).unwrap(), 2);
    assert!(item(&page, 0).is_err() && item(&page, 3).is_err(), "no such line pointers");
    let mut full = page_of(0, &[1; MAX_HEAP_TUPLES]);
    refused(add_item(&mut full, &[0; 1], 0, false, true));
    assert_eq!(heap_free_space(&full), 0, "no more line pointers may be made");
    set_item_id(&mut full, 7, ItemId::UNUSED).unwrap();
    assert_eq!(heap_free_space(&full), 0, "the hint says that there is none, and it is believed");
    set_has_free_lines(&mut full, true);
    assert_eq!(heap_free_space(&full), free_space(&full));
}

#[test]
fn line_pointers_are_cut_off_the_end_but_the_first() {
    let mut page = page_of(0, &[8; 6]);
    for offset in [2, 5, 6] {
        set_item_id(&mut page, offset, ItemId::UNUSED).unwrap();
    }
    truncate_line_pointers(&mut page).unwrap();
    assert_eq!((max_offset(&page), flags(&page) & PD_HAS_FREE_LINES), (4, PD_HAS_FREE_LINES));
    for offset in [1, 3, 4] {
        set_item_id(&mut page, offset, ItemId::UNUSED).unwrap();
    }
    truncate_line_pointers(&mut page).unwrap();
    assert_eq!((max_offset(&page), flags(&page) & PD_HAS_FREE_LINES), (1, PD_HAS_FREE_LINES));
}

#[test]
fn tuples_that_lie_where_others_stay_do_no_harm() {
    // Line pointers that no sound page has: the second is the same tuple as the first, which is in its place already.
    for ids in [vec![(8176, 16), (8176, 16)], vec![(8176, 16), (8160, 32), (8160, 8)], vec![(8176, 16), (8168, 16), (8144, 8)]] {
        let mut page = page_of(0, &[16, 16, 16]);
        set_lower(&mut page, (PAGE_HEADER_SIZE + ids.len() * ITEM_ID_SIZE) as u16);
        for (offset, (off, len)) in (1..).zip(ids) {
            set_item_id(&mut page, offset, ItemId::normal(off, len)).unwrap();
        }
        repair_fragmentation(&mut page, true).unwrap();
        assert!(check_header(&page).is_ok(), "a sound header stays one");
    }
}
