//! WAL of the timeline from before the boundary, as its computes wrote it.
//!
//! A server needs none of it to start. Whoever reads WAL through a slot begins where the slot stands, and a standby
//! asks from the start of its segment on. What stands before it in that segment is filled as before a boundary
//! ([`varve_postgres::wal::synthesis`]).

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use bytes::Bytes;
use varve_postgres::Lsn;
use varve_postgres::lsn::{WAL_SEGMENT_SIZE, wal_segment_name};
use varve_postgres::wal::synthesis::{BaseWal, BaseWalFiles, base_wal};

use super::files::TarWriter;
use super::state::StateAt;
use super::{BackupTimeline, BaseBackupError};
use crate::cluster::ClusterFacts;

/// Gives WAL from the first position on, which lies before the second: at least a byte, and none from behind that.
pub type ReadWal = dyn Fn(Lsn, Lsn) -> io::Result<Bytes> + Send + Sync;

/// See the [module](self).
#[derive(Clone)]
pub struct WalBefore {
    /// Where it begins: with a record, or at the start of a segment.
    pub start: Lsn,
    /// The bytes up to the boundary.
    pub read: Arc<ReadWal>,
}

impl fmt::Debug for WalBefore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WalBefore(from {})", self.start)
    }
}

impl WalBefore {
    /// Writes the segments before that of the boundary, and puts what stands before the boundary into its own.
    pub(super) fn write<W: Write>(
        &self,
        tar: &mut TarWriter<W>,
        cluster: &ClusterFacts,
        timeline: &BackupTimeline,
        at: &StateAt,
        wal: &mut BaseWalFiles,
    ) -> Result<(), BaseBackupError> {
        let end = timeline.base.end;
        let own_segment = wal.checkpoint_start.segment_start();
        let mut from = self.start;
        while from < own_segment {
            let segment_end = from.segment_start() + WAL_SEGMENT_SIZE;
            let filled = self.filling(from, cluster, timeline, at);
            let bytes = filled.chain(Reading { at: from, end: segment_end.min(end), read: &*self.read, chunk: Bytes::new() });
            tar.stream(&format!("pg_wal/{}", wal_segment_name(timeline.tli, from.segment_number())), WAL_SEGMENT_SIZE, bytes)?;
            from = segment_end;
        }
        if let Some(segment) = wal.segments.first_mut()
            && from < end
        {
            let mut bytes = Vec::new();
            Reading { at: from, end, read: &*self.read, chunk: Bytes::new() }.read_to_end(&mut bytes)?;
            let (start, end) = (from.segment_offset() as usize, end.distance_from(own_segment) as usize);
            if let Some(place) = segment.bytes.get_mut(start..end) {
                place.copy_from_slice(&bytes);
            }
        }
        Ok(())
    }

    /// What stands before `from` in its segment.
    fn filling(&self, from: Lsn, cluster: &ClusterFacts, timeline: &BackupTimeline, at: &StateAt) -> io::Cursor<Vec<u8>> {
        let before = from.segment_offset() as usize;
        if before == 0 {
            return io::Cursor::default();
        }
        let filled = base_wal(&BaseWal {
            major: cluster.major,
            system_identifier: timeline.system_identifier,
            base: from,
            prev_record: Lsn::INVALID,
            checkpoint: at.checkpoint(timeline.tli, timeline.tli, 0),
        });
        let mut bytes = filled.segments.into_iter().next().map(|segment| segment.bytes).unwrap_or_default();
        bytes.resize(before, 0);
        io::Cursor::new(bytes)
    }
}

/// WAL as it is read.
struct Reading<'a> {
    at: Lsn,
    end: Lsn,
    read: &'a ReadWal,
    chunk: Bytes,
}

impl Read for Reading<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() && self.at < self.end {
            self.chunk = (self.read)(self.at, self.end)?;
            self.at += self.chunk.len() as u64;
        }
        let taken = self.chunk.split_to(self.chunk.len().min(out.len()));
        out[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}
