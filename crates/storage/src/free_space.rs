//! Free-space maps at any LSN.
//!
//! Maps have no WAL: Postgres's redo notes the free space of heap pages that it fills, prunes or marks all-visible.
//! Ingest has no pages, so it brings maps up to date only now and then. In between it writes **notes**: for each bottom
//! page of a map, the slots whose heap blocks have had such a record since. Whoever reads a page of a map looks at the
//! heap pages that are noted, as they are at his LSN, and puts what is free on them into it ([`fold`]). So a map says
//! the same wherever the ingest, and whoever began anew with it, happened to stand.
//!
//! It is the truth about a page, never an older figure than the one that redo would have. What follows on the pages
//! above is put there, too, without which a search from the root finds nothing.
//!
//! Layout of notes: version `u8`; then varints: how many runs of slots that were noted before the version's own LSN,
//! each (slots left out, slots in the run); how many were noted from there on, each (LSN less the one before, slot).
//! Notes are written once for a batch of records, at the end of the first that noted something. Those of the batch
//! carry their own LSN, and readers leave out what is later than theirs.

use bytes::Bytes;
use varve_postgres::page::{self, ZERO_PAGE};
use varve_postgres::{BlockNumber, Fork, Lsn, Page, RelFork, RelNode};
use varve_redo::free_space_map::{self, MapPage, SLOTS_PER_PAGE};

use crate::history::{History, HistoryError};
use crate::key::{Key, KeyKind};
use crate::relation::{self, LiveSize};
use crate::varint::{put_varint, take_varint};

const VERSION: u8 = 1;
const WORD_BITS: u32 = u64::BITS;
const WORDS: usize = SLOTS_PER_PAGE.div_ceil(WORD_BITS) as usize;
/// Bottom pages up to which their notes are read one by one; a scan costs more than so many.
const GETS_MAX: u32 = 64;
/// Heap pages that are read at once.
const READ_AT_ONCE: usize = 128;

/// Slots of a map's page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slots([u64; WORDS]);

impl Default for Slots {
    fn default() -> Slots {
        Slots([0; WORDS])
    }
}

impl Slots {
    /// Adds a slot, which exists on a page. Whether it is new.
    fn insert(&mut self, slot: u32) -> bool {
        let Some(word) = self.0.get_mut((slot / WORD_BITS) as usize) else { return false };
        let bit = 1 << (slot % WORD_BITS);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    fn remove(&mut self, slot: u32) {
        if let Some(word) = self.0.get_mut((slot / WORD_BITS) as usize) {
            *word &= !(1 << (slot % WORD_BITS));
        }
    }

    /// Takes out all slots from `slot` on.
    fn cut(&mut self, slot: u32) {
        for (first, word) in (0..).step_by(WORD_BITS as usize).zip(&mut self.0) {
            let keep = slot.saturating_sub(first);
            if keep < WORD_BITS {
                *word &= (1 << keep) - 1;
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The slots, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().zip((0..).step_by(WORD_BITS as usize)).flat_map(|(word, first)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(first + bit)
            })
        })
    }

    /// First slot at or after `from` that is in, or is not in, as `wanted` says.
    fn next(&self, from: u32, wanted: bool) -> Option<u32> {
        let mut at = from;
        while let Some(word) = self.0.get((at / WORD_BITS) as usize) {
            let word = if wanted { *word } else { !*word } >> (at % WORD_BITS);
            if word != 0 {
                return Some(at + word.trailing_zeros());
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }
}

/// The value of a notes key: the slots of one bottom page whose heap blocks are to be looked at. See the module's doc.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Notes {
    noted: Slots,
    /// Those of them that the batch in hand noted, ascending by LSN.
    batch: Vec<(Lsn, u32)>,
}

impl Notes {
    /// Notes a slot, by the record that ends at `lsn`. Whether it was not noted yet.
    pub fn note(&mut self, slot: u32, lsn: Lsn) -> bool {
        let is_new = slot < SLOTS_PER_PAGE && self.noted.insert(slot);
        if is_new {
            self.batch.push((lsn, slot));
        }
        is_new
    }

