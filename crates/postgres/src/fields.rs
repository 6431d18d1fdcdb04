//! Reading the fields of a C structure out of bytes that may be anything.

/// A position in little-endian bytes; each read moves it and fails at the end. No alignment: what the compiler pads is
/// skipped by hand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Fields<'a> {
        Fields { bytes, at: 0 }
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len);
        let slice = end.and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| {
            format!("{len} bytes wanted at offset {}, and there are {}", self.at, self.bytes.len().saturating_sub(self.at))
        })?;
        self.at += len;
        Ok(slice)
    }

    /// `count` items of `size` bytes each; the count comes from outside.
    pub(crate) fn items(&mut self, count: i32, size: usize) -> Result<&'a [u8], String> {
        let count = usize::try_from(count).map_err(|_| format!("a count of {count}"))?;
        self.take(count.checked_mul(size).ok_or_else(|| format!("a count of {count}"))?)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn bool(&mut self) -> Result<bool, String> {
        Ok(self.array::<1>()?[0] != 0)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, String> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn i32(&mut self) -> Result<i32, String> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    pub(crate) fn i64(&mut self) -> Result<i64, String> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Moves to the next multiple of `alignment`, as the compiler pads.
    pub(crate) fn align(&mut self, alignment: usize) -> Result<(), String> {
        let target = self.at.next_multiple_of(alignment);
        self.take(target - self.at).map(|_| ())
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        let rest = self.bytes.get(self.at..).unwrap_or(&[]);
        self.at = self.bytes.len();
        rest
    }
}

/// The 32-bit numbers in `bytes`.
pub(crate) fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}
