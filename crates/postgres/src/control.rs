//! `pg_control`, and the checkpoint that it and checkpoint records carry (`catalog/pg_control.h`).
//!
//! The file has 8192 bytes of which the structure takes 292 (296 from 18 on), all little-endian, at these offsets:
//!
//! | offset | field | offset | field |
//! |---|---|---|---|
//! | 0 | system identifier | 152, 160, 168 | backup start, end, end required |
//! | 8, 12 | control version, catalog version | 172, 176 | wal_level, wal_log_hints |
//! | 16, 24 | state, time | 180..200 | five limits that a standby needs |
//! | 32 | position of the last checkpoint record | 200 | track_commit_timestamp |
//! | 40 | copy of the last checkpoint (88 bytes) | 204, 208 | alignment, float format |
//! | 128 | fake LSN of unlogged relations | 216..248 | sizes compiled into the server |
//! | 136, 144 | minimum recovery point and its timeline | 248, 252 | float8 by value, data checksum version |
//!
//! then `default_char_signedness` (one byte, 18), a nonce of 32 bytes, and the CRC-32C of all before it, aligned to 4.

use crate::fields::Fields;
use crate::{Lsn, Major, Oid};

/// Bytes in the file (`PG_CONTROL_FILE_SIZE`).
pub const CONTROL_FILE_SIZE: usize = 8192;
/// Bytes in a [`CheckPoint`].
pub const CHECKPOINT_SIZE: usize = 88;
/// `FLOATFORMAT_VALUE`.
const FLOAT_FORMAT: f64 = 1_234_567.0;
/// Bytes of the structure up to where majors differ.
const COMMON_SIZE: usize = 256;
const NONCE_SIZE: usize = 32;

/// `pg_control` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pg_control: {0}")]
pub struct ControlError(pub String);

/// `wal_level` as numbers in WAL and `pg_control` (`WalLevel`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(missing_docs, reason = "the names are Postgres's settings")]
#[repr(i32)]
pub enum WalLevel {
    Minimal = 0,
    Replica = 1,
    Logical = 2,
}

impl WalLevel {
    /// The level with this number.
    pub fn from_number(number: i32) -> Option<WalLevel> {
        [WalLevel::Minimal, WalLevel::Replica, WalLevel::Logical].into_iter().find(|level| *level as i32 == number)
    }
}

/// `CheckPoint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckPoint {
    /// Where redo begins.
    pub redo: Lsn,
    /// `ThisTimeLineID`.
    pub tli: u32,
    /// `PrevTimeLineID`.
    pub prev_tli: u32,
    /// `full_page_writes`.
    pub full_page_writes: bool,
    /// `wal_level`, from 17 on.
    pub wal_level: i32,
    /// Next transaction, with its epoch.
    pub next_xid: u64,
    /// Next object identifier.
    pub next_oid: Oid,
    /// Next multixact.
    pub next_multi: u32,
    /// Next multixact member offset.
    pub next_multi_offset: u32,
    /// Oldest transaction that may be found in a table.
    pub oldest_xid: u32,
    /// The database that holds it back.
    pub oldest_xid_db: Oid,
    /// Oldest multixact that may be found in a table.
    pub oldest_multi: u32,
    /// The database that holds it back.
    pub oldest_multi_db: Oid,
    /// Seconds since 1970.
    pub time: i64,
    /// Oldest transaction with a commit timestamp, or 0.
    pub oldest_commit_ts_xid: u32,
    /// Newest transaction with a commit timestamp, or 0.
    pub newest_commit_ts_xid: u32,
    /// Oldest running transaction; 0 in a shutdown checkpoint.
    pub oldest_active_xid: u32,
}