    /// Forgets all slots from `slot` on. How many those were.
    pub fn cut(&mut self, slot: u32) -> usize {
        let before = self.noted.len();
        self.noted.cut(slot);
        self.batch.retain(|(_, noted)| *noted < slot);
        before - self.noted.len()
    }

    /// Says that the batch is over and written.
    pub fn end_batch(&mut self) {
        self.batch.clear();
    }

    /// The slots that are noted.
    pub fn noted(&self) -> &Slots {
        &self.noted
    }

    /// What was noted at or before `lsn`, where this was found.
    pub fn at(mut self, lsn: Lsn) -> Slots {
        for (_, slot) in self.batch.iter().rev().take_while(|(noted, _)| *noted > lsn) {
            self.noted.remove(*slot);
        }
        self.noted
    }

    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut before = self.noted.clone();
        self.batch.iter().for_each(|(_, slot)| before.remove(*slot));
        let mut runs = Vec::new();
        let (mut count, mut end) = (0, 0);
        while let Some(start) = before.next(end, true) {
            put_varint(&mut runs, u64::from(start - end));
            end = before.next(start, false).unwrap_or(SLOTS_PER_PAGE);
            put_varint(&mut runs, u64::from(end - start));
            count += 1;
        }
        let mut out = vec![VERSION];
        put_varint(&mut out, count);
        out.append(&mut runs);
        put_varint(&mut out, self.batch.len() as u64);
        let mut last = Lsn::INVALID;
        for (lsn, slot) in &self.batch {
            put_varint(&mut out, lsn.distance_from(last));
            put_varint(&mut out, u64::from(*slot));
            last = *lsn;
        }
        out.into()
    }

    /// Reads the stored form; `None` if it is not one.
    pub fn decode(bytes: &[u8]) -> Option<Notes> {
        let mut at = 1;
        if *bytes.first()? != VERSION {
            return None;
        }
        let slot_of = |number: u64| u32::try_from(number).ok().filter(|slot| *slot <= SLOTS_PER_PAGE);
        let mut notes = Notes::default();
        let mut end = 0;
        for _ in 0..take_varint(bytes, &mut at)? {
            let start = slot_of(take_varint(bytes, &mut at)?)? + end;
            end = slot_of(start.into())? + slot_of(take_varint(bytes, &mut at)?)?;
            (start..slot_of(end.into())?).for_each(|slot| _ = notes.noted.insert(slot));
        }
        let mut last = Lsn::INVALID;
        for _ in 0..take_varint(bytes, &mut at)? {
            last = Lsn(last.0.checked_add(take_varint(bytes, &mut at)?)?);
            let slot = slot_of(take_varint(bytes, &mut at)?).filter(|slot| *slot < SLOTS_PER_PAGE)?;
            if !notes.note(slot, last) {
                return None;
            }
        }
        (at == bytes.len()).then_some(notes)
    }
}

/// All notes at `lsn`, by key.
///
/// # Errors
/// When the history cannot be read.
pub fn all_notes(history: &(impl History + ?Sized), lsn: Lsn) -> Result<Vec<(Key, Slots)>, HistoryError> {
    let (from, to) = Key::all_of_kind(Key::free_space_notes(RelNode { spc: 0, db: 0, rel: 0 }, 0));
    let mut found = Vec::new();
    history.scan(from, to, lsn, &mut |key, value| {
        found.push((key, decode_at(key, &value, lsn)?));
        Ok(())
    })?;
    found.retain(|(_, slots)| !slots.is_empty());
    Ok(found)
}

impl From<Slots> for Notes {
    fn from(noted: Slots) -> Notes {
        Notes { noted, batch: Vec::new() }
    }
}

fn decode_at(key: Key, value: &[u8], lsn: Lsn) -> Result<Slots, HistoryError> {
    let notes = Notes::decode(value).ok_or_else(|| HistoryError(format!("the value of the {key}, read at {lsn}, is malformed")))?;
    Ok(notes.at(lsn))
}

