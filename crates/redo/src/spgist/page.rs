//! Pages and tuples of SP-GiST.
//!
//! Special space, 8 bytes: flags `u16`, number of redirections `u16`, of placeholders `u16`, page id `u16`.
//!
//! Tuples, all sizes multiples of 8. The lowest two bits of the first `u32` are the state of any of them.
//! - Leaf: `u32` of state and size (30 bits); `u16` whose low 14 bits are the next tuple of the chain; heap pointer, 6
//!   bytes; data.
//! - Inner: `u32` of state, a bit "all the same", number of nodes (13 bits), bytes of the prefix (16 bits); size `u16`;
//!   padding; prefix; nodes, which are index tuples with a pointer down each.
//! - Dead: `u32` of state and size, unused `u16`, for a redirection where it leads (6 bytes) and who made it `u32`.

use varve_postgres::Page;
use varve_postgres::page::{self, BLCKSZ, PAGE_HEADER_SIZE};

use crate::Fault;
use crate::cursor::Cursor;
use crate::index_tuple::{self, INDEX_TUPLE_HEADER_SIZE, ItemPointer};
use crate::item::{
    OffsetNumber, add_item, index_multi_delete, index_tuple_delete, item, item_mut, max_offset, special_space, special_space_mut,
};

/// Page flags.
pub(super) const LEAF: u16 = 1 << 2;
const NULLS: u16 = 1 << 3;

/// Bytes of special space.
const SPECIAL_SIZE: usize = 8;
/// `SPGIST_PAGE_ID`.
const PAGE_ID: u16 = 0xFF82;
/// `SGDTSIZE`: bytes of a dead tuple, and at least of any.
const DEAD_TUPLE_SIZE: usize = 16;
/// `SGITHDRSZ`: bytes of an inner tuple before its prefix.
const INNER_HEADER_SIZE: usize = 8;
/// Bits of a leaf tuple's second field that are the next tuple of its chain.
const NEXT_OFFSET_MASK: u16 = 0x3FFF;

/// What the special space holds (`SpGistPageOpaqueData`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Opaque {
    pub(super) flags: u16,
    pub(super) redirections: u16,
    pub(super) placeholders: u16,
}

impl Opaque {
    pub(super) fn read(page: &Page) -> Result<Opaque, Fault> {
        let mut cursor = Cursor::new(special_space(page, SPECIAL_SIZE)?);
        let opaque = Opaque { flags: cursor.u16()?, redirections: cursor.u16()?, placeholders: cursor.u16()? };
        match cursor.u16()? {
            PAGE_ID => Ok(opaque),
            id => Err(format!("the page has id {id:#06x}, expected SP-GiST's {PAGE_ID:#06x}").into()),
        }
    }

    pub(super) fn write(self, page: &mut Page) -> Result<(), Fault> {
        let space = special_space_mut(page, SPECIAL_SIZE)?;
        for (field, at) in [self.flags, self.redirections, self.placeholders, PAGE_ID].iter().zip((0..).step_by(2)) {
            space[at..at + 2].copy_from_slice(&field.to_le_bytes());
        }
        Ok(())
    }

    /// Counts `tuples` more or fewer placeholders.
    pub(super) fn add_placeholders(&mut self, tuples: isize) -> Result<(), Fault> {
        self.placeholders = count(self.placeholders, tuples, "placeholders")?;
        Ok(())
    }

    /// Counts `tuples` more or fewer redirections.
    pub(super) fn add_redirections(&mut self, tuples: isize) -> Result<(), Fault> {
        self.redirections = count(self.redirections, tuples, "redirections")?;
        Ok(())
    }
}

fn count(before: u16, more: isize, what: &str) -> Result<u16, Fault> {
    let after = isize::try_from(before).ok().and_then(|before| before.checked_add(more)).and_then(|after| u16::try_from(after).ok());
    after.ok_or_else(|| format!("the page says that it has {before} {what}, which cannot change by {more}").into())
}

/// `SpGistInitPage`, of a page for leaf or for inner tuples, in the tree of nulls or in the other.
pub(super) fn init(page: &mut Page, flags: u16, stores_nulls: bool) -> Result<(), Fault> {
    page::init(page, SPECIAL_SIZE);
    let flags = if stores_nulls { flags | NULLS } else { flags };
    Opaque { flags, redirections: 0, placeholders: 0 }.write(page)
}

