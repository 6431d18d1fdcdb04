//! Writing a layer, from the first byte to the last, in bounded memory.

use std::io::Write;

use crc_fast::{CrcAlgorithm, Digest};
use varve_postgres::Lsn;

use super::block::{BLOCK_BYTES_TARGET, BlockBuilder};
use super::filter::FilterBuilder;
use super::index::{Handle, PARTITION_BLOCKS_MAX, PARTITION_KEYS_TARGET, Partition, Top};
use super::{DATA_BLOCK, Footer, LayerError, LayerInfo, PARTITION, TOP, envelope_checksum};
use crate::chain::Version;
use crate::envelope::{self, Codec, Format};
use crate::ids::LayerId;
use crate::key::Key;

/// When blocks and partitions are closed.
#[derive(Clone, Copy)]
struct Limits {
    block_bytes: usize,
    partition_blocks: usize,
    partition_keys: usize,
}

const LIMITS: Limits =
    Limits { block_bytes: BLOCK_BYTES_TARGET, partition_blocks: PARTITION_BLOCKS_MAX, partition_keys: PARTITION_KEYS_TARGET };

/// Writes versions, which come in order, to `out`. In memory are one data block, one filter, and what becomes the
/// index: about a hundredth of the layer.
pub struct LayerWriter<W> {
    object: String,
    id: LayerId,
    lsn_start: Lsn,
    lsn_end: Lsn,
    codec: Codec,
    limits: Limits,
    out: W,
    written_bytes: u64,
    checksum: Digest,
    versions: u64,
    first_key: Key,
    last: Option<(Key, Lsn)>,
    block: BlockBuilder,
    /// The key before the block's first version.
    key_before_block: Option<Key>,
    filter: FilterBuilder,
    /// Data blocks of the partition.
    blocks: Vec<Handle>,
    /// Finished partitions: handle of the first block, and content.
    partitions: Vec<(Handle, Vec<u8>)>,
}

impl<W: Write> LayerWriter<W> {
    /// A writer of the layer `id`, called `object` in messages, of versions in `lsn_start..lsn_end`.
    pub fn new(object: String, id: LayerId, lsn_start: Lsn, lsn_end: Lsn, codec: Codec, out: W) -> LayerWriter<W> {
        LayerWriter {
            object,
            id,
            lsn_start,
            lsn_end,
            codec,
            limits: LIMITS,
            out,
            written_bytes: 0,
            checksum: Digest::new(CrcAlgorithm::Crc32Iscsi),
            versions: 0,
            first_key: Key::MIN,
            last: None,
            block: BlockBuilder::new(lsn_start),
            key_before_block: None,
            filter: FilterBuilder::default(),
            blocks: Vec::new(),
            partitions: Vec::new(),
        }
    }

    /// The same with tiny blocks and partitions, so that a test needs no megabytes to have many.
    #[cfg(test)]
    pub(super) fn tiny(self) -> LayerWriter<W> {
        LayerWriter { limits: Limits { block_bytes: 100, partition_blocks: 4, partition_keys: 7 }, ..self }
    }

    /// Bytes written so far; what is in the block that is being filled does not count.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Adds the next version: greater key, or same key and not newer.
    ///
    /// # Errors
    /// When it is out of order or out of range, or cannot be written.
    pub fn push(&mut self, key: &Key, version: &Version) -> Result<(), LayerError> {
        let in_range = self.lsn_start < version.lsn && version.lsn <= self.lsn_end;
        let in_order = self.last.is_none_or(|(last, lsn)| last < *key || last == *key && lsn >= version.lsn);
        if !in_range || !in_order {
            let (start, end) = (self.lsn_start, self.lsn_end);
            let problem = format!("{key} at {} comes after {:?} in a layer of {start}..{end}", version.lsn, self.last);
            return Err(self.write_error(problem));
        }
        if self.block.content().len() >= self.limits.block_bytes {
            self.finish_block()?;
        }
        if self.last.is_none() {
            self.first_key = *key;
        }
        // A key whose versions go on in the next partition is in the filters of both.
        let is_first_in_partition = self.filter.len() == 0;
        if is_first_in_partition || self.last.is_none_or(|(last, _)| last != *key) {
            self.filter.push(key);
        }
        self.block.push(key, version);
        self.last = Some((*key, version.lsn));
        self.versions += 1;
        Ok(())
    }

