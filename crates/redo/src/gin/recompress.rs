//! Leaves of posting trees: changes to their posting lists, segment by segment (`ginRedoRecompress`).
//!
//! Data (`ginxlogRecompressDataLeaf`): number of actions `u16`; each: segment `u8`, counted as before the record,
//! action `u8`, then for an insertion or replacement the new segment, for added items their number `u16` and the
//! uncompressed item pointers. Segments are named in ascending order, and an insertion goes before the one that it
//! names.

use varve_postgres::{Page, page};

use super::posting_list::{decode, encode, merge, read_pointers, segment_size};
use super::posting_tree::{DATA_END, DATA_START};
use super::{COMPRESSED, DATA, LEAF, Opaque};
use crate::Fault;
use crate::cursor::Cursor;
use crate::index_tuple::ITEM_POINTER_SIZE;
use crate::item::set_content_end;

/// Actions on a segment.
const DELETE: u8 = 1;
const INSERT: u8 = 2;
const REPLACE: u8 = 3;
const ADD_ITEMS: u8 = 4;

/// Makes the changes in `data` to a leaf page.
pub(super) fn recompress(page: &mut Page, data: &[u8]) -> Result<(), Fault> {
    let opaque = Opaque::expect(page, DATA | LEAF, DATA | LEAF)?;
    if opaque.flags & COMPRESSED == 0 {
        compress_page(page, opaque)?;
    }
    let mut rewrite = Rewrite::new(page)?;
    let mut data = Cursor::new(data);
    for _ in 0..data.u16()? {
        let (segment, action) = (data.u8()?, data.u8()?);
        rewrite.keep_until(segment)?;
        match action {
            DELETE => rewrite.drop_segment()?,
            INSERT => rewrite.put(take_segment(&mut data)?)?,
            REPLACE => {
                let new = take_segment(&mut data)?;
                rewrite.drop_segment()?;
                rewrite.put(new)?;
            }
            ADD_ITEMS => {
                let n = data.u16()?;
                let new = read_pointers(&mut data, usize::from(n))?;
                let new = encode(&merge(&new, &decode(rewrite.segment()?)?))?;
                rewrite.drop_segment()?;
                rewrite.put(&new)?;
            }
            _ => return Err(format!("unknown action {action} on posting list {segment}").into()),
        }
    }
    rewrite.finish()
}

fn take_segment<'a>(data: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let mut ahead = *data;
    data.take(segment_size(ahead.rest())?)
}

/// Compresses a page as releases before 9.4 left it, with maxoff plain item pointers.
fn compress_page(page: &mut Page, mut opaque: Opaque) -> Result<(), Fault> {
    let n = usize::from(opaque.max_off);
    if n * ITEM_POINTER_SIZE > DATA_END - DATA_START {
        return Err(format!("the page cannot have {n} uncompressed item pointers").into());
    }
    let segment = match n {
        0 => Vec::new(),
        _ => encode(&read_pointers(&mut Cursor::new(&page[DATA_START..]), n)?)?,
    };
    let end = DATA_START + segment.len();
    page.get_mut(DATA_START..end)
        .filter(|_| end <= DATA_END)
        .ok_or("the page's item pointers do not fit compressed")?
        .copy_from_slice(&segment);
    set_content_end(page, end)?;
    opaque.flags |= COMPRESSED;
    opaque.max_off = 0;
    opaque.write(page)
}

/// A page whose segments are read and written in one pass, in place as long as writing does not overtake reading:
/// before it does, what is still to be read is copied aside.
struct Rewrite<'a> {
    page: &'a mut Page,
    /// Number of the old segment at `read`.
    number: u16,
    read: usize,
    /// End of the old segments.
    end: usize,
    write: usize,
    /// The old segments from `aside_start` to `end`, when they are no longer on the page.
    aside: Option<Vec<u8>>,
    aside_start: usize,
}

