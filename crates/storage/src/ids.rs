//! Identities that appear in durable formats: tenants, timelines, layers, generations, writer epochs; and the two kinds
//! of names that people give, for tenants and for branches.
//!
//! Ids are 128 random bits, printed as 32 hexadecimal digits. In a binary format they are their 16 bytes, in JSON their
//! text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use crate::chance::{RandomError, random_bytes};

/// Most characters of a tenant's or a branch's name.
pub const NAME_CHARS_MAX: usize = 63;

/// A text that is not an id of 128 bits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a {what} id: expected 32 hexadecimal digits")]
pub struct ParseIdError {
    what: &'static str,
    text: String,
}

/// A text that may not be a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a {what} name: expected 1 to {NAME_CHARS_MAX} characters, lower-case letters, digits, '-', '_' and '.', of which the first is a letter or a digit"
)]
pub struct ParseNameError {
    what: &'static str,
    text: String,
}

/// First characters of a bad input: enough to recognise it, whatever its length.
fn excerpt(text: &str) -> String {
    text.chars().take(NAME_CHARS_MAX + 1).collect()
}

macro_rules! id_128 {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// A new id, by chance.
            ///
            /// # Errors
            /// [`RandomError`].
            pub fn random() -> Result<Self, RandomError> {
                random_bytes().map($name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", u128::from_be_bytes(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                match digits.then(|| u128::from_str_radix(text, 16)) {
                    Some(Ok(number)) => Ok($name(number.to_be_bytes())),
                    _ => Err(ParseIdError { what: $what, text: excerpt(text) }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
                } else {
                    <[u8; 16]>::deserialize(deserializer).map($name)
                }
            }
        }
    };
}

id_128!(
    /// Identity of a tenant.
    TenantId,
    "tenant"
);
id_128!(
    /// Identity of a timeline, unique over all tenants.
    TimelineId,
    "timeline"
);
id_128!(
    /// Identity of a layer within its tenant.
    LayerId,
    "layer"
);

id_128!(
    /// Identity of an endpoint: the stable address of a branch's compute.
    EndpointId,
    "endpoint"
);
id_128!(
    /// Identity of a host: a machine that runs computes.
    HostId,
    "host"
);
id_128!(
    /// Identity of a pageserver's WAL log: which disk holds what the store does not have yet.
    WalLogId,
    "WAL log"
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u32);

        impl $name {
            /// The one after this, or `None` when the numbers are used up.
            pub fn next(self) -> Option<Self> {
                self.0.checked_add(1).map($name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter!(
    /// Number of a pageserver's ownership of a tenant; the first is 1.
    Generation
);
counter!(
    /// Number of a compute's right to write a timeline; the first is 1.
    WriterEpoch
);

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseNameError;
            fn from_str(text: &str) -> Result<Self, ParseNameError> {
                if is_name(text) { Ok($name(text.into())) } else { Err(ParseNameError { what: $what, text: excerpt(text) }) }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

name!(
    /// Unique name of a tenant: `acme`. See [`ParseNameError`] for the rules.
    TenantName,
    "tenant"
);
name!(
    /// Name of a branch within its tenant: `main`. See [`ParseNameError`] for the rules.
    BranchName,
    "branch"
);
name!(
    /// Name of a snapshot within its tenant: `before-migration`. See [`ParseNameError`] for the rules.
    SnapshotName,
    "snapshot"
);

fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    text.len() <= NAME_CHARS_MAX
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|b| plain(b) || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_as_hexadecimal() {
        let id: TenantId = "00112233445566778899aabbccddeeff".parse().unwrap();
        assert_eq!(id.to_string(), "00112233445566778899aabbccddeeff");
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"00112233445566778899aabbccddeeff\"");
        for bad in ["", "0011", "+0112233445566778899aabbccddeeff", "00112233445566778899aabbccddeegg", &"0".repeat(33)] {
            assert!(bad.parse::<TimelineId>().is_err(), "{bad:?} must be refused");
        }
        assert_ne!(LayerId::random().unwrap(), LayerId::random().unwrap());
    }

    #[test]
    fn names_follow_the_rules_that_their_error_tells() {
        for good in ["a", "0", "main", "a-b_c.d", &"x".repeat(63)] {
            assert_eq!(good.parse::<BranchName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "_a", "A", "a b", "a/b", "ä", "a\n", &"x".repeat(64)] {
            let error = bad.parse::<TenantName>().unwrap_err().to_string();
            assert!(error.contains("expected 1 to 63 characters"), "{bad:?}: {error}");
        }
        assert!("x".repeat(1 << 20).parse::<TenantName>().unwrap_err().to_string().len() < 400);
    }
}