/// Brings block `block` of a free-space map, as it was written last, up to what was noted at or before `lsn`.
///
/// # Errors
/// When the history cannot be read.
pub fn fold(history: &(impl History + ?Sized), rel: RelFork, block: BlockNumber, lsn: Lsn, page: &mut Page) -> Result<(), HistoryError> {
    let main = relation::live_size(history, rel.node.fork(Fork::Main), lsn)?.filter(|live| live.size.exists);
    let Some(main) = main else { return Ok(()) };
    let reader = Reader { history, node: rel.node, lsn, main };
    reader.fold(MapPage::at(block), page)
}

/// Reads what bears upon one map.
struct Reader<'a, H: History + ?Sized> {
    history: &'a H,
    node: RelNode,
    lsn: Lsn,
    /// Of the heap.
    main: LiveSize,
}

impl<H: History + ?Sized> Reader<'_, H> {
    fn fold(&self, place: MapPage, page: &mut Page) -> Result<(), HistoryError> {
        match place {
            MapPage::Bottom(number) => {
                let key = Key::free_space_notes(self.node, number);
                if let Some(value) = self.history.get(key, self.lsn)? {
                    let slots = decode_at(key, &value, self.lsn)?;
                    // The map is a hint: a heap page that cannot be made keeps nobody from reading it.
                    if let Err(error) = look_at_heap(self.history, self.node, &self.main, number, &slots, self.lsn, page) {
                        tracing::warn!(relation = %self.node, %error, "free space of pages that cannot be read is not in the map");
                    }
                }
            }
            MapPage::Middle(number) => {
                let first = number.saturating_mul(SLOTS_PER_PAGE);
                for noted in self.noted(first, first.saturating_add(SLOTS_PER_PAGE))? {
                    let greatest = self.greatest(MapPage::Bottom(noted))?;
                    free_space_map::set(page, noted % SLOTS_PER_PAGE, greatest);
                }
            }
            MapPage::Root => {
                let mut middles: Vec<u32> = self.noted(0, u32::MAX)?.into_iter().map(|bottom| bottom / SLOTS_PER_PAGE).collect();
                middles.dedup();
                for middle in middles {
                    let greatest = self.greatest(MapPage::Middle(middle))?;
                    free_space_map::set(page, middle % SLOTS_PER_PAGE, greatest);
                }
            }
        }
        Ok(())
    }

    /// Numbers of the bottom pages in `from..to` that have notes, ascending.
    fn noted(&self, from: u32, to: u32) -> Result<Vec<u32>, HistoryError> {
        let to = to.min(self.main.size.blocks.div_ceil(SLOTS_PER_PAGE));
        let mut noted = Vec::new();
        let mut take = |key: Key, value: &[u8]| {
            if let Some(KeyKind::FreeSpaceNotes { map_page, .. }) = key.kind()
                && !decode_at(key, value, self.lsn)?.is_empty()
            {
                noted.push(map_page);
            }
            Ok(())
        };
        if to.saturating_sub(from) > GETS_MAX {
            let (from, to) = (Key::free_space_notes(self.node, from), Key::free_space_notes(self.node, to));
            self.history.scan(from, to, self.lsn, &mut |key, value| take(key, &value))?;
            return Ok(noted);
        }
        for map_page in from..to {
            let key = Key::free_space_notes(self.node, map_page);
            if let Some(value) = self.history.get(key, self.lsn)? {
                take(key, &value)?;
            }
        }
        Ok(noted)
    }

    /// The greatest category on a page of the map.
    fn greatest(&self, place: MapPage) -> Result<u8, HistoryError> {
        let mut page = written(self.history, self.node, place.block(), self.lsn)?;
        self.fold(place, &mut page)?;
        Ok(free_space_map::greatest(&page))
    }
}

/// Block `block` of the relation's map as it was written last; zeros if it never was.
///
/// # Errors
/// When the history cannot be read.
pub fn written(history: &(impl History + ?Sized), node: RelNode, block: BlockNumber, lsn: Lsn) -> Result<Box<Page>, HistoryError> {
    let rel = node.fork(Fork::FreeSpaceMap);
    let live = relation::live_size(history, rel, lsn)?.filter(|live| live.size.exists && block < live.size.blocks);
    let page = match live {
        Some(live) => history.page(Key::block(rel, block), live.floor(block), lsn)?,
        None => None,
    };
    Ok(page.unwrap_or_else(|| Box::new(ZERO_PAGE)))
}

