//! Base backups of any state.

use std::io::{self, Write};

use bytes::Bytes;
use varve_engine::base_backup::{BackupTimeline, Options, write_base_backup};
use varve_engine::cluster::ClusterFacts;
use varve_postgres::slru::SlruKind;
use varve_postgres::{Fork, Lsn, RelNode, Timestamp};
use varve_storage::history::HistoryWriter;
use varve_storage::key::Key;
use varve_storage::value::Value;
use varve_storage::wal_index::Boundary;
use varve_testing::naive_history::NaiveHistory;

use crate::input::Input;

/// Bytes after which a client is gone: sizes of relations may be anything.
const BYTES_MAX: usize = 8 << 20;
/// Values in a history.
const VALUES_MAX: usize = 64;
const LSN: Lsn = Lsn(0x200_0028);

/// Takes so many bytes.
#[derive(Debug, Default)]
struct Client {
    bytes: usize,
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len();
        if self.bytes > BYTES_MAX { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A base backup of a history with any values is written or refused.
///
/// Input: major, options; then values: kind of the key, two numbers for it, and the value.
pub(crate) fn base_backup(data: &[u8]) {
    let mut input = Input::new(data);
    let (major, flags) = (input.major(), input.u8());
    let history = NaiveHistory::new(major, Lsn(8));
    for _ in 0..VALUES_MAX {
        if input.is_empty() {
            break;
        }
        let (kind, a, b) = (input.u8(), input.u32(), input.u32());
        let bytes = Bytes::copy_from_slice(input.piece());
        let rel = RelNode { spc: a, db: 5, rel: b }.fork(Fork::Main);
        let area = SlruKind::ALL[b as usize % SlruKind::ALL.len()];
        let key = match kind % 10 {
            0 => Key::checkpoint(),
            1 => Key::database(a, b),
            2 => Key::relation_map(a, b),
            3 => Key::tablespace(a),
            4 => Key::two_phase(u64::from(a) << 32 | u64::from(b)),
            5 => Key::replication_origin(a as u16),
            6 => Key::relation_size(rel),
            7 => Key::block(rel, a),
            8 => Key::slru_extent(area),
            _ => Key::slru_page(area, a),
        };
        if history.put(key, LSN, Value::Image(bytes)).is_err() {
            return;
        }
    }
    history.advance(LSN);
    let cluster = ClusterFacts { major, catalog_version: 202_209_061, data_checksum_version: 0, default_char_signedness: true };
    let timeline = BackupTimeline {
        system_identifier: 7,
        tli: 1,
        ancestors: Vec::new(),
        base: Boundary { end: LSN, record_start: Lsn(0x200_0000), next_xid: 800, time_max: Timestamp::MIN, time: None },
        mock_authentication_nonce: [0; 32],
    };
    let options = Options { slru: flags & 1 != 0, relations: flags & 2 != 0, ..Options::default() };
    // That it does not panic, and does not go on for ever, is all there is to see.
    let _ = write_base_backup(&history, &cluster, &timeline, &options, Client::default());
}
