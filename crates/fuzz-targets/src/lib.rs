//! What is fuzzed: each target is a function that takes any bytes, and panics when something is not as it must be.
//!
//! The functions are apart from `fuzz/fuzz_targets` (which only hands libFuzzer's bytes to them, and needs a nightly
//! compiler) so that an ordinary test replays the corpora, `fuzz/corpus/<target>/`, on every run. `scripts/fuzz` runs
//! the fuzzer itself; `cargo run -p varve-fuzz-targets --example seeds` makes the corpora anew from the WAL of real
//! servers.

#![allow(clippy::panic, reason = "a target panics when something is wrong")]

mod backup;
mod control;
mod input;
mod layer;
mod messages;
pub mod redo;
mod wal;

use varve_postgres::wal::rmgr;

/// A target's name and function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 20] = [
    ("wal_stream", wal::stream),
    ("wal_record", wal::record),
    ("image", wal::image),
    ("control_file", control::control_file),
    ("page_service", messages::page_service),
    ("wire", messages::wire),
    ("layer", layer::layer),
    ("base_backup", backup::base_backup),
    ("redo_xlog", |data| redo::redo(rmgr::XLOG, data)),
    ("redo_heap", |data| redo::redo(rmgr::HEAP, data)),
    ("redo_heap2", |data| redo::redo(rmgr::HEAP2, data)),
    ("redo_heap_series", redo::heap_series),
    ("redo_btree", |data| redo::redo(rmgr::BTREE, data)),
    ("redo_hash", |data| redo::redo(rmgr::HASH, data)),
    ("redo_gin", |data| redo::redo(rmgr::GIN, data)),
    ("redo_gist", |data| redo::redo(rmgr::GIST, data)),
    ("redo_spgist", |data| redo::redo(rmgr::SPGIST, data)),
    ("redo_brin", |data| redo::redo(rmgr::BRIN, data)),
    ("redo_sequence_and_generic", redo::sequence_and_generic),
    ("redo_maps_and_slru", redo::maps_and_slru),
];

/// Runs the target `name` on `data`.
///
/// # Panics
/// When the target finds something, or there is none of that name.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|(other, _)| *other == name);
    target.unwrap_or_else(|| panic!("there is no fuzz target '{name}'")).1(data);
}
