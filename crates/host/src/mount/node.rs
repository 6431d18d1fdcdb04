//! Inodes: what every object of the mount has, and the table that finds them by number.
//!
//! Inode numbers are issued by counting and never used again, so a number names one object for the life of the mount
//! and generations are not needed. A node is in the table while a name or the kernel refers to it; the kernel counts
//! its references by lookups and gives them back with `forget`.

use std::{
    collections::HashMap,
    ffi::OsString,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::SystemTime,
};

use fuser::{FileAttr, FileType, INodeNo};
use parking_lot::{Mutex, RwLock};

use varve_postgres::ids::GLOBAL_TABLESPACE;

use super::{base::Base, directory::Directory, file::FileData};

/// Number of the root directory (`FUSE_ROOT_ID`).
pub(super) const ROOT: u64 = 1;
/// Parts of the table, so that threads do not queue on one lock.
const SHARDS: usize = 32;
/// Unit of `st_blocks`.
const STAT_BLOCK_BYTES: u64 = 512;
/// The bit of a mode that says set-user-id.
const S_ISUID: u16 = 0o4000;

/// An object of the mount.
pub(super) struct Node {
    pub(super) ino: u64,
    pub(super) meta: Mutex<Meta>,
    /// References of the kernel.
    lookups: AtomicU64,
    /// Where the file observer wants to hear of this file: its path, while it has one that is observed.
    pub(super) observed: Mutex<Option<Arc<str>>>,
    /// It holds what a tenant has.
    is_data: AtomicBool,
    pub(super) content: Content,
}

/// Owner, mode, times and links.
#[derive(Clone, Copy)]
pub(super) struct Meta {
    /// Permission bits.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    pub(super) accessed: SystemTime,
    pub(super) modified: SystemTime,
    pub(super) changed: SystemTime,
}

impl Meta {
    /// A new object's, with one link.
    pub(super) fn new(mode: u32, uid: u32, gid: u32) -> Meta {
        let now = SystemTime::now();
        Meta { mode: (mode & 0o7777) as u16, uid, gid, links: 1, accessed: now, modified: now, changed: now }
    }
}

/// What kind of object it is.
pub(super) enum Content {
    File(Arc<FileData>),
    Directory(Directory),
    Symlink(OsString),
    /// A socket or pipe: the kernel does the rest.
    Special(FileType),
}

impl Node {
    pub(super) fn new(ino: u64, meta: Meta, content: Content) -> Arc<Node> {
        Arc::new(Node {
            ino,
            meta: Mutex::new(meta),
            lookups: AtomicU64::new(0),
            observed: Mutex::new(None),
            is_data: AtomicBool::new(false),
            content,
        })
    }

    pub(super) fn kind(&self) -> FileType {
        match &self.content {
            Content::File(_) => FileType::RegularFile,
            Content::Directory(_) => FileType::Directory,
            Content::Symlink(_) => FileType::Symlink,
            Content::Special(kind) => *kind,
        }
    }

    /// What the kernel is told of it. Where files are to be `written_through`, it learns so by a bit of the mode
    /// ([`super::room`]).
    pub(super) fn attributes(&self, written_through: bool) -> FileAttr {
        let meta = *self.meta.lock();
        let size = match &self.content {
            Content::File(file) => file.size(),
            Content::Symlink(target) => target.len() as u64,
            Content::Directory(_) | Content::Special(_) => 0,
        };
        FileAttr {
            ino: INodeNo(self.ino),
            size,
            blocks: size.div_ceil(STAT_BLOCK_BYTES),
            atime: meta.accessed,
            mtime: meta.modified,
            ctime: meta.changed,
            crtime: meta.changed,
            kind: self.kind(),
            perm: if written_through && self.kind() == FileType::RegularFile { meta.mode | S_ISUID } else { meta.mode },
            nlink: meta.links,
            uid: meta.uid,
            gid: meta.gid,
            rdev: 0,
            blksize: varve_postgres::BLCKSZ as u32,
            flags: 0,
        }
    }

    /// The object was changed just now: a name added or removed, or data written.
    pub(super) fn touch(&self) {
        let now = SystemTime::now();
        let mut meta = self.meta.lock();
        meta.modified = now;
        meta.changed = now;
    }

    /// Changes the number of links by one.
    pub(super) fn count_link(&self, added: bool) {
        let mut meta = self.meta.lock();
        meta.links = if added { meta.links.saturating_add(1) } else { meta.links.saturating_sub(1) };
        meta.changed = SystemTime::now();
    }

    /// Growing it may be refused: it holds what a tenant has, and nothing that Postgres needs to go on.
    pub(super) fn may_be_refused(&self) -> bool {
        let is_of_a_database = |base: &Base| matches!(base, Base::Relation { fork, .. } if fork.node.spc != GLOBAL_TABLESPACE);
        self.is_data.load(Relaxed) || matches!(&self.content, Content::File(file) if is_of_a_database(file.base()))
    }

    /// The file is in a database's folder, or in a tablespace.
    pub(super) fn is_data(&self) {
        self.is_data.store(true, Relaxed);
    }

    /// The kernel is told of the node once more.
    pub(super) fn count_lookup(&self) {
        self.lookups.fetch_add(1, AcqRel);
    }
}

/// All nodes by number.
pub(super) struct NodeTable {
    shards: [RwLock<HashMap<u64, Arc<Node>>>; SHARDS],
    next: AtomicU64,
}

impl NodeTable {
    pub(super) fn new() -> NodeTable {
        NodeTable { shards: std::array::from_fn(|_| RwLock::default()), next: AtomicU64::new(ROOT) }
    }

    /// `count` numbers that nobody else has, the first of them.
    pub(super) fn issue(&self, count: u64) -> u64 {
        self.next.fetch_add(count, Relaxed)
    }

    fn shard(&self, ino: u64) -> &RwLock<HashMap<u64, Arc<Node>>> {
        &self.shards[ino as usize % SHARDS]
    }

    pub(super) fn get(&self, ino: u64) -> Option<Arc<Node>> {
        self.shard(ino).read().get(&ino).cloned()
    }

    /// Numbers of the regular files that the kernel knows.
    pub(super) fn known_files(&self) -> Vec<u64> {
        let is_known = |node: &&Arc<Node>| node.kind() == FileType::RegularFile && node.lookups.load(Acquire) > 0;
        self.shards.iter().flat_map(|shard| shard.read().values().filter(is_known).map(|node| node.ino).collect::<Vec<_>>()).collect()
    }

    pub(super) fn insert(&self, node: &Arc<Node>) {
        self.shard(node.ino).write().insert(node.ino, node.clone());
    }

    /// The kernel gives back `count` references.
    pub(super) fn forget(&self, ino: u64, count: u64) -> Option<Arc<Node>> {
        let node = self.get(ino)?;
        let before = node.lookups.fetch_sub(count, AcqRel);
        debug_assert!(before >= count, "the kernel forgot inode {ino} {count} times, {before} were known");
        self.remove_unreferenced(&node).then_some(node)
    }

    /// Takes a node out of the table if neither a name nor the kernel refers to it. Whether it did.
    pub(super) fn remove_unreferenced(&self, node: &Node) -> bool {
        let unreferenced = || node.lookups.load(Acquire) == 0 && node.meta.lock().links == 0;
        unreferenced() && self.shard(node.ino).write().remove(&node.ino).is_some()
    }
}