impl CheckPoint {
    /// Decodes the 88 bytes.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn decode(bytes: &[u8], major: Major) -> Result<CheckPoint, String> {
        let mut f = Fields::new(bytes);
        let redo = Lsn(f.u64()?);
        let (tli, prev_tli) = (f.u32()?, f.u32()?);
        let full_page_writes = f.bool()?;
        f.align(4)?;
        let wal_level = f.i32()?; // padding before 17
        let checkpoint = CheckPoint {
            redo,
            tli,
            prev_tli,
            full_page_writes,
            wal_level: if major.checkpoint_has_wal_level() { wal_level } else { 0 },
            next_xid: f.u64()?,
            next_oid: f.u32()?,
            next_multi: f.u32()?,
            next_multi_offset: f.u32()?,
            oldest_xid: f.u32()?,
            oldest_xid_db: f.u32()?,
            oldest_multi: f.u32()?,
            oldest_multi_db: f.u32()?,
            time: {
                f.align(8)?;
                f.i64()?
            },
            oldest_commit_ts_xid: f.u32()?,
            newest_commit_ts_xid: f.u32()?,
            oldest_active_xid: f.u32()?,
        };
        f.align(8)?;
        Ok(checkpoint)
    }

    /// The 88 bytes.
    pub fn encode(&self, major: Major) -> [u8; CHECKPOINT_SIZE] {
        let mut out = [0; CHECKPOINT_SIZE];
        put_u64(&mut out, 0, self.redo.0);
        put_u32(&mut out, 8, self.tli);
        put_u32(&mut out, 12, self.prev_tli);
        out[16] = u8::from(self.full_page_writes);
        if major.checkpoint_has_wal_level() {
            put_u32(&mut out, 20, self.wal_level as u32);
        }
        put_u64(&mut out, 24, self.next_xid);
        put_u32(&mut out, 32, self.next_oid);
        put_u32(&mut out, 36, self.next_multi);
        put_u32(&mut out, 40, self.next_multi_offset);
        put_u32(&mut out, 44, self.oldest_xid);
        put_u32(&mut out, 48, self.oldest_xid_db);
        put_u32(&mut out, 52, self.oldest_multi);
        put_u32(&mut out, 56, self.oldest_multi_db);
        put_u64(&mut out, 64, self.time as u64);
        put_u32(&mut out, 72, self.oldest_commit_ts_xid);
        put_u32(&mut out, 76, self.newest_commit_ts_xid);
        put_u32(&mut out, 80, self.oldest_active_xid);
        out
    }
}

/// `DBState`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names are Postgres's states")]
#[repr(u32)]
pub enum ClusterState {
    Startup = 0,
    ShutDown = 1,
    ShutDownInRecovery = 2,
    ShuttingDown = 3,
    InCrashRecovery = 4,
    InArchiveRecovery = 5,
    InProduction = 6,
}

impl ClusterState {
    const ALL: [ClusterState; 7] = [
        ClusterState::Startup,
        ClusterState::ShutDown,
        ClusterState::ShutDownInRecovery,
        ClusterState::ShuttingDown,
        ClusterState::InCrashRecovery,
        ClusterState::InArchiveRecovery,
        ClusterState::InProduction,
    ];

    /// As `pg_controldata` prints it.
    pub fn name(self) -> &'static str {
        match self {
            ClusterState::Startup => "starting up",
            ClusterState::ShutDown => "shut down",
            ClusterState::ShutDownInRecovery => "shut down in recovery",
            ClusterState::ShuttingDown => "shutting down",
            ClusterState::InCrashRecovery => "in crash recovery",
            ClusterState::InArchiveRecovery => "in archive recovery",
            ClusterState::InProduction => "in production",
        }
    }
}

/// The settings that `pg_control` copies and an `XLOG_PARAMETER_CHANGE` record announces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names are Postgres's settings")]
pub struct Parameters {
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_transactions: i32,
    pub max_locks_per_transaction: i32,
    pub wal_level: i32,
    pub wal_log_hints: bool,
    pub track_commit_timestamp: bool,
}

impl Default for Parameters {
    /// What `initdb` writes.
    fn default() -> Self {
        Parameters {
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            wal_level: WalLevel::Replica as i32,
            wal_log_hints: false,
            track_commit_timestamp: false,
        }
    }
}

/// Sizes compiled into a server, which must be those of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the names are Postgres's own")]
pub struct CompiledSizes {
    pub max_align: u32,
    pub blcksz: u32,
    pub relseg_size: u32,
    pub xlog_blcksz: u32,
    pub xlog_seg_size: u32,
    pub name_data_len: u32,
    pub index_max_keys: u32,
    pub toast_max_chunk_size: u32,
    pub loblksize: u32,
    pub float8_by_val: bool,
}

impl Default for CompiledSizes {
    /// Those of every 64-bit build with Postgres's default options.
    fn default() -> Self {
        CompiledSizes {
            max_align: 8,
            blcksz: 8192,
            relseg_size: 131_072,
            xlog_blcksz: 8192,
            xlog_seg_size: 16 * 1024 * 1024,
            name_data_len: 64,
            index_max_keys: 32,
            toast_max_chunk_size: 1996,
            loblksize: 2048,
            float8_by_val: true,
        }
    }
}

/// `ControlFileData`.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the module's table and Postgres's header say what they are")]
pub struct ControlFile {
    /// Known from the catalog and control version when decoded; see [`ControlFile::decode`].
    pub major: Major,
    pub system_identifier: u64,
    pub catalog_version: u32,
    pub state: ClusterState,
    /// Seconds since 1970.
    pub time: i64,
    pub checkpoint: Lsn,
    pub checkpoint_copy: CheckPoint,
    pub unlogged_lsn: Lsn,
    pub min_recovery_point: Lsn,
    pub min_recovery_point_tli: u32,
    pub backup_start_point: Lsn,
    pub backup_end_point: Lsn,
    pub backup_end_required: bool,
    pub parameters: Parameters,
    pub sizes: CompiledSizes,
    pub data_checksum_version: u32,
    /// Whether `char` is signed where the cluster was made (18).
    pub default_char_signedness: bool,
    pub mock_authentication_nonce: [u8; NONCE_SIZE],
}

