//! The page cache: materialised pages, shared by all timelines and bounded in bytes.
//!
//! An entry belongs to the timeline that owns the version, so all branches below share it. It says which version the
//! page is, and up to which LSN the owner is known to have no newer one. A read at an LSN between the two needs nothing
//! else; a later read only looks for versions above the known LSN, and takes the page as the base for redo.
//!
//! There is one entry for a page of a timeline, the newest that was read: a read of the past does not push it out. On a
//! branch, most pages are still the ancestor's; that the branch has none of its own up to some LSN is worth an entry,
//! too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use varve_postgres::{BLCKSZ, Lsn, Page};

use crate::ids::TimelineId;
use crate::key::Key;

/// Bytes that an entry costs beside the page.
const ENTRY_BYTES: usize = 160;

/// A page as it was over a range of LSNs.
pub struct CachedPage {
    version: Lsn,
    known: AtomicU64,
    page: Page,
}

impl CachedPage {
    /// The page that version `version` makes, which is known to hold at least up to `known`.
    pub fn new(version: Lsn, known: Lsn, page: Page) -> CachedPage {
        CachedPage { version, known: AtomicU64::new(known.0), page }
    }

    /// LSN of the version.
    pub fn version(&self) -> Lsn {
        self.version
    }

    /// The newest LSN for which there is known to be no newer version.
    pub fn known(&self) -> Lsn {
        Lsn(self.known.load(Ordering::Relaxed))
    }

    /// Notes that up to `lsn` there is no newer version.
    pub fn extend_known(&self, lsn: Lsn) {
        // What is known is a fact about the past, so the order in which others learn of it does not matter.
        if lsn > self.known() {
            self.known.fetch_max(lsn.0, Ordering::Relaxed);
        }
    }

    /// The page.
    pub fn page(&self) -> &Page {
        &self.page
    }
}

/// What is known of a page on a timeline.
#[derive(Clone)]
pub enum Known {
    /// The newest page that was read.
    Page(Arc<CachedPage>),
    /// The timeline itself has no version up to this LSN; the ancestor may have.
    Nothing(Lsn),
}

#[derive(Clone)]
struct EntryWeighter;

impl Weighter<(TimelineId, Key), Known> for EntryWeighter {
    fn weight(&self, _key: &(TimelineId, Key), known: &Known) -> u64 {
        match known {
            Known::Page(_) => (ENTRY_BYTES + BLCKSZ) as u64,
            Known::Nothing(_) => ENTRY_BYTES as u64,
        }
    }
}

/// See the module's doc.
pub struct PageCache {
    entries: Cache<(TimelineId, Key), Known, EntryWeighter>,
}

impl PageCache {
    /// A cache of at most `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Arc<PageCache> {
        let expected = (limit_bytes / BLCKSZ).max(16);
        Arc::new(PageCache { entries: Cache::with_weighter(expected, limit_bytes as u64, EntryWeighter) })
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.entries.weight()
    }

    /// What is known of `key` on `timeline`.
    pub fn get(&self, timeline: TimelineId, key: Key) -> Option<Known> {
        self.entries.get(&(timeline, key))
    }

    /// Keeps `page`, unless one that is as new is kept already. Whether it, or the same version of it, is kept now.
    pub fn put(&self, timeline: TimelineId, key: Key, page: &Arc<CachedPage>) -> bool {
        // Two that race here may leave the older one: a loss of time for somebody, not of truth.
        match self.entries.peek(&(timeline, key)) {
            Some(Known::Page(kept)) if kept.version > page.version => false,
            Some(Known::Page(kept)) if kept.version == page.version => {
                kept.extend_known(page.known());
                true
            }
            _ => {
                self.entries.insert((timeline, key), Known::Page(Arc::clone(page)));
                true
            }
        }
    }

    /// Notes that `timeline` has no version of `key` up to `lsn`.
    pub fn put_nothing(&self, timeline: TimelineId, key: Key, lsn: Lsn) {
        match self.entries.peek(&(timeline, key)) {
            Some(Known::Page(_)) => {}
            Some(Known::Nothing(known)) if known >= lsn => {}
            _ => self.entries.insert((timeline, key), Known::Nothing(lsn)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(version: u64, known: u64) -> Arc<CachedPage> {
        Arc::new(CachedPage::new(Lsn(version), Lsn(known), [version as u8; BLCKSZ]))
    }

    #[test]
    fn the_newest_version_is_kept_and_what_is_known_of_it_grows() {
        let cache = PageCache::new(1 << 20);
        let (timeline, key) = (TimelineId([1; 16]), Key::FIRST_BLOCK);
        assert!(cache.put(timeline, key, &page(10, 15)));
        assert!(!cache.put(timeline, key, &page(5, 9)), "an older version does not push out a newer one");
        assert!(cache.put(timeline, key, &page(10, 40)));
        cache.put_nothing(timeline, key, Lsn(50));
        let Some(Known::Page(kept)) = cache.get(timeline, key) else { panic!("the page stays, whatever else is said of its key") };
        assert_eq!((kept.version(), kept.known()), (Lsn(10), Lsn(40)));
        kept.extend_known(Lsn(30));
        assert_eq!(kept.known(), Lsn(40));
        assert!(cache.put(timeline, key, &page(41, 41)));
        assert!(matches!(cache.get(timeline, key), Some(Known::Page(kept)) if kept.page()[0] == 41));
        let branch = TimelineId([2; 16]);
        assert!(cache.get(branch, key).is_none(), "another timeline's page is another page");
        cache.put_nothing(branch, key, Lsn(60));
        cache.put_nothing(branch, key, Lsn(50));
        assert!(matches!(cache.get(branch, key), Some(Known::Nothing(Lsn(60)))));
        assert!(cache.put(branch, key, &page(5, 60)), "a page says more than that there is none");
        assert!(matches!(cache.get(branch, key), Some(Known::Page(_))));
    }

    #[test]
    fn stays_within_its_bytes() {
        let cache = PageCache::new(1 << 20);
        let mut key = Key::FIRST_BLOCK;
        for i in 0..1000 {
            cache.put(TimelineId([1; 16]), key, &page(i, i));
            key = key.next();
        }
        assert!(cache.used_bytes() <= 1 << 20 && cache.used_bytes() > 900_000, "{} bytes", cache.used_bytes());
    }
}
