//! The envelope around everything durable in the object store: what it is, in which version, how it is compressed and
//! encrypted, and a checksum.
//!
//! Layout, integers big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | magic: four letters that name the kind of object |
//! | 4..6 | format version of the content, u16, from 1 |
//! | 6 | codec: 0 none, 1 lz4 (block format), 2 zstd |
//! | 7 | zero |
//! | 8..12 | key id u32: 0 = not encrypted |
//! | 12..20 | plain length u64: bytes of the content |
//! | 20..28 | stored length u64: bytes that follow the header |
//! | 28..28+s | stored bytes: the content, compressed, then encrypted |
//! | last 4 | CRC-32C u32 of everything before it |
//!
//! The order when writing is: compress, encrypt, checksum; so a damaged object is noticed before a byte of it is
//! interpreted. A reader refuses a newer version, an unknown codec and a key that it lacks, each with an error that
//! names the object.

use std::cell::RefCell;
use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

/// Bytes before the stored bytes.
pub const HEADER_SIZE: usize = 28;
/// Bytes after the stored bytes.
pub const TRAILER_SIZE: usize = 4;
/// Level of zstd: fresh data must be written at the speed at which it comes.
const ZSTD_LEVEL: i32 = 1;

/// A kind of object: what its envelope says and which versions can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// First four bytes.
    pub magic: [u8; 4],
    /// Version that is written; this and all older ones, from 1, can be read.
    pub version: u16,
    /// What people call such an object, with its article: "a tenant log entry".
    pub what: &'static str,
    /// Content longer than this is refused, so that a bad length cannot make us allocate without bound.
    pub content_bytes_max: u64,
}

/// How content is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    None = 0,
    /// The lz4 block format: fast.
    Lz4 = 1,
    /// zstd: small.
    Zstd = 2,
}

impl Codec {
    /// The codec with this number.
    pub fn from_number(number: u8) -> Option<Codec> {
        [Codec::None, Codec::Lz4, Codec::Zstd].into_iter().find(|codec| *codec as u8 == number)
    }
}

/// Bytes that cannot be taken out of their envelope, or put into one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Not an object of the kind that was expected.
    #[error("{object} is not {expected}: it begins with {found}")]
    WrongKind {
        /// Where the bytes came from.
        object: String,
        /// What should have been there.
        expected: &'static str,
        /// The magic found, escaped.
        found: String,
    },
    /// Written by a newer release.
    #[error("{object} has format version {found}, this release reads {what} up to version {supported}: upgrade Varve to read it")]
    NewerVersion {
        /// Where the bytes came from.
        object: String,
        /// What it is.
        what: &'static str,
        /// Its version.
        found: u16,
        /// The newest version that we know.
        supported: u16,
    },
    /// Encrypted with a key that we do not have.
    #[error("{object} is encrypted with key {key_id}, and this release has no keys: read it with the release that wrote it")]
    UnknownKey {
        /// Where the bytes came from.
        object: String,
        /// The key's number.
        key_id: u32,
    },
    /// Damaged: too short, lengths that contradict each other, a wrong checksum, content that does not decompress.
    #[error("{object} is damaged: {problem}; restore it from a copy")]
    Damaged {
        /// Where the bytes came from.
        object: String,
        /// What is wrong.
        problem: String,
    },
    /// Content longer than its format allows.
    #[error("{object}: content of {bytes} bytes is over the limit of {limit_bytes} bytes for {what}")]
    TooLong {
        /// Where the bytes came from or go to.
        object: String,
        /// What it is.
        what: &'static str,
        /// Bytes of content.
        bytes: u64,
        /// The format's limit.
        limit_bytes: u64,
    },
}

/// Content that was taken out of its envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Version of the content's format.
    pub version: u16,
    /// The content; it shares memory with the envelope where that was not compressed.
    pub content: Bytes,
}

