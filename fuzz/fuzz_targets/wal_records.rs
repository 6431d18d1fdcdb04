//! Bytes as a record: decoding, and restoring its page images, must not panic, whatever they are.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use varve_postgres::wal::{Framer, Record};
use varve_postgres::{Lsn, Major};

fuzz_target!(|data: &[u8]| {
    let Some((&which, rest)) = data.split_first() else { return };
    let major = Major::ALL[usize::from(which) % Major::ALL.len()];
    let bytes = Bytes::copy_from_slice(rest);
    if let Ok(record) = Record::decode(&bytes, Lsn(0x100_0028), Lsn(0x100_0028 + rest.len() as u64), major) {
        for block in &record.blocks {
            let _ = block.image.as_ref().map(varve_postgres::wal::image::Image::restore);
        }
    }
    let mut input = bytes;
    let mut framer = Framer::new(major, None, Lsn(0x100_0000), None);
    while let Ok(Some(_)) = framer.next_record(&mut input) {}
});
