//! `pg_filenode.map`: the file numbers of the catalogs that every start reads before it can read catalogs
//! (`utils/cache/relmapper.c`).
//!
//! Layout: magic `i32`, number of mappings `i32`, 62 (from 16 on 64) pairs of object id and file number, CRC-32C of all
//! before it; up to 15 four bytes of padding.

use crate::fields::Fields;
use crate::{Major, Oid};

const MAGIC: u32 = 0x0059_2717;
/// Bytes before the mappings.
const HEADER_SIZE: usize = 8;

/// Name of the file in a database's directory and in `global`.
pub const FILE_NAME: &str = "pg_filenode.map";

fn crc_offset(major: Major) -> usize {
    let capacity = if major >= Major::V16 { 64 } else { 62 };
    HEADER_SIZE + capacity * 8
}

/// The mappings (catalog, file number) of a map file.
///
/// # Errors
/// What is wrong, in words, when the bytes are no whole and correct map.
pub fn decode(bytes: &[u8], major: Major) -> Result<Vec<(Oid, Oid)>, String> {
    if bytes.len() != major.relation_map_size() {
        return Err(format!("a relation map has {} bytes, expected {}", bytes.len(), major.relation_map_size()));
    }
    let mut f = Fields::new(bytes);
    let magic = f.u32()?;
    if magic != MAGIC {
        return Err(format!("a relation map begins with {magic:08X}, expected {MAGIC:08X}"));
    }
    let count = f.i32()?;
    let crc_at = crc_offset(major);
    let capacity = (crc_at - HEADER_SIZE) / 8;
    if !usize::try_from(count).is_ok_and(|count| count <= capacity) {
        return Err(format!("a relation map with {count} mappings, of which there can be {capacity}"));
    }
    let mappings = crate::fields::u32s(f.items(count, 8)?);
    let stored = Fields::new(&bytes[crc_at..]).u32()?;
    let found = crc_fast::crc32_iscsi(&bytes[..crc_at]);
    if stored != found {
        return Err(format!("a relation map whose CRC is {found:08X}, and it says {stored:08X}"));
    }
    Ok(mappings.as_chunks::<2>().0.iter().map(|[catalog, file]| (*catalog, *file)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_map_reads_back_and_damage_is_found() {
        for major in Major::ALL {
            let mut map = vec![0; major.relation_map_size()];
            map[..4].copy_from_slice(&MAGIC.to_le_bytes());
            map[4] = 2;
            for (i, value) in [1262u32, 1262, 1259, 16399].into_iter().enumerate() {
                map[8 + i * 4..12 + i * 4].copy_from_slice(&value.to_le_bytes());
            }
            let at = crc_offset(major);
            let crc = crc_fast::crc32_iscsi(&map[..at]);
            map[at..at + 4].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(decode(&map, major), Ok(vec![(1262, 1262), (1259, 16399)]));
            map[20] ^= 1;
            assert!(decode(&map, major).unwrap_err().contains("CRC"));
        }
    }

    proptest! {
        #[test]
        fn anything_decodes_or_is_refused(mut bytes in proptest::collection::vec(any::<u8>(), 520..530), count in any::<i32>()) {
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..8].copy_from_slice(&count.to_le_bytes());
            for major in Major::ALL {
                let _ = decode(&bytes[..major.relation_map_size().min(bytes.len())], major);
            }
        }
    }
}