impl ControlFile {
    /// Decodes the file of a cluster of `major`.
    ///
    /// # Errors
    /// When it is too short, of another version, has a wrong CRC, or comes from a machine of another kind.
    pub fn decode(bytes: &[u8], major: Major) -> Result<ControlFile, ControlError> {
        Self::decode_inner(bytes, major).map_err(ControlError)
    }

    fn decode_inner(bytes: &[u8], major: Major) -> Result<ControlFile, String> {
        let mut f = Fields::new(bytes);
        let system_identifier = f.u64()?;
        let version = f.u32()?;
        if version != major.control_version() {
            return Err(format!("is of version {version}, and that of {major:?} is {}", major.control_version()));
        }
        let crc_at = Self::crc_offset(major);
        let stored = Fields::new(bytes.get(crc_at..).unwrap_or(&[])).u32()?;
        let found = crc_fast::crc32_iscsi(&bytes[..crc_at]);
        if found != stored {
            return Err(format!("CRC is {found:08X}, the file says {stored:08X}"));
        }
        let catalog_version = f.u32()?;
        let state = f.u32()?;
        let state = ClusterState::ALL.into_iter().find(|s| *s as u32 == state).ok_or_else(|| format!("state {state} does not exist"))?;
        f.align(8)?;
        let time = f.i64()?;
        let checkpoint = Lsn(f.u64()?);
        let checkpoint_copy = CheckPoint::decode(f.take(CHECKPOINT_SIZE)?, major)?;
        let (unlogged_lsn, min_recovery_point, min_recovery_point_tli) = (Lsn(f.u64()?), Lsn(f.u64()?), f.u32()?);
        f.align(8)?;
        let (backup_start_point, backup_end_point, backup_end_required) = (Lsn(f.u64()?), Lsn(f.u64()?), f.bool()?);
        f.align(4)?;
        let wal_level = f.i32()?;
        let wal_log_hints = f.bool()?;
        f.align(4)?;
        let mut parameters = Parameters {
            max_connections: f.i32()?,
            max_worker_processes: f.i32()?,
            max_wal_senders: f.i32()?,
            max_prepared_transactions: f.i32()?,
            max_locks_per_transaction: f.i32()?,
            wal_level,
            wal_log_hints,
            track_commit_timestamp: false,
        };
        parameters.track_commit_timestamp = f.bool()?;
        f.align(4)?;
        let max_align = f.u32()?;
        let float_format = f64::from_bits(f.u64()?);
        if float_format.to_bits() != FLOAT_FORMAT.to_bits() {
            return Err("comes from a machine whose floating-point numbers are of another kind".to_owned());
        }
        let mut sizes = CompiledSizes {
            max_align,
            blcksz: f.u32()?,
            relseg_size: f.u32()?,
            xlog_blcksz: f.u32()?,
            xlog_seg_size: f.u32()?,
            name_data_len: f.u32()?,
            index_max_keys: f.u32()?,
            toast_max_chunk_size: f.u32()?,
            loblksize: f.u32()?,
            float8_by_val: false,
        };
        sizes.float8_by_val = f.bool()?;
        f.align(4)?;
        let data_checksum_version = f.u32()?;
        let default_char_signedness = if major.control_has_char_signedness() { f.bool()? } else { true };
        let mut mock_authentication_nonce = [0; NONCE_SIZE];
        mock_authentication_nonce.copy_from_slice(f.take(NONCE_SIZE)?);
        Ok(ControlFile {
            major,
            system_identifier,
            catalog_version,
            state,
            time,
            checkpoint,
            checkpoint_copy,
            unlogged_lsn,
            min_recovery_point,
            min_recovery_point_tli,
            backup_start_point,
            backup_end_point,
            backup_end_required,
            parameters,
            sizes,
            data_checksum_version,
            default_char_signedness,
            mock_authentication_nonce,
        })
    }

    fn crc_offset(major: Major) -> usize {
        (COMMON_SIZE + usize::from(major.control_has_char_signedness()) + NONCE_SIZE).next_multiple_of(4)
    }

