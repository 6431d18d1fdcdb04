//! The value of an SLRU-extent key: which pages of an area exist.
//!
//! Page numbers wrap around with transaction ids, so what exists can be two pieces: the newest pages at the bottom and
//! the oldest at the top. Hence a list of intervals, ascending, with gaps between them.
//!
//! Layout, little-endian: for each interval first page `u32` and number of pages `u32`.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// See the module's doc.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SlruExtent {
    intervals: Vec<Range<u32>>,
}

impl SlruExtent {
    /// The pages that exist, as intervals, ascending.
    pub fn intervals(&self) -> &[Range<u32>] {
        &self.intervals
    }

    /// Whether page `page` exists.
    pub fn contains(&self, page: u32) -> bool {
        self.intervals.iter().any(|pages| pages.contains(&page))
    }

    /// Adds pages. Whether that changed anything.
    pub fn insert(&mut self, pages: Range<u32>) -> bool {
        if pages.is_empty() || self.intervals.iter().any(|have| have.start <= pages.start && pages.end <= have.end) {
            return false;
        }
        let touches = |have: &Range<u32>| have.start <= pages.end && pages.start <= have.end;
        let start = self.intervals.iter().filter(|have| touches(have)).map(|have| have.start).min().unwrap_or(pages.start);
        let end = self.intervals.iter().filter(|have| touches(have)).map(|have| have.end).max().unwrap_or(pages.end);
        self.intervals.retain(|have| !touches(have));
        let at = self.intervals.partition_point(|have| have.start < pages.start);
        self.intervals.insert(at, start.min(pages.start)..end.max(pages.end));
        true
    }

    /// Takes pages away. Whether that changed anything.
    pub fn remove(&mut self, pages: Range<u32>) -> bool {
        // An empty range would cut an interval in two.
        if pages.is_empty() {
            return false;
        }
        let outside = |have: &Range<u32>| [have.start..have.end.min(pages.start), have.start.max(pages.end)..have.end];
        let left = self.intervals.iter().flat_map(outside).filter(|left| !left.is_empty()).collect();
        let before = std::mem::replace(&mut self.intervals, left);
        self.intervals != before
    }

    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.intervals.len() * 8);
        for pages in &self.intervals {
            out.put_u32_le(pages.start);
            out.put_u32_le(pages.end - pages.start);
        }
        out.freeze()
    }

    /// Reads the stored form; `None` if it is not one.
    pub fn decode(mut bytes: &[u8]) -> Option<SlruExtent> {
        if !bytes.len().is_multiple_of(8) {
            return None;
        }
        let mut intervals: Vec<Range<u32>> = Vec::with_capacity(bytes.len() / 8);
        while bytes.has_remaining() {
            let start = bytes.get_u32_le();
            let end = start.checked_add(bytes.get_u32_le())?;
            if start == end || intervals.last().is_some_and(|last| start <= last.end) {
                return None;
            }
            intervals.push(start..end);
        }
        Some(SlruExtent { intervals })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_pages(steps in proptest::collection::vec((any::<bool>(), 0u32..40, 0u32..10), 0..40)) {
            let (mut extent, mut model) = (SlruExtent::default(), BTreeSet::new());
            for (add, start, len) in steps {
                let before = model.clone();
                let pages = start..start + len;
                let changed = if add { extent.insert(pages.clone()) } else { extent.remove(pages.clone()) };
                for page in pages {
                    if add { model.insert(page); } else { model.remove(&page); }
                }
                prop_assert_eq!(changed, before != model);
                let pages: BTreeSet<u32> = extent.intervals().iter().cloned().flatten().collect();
                prop_assert_eq!(&pages, &model);
                prop_assert!(extent.intervals().windows(2).all(|pair| pair[0].end < pair[1].start), "gaps between intervals");
                prop_assert!((0..50).all(|page| extent.contains(page) == model.contains(&page)));
                prop_assert_eq!(SlruExtent::decode(&extent.encode()), Some(extent.clone()));
            }
        }
    }
}
