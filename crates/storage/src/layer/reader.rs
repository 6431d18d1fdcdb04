//! Reading a layer: the versions that lookups want, or all of them in order.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use varve_postgres::Lsn;

use super::blob::LayerBlob;
use super::block::{BlockIter, MALFORMED};
use super::index::{Handle, Partition, Top, seek};
use super::{DATA_BLOCK, FOOTER_SIZE, Footer, LayerError, LayerInfo, PARTITION, TOP, open_envelope};
use crate::block_cache::BlockCache;
use crate::chain::{Lookup, Version};
use crate::key::Key;

/// Bytes at an object's end that are read first: the footer, and with it most tops.
const TAIL_BYTES: u64 = 8 << 10;
/// Bytes that one request reads at most, when it reads more than one block.
const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// Bytes that nobody wants, and that are read all the same when this saves a request.
const REQUEST_GAP_BYTES_MAX: u64 = 16 << 10;

/// A layer that can be read. Nothing is read before it is needed.
pub struct Layer {
    info: LayerInfo,
    object: String,
    /// Where in the object it begins.
    start: u64,
    is_own: bool,
    blob: Box<dyn LayerBlob>,
    top: OnceLock<Top>,
}

/// Whether a lookup has what it wants from a layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    /// The block ended, versions of the key may go on in the next.
    GoOn,
}

impl Layer {
    /// The layer that `info` tells of, from `start` on in the object `object`, whose bytes `blob` reads.
    pub fn new(info: LayerInfo, object: String, start: u64, blob: Box<dyn LayerBlob>) -> Layer {
        Layer { info, object, start, is_own: false, blob, top: OnceLock::new() }
    }

    /// The layer as one whose object is the reading timeline's own.
    pub fn into_own(self) -> Layer {
        Layer { is_own: true, ..self }
    }

    /// Whether its object is the reading timeline's own, to merge away and delete.
    pub fn is_own(&self) -> bool {
        self.is_own
    }

    /// What is known of it without reading it.
    pub fn info(&self) -> &LayerInfo {
        &self.info
    }

    /// Its object's name.
    pub fn object(&self) -> &str {
        &self.object
    }

    fn corrupt(&self, offset: u64, key: Option<Key>, problem: impl Into<String>) -> LayerError {
        LayerError::Corrupt { object: self.object.clone(), offset, key, problem: problem.into() }
    }

    fn read_at(&self, offset: u64, length: u64, key: Option<Key>) -> Result<Bytes, LayerError> {
        if offset.checked_add(length).is_none_or(|end| end > self.info.length) {
            let problem = format!("{length} bytes should be there, the object has {}", self.info.length);
            return Err(self.corrupt(offset, key, problem));
        }
        self.blob.read_at(self.start.saturating_add(offset), length as usize).map_err(|problem| LayerError::Read {
            object: self.object.clone(),
            offset,
            key,
            problem,
        })
    }

    /// Tries `read` again if what it read is corrupt and may have been a damaged copy.
    fn distrusting_copies<T>(&self, read: impl Fn() -> Result<T, LayerError>) -> Result<T, LayerError> {
        match read() {
            Err(LayerError::Corrupt { offset, problem, .. }) if self.blob.forget_copies() => {
                tracing::warn!(object = self.object, offset, problem, "the local copy of a layer is damaged, the store is read instead");
                read()
            }
            result => result,
        }
    }

    fn top(&self, key: Option<Key>) -> Result<&Top, LayerError> {
        if let Some(top) = self.top.get() {
            return Ok(top);
        }
        let top = self.distrusting_copies(|| self.load_top(key))?;
        Ok(self.top.get_or_init(|| top))
    }

    fn load_top(&self, key: Option<Key>) -> Result<Top, LayerError> {
        let tail_length = TAIL_BYTES.min(self.info.length);
        let tail_offset = self.info.length - tail_length;
        let tail = self.read_at(tail_offset, tail_length, key)?;
        let footer_offset = self.info.length.saturating_sub(FOOTER_SIZE as u64);
        let footer = tail.last_chunk().ok_or_else(|| self.corrupt(0, key, "it is shorter than a footer"))?;
        let footer = Footer::decode(footer).map_err(|problem| self.corrupt(footer_offset, key, problem))?;
        let length = u64::from(footer.top_length);
        if footer.top_offset.checked_add(length) != Some(footer_offset) {
            return Err(self.corrupt(footer_offset, key, "its footer does not say where its top is"));
        }
        let bytes = match footer.top_offset.checked_sub(tail_offset) {
            Some(start) => tail.slice(start as usize..(start + length) as usize),
            None => self.read_at(footer.top_offset, length, key)?,
        };
        let problem = |problem| self.corrupt(footer.top_offset, key, problem);
        let content = open_envelope(&TOP, &self.object, footer.top_checksum, &bytes).map_err(problem)?;
        let top = Top::decode(&content).ok_or_else(|| problem("its top is malformed".to_owned()))?;
        self.check_top(&top).map_err(problem)?;
        Ok(top)
    }

