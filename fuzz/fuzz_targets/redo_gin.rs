//! `redo_gin` of `varve_fuzz_targets` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| varve_fuzz_targets::run("redo_gin", data));
