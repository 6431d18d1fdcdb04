//! Bytes as a stored change and a page: redo must not panic, whatever they are.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use varve_postgres::{BLCKSZ, Lsn, Major};
use varve_redo::change::Change;

fuzz_target!(|data: &[u8]| {
    let Some((&[which, split, ..], rest)) = data.split_first_chunk::<3>() else { return };
    let major = Major::ALL[usize::from(which) % Major::ALL.len()];
    let (change, start) = rest.split_at(rest.len() * usize::from(split) / 256);
    let mut page = [0; BLCKSZ];
    let n = start.len().min(BLCKSZ);
    page[..n].copy_from_slice(&start[..n]);
    if let Ok(change) = Change::decode(Bytes::copy_from_slice(change)) {
        let _ = varve_redo::apply(major, Lsn(0x200_0000), 1, &change, &mut page);
    }
});
