//! Directories: names in the order in which they came, so that reading goes on at the right place whatever is created
//! and removed meanwhile.
//!
//! A directory that has files in the base is *listed* on first need: when a name is sought that the base may have, when
//! it is read, or when anything in it changes. From then on the base is not asked again: what is removed here stays
//! removed. A listed file becomes a node when it is first looked up; until then it costs a name and a few words, for a
//! database may have 100,000 of them.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Release},
        },
    },
};

use parking_lot::{Mutex, MutexGuard, RwLock};
use varve_postgres::{Oid, paths::RelationFileName, slru::SlruKind};

use super::{
    base::Base,
    node::{Node, ROOT},
};

/// Digits in the name of an SLRU's segment, at least.
const SLRU_NAME_DIGITS: usize = 4;

/// The name of an entry.
pub(super) type Name = Arc<OsStr>;

/// What the base has in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Listing {
    /// The relations of a database in a tablespace.
    Relations {
        /// Tablespace.
        spc: Oid,
        /// Database.
        db: Oid,
    },
    /// The segments of an SLRU area.
    Slru(SlruKind),
}

impl Listing {
    /// Whether the base may have a file of this name here. Temporary relations (`t3_16384`) are not of the base.
    pub(super) fn may_have(self, name: &OsStr) -> bool {
        let Some(name) = name.to_str() else { return false };
        match self {
            Listing::Relations { .. } => RelationFileName::parse(name).is_some(),
            Listing::Slru(_) => name.len() >= SLRU_NAME_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit()),
        }
    }
}

/// See the module.
pub(super) struct Directory {
    pub(super) entries: RwLock<Entries>,
    /// Where the directory is; `None` for the root and for what was removed.
    pub(super) place: Mutex<Option<Place>>,
    listed: AtomicBool,
    /// What is still to be listed. Locked while it is done.
    listing: Mutex<Option<Listing>>,
}

/// A directory's parent, and its name there.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) parent: u64,
    pub(super) name: Name,
}

/// The names of a directory.
#[derive(Default)]
pub(super) struct Entries {
    by_name: HashMap<Name, Entry>,
    /// By cookie, the position that `readdir` gives the kernel.
    in_order: BTreeMap<u64, Name>,
    last_cookie: u64,
    /// The directory itself was removed: nothing can be put into it any more.
    pub(super) removed: bool,
}

/// What a name stands for.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) ino: u64,
    cookie: u64,
    pub(super) target: Target,
}

/// The object itself, or what it will be made of.
#[derive(Clone)]
pub(super) enum Target {
    Node(Arc<Node>),
    /// A file of the base that nobody looked up yet.
    Unseen(Base),
}

impl Directory {
    /// An empty directory; `listing` is what the base has in it.
    pub(super) fn new(place: Option<Place>, listing: Option<Listing>) -> Directory {
        Directory {
            entries: RwLock::default(),
            place: Mutex::new(place),
            listed: AtomicBool::new(listing.is_none()),
            listing: Mutex::new(listing),
        }
    }

    /// Inode number of the parent; the root's own for the root.
    pub(super) fn parent(&self) -> u64 {
        self.place.lock().as_ref().map_or(ROOT, |place| place.parent)
    }

    /// Whether everything that the base has here is among the entries.
    pub(super) fn is_listed(&self) -> bool {
        self.listed.load(Acquire)
    }

    /// Whether `name` can be sought only after listing.
    pub(super) fn needs_listing_for(&self, name: &OsStr) -> bool {
        // While somebody lists, the lock is taken: then waiting is right.
        !self.is_listed() && self.listing.try_lock().is_none_or(|listing| listing.is_some_and(|listing| listing.may_have(name)))
    }

    /// What is to be listed, locked until [`Directory::set_listed`].
    pub(super) fn lock_listing(&self) -> MutexGuard<'_, Option<Listing>> {
        self.listing.lock()
    }

    /// The entries are complete.
    pub(super) fn set_listed(&self, mut listing: MutexGuard<'_, Option<Listing>>) {
        *listing = None;
        self.listed.store(true, Release);
    }
}

impl Entries {
    pub(super) fn get(&self, name: &OsStr) -> Option<&Entry> {
        self.by_name.get(name)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Name, &Entry)> {
        self.by_name.iter()
    }

    /// Makes room for `count` more names.
    pub(super) fn reserve(&mut self, count: usize) {
        self.by_name.reserve(count);
    }

    /// Puts a name, or gives it a new target, at its old place; returns what it stood for.
    pub(super) fn put(&mut self, name: Name, ino: u64, target: Target) -> Option<Entry> {
        if let Some(entry) = self.by_name.get_mut(&name) {
            let cookie = entry.cookie;
            return Some(std::mem::replace(entry, Entry { ino, cookie, target }));
        }
        self.last_cookie += 1;
        self.in_order.insert(self.last_cookie, name.clone());
        self.by_name.insert(name, Entry { ino, cookie: self.last_cookie, target });
        None
    }

    /// The file that `name` stands for was looked up.
    pub(super) fn see(&mut self, name: &OsStr, node: Arc<Node>) {
        if let Some(entry) = self.by_name.get_mut(name) {
            entry.target = Target::Node(node);
        }
    }

    pub(super) fn remove(&mut self, name: &OsStr) -> Option<Entry> {
        let entry = self.by_name.remove(name)?;
        self.in_order.remove(&entry.cookie);
        Some(entry)
    }

    /// The entries behind position `cookie`, with theirs.
    pub(super) fn after(&self, cookie: u64) -> impl Iterator<Item = (u64, &Name, &Entry)> {
        let behind = (std::ops::Bound::Excluded(cookie), std::ops::Bound::Unbounded);
        self.in_order.range(behind).filter_map(|(cookie, name)| Some((*cookie, name, self.by_name.get(name)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_the_base_can_have_make_a_directory_be_listed() {
        let relations = Listing::Relations { spc: 1663, db: 5 };
        for name in ["16384", "16384.1", "16384_vm"] {
            assert!(relations.may_have(OsStr::new(name)), "{name}");
        }
        for name in ["PG_VERSION", "pg_internal.init", "t3_16384"] {
            assert!(!relations.may_have(OsStr::new(name)), "{name}");
        }
        let segments = Listing::Slru(SlruKind::Clog);
        assert!(segments.may_have(OsStr::new("0A1F")));
        assert!(!segments.may_have(OsStr::new("0A1")));
        assert!(!segments.may_have(OsStr::new("0A1G")));
    }

    #[test]
    fn reading_goes_on_where_it_was_whatever_is_removed_and_replaced() {
        let mut entries = Entries::default();
        for n in 0..10u64 {
            entries.put(Arc::from(OsStr::new(&n.to_string())), n, Target::Unseen(Base::None));
        }
        let (position, ..) = entries.after(0).nth(4).unwrap();
        entries.remove(OsStr::new("2"));
        entries.remove(OsStr::new("5"));
        entries.put(Arc::from(OsStr::new("7")), 70, Target::Unseen(Base::None));
        let rest: Vec<u64> = entries.after(position).map(|(_, _, entry)| entry.ino).collect();
        assert_eq!(rest, [6, 70, 8, 9]);
    }
}
