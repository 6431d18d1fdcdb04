//! `pg_logical/replorigin_checkpoint`: how far each replication origin had been replayed
//! (`replication/logical/origin.c`).
//!
//! Layout: magic `u32`; for each origin its id `u16`, six bytes of padding and the remote position `u64`; CRC-32C of
//! all before it.

use crate::Lsn;
use crate::fields::Fields;

const MAGIC: u32 = 0x1257_DADE;
const ENTRY_SIZE: usize = 16;

/// Path of the file, relative to the data directory.
pub const CHECKPOINT_PATH: &str = "pg_logical/replorigin_checkpoint";

/// The file with these origins.
pub fn encode(origins: &[(u16, Lsn)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + origins.len() * ENTRY_SIZE);
    out.extend_from_slice(&MAGIC.to_le_bytes());
    for (origin, remote) in origins {
        out.extend_from_slice(&u64::from(*origin).to_le_bytes());
        out.extend_from_slice(&remote.0.to_le_bytes());
    }
    let crc = crc_fast::crc32_iscsi(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// The origins in the file.
///
/// # Errors
/// What is wrong, in words.
pub fn decode(bytes: &[u8]) -> Result<Vec<(u16, Lsn)>, String> {
    let (body, crc) = bytes.split_last_chunk::<4>().ok_or("the file of replication origins is shorter than its CRC")?;
    let (stored, found) = (u32::from_le_bytes(*crc), crc_fast::crc32_iscsi(body));
    if stored != found {
        return Err(format!("the file of replication origins has the CRC {found:08X} and says {stored:08X}"));
    }
    let mut f = Fields::new(body);
    let magic = f.u32()?;
    if magic != MAGIC {
        return Err(format!("the file of replication origins begins with {magic:08X}, expected {MAGIC:08X}"));
    }
    let (entries, rest) = f.rest().as_chunks::<ENTRY_SIZE>();
    if !rest.is_empty() {
        return Err(format!("the file of replication origins has {} bytes too many", rest.len()));
    }
    entries
        .iter()
        .map(|entry| {
            let mut f = Fields::new(entry);
            let origin = f.u16()?;
            f.align(8)?;
            Ok((origin, Lsn(f.u64()?)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_read_back() {
        let origins = vec![(1, Lsn(0x1_0000_0000)), (7, Lsn(8))];
        let bytes = encode(&origins);
        assert_eq!(decode(&bytes), Ok(origins));
        assert_eq!(decode(&encode(&[])), Ok(vec![]));
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "a file cut to {len} bytes must be refused");
        }
    }
}