/// Puts `content` into an envelope. Where the codec does not make it smaller it is stored as it is.
pub fn encode(format: &Format, codec: Codec, object: &str, content: &[u8]) -> Result<Bytes, EnvelopeError> {
    if content.len() as u64 > format.content_bytes_max {
        return Err(too_long(format, object, content.len() as u64));
    }
    let compressed = match codec {
        Codec::None => None,
        Codec::Lz4 => Some(lz4_flex::block::compress(content)),
        Codec::Zstd => {
            let failed = |error: io::Error| damaged(object, format!("zstd could not compress it ({error})"));
            Some(zstd_compress(content).map_err(failed)?)
        }
    };
    let (codec, stored) = match &compressed {
        Some(smaller) if smaller.len() < content.len() => (codec, smaller.as_slice()),
        _ => (Codec::None, content),
    };
    let mut out = BytesMut::with_capacity(HEADER_SIZE + stored.len() + TRAILER_SIZE);
    out.put_slice(&format.magic);
    out.put_u16(format.version);
    out.put_u8(codec as u8);
    out.put_u8(0);
    out.put_u32(0);
    out.put_u64(content.len() as u64);
    out.put_u64(stored.len() as u64);
    out.put_slice(stored);
    let crc = crc_fast::crc32_iscsi(&out);
    out.put_u32(crc);
    Ok(out.freeze())
}

/// Bytes of the whole envelope that begins with `head`; `None` if that is too short to tell.
pub fn length_of(head: &[u8]) -> Option<u64> {
    let stored = u64_at(head.get(20..HEADER_SIZE)?);
    stored.checked_add((HEADER_SIZE + TRAILER_SIZE) as u64)
}

/// Takes the content out of the envelope `bytes`, which was found at `object` and must be whole.
pub fn decode(format: &Format, object: &str, bytes: &Bytes) -> Result<Opened, EnvelopeError> {
    let Some((head, _)) = bytes.split_first_chunk::<HEADER_SIZE>().filter(|_| bytes.len() >= HEADER_SIZE + TRAILER_SIZE) else {
        return Err(damaged(object, format!("{} bytes are fewer than an envelope has", bytes.len())));
    };
    // Before the checksum: whoever hands us a wholly different thing should hear that, and not of damage.
    if head[..4] != format.magic {
        let found = head[..4].escape_ascii().to_string();
        return Err(EnvelopeError::WrongKind { object: object.to_owned(), expected: format.what, found });
    }
    let body_end = bytes.len() - TRAILER_SIZE;
    let (crc_stored, crc_found) = (u32_at(&bytes[body_end..]), crc_fast::crc32_iscsi(&bytes[..body_end]));
    if crc_stored != crc_found {
        return Err(damaged(object, format!("its CRC-32C is {crc_found:08x}, it says {crc_stored:08x}")));
    }
    let version = u16::from_be_bytes([head[4], head[5]]);
    if version > format.version {
        let (what, supported) = (format.what, format.version);
        return Err(EnvelopeError::NewerVersion { object: object.to_owned(), what, found: version, supported });
    }
    let key_id = u32_at(&head[8..]);
    if key_id != 0 {
        return Err(EnvelopeError::UnknownKey { object: object.to_owned(), key_id });
    }
    let (plain_length, stored_length) = (u64_at(&head[12..]), u64_at(&head[20..]));
    if stored_length != (body_end - HEADER_SIZE) as u64 {
        return Err(damaged(object, format!("it says {stored_length} stored bytes and has {}", body_end - HEADER_SIZE)));
    }
    if plain_length > format.content_bytes_max {
        return Err(too_long(format, object, plain_length));
    }
    let stored = bytes.slice(HEADER_SIZE..body_end);
    let content = match Codec::from_number(head[6]) {
        None => return Err(damaged(object, format!("it has the unknown codec {}", head[6]))),
        Some(Codec::None) => Ok(stored),
        Some(Codec::Lz4) => lz4_flex::block::decompress(&stored, plain_length as usize).map(Bytes::from).map_err(|e| e.to_string()),
        Some(Codec::Zstd) => zstd_decompress(&stored, plain_length as usize).map(Bytes::from).map_err(|e| e.to_string()),
    };
    let content = content.map_err(|error| damaged(object, format!("its content does not decompress ({error})")))?;
    if content.len() as u64 != plain_length {
        return Err(damaged(object, format!("its content has {} bytes where the header says {plain_length}", content.len())));
    }
    Ok(Opened { version, content })
}

thread_local! {
    // Making a context costs as much as the work on a block, and clears a hundred kilobytes.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn zstd_compress(content: &[u8]) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|compressor| match compressor {
        Some(compressor) => compressor.compress(content),
        None => compressor.insert(Compressor::new(ZSTD_LEVEL)?).compress(content),
    })
}

