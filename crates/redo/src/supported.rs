//! Which record types that change relation blocks there are, so that ingest can refuse one that nobody could redo
//! later.

use varve_postgres::{Major, wal::rmgr};

/// A set of record types: bit `n` for `info` `n << 4`.
type Kinds = u16;

const fn through(last: u8) -> Kinds {
    (2u32 << last) as u16 - 1
}

const fn except(kinds: Kinds, info: u8) -> Kinds {
    kinds & !(1 << (info >> 4))
}

/// Types with the flag `0x80` (`XLOG_HEAP_INIT_PAGE`, `XLOG_BRIN_INIT_PAGE`) as well as without.
const fn with_init_flag(kinds: Kinds) -> Kinds {
    kinds | kinds << 8
}

/// Whether [`crate::apply`] knows how to redo the blocks of records of this type, as `major` writes them. `info`
/// without the flags of the WAL machinery. Types that change no block are supported too.
pub fn is_supported(major: Major, rmid: u8, info: u8) -> bool {
    let kinds: Kinds = match rmid {
        // XLOG_FPI_FOR_HINT, XLOG_FPI; the other types have no blocks and concern ingest alone.
        rmgr::XLOG => 1 << 0xA | 1 << 0xB,
        rmgr::HEAP | rmgr::HEAP2 => with_init_flag(through(7)),
        rmgr::BTREE => through(0xE),
        rmgr::HASH => through(0xC),
        // XLOG_GIN_CREATE_INDEX went with 12.
        rmgr::GIN => except(through(9), 0x00),
        rmgr::GIST => except(except(through(7), 0x40), 0x50),
        rmgr::SEQ | rmgr::GENERIC => through(0),
        rmgr::SPGIST => except(through(8), 0x00),
        rmgr::BRIN => with_init_flag(through(5)),
        _ => 0,
    };
    let _same_types_in_all = major;
    kinds >> (info >> 4) & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_those_that_postgres_has() {
        let yes = [
            (rmgr::HEAP, 0x80),
            (rmgr::HEAP2, 0x70),
            (rmgr::BTREE, 0xE0),
            (rmgr::HASH, 0xC0),
            (rmgr::GIN, 0x90),
            (rmgr::BRIN, 0x90),
            (rmgr::XLOG, 0xB0),
        ];
        let no = [(rmgr::BTREE, 0xF0), (rmgr::HASH, 0xD0), (rmgr::GIN, 0x00), (rmgr::GIST, 0x50), (rmgr::GENERIC, 0x10), (130, 0x00)];
        for (rmid, info) in yes {
            assert!(is_supported(Major::V15, rmid, info), "{} {info:02X} must be supported", rmgr::name(rmid));
        }
        for (rmid, info) in no {
            assert!(!is_supported(Major::V15, rmid, info), "{} {info:02X} does not exist", rmgr::name(rmid));
        }
    }
}
