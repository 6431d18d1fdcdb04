//! The file `newest`: the number of the newest segment, known from a second place, so that its file cannot go missing
//! in silence.
//!
//! It is made durable after the segment's file and before the segment's first chunk: one small write and fsync for
//! each segment, none for a commit. Older segments need no such note, for a number between two others is missed
//! anyway.
//!
//! Layout, little-endian: two slots of [`SLOT_SIZE`] bytes, one in each half of [`FILE_SIZE`] bytes, written in turn,
//! so that a torn write leaves the one before. The sound one with the higher turn counts; a file without one says
//! nothing.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 4 | magic `VWLN` |
//! | 4 | 1 | format version, 1 |
//! | 5 | 3 | zero |
//! | 8 | 8 | turn |
//! | 16 | 8 | number of the newest segment |
//! | 24 | 4 | CRC-32C of the 24 bytes before |

use std::io;
use std::sync::Arc;

use super::chunk::checksum;
use super::disk::{LogDisk, LogFile};

pub(super) const FILE_NAME: &str = "newest";
const FILE_SIZE: usize = 1024;
const SLOT_SIZE: usize = 28;
/// Power that fails tears no more than one sector.
const SLOT_AT: [usize; 2] = [0, FILE_SIZE / 2];
const MAGIC: [u8; 4] = *b"VWLN";
const VERSION: u8 = 1;

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Newest {
    /// Missing in folders of older releases, until they get their next segment.
    file: Option<Arc<dyn LogFile>>,
    turn: u64,
    number: Option<u64>,
}

/// A note that a newer release wrote.
#[derive(Debug)]
pub(super) struct UnsupportedVersion(pub(super) u8);

impl Newest {
    /// Reads the note in `file`.
    pub(super) fn read(file: Arc<dyn LogFile>) -> io::Result<Result<Newest, UnsupportedVersion>> {
        let mut bytes = [0; FILE_SIZE];
        file.read_at(&mut bytes, 0)?;
        let mut newest = Newest { file: Some(file), turn: 0, number: None };
        for at in SLOT_AT {
            let slot = &bytes[at..at + SLOT_SIZE];
            let u32_at = |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
            let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
            if slot[..4] != MAGIC || checksum(&slot[..24], &[]) != u32_at(24) {
                continue;
            }
            if slot[4] != VERSION {
                return Ok(Err(UnsupportedVersion(slot[4])));
            }
            if u64_at(8) > newest.turn {
                (newest.turn, newest.number) = (u64_at(8), Some(u64_at(16)));
            }
        }
        Ok(Ok(newest))
    }

    /// Number of the newest segment, if it is known.
    pub(super) fn number(&self) -> Option<u64> {
        self.number
    }

    /// Whether there is a note, sound or not.
    pub(super) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// Notes `number` durably.
    pub(super) fn write(&mut self, disk: &dyn LogDisk, number: u64) -> io::Result<()> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => self.file.insert(disk.create(FILE_NAME, FILE_SIZE as u64)?).clone(),
        };
        // After a failure the same slot is tried again: the other one is sound.
        let turn = self.turn + 1;
        let mut slot = Vec::with_capacity(SLOT_SIZE);
        slot.extend_from_slice(&MAGIC);
        slot.extend_from_slice(&[VERSION, 0, 0, 0]);
        slot.extend_from_slice(&turn.to_le_bytes());
        slot.extend_from_slice(&number.to_le_bytes());
        let crc = checksum(&slot, &[]);
        slot.extend_from_slice(&crc.to_le_bytes());
        file.write_at(&slot, SLOT_AT[(turn % 2) as usize] as u64)?;
        file.sync()?;
        (self.turn, self.number) = (turn, Some(number));
        Ok(())
    }
}