/// State of a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum State {
    Live = 0,
    Redirect = 1,
    Dead = 2,
    Placeholder = 3,
}

impl State {
    /// That of the tuple `tuple`.
    pub(super) fn of(tuple: &[u8]) -> Result<State, Fault> {
        Ok(match Cursor::new(tuple).u32()? & 3 {
            0 => State::Live,
            1 => State::Redirect,
            2 => State::Dead,
            _ => State::Placeholder,
        })
    }
}

/// A dead tuple (`spgFormDeadTuple`).
#[derive(Clone, Copy, Debug)]
pub(super) enum DeadTuple {
    /// Leads to where the live one went, for searches that began before transaction `xid` moved it.
    Redirect { to: ItemPointer, xid: u32 },
    /// Its chain would break without it.
    Dead,
    /// Nothing leads here; to be used again.
    Placeholder,
}

impl DeadTuple {
    fn to_bytes(self) -> [u8; DEAD_TUPLE_SIZE] {
        let (state, to, xid) = match self {
            DeadTuple::Redirect { to, xid } => (State::Redirect, to, xid),
            DeadTuple::Dead => (State::Dead, ItemPointer::INVALID, 0),
            DeadTuple::Placeholder => (State::Placeholder, ItemPointer::INVALID, 0),
        };
        let mut bytes = [0; DEAD_TUPLE_SIZE];
        bytes[..4].copy_from_slice(&(state as u32 | (DEAD_TUPLE_SIZE as u32) << 2).to_le_bytes());
        bytes[6..12].copy_from_slice(&to.to_bytes());
        bytes[12..].copy_from_slice(&xid.to_le_bytes());
        bytes
    }
}

/// `spgxlogState`: the transaction that redirections name `u32`, whether the index is being built `u8`, padding. While
/// it is built nobody searches, and no redirections are needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writer {
    xid: u32,
    builds: bool,
}

impl Writer {
    pub(super) fn read(main: &mut Cursor<'_>) -> Result<Writer, Fault> {
        let writer = Writer { xid: main.u32()?, builds: main.u8()? != 0 };
        main.take(3)?;
        Ok(writer)
    }

    /// What is left of a tuple that went to `to`.
    pub(super) fn trace(self, to: ItemPointer) -> DeadTuple {
        if self.builds { DeadTuple::Placeholder } else { DeadTuple::Redirect { to, xid: self.xid } }
    }
}

/// Puts `tuple` where tuple `offset` is.
pub(super) fn replace(page: &mut Page, offset: OffsetNumber, tuple: &[u8]) -> Result<(), Fault> {
    index_tuple_delete(page, offset)?;
    add_item(page, tuple, offset, false, false)?;
    Ok(())
}

/// Puts `dead` where tuple `offset` is, and counts it.
pub(super) fn replace_by_dead(page: &mut Page, offset: OffsetNumber, dead: DeadTuple) -> Result<(), Fault> {
    replace(page, offset, &dead.to_bytes())?;
    count_dead(page, dead, 1)
}

fn count_dead(page: &mut Page, dead: DeadTuple, tuples: isize) -> Result<(), Fault> {
    let mut opaque = Opaque::read(page)?;
    match dead {
        DeadTuple::Redirect { .. } => opaque.add_redirections(tuples)?,
        DeadTuple::Placeholder => opaque.add_placeholders(tuples)?,
        DeadTuple::Dead => return Ok(()),
    }
    opaque.write(page)
}

/// `addOrReplaceTuple`: puts `tuple` behind the page's last, or where a placeholder is.
pub(super) fn add_or_replace(page: &mut Page, offset: OffsetNumber, tuple: &[u8]) -> Result<(), Fault> {
    if offset <= max_offset(page) {
        let state = State::of(item(page, offset)?)?;
        if state != State::Placeholder {
            return Err(format!("tuple {offset} is {state:?}, only a placeholder can be used again").into());
        }
        count_dead(page, DeadTuple::Placeholder, -1)?;
        index_tuple_delete(page, offset)?;
    }
    add_item(page, tuple, offset, false, false)?;
    Ok(())
}