    /// That the object is the layer that it should be.
    fn check_top(&self, top: &Top) -> Result<(), String> {
        let info = &self.info;
        let first_key = top.partitions.first().map(|partition| partition.key);
        let is_same = top.id == info.id
            && (top.lsn_start, top.lsn_end) == (info.lsn_start, info.lsn_end)
            && top.versions == info.versions
            && (first_key, top.last_key) == (Some(info.first_key), info.last_key);
        if is_same {
            return Ok(());
        }
        Err(format!(
            "it should be layer {} of {}..{}, and is layer {} of {}..{}",
            info.id, info.lsn_start, info.lsn_end, top.id, top.lsn_start, top.lsn_end
        ))
    }

    fn load_partition(&self, handle: &Handle, key: Option<Key>) -> Result<Partition, LayerError> {
        let bytes = self.read_at(handle.offset, u64::from(handle.length), key)?;
        let problem = |problem| self.corrupt(handle.offset, key, problem);
        let content = open_envelope(&PARTITION, &self.object, handle.checksum, &bytes).map_err(problem)?;
        let partition = Partition::decode(&content).ok_or_else(|| problem("an index partition is malformed".to_owned()))?;
        let is_expected = partition.blocks.first().is_some_and(|block| (block.key, block.lsn) == (handle.key, handle.lsn));
        if is_expected { Ok(partition) } else { Err(problem("an index partition begins with another key than the top says".to_owned())) }
    }

    fn partition(&self, cache: &BlockCache, handle: &Handle, key: Option<Key>) -> Result<Arc<Partition>, LayerError> {
        if let Some(partition) = cache.partition(self.info.id, handle.offset) {
            return Ok(partition);
        }
        let partition = Arc::new(self.distrusting_copies(|| self.load_partition(handle, key))?);
        cache.put_partition(self.info.id, handle.offset, Arc::clone(&partition));
        Ok(partition)
    }

    /// The content of a data block, given its envelope.
    fn open_block(&self, handle: &Handle, key: Option<Key>, bytes: &Bytes) -> Result<Bytes, LayerError> {
        open_envelope(&DATA_BLOCK, &self.object, handle.checksum, bytes).map_err(|problem| self.corrupt(handle.offset, key, problem))
    }

    fn block(&self, cache: &BlockCache, handle: &Handle, key: Option<Key>) -> Result<Bytes, LayerError> {
        if let Some(content) = cache.content(self.info.id, handle.offset) {
            return Ok(content);
        }
        let content = self.distrusting_copies(|| {
            let bytes = self.read_at(handle.offset, u64::from(handle.length), key)?;
            self.open_block(handle, key, &bytes)
        })?;
        cache.put_content(self.info.id, handle.offset, content.clone());
        Ok(content)
    }

    /// Adds to each of `lookups` what this layer has for it. Their keys ascend.
    ///
    /// # Errors
    /// When the layer cannot be read. The lookups are then not to be used.
    pub fn read(&self, cache: &BlockCache, lookups: &mut [&mut Lookup]) -> Result<(), LayerError> {
        if lookups.len() > 1 {
            self.prefetch(cache, lookups)?;
        }
        lookups.iter_mut().try_for_each(|lookup| self.read_one(cache, lookup))
    }

