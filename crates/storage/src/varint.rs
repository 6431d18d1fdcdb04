//! Numbers in as few bytes as they need: seven bits in a byte, the lowest first, the highest bit set in all bytes but
//! the last.

/// Appends `value`.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a number off `bytes` at `at`; `None` if they end before it does.
pub(crate) fn take_varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varints_round_trip(value in any::<u64>(), shift in 0u32..64) {
            let (mut out, mut at) = (Vec::new(), 0);
            put_varint(&mut out, value >> shift);
            prop_assert_eq!(take_varint(&out, &mut at), Some(value >> shift));
            prop_assert_eq!(at, out.len());
        }
    }
}
