//! `redo_maps_and_slru` of `varve_fuzz_targets` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| varve_fuzz_targets::run("redo_maps_and_slru", data));