    fn read_one(&self, cache: &BlockCache, lookup: &mut Lookup) -> Result<(), LayerError> {
        let key = lookup.key;
        if !self.info.spans(&key) {
            return Ok(());
        }
        let partitions = &self.top(Some(key))?.partitions;
        let Some(first) = seek(partitions, &key, lookup.upto) else { return Ok(()) };
        for (i, handle) in partitions.iter().enumerate().skip(first) {
            if i > first && handle.key != key {
                break;
            }
            let partition = self.partition(cache, handle, Some(key))?;
            if !partition.may_contain(&key) {
                break;
            }
            // In a partition that only goes on with the key, its first block is where to go on.
            let first_block = if i > first { Some(0) } else { seek(&partition.blocks, &key, lookup.upto) };
            let Some(first_block) = first_block else { break };
            for (j, block) in partition.blocks.iter().enumerate().skip(first_block) {
                if j > first_block && block.key != key {
                    return Ok(());
                }
                let content = self.block(cache, block, Some(key))?;
                let progress = read_block(&content, lookup).map_err(|problem| self.corrupt(block.offset, Some(key), problem))?;
                if progress == Progress::Done {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Reads the blocks where `lookups` begin into the cache, neighbours in one request.
    fn prefetch(&self, cache: &BlockCache, lookups: &[&mut Lookup]) -> Result<(), LayerError> {
        let mut missing: Vec<Handle> = Vec::new();
        for lookup in lookups {
            let key = lookup.key;
            if !self.info.spans(&key) {
                continue;
            }
            let partitions = &self.top(Some(key))?.partitions;
            let Some(handle) = seek(partitions, &key, lookup.upto).and_then(|i| partitions.get(i)) else { continue };
            let partition = self.partition(cache, handle, Some(key))?;
            if !partition.may_contain(&key) {
                continue;
            }
            let Some(block) = seek(&partition.blocks, &key, lookup.upto).and_then(|i| partition.blocks.get(i)) else { continue };
            let is_known = missing.last().is_some_and(|last| last.offset == block.offset);
            if !is_known && cache.content(self.info.id, block.offset).is_none() {
                missing.push(*block);
            }
        }
        let mut rest = &missing[..];
        while let Some(first) = rest.first() {
            let (mut count, mut end) = (1, first.end());
            for block in &rest[1..] {
                if block.offset > end + REQUEST_GAP_BYTES_MAX || block.end() - first.offset > REQUEST_BYTES_MAX {
                    break;
                }
                (count, end) = (count + 1, block.end());
            }
            let (together, later) = rest.split_at(count);
            let key = Some(first.key);
            let bytes = self.read_at(first.offset, end - first.offset, key)?;
            for block in together {
                let start = (block.offset - first.offset) as usize;
                // What is damaged is read again, alone, by whoever wants it.
                let Ok(content) = self.open_block(block, key, &bytes.slice(start..start + block.length as usize)) else { continue };
                // A block that was stored as it is would keep all that was read with it in memory.
                let is_view = bytes.as_ptr_range().contains(&content.as_ptr()) && count > 1;
                cache.put_content(self.info.id, block.offset, if is_view { Bytes::copy_from_slice(&content) } else { content });
            }
            rest = later;
        }
        Ok(())
    }

    /// All versions, in order.
    pub fn iter(self: &Arc<Self>) -> LayerIter {
        LayerIter::new(Arc::clone(self), None)
    }

    /// The versions of `from` and greater keys, in order, through the cache.
    pub fn iter_from(self: &Arc<Self>, from: Key, cache: Arc<BlockCache>) -> LayerIter {
        LayerIter::new(Arc::clone(self), Some((from, cache)))
    }

    /// Reads all of it and compares with what should be there: length, checksum, number and order of versions, their
    /// range, the filters.
    ///
    /// # Errors
    /// When something is not as it should be.
    pub fn verify(self: &Arc<Self>) -> Result<(), LayerError> {
        let (mut digest, mut offset) = (Digest::new(CrcAlgorithm::Crc32Iscsi), 0);
        while offset < self.info.length {
            let bytes = self.read_at(offset, REQUEST_BYTES_MAX.min(self.info.length - offset), None)?;
            digest.update(&bytes);
            offset += bytes.len() as u64;
        }
        let checksum = digest.finalize() as u32;
        if checksum != self.info.checksum {
            return Err(self.corrupt(0, None, format!("its CRC-32C is {checksum:08x}, it should be {:08x}", self.info.checksum)));
        }
        let (mut versions, mut last) = (0, None);
        let mut iter = self.iter();
        while let Some((key, version)) = iter.next()? {
            let in_order = last.is_none_or(|(last_key, last_lsn)| last_key < key || last_key == key && last_lsn >= version.lsn);
            let in_range = self.info.lsn_start < version.lsn && version.lsn <= self.info.lsn_end;
            let is_filtered = iter.partition.as_ref().is_some_and(|partition| partition.may_contain(&key));
            if !in_order || !in_range || !is_filtered {
                let problem = format!("the version at {} is out of order, out of range, or not in the filter", version.lsn);
                return Err(self.corrupt(iter.block_offset, Some(key), problem));
            }
            last = Some((key, version.lsn));
            versions += 1;
        }
        let is_last = last.is_some_and(|(key, _)| key == self.info.last_key);
        if versions != self.info.versions || !is_last {
            return Err(self.corrupt(0, None, format!("it has {versions} versions, it should have {}", self.info.versions)));
        }
        Ok(())
    }
}

/// Adds the versions in a block's content that `lookup` wants.
fn read_block(content: &Bytes, lookup: &mut Lookup) -> Result<Progress, &'static str> {
    let mut iter = BlockIter::new(&content[..]).ok_or(MALFORMED)?;
    while let Some(item) = iter.next()? {
        if item.key < lookup.key || item.key == lookup.key && item.lsn > lookup.upto {
            continue;
        }
        if item.key > lookup.key || item.lsn <= lookup.above || !lookup.push(item.version(content)) {
            return Ok(Progress::Done);
        }
    }
    Ok(Progress::GoOn)
}

/// Walks over a layer's versions.
pub struct LayerIter {
    layer: Arc<Layer>,
    /// Where to begin, and the cache to use; without it blocks are read in large requests and not kept.
    from: Option<(Key, Arc<BlockCache>)>,
    next_partition: usize,
    partition: Option<Arc<Partition>>,
    next_block: usize,
    /// Bytes read ahead, and their offset.
    ahead: (u64, Bytes),
    block_offset: u64,
    block: Option<BlockIter<Bytes>>,
}

impl LayerIter {
    fn new(layer: Arc<Layer>, from: Option<(Key, Arc<BlockCache>)>) -> LayerIter {
        LayerIter { layer, from, next_partition: 0, partition: None, next_block: 0, ahead: (0, Bytes::new()), block_offset: 0, block: None }
    }

    /// The next version; `None` at the end.
    ///
    /// # Errors
    /// When the layer cannot be read.
    #[allow(clippy::should_implement_trait, reason = "an error ends the walk, so this is no iterator of results")]
    pub fn next(&mut self) -> Result<Option<(Key, Version)>, LayerError> {
        loop {
            while let Some(block) = &mut self.block {
                let item = block.next().map_err(|problem| self.layer.corrupt(self.block_offset, None, problem))?;
                match item {
                    None => self.block = None,
                    Some(item) if self.from.as_ref().is_some_and(|(from, _)| item.key < *from) => {}
                    Some(item) => return Ok(Some((item.key, item.version(block.content())))),
                }
            }
            if !self.open_next_block()? {
                return Ok(None);
            }
        }
    }

    fn open_next_block(&mut self) -> Result<bool, LayerError> {
        let layer = Arc::clone(&self.layer);
        let partition = loop {
            match &self.partition {
                Some(partition) if self.next_block < partition.blocks.len() => break Arc::clone(partition),
                _ => {}
            }
            let partitions = &layer.top(None)?.partitions;
            let is_first = self.partition.is_none();
            if let (true, Some((from, _))) = (is_first, &self.from) {
                self.next_partition = seek(partitions, from, Lsn::MAX).unwrap_or(0);
            }
            let Some(handle) = partitions.get(self.next_partition) else { return Ok(false) };
            let partition = match &self.from {
                Some((_, cache)) => layer.partition(cache, handle, None)?,
                None => Arc::new(layer.distrusting_copies(|| layer.load_partition(handle, None))?),
            };
            self.next_partition += 1;
            self.next_block = match &self.from {
                Some((from, _)) if is_first => seek(&partition.blocks, from, Lsn::MAX).unwrap_or(0),
                _ => 0,
            };
            self.partition = Some(partition);
        };
        let Some(handle) = partition.blocks.get(self.next_block) else { return Ok(false) };
        let content = match &self.from {
            Some((_, cache)) => layer.block(cache, handle, None)?,
            None => self.read_ahead(&partition, handle)?,
        };
        self.next_block += 1;
        self.block_offset = handle.offset;
        let block = BlockIter::new(content).ok_or_else(|| layer.corrupt(handle.offset, None, MALFORMED))?;
        self.block = Some(block);
        Ok(true)
    }

    /// The content of the block at `handle`, read together with those that follow it.
    fn read_ahead(&mut self, partition: &Partition, handle: &Handle) -> Result<Bytes, LayerError> {
        let (offset, bytes) = &self.ahead;
        if !(*offset <= handle.offset && handle.end() <= offset + bytes.len() as u64) {
            let blocks = partition.blocks.get(self.next_block..).unwrap_or_default();
            let fits = |block: &&Handle| block.end() - handle.offset <= REQUEST_BYTES_MAX;
            let end = blocks.iter().take_while(fits).last().unwrap_or(handle).end();
            self.ahead = (handle.offset, self.layer.read_at(handle.offset, end - handle.offset, Some(handle.key))?);
        }
        let (offset, bytes) = &self.ahead;
        let start = (handle.offset - offset) as usize;
        let layer = &self.layer;
        match layer.open_block(handle, None, &bytes.slice(start..start + handle.length as usize)) {
            Err(LayerError::Corrupt { .. }) => layer.distrusting_copies(|| {
                let bytes = layer.read_at(handle.offset, u64::from(handle.length), None)?;
                layer.open_block(handle, None, &bytes)
            }),
            result => result,
        }
    }
}
