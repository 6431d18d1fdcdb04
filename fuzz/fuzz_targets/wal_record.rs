//! `wal_record` of `varve_fuzz_targets` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| varve_fuzz_targets::run("wal_record", data));
