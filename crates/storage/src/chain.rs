//! What a read gathers on its way down: the versions of one key, newest first, until one needs nothing older; and what
//! redo makes of them.

use std::fmt;

use bytes::Bytes;
use varve_postgres::page::ZERO_PAGE;
use varve_postgres::{BLCKSZ, Lsn, Major, Page};
use varve_redo::change::Change;
use varve_redo::{HeapLayout, RedoError};

use crate::key::{Key, KeyKind};
use crate::value::Value;

/// Changes after which a page's chain gets an image, so that a read redoes no more of them than this in one memtable or
/// layer.
pub const CHAIN_CHANGES_MAX: usize = 128;
/// Bytes of changes after which a page's chain gets an image: the image then costs at most half as much again.
pub const CHAIN_BYTES_MAX: usize = 16 << 10;

/// A version of a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Version {
    /// End of the record that made it.
    pub lsn: Lsn,
    /// What it is.
    pub value: Value,
}

/// A page that could not be made of its versions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The value at an LSN is none that its key can have.
    #[error("{key} has a malformed version at {lsn}: {what}")]
    Malformed {
        /// The key.
        key: Key,
        /// The version.
        lsn: Lsn,
        /// What is wrong.
        what: String,
    },
    /// A record could not be redone.
    #[error("{key} cannot be redone at {lsn}: {source}")]
    Redo {
        /// The key.
        key: Key,
        /// The version.
        lsn: Lsn,
        /// Why.
        source: RedoError,
    },
}

/// The number by which redo knows the page that `key` names; `None` if it names no page.
pub fn page_number(key: Key) -> Option<u32> {
    match key.kind()? {
        KeyKind::Block { block, .. } => Some(block),
        KeyKind::SlruPage { page, .. } => Some(page),
        _ => None,
    }
}

/// A read of one key: what it looks for, and what it has found so far.
#[derive(Clone)]
pub struct Lookup {
    /// The key.
    pub key: Key,
    /// Versions at or below this do not count.
    pub above: Lsn,
    /// Versions above this do not count, or are gathered already.
    pub upto: Lsn,
    /// Newest first.
    versions: Vec<Version>,
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}..{}, {} versions", self.key, self.above, self.upto, self.versions.len())
    }
}

impl Lookup {
    /// Looks for the newest version of `key` in `above..upto` and what it rests on.
    pub fn new(key: Key, above: Lsn, upto: Lsn) -> Lookup {
        Lookup { key, above, upto, versions: Vec::new() }
    }

    /// Adds the next older version. Whether more are needed.
    pub fn push(&mut self, version: Version) -> bool {
        self.versions.push(version);
        !self.is_complete()
    }

    /// Whether nothing older is needed.
    pub fn is_complete(&self) -> bool {
        self.versions.last().is_some_and(|version| version.value.is_base())
    }

    /// What was found, newest first.
    pub fn versions(&self) -> &[Version] {
        &self.versions
    }

    /// The newest version found.
    pub fn newest(&self) -> Option<&Version> {
        self.versions.first()
    }

    /// Makes the page of the versions found, on top of `base`, which is what the key was just before them (zeros if it
    /// was nothing).
    ///
    /// # Errors
    /// When a version is malformed or cannot be redone.
    pub fn materialise(&self, major: Major, base: Option<&Page>) -> Result<Box<Page>, ChainError> {
        let mut page = Box::new(if self.is_complete() { ZERO_PAGE } else { *base.unwrap_or(&ZERO_PAGE) });
        let mut layout = HeapLayout::default();
        for version in self.versions.iter().rev() {
            apply_loosely(major, self.key, version, &mut page, &mut layout)?;
        }
        settle(self.key, &mut page, &mut layout)?;
        Ok(page)
    }
}

/// Makes `page` what it is after `version`, given what it was before.
///
/// # Errors
/// When the version is malformed or cannot be redone; the page is then not to be used.
pub fn apply(major: Major, key: Key, version: &Version, page: &mut Page) -> Result<(), ChainError> {
    let mut layout = HeapLayout::default();
    apply_loosely(major, key, version, page, &mut layout)?;
    settle(key, page, &mut layout)
}

fn settle(key: Key, page: &mut Page, layout: &mut HeapLayout) -> Result<(), ChainError> {
    let lsn = varve_postgres::page::lsn(page);
    layout.settle(page, page_number(key).unwrap_or(0)).map_err(|source| ChainError::Redo { key, lsn, source })
}

/// The same as one of a series: see [`varve_redo::apply_loosely`].
fn apply_loosely(major: Major, key: Key, version: &Version, page: &mut Page, layout: &mut HeapLayout) -> Result<(), ChainError> {
    let lsn = version.lsn;
    let malformed = |what: String| ChainError::Malformed { key, lsn, what };
    match &version.value {
        Value::Absent => {
            *layout = HeapLayout::default();
            page.fill(0);
        }
        Value::Image(bytes) => {
            let image: &Page =
                bytes.as_ref().try_into().map_err(|_| malformed(format!("an image of {} bytes, a page has {BLCKSZ}", bytes.len())))?;
            *layout = HeapLayout::default();
            *page = *image;
        }
        Value::Change { bytes, .. } => {
            let number = page_number(key).ok_or_else(|| malformed("a change, though the key is no page".to_owned()))?;
            let change = Change::decode(bytes).map_err(malformed)?;
            varve_redo::apply_loosely(major, lsn, number, &change, page, layout).map_err(|source| ChainError::Redo { key, lsn, source })?;
        }
    }
    Ok(())
}

/// Counts the changes of one page since the last version that needs nothing older, to tell when it is time for an
/// image.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainLength {
    changes: usize,
    bytes: usize,
}

impl ChainLength {
    /// Counts the next newer version.
    pub fn add(&mut self, value: &Value) {
        match value {
            Value::Change { will_init: false, bytes } => {
                self.changes += 1;
                self.bytes += bytes.len();
            }
            _ => *self = ChainLength::default(),
        }
    }

    /// Whether the page should get an image here.
    pub fn wants_image(&self) -> bool {
        self.changes >= CHAIN_CHANGES_MAX || self.bytes >= CHAIN_BYTES_MAX
    }
}

/// An image of `page` as a value.
pub fn image(page: &Page) -> Value {
    Value::Image(Bytes::copy_from_slice(page))
}
