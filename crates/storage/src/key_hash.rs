//! The hash of a key: in memory for hash tables, on disk in the layers' filters, so it never changes.
//!
//! With `a` the key's bytes 0..8 and `b` its bytes 8..16 as little-endian `u64`, `c` its bytes 16..18 as little-endian
//! `u16`, and `fold(x, y)` the upper half of the 128-bit product of `x` and `y`, XORed with its lower half:
//! `fold(fold(a ^ K0, b ^ K1) ^ c ^ K2, K3)`. `K0` differs from each key's kind in its lowest byte, so the inner
//! product never loses `b`.

use std::hash::{BuildHasherDefault, Hasher};

use crate::key::{KEY_SIZE, Key};

const K0: u64 = 0x9E37_79B9_7F4A_7CF5;
const K1: u64 = 0xD1B5_4A32_D192_ED03;
const K2: u64 = 0x8CB9_2BA7_2F3D_8DD7;
const K3: u64 = 0xF135_7AEA_2E62_A9C5;

fn fold(x: u64, y: u64) -> u64 {
    let product = u128::from(x) * u128::from(y);
    (product >> 64) as u64 ^ product as u64
}

/// See the module's doc.
#[inline]
pub fn key_hash(key: &Key) -> u64 {
    hash_bytes(&key.0)
}

#[inline]
fn hash_bytes(k: &[u8; KEY_SIZE]) -> u64 {
    let a = u64::from_le_bytes([k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]]);
    let b = u64::from_le_bytes([k[8], k[9], k[10], k[11], k[12], k[13], k[14], k[15]]);
    let c = u64::from(u16::from_le_bytes([k[16], k[17]]));
    fold(fold(a ^ K0, b ^ K1) ^ c ^ K2, K3)
}

/// Hashes a [`Key`] in a hash table as [`key_hash`] does, and what else there may be beside it more simply.
#[derive(Default, Clone, Copy)]
pub struct KeyHasher(u64);

/// Makes [`KeyHasher`]s.
pub type BuildKeyHasher = BuildHasherDefault<KeyHasher>;

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        match bytes.try_into() {
            Ok(key) => self.0 ^= hash_bytes(key),
            Err(_) => bytes.chunks(8).for_each(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                self.0 = fold(self.0 ^ u64::from_le_bytes(word) ^ K1, K3);
            }),
        }
    }

    /// A key's length, which all keys share.
    #[inline]
    fn write_usize(&mut self, _length: usize) {}
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::Hash;

    use super::*;
    use varve_postgres::{Fork, RelNode};

    #[test]
    fn the_hash_is_what_layers_on_disk_were_written_with() {
        let key = Key::block(RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main), 7);
        assert_eq!(key_hash(&key), 3_901_814_583_538_848_345, "a changed hash makes every filter in the store wrong");
        let mut hasher = KeyHasher::default();
        key.hash(&mut hasher);
        assert_eq!(hasher.finish(), key_hash(&key));
    }

    #[test]
    fn neighbours_spread() {
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(Fork::Main);
        let hashes: Vec<u64> = (0..1 << 16).map(|block| key_hash(&Key::block(rel, block))).collect();
        assert_eq!(hashes.iter().collect::<HashSet<_>>().len(), 1 << 16);
        for shift in [0, 20, 40, 48] {
            let mut buckets = [0u32; 256];
            hashes.iter().for_each(|hash| buckets[(hash >> shift & 0xFF) as usize] += 1);
            let (low, high) = (buckets.iter().min().copied().unwrap(), buckets.iter().max().copied().unwrap());
            assert!(low > 150 && high < 380, "bits from {shift} on fill buckets of 256 unevenly: {low} to {high}");
        }
    }
}