impl Rewrite<'_> {
    fn new(page: &mut Page) -> Result<Rewrite<'_>, Fault> {
        let end = usize::from(page::lower(page));
        if !(DATA_START..=DATA_END).contains(&end) {
            return Err(format!("the page's posting lists end at {end}, expected {DATA_START} to {DATA_END}").into());
        }
        Ok(Rewrite { page, number: 0, read: DATA_START, end, write: DATA_START, aside: None, aside_start: DATA_START })
    }

    /// The old segment that comes next.
    fn segment(&self) -> Result<&[u8], Fault> {
        let rest = match &self.aside {
            Some(aside) => &aside[self.read - self.aside_start..],
            None => &self.page[self.read..self.end],
        };
        if rest.is_empty() {
            return Err(format!("posting list {} does not exist", self.number).into());
        }
        Ok(&rest[..segment_size(rest)?])
    }

    fn drop_segment(&mut self) -> Result<(), Fault> {
        self.read += self.segment()?.len();
        self.number += 1;
        Ok(())
    }

    /// Writes a new segment.
    fn put(&mut self, segment: &[u8]) -> Result<(), Fault> {
        let end = self.written_end(segment.len())?;
        if end > self.read && self.read < self.end && self.aside.is_none() {
            self.aside = Some(self.page[self.read..self.end].to_vec());
            self.aside_start = self.read;
        }
        self.page[self.write..end].copy_from_slice(segment);
        self.write = end;
        Ok(())
    }

    /// Keeps the old segments before `number`.
    fn keep_until(&mut self, number: u8) -> Result<(), Fault> {
        let number = u16::from(number);
        if number < self.number {
            return Err(format!("posting list {number} is changed after {}", self.number).into());
        }
        while self.number < number {
            let len = self.segment()?.len();
            self.keep(len)?;
            self.number += 1;
        }
        Ok(())
    }

    /// Keeps the next `len` old bytes.
    fn keep(&mut self, len: usize) -> Result<(), Fault> {
        let end = self.written_end(len)?;
        let old = self.read..self.read + len;
        match &self.aside {
            Some(aside) => self.page[self.write..end].copy_from_slice(&aside[old.start - self.aside_start..old.end - self.aside_start]),
            None if self.read != self.write => self.page.copy_within(old, self.write),
            None => {}
        }
        self.read += len;
        self.write = end;
        Ok(())
    }

    fn written_end(&self, len: usize) -> Result<usize, Fault> {
        let end = self.write + len;
        if end > DATA_END {
            return Err(
                format!("the page's posting lists grow to {} bytes, expected {} at most", end - DATA_START, DATA_END - DATA_START).into()
            );
        }
        Ok(end)
    }

    /// Keeps what is left of the old segments, and sets the page's `pd_lower`.
    fn finish(mut self) -> Result<(), Fault> {
        self.keep(self.end - self.read)?;
        set_content_end(self.page, self.write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index_tuple::ItemPointer;

    fn leaf(segments: &[&[u8]]) -> Page {
        let mut page = page_of_flags(DATA | LEAF | COMPRESSED);
        let bytes = segments.concat();
        page[DATA_START..DATA_START + bytes.len()].copy_from_slice(&bytes);
        page::set_lower(&mut page, (DATA_START + bytes.len()) as u16);
        page
    }

    fn page_of_flags(flags: u16) -> Page {
        let mut page = page::ZERO_PAGE;
        super::super::init(&mut page, flags).unwrap();
        page
    }

    fn segment(blocks: std::ops::Range<u32>) -> Vec<u8> {
        let bytes: Vec<u8> = blocks.clone().flat_map(|block| ItemPointer { block, offset: 1 }.to_bytes()).collect();
        encode(&read_pointers(&mut Cursor::new(&bytes), blocks.len()).unwrap()).unwrap()
    }

    fn content(page: &Page) -> &[u8] {
        &page[DATA_START..usize::from(page::lower(page))]
    }

    #[test]
    fn segments_are_kept_dropped_inserted_and_replaced() {
        let (a, b, c, new, last) = (segment(0..10), segment(20..30), segment(40..50), segment(12..90), segment(91..99));
        let mut page = leaf(&[&a, &b, &c]);
        let mut data = vec![4, 0];
        data.extend([1, INSERT]);
        data.extend(&new);
        data.extend([1, DELETE]);
        data.extend([2, REPLACE]);
        data.extend(&b);
        data.extend([3, INSERT]);
        data.extend(&last);
        recompress(&mut page, &data).unwrap();
        assert_eq!(content(&page), [a, new, b, last].concat());
    }

    #[test]
    fn items_are_added_to_a_segment() {
        let (a, b) = (segment(0..10), segment(20..30));
        let mut page = leaf(&[&a, &b]);
        let mut data = vec![1, 0, 0, ADD_ITEMS, 2, 0];
        data.extend(ItemPointer { block: 10, offset: 1 }.to_bytes());
        data.extend(ItemPointer { block: 11, offset: 1 }.to_bytes());
        recompress(&mut page, &data).unwrap();
        assert_eq!(content(&page), [segment(0..12), b].concat());
    }

    #[test]
    fn a_page_from_before_9_4_is_compressed_first() {
        let mut page = page_of_flags(DATA | LEAF);
        for (i, at) in (DATA_START..).step_by(ITEM_POINTER_SIZE).take(20).enumerate() {
            page[at..at + ITEM_POINTER_SIZE].copy_from_slice(&ItemPointer { block: i as u32, offset: 1 }.to_bytes());
        }
        Opaque { max_off: 20, ..Opaque::read(&page).unwrap() }.write(&mut page).unwrap();
        let last = segment(30..31);
        let mut data = vec![1, 0, 1, INSERT];
        data.extend(&last);
        recompress(&mut page, &data).unwrap();
        assert_eq!(content(&page), [segment(0..20), last].concat());
        let opaque = Opaque::read(&page).unwrap();
        assert_eq!((opaque.flags, opaque.max_off), (DATA | LEAF | COMPRESSED, 0));
    }

    #[test]
    fn a_segment_that_does_not_exist_is_an_error() {
        for data in [&[1, 0, 3, DELETE][..], &[1, 0, 2, DELETE], &[2, 0, 1, DELETE, 0, DELETE], &[1, 0, 0, 9]] {
            let mut page = leaf(&[&segment(0..3), &segment(5..8)]);
            assert!(recompress(&mut page, data).is_err(), "{data:?} was accepted");
        }
    }
}
