//! Reading fields out of a record's data without ever reading past its end.

use crate::Fault;

/// A position in a record's data; each read moves it and fails at the end. Little-endian, no alignment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { rest: bytes }
    }

    /// The next `len` bytes.
    #[inline]
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or_else(|| ends_early(len, self.rest.len()))?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    #[inline(always)]
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (head, rest) = self.rest.split_first_chunk().ok_or_else(|| ends_early(N, self.rest.len()))?;
        self.rest = rest;
        Ok(*head)
    }

    #[inline(always)]
    pub(crate) fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.array::<1>()?[0])
    }

    #[inline(always)]
    pub(crate) fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    #[inline(always)]
    pub(crate) fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The next `n` numbers of two bytes.
    pub(crate) fn u16s(&mut self, n: usize) -> Result<Vec<u16>, Fault> {
        let (words, _) = self.take(n.saturating_mul(2))?.as_chunks::<2>();
        Ok(words.iter().map(|word| u16::from_le_bytes(*word)).collect())
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> usize {
        self.rest.len()
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

#[cold]
fn ends_early(wanted: usize, left: usize) -> Fault {
    Fault::Inconsistent(format!("the data ends early: {wanted} bytes wanted, {left} left"))
}
