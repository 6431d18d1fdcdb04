//! Pages of relations that WAL does not give back: what a mount holds of them when Postgres has ended, and how a later
//! one gets them.
//!
//! Two kinds. A *sequence* logs 32 values ahead, and its page says where between them it stands. An *unlogged relation*
//! has an init fork, which is logged, and its other forks are not. Files that are as in the base are left out: the next
//! start finds them there.
//!
//! Files are put back as if Postgres had written them, all of them or none: they are made beside the tree and then take
//! their names.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use varve_postgres::{BLCKSZ, Fork, paths::RelationFileName};

use super::build::TABLESPACES;
use super::directory::{Entry, Name, Target};
use super::file::{FileContext, FileData};
use super::node::{Content, Node};
use super::tree::{Tree, directory};
use super::{Base, Mount};

/// `SEQ_MAGIC`, in a sequence's special space.
const SEQUENCE_MAGIC: [u8; 8] = [0x17, 0x17, 0, 0, 0, 0, 0, 0];
/// Where the first line pointer of a page is.
const FIRST_LINE_POINTER: usize = 24;
/// Where `log_cnt` is in a sequence's tuple, behind its header and `last_value`.
const LOG_CNT: usize = 24 + 8;
/// How deep directories of relations lie: `varve_tablespaces/<oid>/PG_15_202209061/<database>`.
const DEPTH_MAX: usize = 4;

/// See the module.
pub struct BesideWal {
    /// The pages of sequences that stand between two records.
    pub sequences: Vec<RelationFile>,
    /// Files of unlogged relations.
    pub unlogged: Vec<RelationFile>,
}

/// A file of a relation.
pub struct RelationFile {
    /// Its path in the mount.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    file: Arc<FileData>,
    context: Arc<FileContext>,
}

impl RelationFile {
    /// The bytes at `offset`, `length` of them but for the end of the file.
    ///
    /// # Errors
    /// When the cache or the base cannot be read.
    pub fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length.min(self.bytes as usize));
        while bytes.len() < length {
            let (at, left) = (offset + bytes.len() as u64, (length - bytes.len()) as u64);
            let more = self.file.read(&self.context, at, left, |read| read.map(<[u8]>::to_vec))?;
            if more.is_empty() {
                break;
            }
            bytes.extend_from_slice(&more);
        }
        Ok(bytes)
    }
}

/// A file that is made beside the tree.
pub struct StagedFile {
    path: String,
    ino: u64,
    file: Arc<FileData>,
    context: Arc<FileContext>,
    placed: bool,
}

impl StagedFile {
    /// Writes into it.
    ///
    /// # Errors
    /// When the cache cannot be written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write(&self.context, offset, bytes)
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        if !self.placed {
            self.file.retire(&self.context);
            self.context.cache.delete(self.file.cache_file());
        }
    }
}

impl Mount {
    /// What is here beside WAL. Postgres has ended; what the kernel still holds of its writes is waited for.
    ///
    /// # Errors
    /// When the mount fails.
    pub fn beside_wal(&self) -> io::Result<BesideWal> {
        let root =
            rustix::fs::open(&self.mountpoint, rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
        rustix::fs::syncfs(root.as_fd())?;
        let mut found = BesideWal { sequences: Vec::new(), unlogged: Vec::new() };
        let tree = &self.tree;
        let mut look_at = |folder: &str, path: &str| match tree.find(folder) {
            Ok(node) => look(tree, &node, path, 1, &mut found),
            Err(fuser::Errno::ENOENT | fuser::Errno::ENOTDIR) => Ok(()),
            Err(error) => Err(io::Error::from_raw_os_error(error.code())),
        };
        look_at("base", "base")?;
        look_at("pg_tblspc", "pg_tblspc")?;
        for (spc, link) in self.tablespace_links() {
            // Wherever it lies now, the next mount has it there.
            if let Some(folder) = tree.places.behind(&link, &self.mountpoint) {
                look_at(&folder, &format!("{TABLESPACES}/{spc}"))?;
            }
        }
        Ok(found)
    }

    /// Tablespaces outside `pg_tblspc`, and where they are.
    fn tablespace_links(&self) -> Vec<(u32, PathBuf)> {
        let Ok(folder) = self.tree.find("pg_tblspc") else { return Vec::new() };
        let Ok(dir) = directory(&folder) else { return Vec::new() };
        let link = |(name, entry): (&Name, &Entry)| match &entry.target {
            Target::Node(node) => match &node.content {
                Content::Symlink(target) => Some((name.to_str()?.parse().ok()?, PathBuf::from(target))),
                _ => None,
            },
            Target::Unseen(_) => None,
        };
        dir.entries.read().iter().filter_map(link).collect()
    }

    /// A file of a relation that is to have `bytes` bytes, zeros until they are written.
    ///
    /// # Errors
    /// When its directory is not there, or the cache cannot be written.
    pub fn stage(&self, path: &str, bytes: u64) -> io::Result<StagedFile> {
        place_of(&self.tree, path)?;
        let ino = self.tree.nodes.issue(1);
        let (file, context) = (FileData::new(ino, Base::None), self.tree.files.clone());
        file.truncate(&context, bytes)?;
        Ok(StagedFile { path: path.to_owned(), ino, file, context, placed: false })
    }

    /// Gives all of them their names. Nobody has looked at those yet.
    ///
    /// # Errors
    /// When a directory is not there; then no file has its name.
    pub fn put_in_place(&self, staged: Vec<StagedFile>) -> io::Result<()> {
        let places: Vec<(Arc<Node>, Name)> = staged.iter().map(|file| place_of(&self.tree, &file.path)).collect::<io::Result<_>>()?;
        for (mut staged, (parent, name)) in staged.into_iter().zip(places) {
            let Ok(dir) = directory(&parent) else { continue };
            let node = Node::new(staged.ino, self.tree.file_of_the_base(), Content::File(staged.file.clone()));
            self.tree.nodes.insert(&node);
            dir.entries.write().put(name, staged.ino, Target::Node(node));
            staged.placed = true;
        }
        Ok(())
    }
}

/// The directory of a relation's file, listed, and its name there.
fn place_of(tree: &Tree, path: &str) -> io::Result<(Arc<Node>, Name)> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("{path} is no file of a relation"));
    let (parent, name) = path.rsplit_once('/').ok_or_else(invalid)?;
    RelationFileName::parse(name).ok_or_else(invalid)?;
    let failed = |error: fuser::Errno| io::Error::from_raw_os_error(error.code());
    let node = tree.find(parent).map_err(failed)?;
    tree.list(directory(&node).map_err(failed)?).map_err(failed)?;
    Ok((node, Arc::from(OsStr::new(name))))
}

