//! Values: one for each (key, LSN).

use bytes::Bytes;

/// A version of a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// The whole of it: an 8 KiB page for blocks and SLRU pages, the encoded thing for others.
    Image(Bytes),
    /// A change to what was there, a stored `varve_redo::change::Change`; only for blocks and SLRU pages.
    Change {
        /// Whether what was there does not matter.
        will_init: bool,
        /// The stored change.
        bytes: Bytes,
    },
    /// The key has no value from here on.
    Absent,
}

impl Value {
    /// Whether no older version is needed to know the key's contents here.
    pub fn is_base(&self) -> bool {
        !matches!(self, Value::Change { will_init: false, .. })
    }

    /// Bytes of payload.
    pub fn len(&self) -> usize {
        match self {
            Value::Image(bytes) | Value::Change { bytes, .. } => bytes.len(),
            Value::Absent => 0,
        }
    }

    /// Whether there is no payload.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