/// `spgPageIndexMultiDelete`: puts dead tuples where tuples `offsets` are, `first` for the first of these, `rest` for
/// the others.
pub(super) fn replace_all_by_dead(page: &mut Page, offsets: &[OffsetNumber], first: DeadTuple, rest: DeadTuple) -> Result<(), Fault> {
    let Some(first_offset) = offsets.first() else { return Ok(()) };
    let mut sorted = offsets.to_vec();
    sorted.sort_unstable();
    index_multi_delete(page, &sorted)?;
    let (first_bytes, rest_bytes) = (first.to_bytes(), rest.to_bytes());
    for offset in &sorted {
        let bytes = if offset == first_offset { &first_bytes } else { &rest_bytes };
        add_item(page, bytes, *offset, false, false)?;
    }
    count_dead(page, first, 1)?;
    count_dead(page, rest, offsets.len() as isize - 1)
}

/// Makes node `node` of inner tuple `offset` point to `to` (`spgUpdateNodeLink`).
pub(super) fn set_downlink(page: &mut Page, offset: OffsetNumber, node: u16, to: ItemPointer) -> Result<(), Fault> {
    let tuple = item_mut(page, offset)?;
    let header = Cursor::new(tuple).u32()?;
    let (nodes, prefix_size) = ((header >> 3 & 0x1FFF) as u16, (header >> 16) as usize);
    if node >= nodes {
        return Err(format!("node {node} of inner tuple {offset} does not exist: it has {nodes}").into());
    }
    let mut rest = tuple
        .get_mut(INNER_HEADER_SIZE + prefix_size..)
        .ok_or_else(|| format!("inner tuple {offset} ends within its prefix of {prefix_size} bytes"))?;
    for i in 0..node {
        let size = index_tuple::size(rest)?;
        let (_, behind) = rest
            .split_at_mut_checked(size)
            .filter(|_| size >= INDEX_TUPLE_HEADER_SIZE)
            .ok_or_else(|| format!("node {i} of inner tuple {offset} cannot have {size} bytes"))?;
        rest = behind;
    }
    index_tuple::set_pointer(rest, to)
}

/// `SGLT_SET_NEXTOFFSET`: makes `next` the tuple that follows leaf tuple `offset` in its chain.
pub(super) fn set_next(page: &mut Page, offset: OffsetNumber, next: OffsetNumber) -> Result<(), Fault> {
    let tuple = item_mut(page, offset)?;
    let field = tuple.get_mut(4..6).ok_or_else(|| format!("leaf tuple {offset} is shorter than its header"))?;
    let info = u16::from_le_bytes([field[0], field[1]]) & !NEXT_OFFSET_MASK | next & NEXT_OFFSET_MASK;
    field.copy_from_slice(&info.to_le_bytes());
    Ok(())
}

/// Makes a placeholder of redirection `offset`, in place.
pub(super) fn forget_redirection(page: &mut Page, offset: OffsetNumber) -> Result<(), Fault> {
    let tuple = item_mut(page, offset)?;
    let state = State::of(tuple)?;
    let fields = tuple.first_chunk_mut::<DEAD_TUPLE_SIZE>().filter(|_| state == State::Redirect);
    let fields = fields.ok_or_else(|| format!("tuple {offset} is {state:?}, expected a redirection"))?;
    fields[0] |= State::Placeholder as u8; // of whose two bits a redirection has one
    fields[6..12].copy_from_slice(&ItemPointer::INVALID.to_bytes());
    Ok(())
}

/// Reads a whole leaf tuple.
pub(super) fn take_leaf<'a>(data: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let mut ahead = *data;
    take_tuple(data, (ahead.u32()? >> 2) as usize)
}

/// Reads a whole inner tuple.
pub(super) fn take_inner<'a>(data: &mut Cursor<'a>) -> Result<&'a [u8], Fault> {
    let mut ahead = *data;
    ahead.take(4)?;
    let size = ahead.u16()?;
    take_tuple(data, usize::from(size))
}

fn take_tuple<'a>(data: &mut Cursor<'a>, size: usize) -> Result<&'a [u8], Fault> {
    if !(DEAD_TUPLE_SIZE..=BLCKSZ - PAGE_HEADER_SIZE).contains(&size) {
        return Err(format!("a tuple says that it has {size} bytes").into());
    }
    data.take(size)
}