/// Looks through a directory and those below it. In one that nobody listed nothing was written.
fn look(tree: &Tree, node: &Node, path: &str, depth: usize, found: &mut BesideWal) -> io::Result<()> {
    let Ok(dir) = directory(node) else { return Ok(()) };
    if !dir.is_listed() {
        return Ok(());
    }
    let entries: Vec<(Name, Entry)> = dir.entries.read().iter().map(|(name, entry)| (name.clone(), entry.clone())).collect();
    let parse = |name: &Name| name.to_str().and_then(RelationFileName::parse);
    let unlogged: BTreeSet<u32> =
        entries.iter().filter_map(|(name, _)| parse(name)).filter(|name| name.fork == Fork::Init).map(|name| name.rel).collect();
    for (name, entry) in &entries {
        let (Target::Node(node), Some(text)) = (&entry.target, name.to_str()) else { continue };
        let path = format!("{path}/{text}");
        let file = match &node.content {
            Content::Directory(_) if depth < DEPTH_MAX => {
                look(tree, node, &path, depth + 1, found)?;
                continue;
            }
            Content::File(file) if file.is_changed() => file,
            _ => continue,
        };
        let Some(name) = parse(name) else { continue };
        let file = RelationFile { path, bytes: file.size(), file: file.clone(), context: tree.files.clone() };
        if unlogged.contains(&name.rel) {
            if name.fork != Fork::Init {
                found.unlogged.push(file);
            }
        } else if name.fork == Fork::Main
            && name.file_number == 0
            && file.bytes == BLCKSZ as u64
            && is_between_records(&file.read(0, BLCKSZ)?)
        {
            found.sequences.push(file);
        }
    }
    Ok(())
}

/// Whether a page is that of a sequence that stands between what it logged and what it will log. One that has used up
/// what it logged, or was set, is as WAL has it.
fn is_between_records(page: &[u8]) -> bool {
    if page.len() != BLCKSZ || !page.ends_with(&SEQUENCE_MAGIC) {
        return false;
    }
    let pointer = page[FIRST_LINE_POINTER..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let tuple = pointer.map_or(0, |pointer| (pointer & 0x7fff) as usize);
    let log_cnt = page.get(tuple + LOG_CNT..).and_then(<[u8]>::first_chunk).map(|bytes| i64::from_le_bytes(*bytes));
    log_cnt.is_some_and(|log_cnt| log_cnt != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_a_sequences_by_its_magic_and_stands_between_records_by_its_count() {
        let mut page = vec![0; BLCKSZ];
        assert!(!is_between_records(&page), "a new page");
        page[8184..8186].copy_from_slice(&[0x17, 0x17]);
        let tuple = 8184_u32 - 48;
        page[24..28].copy_from_slice(&(tuple | 1 << 15 | 41 << 17).to_le_bytes());
        assert!(!is_between_records(&page), "all values that it logged are used");
        page[tuple as usize + 32] = 28;
        assert!(is_between_records(&page));
        page[24..28].copy_from_slice(&0x7fff_u32.to_le_bytes());
        assert!(!is_between_records(&page), "a pointer out of the page");
        assert!(!is_between_records(&page[1..]), "half a page");
    }
}