    /// The whole file, CRC included.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; CONTROL_FILE_SIZE];
        put_u64(&mut out, 0, self.system_identifier);
        put_u32(&mut out, 8, self.major.control_version());
        put_u32(&mut out, 12, self.catalog_version);
        put_u32(&mut out, 16, self.state as u32);
        put_u64(&mut out, 24, self.time as u64);
        put_u64(&mut out, 32, self.checkpoint.0);
        out[40..40 + CHECKPOINT_SIZE].copy_from_slice(&self.checkpoint_copy.encode(self.major));
        put_u64(&mut out, 128, self.unlogged_lsn.0);
        put_u64(&mut out, 136, self.min_recovery_point.0);
        put_u32(&mut out, 144, self.min_recovery_point_tli);
        put_u64(&mut out, 152, self.backup_start_point.0);
        put_u64(&mut out, 160, self.backup_end_point.0);
        out[168] = u8::from(self.backup_end_required);
        let p = &self.parameters;
        put_u32(&mut out, 172, p.wal_level as u32);
        out[176] = u8::from(p.wal_log_hints);
        for (i, value) in
            [p.max_connections, p.max_worker_processes, p.max_wal_senders, p.max_prepared_transactions, p.max_locks_per_transaction]
                .into_iter()
                .enumerate()
        {
            put_u32(&mut out, 180 + i * 4, value as u32);
        }
        out[200] = u8::from(p.track_commit_timestamp);
        let s = &self.sizes;
        put_u32(&mut out, 204, s.max_align);
        put_u64(&mut out, 208, FLOAT_FORMAT.to_bits());
        for (i, value) in [
            s.blcksz,
            s.relseg_size,
            s.xlog_blcksz,
            s.xlog_seg_size,
            s.name_data_len,
            s.index_max_keys,
            s.toast_max_chunk_size,
            s.loblksize,
        ]
        .into_iter()
        .enumerate()
        {
            put_u32(&mut out, 216 + i * 4, value);
        }
        out[248] = u8::from(s.float8_by_val);
        put_u32(&mut out, 252, self.data_checksum_version);
        let mut at = COMMON_SIZE;
        if self.major.control_has_char_signedness() {
            out[at] = u8::from(self.default_char_signedness);
            at += 1;
        }
        out[at..at + NONCE_SIZE].copy_from_slice(&self.mock_authentication_nonce);
        let crc_at = Self::crc_offset(self.major);
        let crc = crc_fast::crc32_iscsi(&out[..crc_at]);
        put_u32(&mut out, crc_at, crc);
        out
    }
}

fn put_u32(out: &mut [u8], at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut [u8], at: usize, value: u64) {
    out[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(major: Major) -> ControlFile {
        ControlFile {
            major,
            system_identifier: 7_000_000_000_000_000_001,
            catalog_version: 202_209_061,
            state: ClusterState::ShutDown,
            time: 1_700_000_000,
            checkpoint: Lsn(0x1_0000_0028),
            checkpoint_copy: CheckPoint {
                redo: Lsn(0x1_0000_0028),
                tli: 3,
                prev_tli: 2,
                full_page_writes: true,
                wal_level: if major >= Major::V17 { 1 } else { 0 },
                next_xid: 1 << 32 | 740,
                next_oid: 24_576,
                next_multi: 1,
                next_multi_offset: 0,
                oldest_xid: 716,
                oldest_xid_db: 1,
                oldest_multi: 1,
                oldest_multi_db: 1,
                time: 1_700_000_001,
                oldest_commit_ts_xid: 5,
                newest_commit_ts_xid: 6,
                oldest_active_xid: 0,
            },
            unlogged_lsn: Lsn(1000),
            min_recovery_point: Lsn(1),
            min_recovery_point_tli: 2,
            backup_start_point: Lsn(3),
            backup_end_point: Lsn(4),
            backup_end_required: true,
            parameters: Parameters { wal_log_hints: true, track_commit_timestamp: true, ..Parameters::default() },
            sizes: CompiledSizes::default(),
            data_checksum_version: 1,
            default_char_signedness: true,
            mock_authentication_nonce: [7; NONCE_SIZE],
        }
    }

    #[test]
    fn the_file_reads_back_and_a_flipped_bit_is_found() {
        for major in Major::ALL {
            let control = sample(major);
            let bytes = control.encode();
            assert_eq!(bytes.len(), CONTROL_FILE_SIZE);
            assert_eq!(ControlFile::decode(&bytes, major), Ok(control));
            let mut torn = bytes.clone();
            torn[100] ^= 1;
            let error = ControlFile::decode(&torn, major).unwrap_err();
            assert!(error.to_string().contains("CRC"), "{error}");
            assert!(ControlFile::decode(&bytes[..200], major).is_err());
        }
        let error = ControlFile::decode(&sample(Major::V15).encode(), Major::V18).unwrap_err();
        assert!(error.to_string().contains("1300"), "names the version found: {error}");
    }

    proptest! {
        #[test]
        fn anything_decodes_or_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            for major in Major::ALL {
                let _ = ControlFile::decode(&bytes, major);
                let _ = CheckPoint::decode(&bytes, major);
            }
        }
    }
}