    /// Writes the rest; gives what the layer is. At least one version must have been added.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> Result<(LayerInfo, W), LayerError> {
        let Some((last_key, _)) = self.last else { return Err(self.write_error("it has no versions".to_owned())) };
        self.finish_block()?;
        self.finish_partition();
        let mut partitions = Vec::with_capacity(self.partitions.len());
        for (first, content) in std::mem::take(&mut self.partitions) {
            let handle = self.write_envelope(&PARTITION, &content)?;
            partitions.push(Handle { key: first.key, lsn: first.lsn, continues: first.continues, ..handle });
        }
        let (lsn_start, lsn_end, versions) = (self.lsn_start, self.lsn_end, self.versions);
        let top = Top { id: self.id, lsn_start, lsn_end, versions, last_key, partitions: partitions.into() };
        let top = self.write_envelope(&TOP, &top.encode())?;
        self.write(&Footer { top_offset: top.offset, top_length: top.length, top_checksum: top.checksum }.encode())?;
        self.out.flush().map_err(|error| self.write_error(error.to_string()))?;
        let info = LayerInfo {
            id: self.id,
            first_key: self.first_key,
            last_key,
            lsn_start,
            lsn_end,
            versions,
            length: self.written_bytes,
            codec: self.codec,
            checksum: self.checksum.finalize() as u32,
        };
        Ok((info, self.out))
    }

    fn finish_block(&mut self) -> Result<(), LayerError> {
        let Some((key, lsn)) = self.block.first() else { return Ok(()) };
        let content = std::mem::replace(&mut self.block, BlockBuilder::new(self.lsn_start));
        let handle = self.write_envelope(&DATA_BLOCK, content.content())?;
        let continues = self.key_before_block == Some(key);
        self.blocks.push(Handle { key, lsn, continues, ..handle });
        self.key_before_block = self.last.map(|(key, _)| key);
        // The buffer is used again, unless a large value has blown it up.
        if content.content().len() <= 4 * BLOCK_BYTES_TARGET {
            self.block = content;
            self.block.clear();
        }
        if self.blocks.len() >= self.limits.partition_blocks || self.filter.len() >= self.limits.partition_keys {
            self.finish_partition();
        }
        Ok(())
    }

    fn finish_partition(&mut self) {
        if let Some(first) = self.blocks.first().copied() {
            let content = Partition::encode(&self.filter.finish(), &self.blocks);
            self.blocks.clear();
            self.partitions.push((first, content));
        }
    }

    /// Writes an envelope; gives its place, and a handle otherwise empty.
    fn write_envelope(&mut self, format: &Format, content: &[u8]) -> Result<Handle, LayerError> {
        let bytes =
            envelope::encode(format, self.codec, &self.object, content).map_err(|error| self.write_error(super::problem_of(&error)))?;
        let length = u32::try_from(bytes.len()).map_err(|_| self.write_error(format!("{} of {} bytes", format.what, bytes.len())))?;
        let offset = self.written_bytes;
        self.write(&bytes)?;
        Ok(Handle { key: Key::MIN, lsn: Lsn::INVALID, continues: false, offset, length, checksum: envelope_checksum(&bytes) })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.out.write_all(bytes).map_err(|error| self.write_error(error.to_string()))?;
        self.checksum.update(bytes);
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    fn write_error(&self, problem: String) -> LayerError {
        LayerError::Write { object: self.object.clone(), problem }
    }
}
