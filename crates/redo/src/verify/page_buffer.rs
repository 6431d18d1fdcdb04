//! A bounded number of pages in memory; further ones lie in an [`Overflow`].

use varve_postgres::{BLCKSZ, BlockNumber, Page, RelFork, page};

use super::StoreError;

/// Where pages go for which there is no room in memory: numbered slots of one page each.
pub trait Overflow: std::fmt::Debug + Send {
    /// Writes a page into a slot; slots are used from 0 on, without gaps.
    ///
    /// # Errors
    /// When it cannot be kept.
    fn write(&mut self, slot: u64, page: &Page) -> Result<(), StoreError>;

    /// Reads what was written into a slot.
    ///
    /// # Errors
    /// When it cannot be read.
    fn read(&self, slot: u64, page: &mut Page) -> Result<(), StoreError>;
}

/// Whose page it is.
pub(super) type Owner = (RelFork, BlockNumber);

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Frame(usize),
    Slot(u64),
}

#[derive(Debug)]
struct Frame {
    /// None if the frame is free.
    owner: Option<Owner>,
    page: Box<Page>,
    /// Whether it was written since the hand came by.
    used: bool,
}

/// Pages in frames, up to a limit. Which one leaves when there is no room is found by a clock hand that spares what was
/// written lately.
#[derive(Debug)]
pub(super) struct PageBuffer {
    frames: Vec<Frame>,
    free_frames: Vec<usize>,
    frames_max: usize,
    hand: usize,
    overflow: Option<Box<dyn Overflow>>,
    free_slots: Vec<u64>,
    slots: u64,
}

impl PageBuffer {
    /// All pages stay in memory.
    pub(super) fn unlimited() -> PageBuffer {
        PageBuffer {
            frames: Vec::new(),
            free_frames: Vec::new(),
            frames_max: usize::MAX,
            hand: 0,
            overflow: None,
            free_slots: Vec::new(),
            slots: 0,
        }
    }

    /// At most `pages_max` pages stay in memory.
    pub(super) fn limited(pages_max: usize, overflow: Box<dyn Overflow>) -> PageBuffer {
        PageBuffer { frames_max: pages_max.max(1), overflow: Some(overflow), ..PageBuffer::unlimited() }
    }

    /// Keeps a page. Says where, and if another had to leave for it, whose and where that is now.
    pub(super) fn put(&mut self, owner: Owner, page: &Page) -> Result<(Place, Option<(Owner, Place)>), StoreError> {
        if self.free_frames.is_empty() && self.frames.len() < self.frames_max {
            self.frames.push(Frame { owner: Some(owner), page: Box::new(*page), used: true });
            return Ok((Place::Frame(self.frames.len() - 1), None));
        }
        let (index, moved) = match self.free_frames.pop() {
            Some(index) => (index, None),
            None => {
                let index = self.next_victim();
                (index, self.move_out(index)?)
            }
        };
        let frame = &mut self.frames[index];
        frame.owner = Some(owner);
        frame.page.copy_from_slice(page);
        frame.used = true;
        Ok((Place::Frame(index), moved))
    }

    /// Keeps another page in place of the one at `place`.
    pub(super) fn replace(&mut self, place: Place, owner: Owner, page: &Page) -> Result<(Place, Option<(Owner, Place)>), StoreError> {
        match place {
            Place::Frame(index) => {
                let frame = &mut self.frames[index];
                frame.page.copy_from_slice(page);
                frame.used = true;
                Ok((place, None))
            }
            Place::Slot(_) => {
                let put = self.put(owner, page)?;
                self.free(place);
                Ok(put)
            }
        }
    }

    /// The page at `place`.
    pub(super) fn get(&self, place: Place) -> Result<Page, StoreError> {
        match (place, &self.overflow) {
            (Place::Frame(index), _) => Ok(*self.frames[index].page),
            (Place::Slot(slot), Some(overflow)) => {
                let mut page = page::ZERO_PAGE;
                overflow.read(slot, &mut page)?;
                Ok(page)
            }
            (Place::Slot(slot), None) => Err(StoreError(format!("slot {slot} of no overflow"))),
        }
    }

    /// Forgets the page at `place`.
    pub(super) fn free(&mut self, place: Place) {
        match place {
            Place::Frame(index) => {
                self.frames[index].owner = None;
                self.free_frames.push(index);
            }
            Place::Slot(slot) => self.free_slots.push(slot),
        }
    }

    /// Bytes of pages that left memory.
    pub(super) fn overflow_bytes(&self) -> u64 {
        self.slots * BLCKSZ as u64
    }

    fn next_victim(&mut self) -> usize {
        loop {
            self.hand = (self.hand + 1) % self.frames.len();
            if !std::mem::take(&mut self.frames[self.hand].used) {
                return self.hand;
            }
        }
    }

    fn move_out(&mut self, index: usize) -> Result<Option<(Owner, Place)>, StoreError> {
        let (frame, Some(overflow)) = (&self.frames[index], &mut self.overflow) else {
            return Err(StoreError("there is no room for another page, and nowhere to put one".to_owned()));
        };
        let slot = self.free_slots.last().copied().unwrap_or(self.slots);
        overflow.write(slot, &frame.page)?;
        if self.free_slots.pop().is_none() {
            self.slots += 1;
        }
        Ok(frame.owner.map(|owner| (owner, Place::Slot(slot))))
    }
}
