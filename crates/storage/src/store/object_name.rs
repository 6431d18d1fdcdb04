//! Names of objects.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Most bytes of an object's name: S3 allows 1,024, and a prefix within the bucket must fit too.
const NAME_BYTES_MAX: usize = 512;

/// Name of an object, relative to the store's root: segments of letters, digits, `-`, `_` and `.` with slashes between
/// them, no segment beginning with a dot. Such a name means the same as a path in a folder and as a key in a bucket,
/// without any escaping.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Arc<str>);

/// A text that is not an object's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not an object name: expected at most {NAME_BYTES_MAX} letters, digits, '-', '_', '.' and '/', no empty segment, no segment that begins with '.'"
)]
pub struct ParseObjectNameError(String);

impl ObjectName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The object `rest` below this one.
    pub fn join(&self, rest: &str) -> Result<ObjectName, ParseObjectNameError> {
        format!("{self}/{rest}").parse()
    }

    /// What follows `self` and a slash in `name`, if it begins with that.
    pub fn relative<'n>(&self, name: &'n ObjectName) -> Option<&'n str> {
        name.0.strip_prefix(&*self.0)?.strip_prefix('/')
    }
}

impl FromStr for ObjectName {
    type Err = ParseObjectNameError;
    fn from_str(text: &str) -> Result<Self, ParseObjectNameError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let segment = |s: &str| !s.is_empty() && !s.starts_with('.') && s.bytes().all(plain);
        if text.len() <= NAME_BYTES_MAX && text.split('/').all(segment) {
            Ok(ObjectName(text.into()))
        } else {
            Err(ParseObjectNameError(text.chars().take(NAME_BYTES_MAX).collect()))
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ObjectName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ObjectName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_every_store_takes_literally() {
        let name: ObjectName = "tenants/00ff/log/1.snapshot".parse().unwrap();
        assert_eq!(name.join("a").unwrap().as_str(), "tenants/00ff/log/1.snapshot/a");
        let prefix: ObjectName = "tenants/00ff".parse().unwrap();
        assert_eq!(prefix.relative(&name), Some("log/1.snapshot"));
        assert_eq!("tenants/00f".parse::<ObjectName>().unwrap().relative(&name), None);
        for bad in ["", "/", "a/", "/a", "a//b", "..", "a/../b", ".a", "a b", "a#1", "a%2F", "ä", &"x".repeat(513)] {
            assert!(bad.parse::<ObjectName>().is_err(), "{bad:?} must be refused");
        }
    }
}
