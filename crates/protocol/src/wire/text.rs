//! NUL-terminated strings.

use bytes::{Buf, Bytes};

use super::WireError;

/// Takes a NUL-terminated UTF-8 string off the front of `body`.
pub(super) fn take_cstr(body: &mut Bytes, what: &str) -> Result<String, WireError> {
    let bytes = take_cstr_bytes(body, what)?;
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(WireError::malformed(format!("{what} is not UTF-8"))),
    }
}

/// The same for text that a server sends: what is not UTF-8 (before the encoding is agreed on) is replaced.
pub(super) fn take_cstr_lossy(body: &mut Bytes, what: &str) -> Result<String, WireError> {
    Ok(String::from_utf8_lossy(&take_cstr_bytes(body, what)?).into_owned())
}

fn take_cstr_bytes(body: &mut Bytes, what: &str) -> Result<Bytes, WireError> {
    let end = body.iter().position(|&b| b == 0).ok_or_else(|| WireError::malformed(format!("{what} does not end with a NUL")))?;
    let bytes = body.split_to(end);
    body.advance(1);
    Ok(bytes)
}

/// Appends `text` and a NUL; a NUL inside becomes a space, since it would end the string.
pub(super) fn put_cstr(text: &str, out: &mut bytes::BytesMut) {
    out.extend(text.bytes().map(|b| if b == 0 { b' ' } else { b }));
    out.extend_from_slice(&[0]);
}

pub(super) fn take_u16(body: &mut Bytes, what: &str) -> Result<u16, WireError> {
    body.try_get_u16().map_err(|_| WireError::malformed(format!("{what} ends early")))
}

pub(super) fn take_u32(body: &mut Bytes, what: &str) -> Result<u32, WireError> {
    body.try_get_u32().map_err(|_| WireError::malformed(format!("{what} ends early")))
}