/// Puts what is free, at `lsn`, on the heap blocks that stand in `slots` of the map's bottom page `number` into that
/// page. Whether it changed. `heap` is the heap's size then.
///
/// # Errors
/// When the history cannot be read.
pub fn look_at_heap(
    history: &(impl History + ?Sized),
    node: RelNode,
    heap: &LiveSize,
    number: u32,
    slots: &Slots,
    lsn: Lsn,
    page: &mut Page,
) -> Result<bool, HistoryError> {
    let first = number.saturating_mul(SLOTS_PER_PAGE);
    // What was cut off meanwhile has no page.
    let blocks: Vec<BlockNumber> = slots.iter().map(|slot| first.saturating_add(slot)).filter(|block| *block < heap.size.blocks).collect();
    let mut changed = false;
    for blocks in blocks.chunks(READ_AT_ONCE) {
        let wanted: Vec<(Key, Lsn)> = blocks.iter().map(|block| (Key::block(node.fork(Fork::Main), *block), heap.floor(*block))).collect();
        history.each_page(&wanted, lsn, &mut |index, heap_page| {
            if let (Some(block), Some(heap_page)) = (blocks.get(index), heap_page.filter(|page| !page::is_new(page))) {
                let category = free_space_map::category(varve_redo::heap_free_space(heap_page));
                changed |= free_space_map::set(page, block % SLOTS_PER_PAGE, category);
            }
        })?;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn runs_of_slots_take_a_few_bytes() {
        let mut notes = Notes::default();
        for slot in 0..SLOTS_PER_PAGE {
            assert!(notes.note(slot, Lsn(100)));
            assert!(!notes.note(slot, Lsn(108)), "a slot is noted once");
        }
        assert!(!notes.note(SLOTS_PER_PAGE, Lsn(100)), "no such slot");
        notes.end_batch();
        assert_eq!(notes.noted().len(), SLOTS_PER_PAGE as usize);
        assert!(notes.encode().len() < 10, "{:?}", notes.encode());
        assert_eq!(notes.cut(65), SLOTS_PER_PAGE as usize - 65);
        assert_eq!(notes.at(Lsn(100)).iter().collect::<Vec<_>>(), (0..65).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn what_was_noted_by_then_is_read(
            before in proptest::collection::btree_set(0..SLOTS_PER_PAGE, 0..50),
            batch in proptest::collection::vec((0..SLOTS_PER_PAGE, 0u64..3), 0..50),
            cut in 0..=SLOTS_PER_PAGE,
        ) {
            let mut notes = Notes::default();
            let mut model: std::collections::BTreeMap<u32, Lsn> = Default::default();
            for slot in &before {
                notes.note(*slot, Lsn(8));
                model.insert(*slot, Lsn(8));
            }
            notes.end_batch();
            let mut lsn = Lsn(16);
            for (slot, step) in batch {
                lsn += step * 8;
                prop_assert_eq!(notes.note(slot, lsn), !model.contains_key(&slot));
                model.entry(slot).or_insert(lsn);
            }
            let kept = model.range(..cut).count();
            prop_assert_eq!(notes.cut(cut), model.len() - kept);
            let read = Notes::decode(&notes.encode()).unwrap();
            prop_assert_eq!(&read, &notes);
            for at in [Lsn(8), Lsn(16), Lsn(24), Lsn(64), lsn] {
                let expected: Vec<u32> = model.range(..cut).filter(|(_, noted)| **noted <= at).map(|(slot, _)| *slot).collect();
                prop_assert_eq!(read.clone().at(at).iter().collect::<Vec<_>>(), expected);
            }
        }

        #[test]
        fn garbage_is_no_notes_or_some_but_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Notes::decode(&[&[VERSION], &bytes[..]].concat());
        }
    }
}
