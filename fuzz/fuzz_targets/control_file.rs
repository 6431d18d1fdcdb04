//! Bytes as pg_control of each major: decoding must not panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use varve_postgres::Major;
use varve_postgres::control::ControlFile;

fuzz_target!(|data: &[u8]| {
    for major in Major::ALL {
        let _ = ControlFile::decode(data, major);
    }
});
