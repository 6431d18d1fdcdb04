//! Reading fields off the front of a message.

use bytes::{Buf, Bytes};

use super::MessageError;

/// The rest of a message, and what to say when it ends early.
pub(super) struct Cursor<B> {
    bytes: B,
    tag: u8,
}

impl<B: Buf> Cursor<B> {
    pub(super) fn new(bytes: B, tag: u8) -> Cursor<B> {
        Cursor { bytes, tag }
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn need(&self, field: &'static str, len: usize) -> Result<(), MessageError> {
        match len.saturating_sub(self.remaining()) {
            0 => Ok(()),
            missing => Err(MessageError::Short { tag: self.tag, field, missing }),
        }
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, MessageError> {
        self.need(field, 1)?;
        Ok(self.bytes.get_u8())
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, MessageError> {
        self.need(field, 4)?;
        Ok(self.bytes.get_u32())
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, MessageError> {
        self.need(field, 8)?;
        Ok(self.bytes.get_u64())
    }

    /// The next `len` bytes: a view where the message is [`Bytes`], else a copy.
    pub(super) fn bytes(&mut self, field: &'static str, len: usize) -> Result<Bytes, MessageError> {
        self.need(field, len)?;
        Ok(self.bytes.copy_to_bytes(len))
    }

    pub(super) fn value_error(&self, what: String) -> MessageError {
        MessageError::Value { tag: self.tag, what }
    }

    /// The message must end here.
    pub(super) fn end(self) -> Result<(), MessageError> {
        match self.remaining() {
            0 => Ok(()),
            extra => Err(MessageError::Long { tag: self.tag, extra }),
        }
    }
}
