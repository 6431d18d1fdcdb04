//! `redo_sequence_and_generic` of `varve_fuzz_targets` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| varve_fuzz_targets::run("redo_sequence_and_generic", data));
