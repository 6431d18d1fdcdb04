//! Tagged messages: `tag u8 | length u32 (itself included, the tag not) | body`.

use bytes::{Buf, Bytes, BytesMut};

use super::WireError;

/// Tag and length.
pub const FRAME_HEADER_SIZE: usize = 5;

/// A whole tagged message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What kind of message; the same letter may mean different things in the two directions.
    pub tag: u8,
    /// What follows the length.
    pub body: Bytes,
}

/// Tag and body length of the frame that `buffer` begins with, as soon as its header is there.
///
/// # Errors
/// When the length cannot be right or the body is longer than `body_size_max`.
pub fn peek_frame(buffer: &[u8], body_size_max: usize) -> Result<Option<(u8, usize)>, WireError> {
    let Some(&[tag, a, b, c, d]) = buffer.first_chunk::<FRAME_HEADER_SIZE>() else { return Ok(None) };
    let len = u32::from_be_bytes([a, b, c, d]);
    let Some(body_len) = (len as usize).checked_sub(4) else {
        return Err(WireError::malformed(format!("message with tag {} and length {len}, which is less than 4", show_tag(tag))));
    };
    if body_len > body_size_max {
        return Err(WireError::TooLong { what: format!("message with tag {}", show_tag(tag)), len: u64::from(len), max: body_size_max });
    }
    Ok(Some((tag, body_len)))
}

/// Takes a whole frame off the front of `buffer`; `None` when more bytes are needed.
///
/// # Errors
/// As [`peek_frame`].
pub fn take_frame(buffer: &mut BytesMut, body_size_max: usize) -> Result<Option<Frame>, WireError> {
    match peek_frame(buffer, body_size_max)? {
        Some((tag, body_len)) if buffer.len() >= FRAME_HEADER_SIZE + body_len => {
            buffer.advance(FRAME_HEADER_SIZE);
            Ok(Some(Frame { tag, body: buffer.split_to(body_len).freeze() }))
        }
        _ => Ok(None),
    }
}

/// Appends a frame whose body is what `body` appends.
pub fn put_frame(tag: u8, out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.extend_from_slice(&[tag, 0, 0, 0, 0]);
    body(out);
    let len = (out.len() - start - 1) as u32;
    out[start + 1..start + FRAME_HEADER_SIZE].copy_from_slice(&len.to_be_bytes());
}

/// A tag as people write it: `'Q'`, or its number when it is no letter.
pub(super) fn show_tag(tag: u8) -> String {
    if tag.is_ascii_graphic() { format!("'{}'", char::from(tag)) } else { format!("{tag}") }
}