fn zstd_decompress(stored: &[u8], plain_length: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|decompressor| match decompressor {
        Some(decompressor) => decompressor.decompress(stored, plain_length),
        None => decompressor.insert(Decompressor::new()?).decompress(stored, plain_length),
    })
}

fn damaged(object: &str, problem: String) -> EnvelopeError {
    EnvelopeError::Damaged { object: object.to_owned(), problem }
}

fn too_long(format: &Format, object: &str, bytes: u64) -> EnvelopeError {
    EnvelopeError::TooLong { object: object.to_owned(), what: format.what, bytes, limit_bytes: format.content_bytes_max }
}

fn u32_at(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |chunk| u32::from_be_bytes(*chunk))
}

fn u64_at(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |chunk| u64::from_be_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMAT: Format = Format { magic: *b"VTST", version: 3, what: "a test object", content_bytes_max: 1 << 20 };

    #[test]
    fn a_newer_version_is_refused_and_the_object_named() {
        let newer = Format { version: 4, ..FORMAT };
        let bytes = encode(&newer, Codec::Lz4, "tenants/x", b"later").unwrap();
        let error = decode(&FORMAT, "tenants/x", &bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tenants/x has format version 4, this release reads a test object up to version 3: upgrade Varve to read it"
        );
        assert_eq!(decode(&newer, "tenants/x", &encode(&FORMAT, Codec::None, "", b"old").unwrap()).unwrap().version, 3);
    }

    #[test]
    fn a_key_that_nobody_has_is_refused() {
        let mut bytes = encode(&FORMAT, Codec::None, "a/b", b"secret").unwrap().to_vec();
        bytes[11] = 7;
        let end = bytes.len() - 4;
        let crc = crc_fast::crc32_iscsi(&bytes[..end]).to_be_bytes();
        bytes[end..].copy_from_slice(&crc);
        let error = decode(&FORMAT, "a/b", &bytes.into()).unwrap_err();
        assert_eq!(error, EnvelopeError::UnknownKey { object: "a/b".into(), key_id: 7 });
    }

    #[test]
    fn another_kind_and_too_much_content_are_refused() {
        let other = Format { magic: *b"VOTH", ..FORMAT };
        let error = decode(&FORMAT, "a/b", &encode(&other, Codec::None, "a/b", b"x").unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "a/b is not a test object: it begins with VOTH");
        let error = encode(&FORMAT, Codec::Zstd, "a/b", &vec![0; (1 << 20) + 1]).unwrap_err();
        assert!(matches!(error, EnvelopeError::TooLong { .. }), "{error}");
        let large = Format { content_bytes_max: 1 << 30, ..FORMAT };
        let bytes = encode(&large, Codec::Zstd, "a/b", &vec![0; (1 << 20) + 1]).unwrap();
        assert!(matches!(decode(&FORMAT, "a/b", &bytes), Err(EnvelopeError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(content in proptest::collection::vec(0u8..4, 0..5000), codec in 0u8..3) {
            let codec = Codec::from_number(codec).unwrap();
            let bytes = encode(&FORMAT, codec, "o", &content).unwrap();
            let opened = decode(&FORMAT, "o", &bytes).unwrap();
            prop_assert_eq!(&opened.content[..], &content[..]);
            prop_assert_eq!(opened.version, 3);
        }

        #[test]
        fn no_damage_goes_unnoticed(content in proptest::collection::vec(any::<u8>(), 0..300), codec in 0u8..3, at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
            let bytes = encode(&FORMAT, Codec::from_number(codec).unwrap(), "o", &content).unwrap();
            let mut flipped = bytes.to_vec();
            flipped[at.index(bytes.len())] ^= 1 << bit;
            prop_assert!(decode(&FORMAT, "o", &flipped.into()).is_err());
            prop_assert!(decode(&FORMAT, "o", &bytes.slice(..cut.index(bytes.len()))).is_err());
        }

        #[test]
        fn garbage_is_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(decode(&FORMAT, "o", &bytes.clone().into()).is_err());
            if bytes.len() > 40 {
                // As bad, but with magic and checksum right.
                bytes[..4].copy_from_slice(b"VTST");
                let end = bytes.len() - 4;
                let crc = crc_fast::crc32_iscsi(&bytes[..end]).to_be_bytes();
                bytes[end..].copy_from_slice(&crc);
                let _ = decode(&FORMAT, "o", &bytes.into());
            }
        }
    }
}
