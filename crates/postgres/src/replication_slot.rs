//! `pg_replslot/<name>/state` of a physical slot (`replication/slot.c`).
//!
//! 200 bytes: magic, CRC-32C of what follows it, version, length; then name (64 bytes), database, persistency, two
//! transaction horizons, and at 96 the position from which WAL is kept. The rest (invalidation, logical decoding,
//! output plugin, failover) is zero for a physical slot.

use crate::{Lsn, Major};

const MAGIC: u32 = 0x0105_1CA1;
const STATE_SIZE: usize = 200;
/// Bytes before the part that the length counts.
const CONSTANT_SIZE: usize = 16;
/// Bytes before the part that the CRC covers.
const NOT_CHECKSUMMED: usize = 8;
/// Database of a logical slot, zero of a physical one.
const DATABASE_AT: usize = 80;
const RESTART_LSN_AT: usize = 96;
/// `NAMEDATALEN`, of which the last byte is the terminating zero.
const NAME_SIZE: usize = 64;

/// Path of a slot's state file, relative to the data directory.
pub fn state_path(slot_name: &str) -> String {
    format!("pg_replslot/{slot_name}/state")
}

/// What a slot's state file says, of any major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Whether it decodes, rather than hands out WAL as it is.
    pub is_logical: bool,
    /// From where on WAL is needed; none if it never was.
    pub restart: Option<Lsn>,
}

impl SlotState {
    /// Reads a state file; none if it is no such file.
    pub fn decode(bytes: &[u8]) -> Option<SlotState> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        if u32_at(0)? != MAGIC {
            return None;
        }
        let restart = Lsn(u64::from_le_bytes(*bytes.get(RESTART_LSN_AT..)?.first_chunk()?));
        Some(SlotState { is_logical: u32_at(DATABASE_AT)? != 0, restart: Some(restart).filter(|lsn| lsn.is_valid()) })
    }
}

/// State of a persistent physical slot that keeps WAL from `restart` on. Names of 64 and more bytes are cut, as
/// Postgres cuts names.
pub fn physical_slot_state(slot_name: &str, restart: Lsn, major: Major) -> Vec<u8> {
    let mut out = vec![0; STATE_SIZE];
    out[..4].copy_from_slice(&MAGIC.to_le_bytes());
    out[8..12].copy_from_slice(&major.slot_version().to_le_bytes());
    out[12..16].copy_from_slice(&((STATE_SIZE - CONSTANT_SIZE) as u32).to_le_bytes());
    let name = slot_name.as_bytes();
    let name = &name[..name.len().min(NAME_SIZE - 1)];
    out[CONSTANT_SIZE..CONSTANT_SIZE + name.len()].copy_from_slice(name);
    out[RESTART_LSN_AT..RESTART_LSN_AT + 8].copy_from_slice(&restart.0.to_le_bytes());
    let crc = crc_fast::crc32_iscsi(&out[NOT_CHECKSUMMED..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_has_the_fields_where_postgres_reads_them() {
        let state = physical_slot_state("varve", Lsn(0x16B_3748), Major::V15);
        assert_eq!(state.len(), 200);
        assert_eq!(&state[16..22], b"varve\0");
        assert_eq!(state[96..104], 0x16B_3748u64.to_le_bytes());
        assert_eq!(state[4..8], crc_fast::crc32_iscsi(&state[8..]).to_le_bytes());
        assert_eq!(SlotState::decode(&state), Some(SlotState { is_logical: false, restart: Some(Lsn(0x16B_3748)) }));
        assert_eq!(SlotState::decode(&state[..90]), None);
        assert_eq!(SlotState::decode(&[0; 200]), None);
        assert_eq!(physical_slot_state(&"x".repeat(100), Lsn(1), Major::V18).len(), 200);
        assert_eq!(state_path("varve"), "pg_replslot/varve/state");
    }
}
