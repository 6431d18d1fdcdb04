//! Prepared transactions: the file of each in `pg_twophase`, which is the main data of its `XLOG_XACT_PREPARE` record
//! with a CRC behind it (`access/transam/twophase.c`).

use crate::fields::{Fields, u32s};
use crate::{Major, Oid, Timestamp};

const MAGIC: u32 = 0x57F9_4534;
const CRC_SIZE: usize = 4;

/// What the file's header says, and the subtransactions that follow it (`xl_xact_prepare`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prepared {
    /// The transaction.
    pub xid: u32,
    /// Its database.
    pub database: Oid,
    /// When it was prepared.
    pub prepared_at: Timestamp,
    /// Its subtransactions.
    pub subxids: Vec<u32>,
}

impl Prepared {
    /// Decodes the main data of an `XLOG_XACT_PREPARE` record.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn decode(state: &[u8], major: Major) -> Result<Prepared, String> {
        let mut f = Fields::new(state);
        let magic = f.u32()?;
        if magic != MAGIC {
            return Err(format!("the state of a prepared transaction begins with {magic:08X}, expected {MAGIC:08X}"));
        }
        let total_len = f.u32()? as usize;
        if total_len != state.len() + CRC_SIZE {
            return Err(format!("the state of a prepared transaction has {} bytes and a CRC, and says {total_len}", state.len()));
        }
        let (xid, database, prepared_at) = (f.u32()?, f.u32()?, Timestamp(f.i64()?));
        let _owner = f.u32()?;
        let subxid_count = f.i32()?;
        let _dropped_on_commit_and_abort = f.take(8)?;
        if major.dropped_stats_item_size() > 0 {
            f.take(8)?; // statistics dropped on commit, on abort
        }
        let _invalidations = f.i32()?;
        let _invalidates_init_file = f.bool()?;
        f.align(2)?;
        let gid_len = f.u16()?;
        f.align(8)?;
        let _origin = f.take(16)?;
        f.take(usize::from(gid_len).next_multiple_of(8))?;
        let subxids = u32s(f.items(subxid_count, 4)?);
        Ok(Prepared { xid, database, prepared_at, subxids })
    }
}

/// The file of a prepared transaction whose record has the main data `state`.
pub fn file(state: &[u8]) -> Vec<u8> {
    let mut out = state.to_vec();
    out.extend_from_slice(&crc_fast::crc32_iscsi(state).to_le_bytes());
    out
}

/// The record's main data in a file.
///
/// # Errors
/// What is wrong, in words.
pub fn state_of_file(file: &[u8]) -> Result<&[u8], String> {
    let (state, crc) = file.split_last_chunk::<CRC_SIZE>().ok_or("a two-phase file is shorter than its CRC")?;
    let (stored, found) = (u32::from_le_bytes(*crc), crc_fast::crc32_iscsi(state));
    if stored == found { Ok(state) } else { Err(format!("a two-phase file has the CRC {found:08X} and says {stored:08X}")) }
}

/// Path of the file of transaction `xid` (with its epoch), relative to the data directory.
pub fn file_path(xid: u64, major: Major) -> String {
    if major.two_phase_name_has_epoch() { format!("pg_twophase/{xid:016X}") } else { format!("pg_twophase/{:08X}", xid as u32) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state(major: Major) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for word in [740u32, 5] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&1_000_000i64.to_le_bytes());
        for word in [10u32, 2, 0, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        if major >= Major::V15 {
            out.extend_from_slice(&[0; 8]);
        }
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&3u16.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(b"g1\0\0\0\0\0\0");
        out.extend_from_slice(&741u32.to_le_bytes());
        out.extend_from_slice(&742u32.to_le_bytes());
        let len = out.len() as u32 + 4;
        out[4..8].copy_from_slice(&len.to_le_bytes());
        out
    }

    #[test]
    fn the_header_reads_as_each_major_writes_it() {
        for major in Major::ALL {
            let state = state(major);
            let prepared = Prepared::decode(&state, major).unwrap();
            assert_eq!((prepared.xid, prepared.database, prepared.subxids), (740, 5, vec![741, 742]));
            assert_eq!(state_of_file(&file(&state)), Ok(&state[..]));
            assert!(Prepared::decode(&state[..state.len() - 1], major).is_err());
        }
        assert_eq!(file_path(1 << 32 | 740, Major::V16), "pg_twophase/000002E4");
        assert_eq!(file_path(1 << 32 | 740, Major::V17), "pg_twophase/00000001000002E4");
    }

    proptest! {
        #[test]
        fn anything_decodes_or_is_refused(mut bytes in proptest::collection::vec(any::<u8>(), 8..120)) {
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            let len = bytes.len() as u32 + 4;
            bytes[4..8].copy_from_slice(&len.to_le_bytes());
            for major in Major::ALL {
                let _ = Prepared::decode(&bytes, major);
            }
            let _ = state_of_file(&bytes);
        }
    }
}
