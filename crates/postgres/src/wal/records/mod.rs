//! Main data of the records that change what Postgres keeps outside relation blocks, one module a resource manager.
//!
//! Each module has its record types as an enum and one `parse(info, data, major)`, where `info` is the record's type
//! (`info & 0xF0`). Parsing is total: a type that the major does not have is [`RecordError::UnknownType`], anything
//! that does not fit is [`RecordError::Malformed`].

pub mod clog;
pub mod commit_ts;
pub mod database;
pub mod multixact;
pub mod relation_map;
pub mod replication_origin;
pub mod standby;
pub mod storage;
pub mod tablespace;
pub mod xact;
pub mod xlog;

/// Main data that could not be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The resource manager has no such record type in this major.
    #[error("unknown record type")]
    UnknownType,
    /// The bytes are not those of the record type.
    #[error("malformed record: {0}")]
    Malformed(String),
}

impl From<String> for RecordError {
    fn from(what: String) -> RecordError {
        RecordError::Malformed(what)
    }
}

/// The page number of an SLRU record, which has 4 or 8 bytes but always fits in 32 bits.
fn slru_page(f: &mut crate::fields::Fields<'_>, major: crate::Major) -> Result<u32, RecordError> {
    let page = if major.slru_page_number_size() == 8 { f.i64()? } else { i64::from(f.i32()?) };
    u32::try_from(page).map_err(|_| RecordError::Malformed(format!("SLRU page number {page}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Major;

    proptest! {
        #[test]
        fn anything_parses_or_is_refused(info in any::<u8>(), data in proptest::collection::vec(any::<u8>(), 0..160)) {
            for major in Major::ALL {
                let _ = clog::parse(info & 0xF0, &data, major);
                let _ = commit_ts::parse(info & 0xF0, &data, major);
                let _ = database::parse(info & 0xF0, &data, major);
                let _ = multixact::parse(info & 0xF0, &data, major);
                let _ = relation_map::parse(info & 0xF0, &data, major);
                let _ = replication_origin::parse(info & 0xF0, &data, major);
                let _ = standby::parse(info & 0xF0, &data, major);
                let _ = storage::parse(info & 0xF0, &data, major);
                let _ = tablespace::parse(info & 0xF0, &data, major);
                let _ = xact::parse(info & 0xF0, &data, major);
                let _ = xlog::parse(info & 0xF0, &data, major);
            }
        }
    }
}
