//! `pg_control`.

use varve_postgres::control::ControlFile;

use crate::input::Input;

/// A control file of any bytes is read or refused; what is read is the same after writing.
///
/// Input: major, whether version and checksum are put right; then the file.
pub(crate) fn control_file(data: &[u8]) {
    const VERSION_AT: usize = 8;
    let mut input = Input::new(data);
    let major = input.major();
    let repair = !input.u8().is_multiple_of(4);
    let mut bytes = input.rest().to_vec();
    // Where `ControlFileData.crc` is: behind the nonce, and in 18 behind a flag that comes before it.
    let crc_at = if major.control_has_char_signedness() { 292 } else { 288 };
    if repair && bytes.len() >= crc_at + 4 {
        bytes[VERSION_AT..VERSION_AT + 4].copy_from_slice(&major.control_version().to_le_bytes());
        let crc = crc_fast::crc32_iscsi(&bytes[..crc_at]);
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    }
    let Ok(control) = ControlFile::decode(&bytes, major) else { return };
    let again = ControlFile::decode(&control.encode(), major).map_err(|error| error.to_string());
    assert_eq!(again, Ok(control), "what was read must be the same after writing");
}
