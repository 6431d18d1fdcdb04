//! Two versions of a page side by side, where they differ.

use std::fmt;

use varve_postgres::page::{self, PAGE_HEADER_SIZE};
use varve_postgres::{BLCKSZ, Page};

use crate::item;

/// Bytes in a printed row.
const ROW_SIZE: usize = 16;
/// Rows that are printed; the rest is counted.
const ROWS_MAX: usize = 24;

/// The rows of a page in which two versions of it differ, in hexadecimal, each with what lies there.
#[derive(Debug, Clone, Copy)]
pub struct PageDiff<'a> {
    /// Offsets of the bytes that differ in what counts, ascending.
    pub at: &'a [u16],
    /// The page as we have it.
    pub ours: &'a Page,
    /// The page as Postgres has it, by whose structure the rows are named.
    pub truth: &'a Page,
}

impl fmt::Display for PageDiff<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
        for at in self.at.iter().map(|at| usize::from(*at)).filter(|at| *at < BLCKSZ) {
            let row = at - at % ROW_SIZE;
            match rows.last_mut() {
                Some((last, bytes)) if *last == row => bytes.push(at),
                _ => rows.push((row, vec![at])),
            }
        }
        writeln!(f, "{:>6}  {:<48}   of", "offset", "bytes, ours (-) and Postgres's (+)")?;
        for (row, bytes) in rows.iter().take(ROWS_MAX) {
            let first = bytes.first().copied().unwrap_or(*row);
            writeln!(f, "{row:>6} -{}  {}", hexadecimal(self.ours, *row, bytes), place(self.truth, first))?;
            writeln!(f, "{:>6} +{}", "", hexadecimal(self.truth, *row, bytes))?;
        }
        if rows.len() > ROWS_MAX {
            writeln!(f, "... and {} more rows of {ROW_SIZE} bytes", rows.len() - ROWS_MAX)?;
        }
        Ok(())
    }
}

/// A row's bytes, those that differ with a star.
fn hexadecimal(page: &Page, row: usize, differ: &[usize]) -> String {
    let byte = |at: usize| format!("{}{:02X}", if differ.contains(&at) { '*' } else { ' ' }, page[at]);
    (row..row + ROW_SIZE).map(byte).collect()
}

/// What a page has at `at`.
fn place(page: &Page, at: usize) -> String {
    const ITEM_ID_SIZE: usize = 4;
    if at < PAGE_HEADER_SIZE {
        let fields = [(8, "pd_lsn"), (10, "pd_checksum"), (12, "pd_flags"), (14, "pd_lower"), (16, "pd_upper"), (18, "pd_special")];
        let later = if at < 20 { "pd_pagesize_version" } else { "pd_prune_xid" };
        return fields.iter().find(|(end, _)| at < *end).map_or(later, |(_, name)| name).to_owned();
    }
    let (lower, upper, special) = (usize::from(page::lower(page)), usize::from(page::upper(page)), usize::from(page::special(page)));
    if at >= special && special >= PAGE_HEADER_SIZE {
        return format!("special space + {}", at - special);
    }
    if at < lower {
        return format!("line pointer {} (or what the page has in its place)", (at - PAGE_HEADER_SIZE) / ITEM_ID_SIZE + 1);
    }
    if at < upper {
        return "free space".to_owned();
    }
    (1..=item::max_offset(page))
        .find_map(|offset| {
            let range = item::item_range(page, offset).ok()?;
            range.contains(&at).then(|| format!("item {offset} + {}", at - range.start))
        })
        .unwrap_or_else(|| "between items".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_named_after_what_is_there() {
        let mut truth = page::ZERO_PAGE;
        page::init(&mut truth, 16);
        let mut ours = truth;
        ours[12] = 7;
        ours[8180] = 1;
        ours[8183] = 2;
        let text = PageDiff { at: &[12, 8180, 8183], ours: &ours, truth: &truth }.to_string();
        assert!(text.contains("pd_lower") && text.contains("special space + 4"), "{text}");
        assert!(text.contains("*07 00") && text.contains("*01 00 00*02"), "{text}");
        assert_eq!(text.lines().count(), 5, "a heading and two lines for each of two rows: {text}");
    }

    #[test]
    fn pages_of_any_bytes_can_be_shown() {
        let (ours, truth) = ([0x5A; BLCKSZ], [0xFF; BLCKSZ]);
        let at: Vec<u16> = (0..BLCKSZ as u16).chain([u16::MAX]).collect();
        let text = PageDiff { at: &at, ours: &ours, truth: &truth }.to_string();
        assert!(text.contains("and 488 more rows"), "{text}");
    }
}
