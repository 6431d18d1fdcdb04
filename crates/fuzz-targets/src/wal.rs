//! WAL: framing, decoding, images.

use bytes::Bytes;
use varve_postgres::lsn::WAL_SEGMENT_SIZE;
use varve_postgres::wal::records::{
    clog, commit_ts, database, multixact, relation_map, replication_origin, standby, storage, tablespace, xact, xlog,
};
use varve_postgres::wal::{FramedRecord, Framer, PlainRecord, RECORD_HEADER_SIZE, Record, WalError};
use varve_postgres::{Lsn, Major};
use varve_redo::change::{BlockRecord, Change};
use varve_redo::visibility_map::visibility_map_clears;

use crate::input::Input;

/// A stream of WAL pages is framed the same however it is cut, and what is framed can be decoded or is refused.
///
/// Input: major, whether it begins within a segment, where it is cut; then the stream.
pub(crate) fn stream(data: &[u8]) {
    let mut input = Input::new(data);
    let major = input.major();
    let within = u64::from(input.u8() % 4) * 8192;
    let cut = usize::from(input.u16());
    let bytes = input.rest();
    let start = Lsn(WAL_SEGMENT_SIZE + within);
    let whole = frame(major, start, &[bytes]);
    let (head, tail) = bytes.split_at(cut.min(bytes.len()));
    let (first, second) = tail.split_at(tail.len() / 2);
    let pieces = frame(major, start, &[head, first, second]);
    assert_eq!(whole, pieces, "records must not depend on how the stream is cut");
    for (record_start, record_end, bytes) in whole.0 {
        if let Ok(record) = Record::decode(&bytes, record_start, record_end, major) {
            look_at(&record, major);
        }
    }
}

type Framed = (Vec<(Lsn, Lsn, Bytes)>, Option<WalError>);

fn frame(major: Major, start: Lsn, pieces: &[&[u8]]) -> Framed {
    let mut framer = Framer::from_page(major, None, start);
    let mut records = Vec::new();
    for piece in pieces {
        let mut input = Bytes::copy_from_slice(piece);
        loop {
            match framer.next_record(&mut input) {
                Ok(Some(FramedRecord { start, end, bytes })) => records.push((start, end, bytes)),
                Ok(None) => break,
                Err(error) => return (records, Some(error)),
            }
        }
    }
    (records, None)
}

/// A record of any bytes is decoded, with all that is in it, or refused.
///
/// Input: major; then the record, whose length is put right.
pub(crate) fn record(data: &[u8]) {
    let mut input = Input::new(data);
    let major = input.major();
    let mut bytes = input.rest().to_vec();
    bytes.resize(bytes.len().max(RECORD_HEADER_SIZE), 0);
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    let record = Record::decode(&bytes, Lsn(0x100_0028), Lsn(0x100_0100), major);
    if let Some(plain) = PlainRecord::decode(&bytes) {
        let record = record.as_ref().expect("a plain record is a record");
        assert_eq!(record.blocks.len(), 1, "a plain record has one block");
        let block = &record.blocks[0];
        assert_eq!((block.rel, block.blkno, block.data, record.main_data), (plain.rel, plain.blkno, plain.data, plain.main_data));
    }
    if let Ok(record) = record {
        look_at(&record, major);
    }
}

/// Everything that is done to a record before redo.
fn look_at(record: &Record<'_>, major: Major) {
    let (kind, data) = (record.kind(), record.main_data);
    // Each reads its own resource manager's records, but must stand those of others.
    let _ = xact::parse(kind, data, major);
    let _ = storage::parse(kind, data, major);
    let _ = database::parse(kind, data, major);
    let _ = clog::parse(kind, data, major);
    let _ = commit_ts::parse(kind, data, major);
    let _ = multixact::parse(kind, data, major);
    let _ = relation_map::parse(kind, data, major);
    let _ = replication_origin::parse(kind, data, major);
    let _ = standby::parse(kind, data, major);
    let _ = tablespace::parse(kind, data, major);
    let _ = xlog::parse(kind, data, major);
    for (_, _, change) in visibility_map_clears(record) {
        assert_eq!(Change::decode(&change.encode()).as_ref(), Ok(&change), "a change must survive being stored");
    }
    for block in &record.blocks {
        let change = Change::Record(BlockRecord::trim(record, block));
        assert_eq!(Change::decode(&change.encode()).as_ref(), Ok(&change), "a change must survive being stored");
        let _ = varve_redo::restore_image(record, block, &mut varve_postgres::page::ZERO_PAGE.clone());
    }
}

/// A full-page image of any bytes is restored or refused.
///
/// Input: major, image flags, offset of the hole, its length, resource manager; then the image's bytes.
pub(crate) fn image(data: &[u8]) {
    /// Block 0 of the main fork, with an image.
    const BLOCK_ID: u8 = 0;
    const HAS_IMAGE: u8 = 0x10;
    let mut input = Input::new(data);
    let major = input.major();
    let (flags, hole_offset, hole_len, rmid) = (input.u8(), input.u16(), input.u16(), input.u8());
    let image = input.take(usize::from(u16::MAX));
    let compressed = flags & if major == Major::V14 { 0x02 } else { 0x1C } != 0;
    let mut bytes = vec![0; RECORD_HEADER_SIZE];
    bytes[17] = rmid;
    bytes.extend_from_slice(&[BLOCK_ID, HAS_IMAGE, 0, 0]);
    bytes.extend_from_slice(&(image.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&hole_offset.to_le_bytes());
    bytes.push(flags);
    if compressed && flags & 1 != 0 {
        bytes.extend_from_slice(&hole_len.to_le_bytes());
    }
    for number in [1663u32, 5, 16384, 7] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(image);
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    if let Ok(record) = Record::decode(&bytes, Lsn(0x100_0028), Lsn(0x100_0100), major) {
        look_at(&record, major);
    }
}
