//! The 8 KiB page: header, line pointers, checksum. Follows `storage/bufpage.h` and `storage/checksum_impl.h`.

use crate::Lsn;

/// Bytes in a page.
pub const BLCKSZ: usize = 8192;
/// Bytes in a page header (`SizeOfPageHeaderData`).
pub const PAGE_HEADER_SIZE: usize = 24;
/// `PG_PAGE_LAYOUT_VERSION`.
pub const PAGE_LAYOUT_VERSION: u16 = 4;

/// `PD_HAS_FREE_LINES` of `pd_flags`.
pub const PD_HAS_FREE_LINES: u16 = 1;
/// `PD_PAGE_FULL` of `pd_flags`.
pub const PD_PAGE_FULL: u16 = 2;
/// `PD_ALL_VISIBLE` of `pd_flags`.
pub const PD_ALL_VISIBLE: u16 = 4;

/// A page's bytes.
pub type Page = [u8; BLCKSZ];

/// A page of zeros: what a block is before anything was written to it.
pub const ZERO_PAGE: Page = [0; BLCKSZ];

fn u16_at(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn put_u16(page: &mut Page, at: usize, value: u16) {
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// `PageGetLSN`.
pub fn lsn(page: &Page) -> Lsn {
    let word = |at: usize| u64::from(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]));
    Lsn(word(0) << 32 | word(4))
}

/// `PageSetLSN`.
pub fn set_lsn(page: &mut Page, lsn: Lsn) {
    page[0..4].copy_from_slice(&((lsn.0 >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn.0 as u32).to_le_bytes());
}

/// `pd_checksum`.
pub fn checksum(page: &Page) -> u16 {
    u16_at(page, 8)
}

/// Sets `pd_checksum`.
pub fn set_checksum(page: &mut Page, value: u16) {
    put_u16(page, 8, value);
}

/// `pd_flags`.
pub fn flags(page: &Page) -> u16 {
    u16_at(page, 10)
}

/// Sets `pd_flags`.
pub fn set_flags(page: &mut Page, value: u16) {
    put_u16(page, 10, value);
}

/// `pd_lower`: end of the line pointers.
pub fn lower(page: &Page) -> u16 {
    u16_at(page, 12)
}

/// Sets `pd_lower`.
pub fn set_lower(page: &mut Page, value: u16) {
    put_u16(page, 12, value);
}

/// `pd_upper`: start of the newest tuple.
pub fn upper(page: &Page) -> u16 {
    u16_at(page, 14)
}

/// Sets `pd_upper`.
pub fn set_upper(page: &mut Page, value: u16) {
    put_u16(page, 14, value);
}

/// `pd_special`: start of the access method's own space at the page's end.
pub fn special(page: &Page) -> u16 {
    u16_at(page, 16)
}

/// `pd_prune_xid`.
pub fn prune_xid(page: &Page) -> u32 {
    u32::from_le_bytes([page[20], page[21], page[22], page[23]])
}

/// Sets `pd_prune_xid`.
pub fn set_prune_xid(page: &mut Page, xid: u32) {
    page[20..24].copy_from_slice(&xid.to_le_bytes());
}

/// `PageIsNew`: never initialised (its `pd_upper` is zero).
pub fn is_new(page: &Page) -> bool {
    upper(page) == 0
}

/// `PageInit`: an empty page with `special_size` bytes (rounded up to 8) of special space.
pub fn init(page: &mut Page, special_size: usize) {
    let special = BLCKSZ - special_size.next_multiple_of(8).min(BLCKSZ - PAGE_HEADER_SIZE);
    page.fill(0);
    put_u16(page, 12, PAGE_HEADER_SIZE as u16);
    put_u16(page, 14, special as u16);
    put_u16(page, 16, special as u16);
    put_u16(page, 18, BLCKSZ as u16 | PAGE_LAYOUT_VERSION);
}

/// `pg_checksum_page`: the page's checksum as block `block` of its fork, as if `pd_checksum` were zero.
pub fn compute_checksum(page: &Page, block: u32) -> u16 {
    const N_SUMS: usize = 32;
    const FNV_PRIME: u32 = 16_777_619;
    const BASE_OFFSETS: [u32; N_SUMS] = [
        0x5B1F_36E9,
        0xB852_5960,
        0x02AB_50AA,
        0x1DE6_6D2A,
        0x79FF_467A,
        0x9BB9_F8A3,
        0x217E_7CD2,
        0x83E1_3D2C,
        0xF8D4_474F,
        0xE39E_B970,
        0x42C6_AE16,
        0x9932_16FA,
        0x7B09_3B5D,
        0x98DA_FF3C,
        0xF718_902A,
        0x0B1C_9CDB,
        0xE58F_764B,
        0x1876_36BC,
        0x5D7B_3BB1,
        0xE73D_E7DE,
        0x92BE_C979,
        0xCCA6_C0B2,
        0x304A_0979,
        0x85AA_43D4,
        0x7831_25BB,
        0x6CA8_EAA2,
        0xE407_EAC6,
        0x4B5C_FC3E,
        0x9FBF_8C76,
        0x15CA_20BE,
        0xF2CA_9FD3,
        0x959B_D756,
    ];
    fn mix(sum: u32, value: u32) -> u32 {
        let t = sum ^ value;
        t.wrapping_mul(FNV_PRIME) ^ (t >> 17)
    }
    let mut sums = BASE_OFFSETS;
    for (row, chunk) in page.chunks_exact(4 * N_SUMS).enumerate() {
        for (i, word) in chunk.chunks_exact(4).enumerate() {
            let mut value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            if row == 0 && i == 2 {
                value &= 0xFFFF_0000; // pd_checksum itself counts as zero
            }
            sums[i] = mix(sums[i], value);
        }
    }
    for _ in 0..2 {
        for sum in &mut sums {
            *sum = mix(*sum, 0);
        }
    }
    let all = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    (all % 65535 + 1) as u16
}
