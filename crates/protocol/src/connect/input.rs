//! What a blocking connection has read and not yet used.

use std::io::{self, Read};

use crate::wire::{FRAME_HEADER_SIZE, WireError, peek_frame};

/// Bytes that one read asks for at least.
const READ_SIZE: usize = 64 * 1024;
/// A buffer that grew beyond this for one message is given back afterwards.
const KEEP_SIZE_MAX: usize = 1024 * 1024;

/// A buffer that is filled at its end by reads and gives whole frames from its front.
///
/// It is zeroed once, when it grows, and not for each read; it grows with the bytes that arrive (at most doubling), not
/// with the length that a frame announces.
#[derive(Debug)]
pub struct InputBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for InputBuffer {
    fn default() -> Self {
        InputBuffer { bytes: vec![0; READ_SIZE], start: 0, end: 0 }
    }
}

impl InputBuffer {
    /// Bytes that are there.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether no byte is there.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The next frame; `None` when more must be read. Its bytes stay valid until the next call.
    ///
    /// # Errors
    /// As [`peek_frame`].
    pub fn take_frame(&mut self, body_size_max: usize) -> Result<Option<(u8, &[u8])>, WireError> {
        let Some((tag, body_len)) = peek_frame(&self.bytes[self.start..self.end], body_size_max)? else { return Ok(None) };
        let size = FRAME_HEADER_SIZE + body_len;
        if self.len() < size {
            return Ok(None);
        }
        let body = self.start + FRAME_HEADER_SIZE..self.start + size;
        self.start += size;
        Ok(Some((tag, &self.bytes[body])))
    }

    /// One `read`; how many bytes it gave, and whether it filled the room that there was (so that more may be waiting).
    ///
    /// # Errors
    /// What the read says.
    pub fn read_from(&mut self, source: &mut impl Read) -> io::Result<(usize, bool)> {
        self.read_with(|room| source.read(room))
    }

    /// The same with any way to read into a slice.
    ///
    /// # Errors
    /// What `read` says.
    pub fn read_with(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<(usize, bool)> {
        self.make_room();
        let room = self.bytes.len() - self.end;
        let n = read(&mut self.bytes[self.end..])?;
        self.end += n;
        Ok((n, n == room))
    }

    fn make_room(&mut self) {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
            if self.bytes.len() > KEEP_SIZE_MAX {
                self.bytes = vec![0; READ_SIZE];
            }
        }
        if self.bytes.len() - self.end >= READ_SIZE / 2 {
            return;
        }
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.bytes.len() - self.end < READ_SIZE / 2 {
            self.bytes.resize(self.bytes.len() * 2, 0);
        }
    }
}
