//! Filters: which keys a part of a layer certainly does not have.
//!
//! A Bloom filter with ten bits a key and six probes, which lets one absent key in a hundred through. With `h` the
//! key's [`key_hash`], `g` = `h` rotated left by 32 bits, its lowest bit set, and `n` the filter's bits, probe `i` (0
//! to 5) is bit `((h + i * g) mod 2^64) * n / 2^64`; bit `b` is bit `b mod 8`, the lowest first, of byte `b / 8`.

use crate::key::Key;
use crate::key_hash::key_hash;

const BITS_PER_KEY: usize = 10;
const PROBES: u64 = 6;

fn probes(hash: u64, bytes: usize) -> impl Iterator<Item = usize> {
    let (step, bits) = (hash.rotate_left(32) | 1, bytes as u128 * 8);
    (0..PROBES).map(move |i| ((u128::from(hash.wrapping_add(i.wrapping_mul(step))) * bits) >> 64) as usize)
}

/// Collects keys.
#[derive(Default)]
pub(super) struct FilterBuilder {
    hashes: Vec<u64>,
}

impl FilterBuilder {
    /// Adds a key; the caller leaves out repetitions.
    pub(super) fn push(&mut self, key: &Key) {
        self.hashes.push(key_hash(key));
    }

    /// Keys added.
    pub(super) fn len(&self) -> usize {
        self.hashes.len()
    }

    /// The filter; the builder is empty again.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        let mut filter = vec![0; (self.hashes.len() * BITS_PER_KEY).div_ceil(8)];
        for hash in self.hashes.drain(..) {
            for bit in probes(hash, filter.len()) {
                filter[bit / 8] |= 1 << (bit % 8);
            }
        }
        filter
    }
}

/// Whether the keys that `filter` was made of may include `key`.
pub(super) fn may_contain(filter: &[u8], key: &Key) -> bool {
    probes(key_hash(key), filter.len()).all(|bit| filter.get(bit / 8).is_some_and(|byte| byte & 1 << (bit % 8) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_postgres::{Fork, RelNode};

    #[test]
    fn finds_each_key_and_few_others() {
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main);
        let mut builder = FilterBuilder::default();
        (0..10_000).for_each(|block| builder.push(&Key::block(rel, block)));
        let filter = builder.finish();
        assert_eq!(filter.len(), 12_500);
        assert!((0..10_000).all(|block| may_contain(&filter, &Key::block(rel, block))), "a key that is there is found");
        let wrong = (10_000..110_000).filter(|block| may_contain(&filter, &Key::block(rel, *block))).count();
        assert!(wrong < 1300, "{wrong} of 100,000 absent keys were let through, expected about 900");
        assert!(!may_contain(&builder.finish(), &Key::block(rel, 1)), "an empty filter has no key");
    }
}
