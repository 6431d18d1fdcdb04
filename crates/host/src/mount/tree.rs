//! The name space: what is where, and everything that changes it.
//!
//! Directories are locked one by one, two of them in the order of their inode numbers. No lock is held while the base
//! is asked, except the one that keeps a directory from being listed twice.

use std::{ffi::OsStr, sync::Arc};

use fuser::{Errno, FileType};
use parking_lot::RwLockWriteGuard;
use varve_postgres::{
    Fork, RelNode,
    paths::{BLOCKS_PER_FILE, relation_file_name},
    slru,
};

use super::{
    base::Base,
    build::Places,
    directory::{Directory, Entries, Entry, Listing, Name, Place, Target},
    file::{FileContext, FileData},
    node::{Content, Meta, Node, NodeTable, ROOT},
    observer::{Observer, is_observed},
};

/// Mode of files of the base, as Postgres makes them.
const BASE_FILE_MODE: u32 = 0o600;
/// Depth of directories at most, wherever a path is built: Postgres has four levels.
const DEPTH_MAX: usize = 64;
/// Folders of what tenants have: databases, their temporary files, tablespaces.
const DATA: [&str; 4] = ["base/", "pg_tblspc/", "varve_tablespaces/", "varve_named/"];
/// Longest name (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;

/// See the module.
pub(super) struct Tree {
    pub(super) nodes: NodeTable,
    pub(super) files: Arc<FileContext>,
    pub(super) observer: Option<Observer>,
    pub(super) places: Places,
    uid: u32,
    gid: u32,
}

/// What is made by [`Tree::create`].
#[derive(Clone, Copy)]
pub(super) enum New<'a> {
    File,
    Directory,
    Symlink(&'a OsStr),
    Special(FileType),
}

impl Tree {
    /// An empty root directory of the given owner.
    pub(super) fn new(files: Arc<FileContext>, observer: Option<Observer>, places: Places, (uid, gid): (u32, u32), root_mode: u32) -> Tree {
        let nodes = NodeTable::new();
        let mut meta = Meta::new(root_mode, uid, gid);
        meta.links = 2;
        nodes.insert(&Node::new(nodes.issue(1), meta, Content::Directory(Directory::new(None, None))));
        Tree { nodes, files, observer, places, uid, gid }
    }

    pub(super) fn node(&self, ino: u64) -> Result<Arc<Node>, Errno> {
        self.nodes.get(ino).ok_or(Errno::ENOENT)
    }

    /// Finds `name`; the kernel is told of the node.
    pub(super) fn lookup(&self, parent: &Node, name: &OsStr) -> Result<Arc<Node>, Errno> {
        if name == "." {
            let node = self.node(parent.ino)?;
            node.count_lookup();
            return Ok(node);
        }
        let dir = directory(parent)?;
        if name == ".." {
            let node = self.node(dir.parent())?;
            node.count_lookup();
            return Ok(node);
        }
        if dir.needs_listing_for(name) {
            self.list(dir)?;
        }
        match dir.entries.read().get(name) {
            None => return Err(Errno::ENOENT),
            Some(Entry { target: Target::Node(node), .. }) => {
                node.count_lookup();
                return Ok(node.clone());
            }
            Some(Entry { target: Target::Unseen(_), .. }) => {}
        }
        let node = self.see(&mut dir.entries.write(), name).ok_or(Errno::ENOENT)?;
        node.count_lookup();
        Ok(node)
    }

    /// Makes a node of what `name` stands for, if it is none yet.
    pub(super) fn see(&self, entries: &mut Entries, name: &OsStr) -> Option<Arc<Node>> {
        let entry = entries.get(name)?;
        match &entry.target {
            Target::Node(node) => Some(node.clone()),
            Target::Unseen(base) => {
                let node = Node::new(entry.ino, self.file_of_the_base(), Content::File(FileData::new(entry.ino, base.clone())));
                self.nodes.insert(&node);
                entries.see(name, node.clone());
                Some(node)
            }
        }
    }

    /// Owner and mode of a file as the base has them.
    pub(super) fn file_of_the_base(&self) -> Meta {
        Meta::new(BASE_FILE_MODE, self.uid, self.gid)
    }

    /// Makes the entries of a directory complete.
    pub(super) fn list(&self, dir: &Directory) -> Result<(), Errno> {
        if dir.is_listed() {
            return Ok(());
        }
        let pending = dir.lock_listing();
        let Some(listing) = *pending else { return Ok(()) };
        let files = self.ask_for(listing)?;
        let first = self.nodes.issue(files.len() as u64);
        let mut entries = dir.entries.write();
        entries.reserve(files.len());
        for (ino, (name, base)) in (first..).zip(files) {
            let name: Name = Arc::from(OsStr::new(&name));
            if entries.get(&name).is_none() {
                entries.put(name, ino, Target::Unseen(base));
            }
        }
        drop(entries);
        dir.set_listed(pending);
        Ok(())
    }

    /// The files that the base has in a directory.
    fn ask_for(&self, listing: Listing) -> Result<Vec<(String, Base)>, Errno> {
        let source = &self.files.source;
        match listing {
            Listing::Slru(kind) => {
                let segments = source.call(format_args!("the segments of {kind}"), |source| source.slru_segments(kind))?;
                let file = |(segno, pages)| (slru::segment_name(segno), Base::Slru { kind, segno, pages });
                Ok(segments.into_iter().map(file).collect())
            }
            Listing::Relations { spc, db } => {
                let what = format_args!("the relations of database {db} in tablespace {spc}");
                Ok(relation_files(spc, db, &source.call(what, |source| source.relations(spc, db))?))
            }
        }
    }

    /// Puts a new object into a directory. The kernel is told of it.
    pub(super) fn create(&self, parent: &Node, name: &OsStr, mut meta: Meta, new: New<'_>) -> Result<Arc<Node>, Errno> {
        check_name(name)?;
        let dir = directory(parent)?;
        self.list(dir)?;
        let ino = self.nodes.issue(1);
        let name: Name = Arc::from(name);
        let content = match new {
            New::File => {
                let base = self.path(parent, &name).map_or(Base::None, |path| Base::of_new_file(&path));
                Content::File(FileData::new(ino, base))
            }
            New::Symlink(target) => Content::Symlink(target.to_owned()),
            New::Special(kind) => Content::Special(kind),
            New::Directory => {
                meta.links = 2;
                Content::Directory(Directory::new(Some(Place { parent: parent.ino, name: name.clone() }), None))
            }
        };
        let node = Node::new(ino, meta, content);
        {
            let mut entries = writable(dir)?;
            if entries.get(&name).is_some() {
                return Err(Errno::EEXIST);
            }
            node.count_lookup();
            self.nodes.insert(&node);
            entries.put(name.clone(), ino, Target::Node(node.clone()));
        }
        if matches!(node.content, Content::File(_)) && self.path(parent, &name).is_some_and(|path| is_of_data(&path)) {
            node.is_data();
        }
        parent.touch();
        if matches!(node.content, Content::Directory(_)) {
            parent.count_link(true);
        }
        self.observe(&node, parent, &name);
        Ok(node)
    }

    /// Gives a file one more name.
    pub(super) fn link(&self, node: &Arc<Node>, parent: &Node, name: &OsStr) -> Result<(), Errno> {
        check_name(name)?;
        if matches!(node.content, Content::Directory(_)) {
            return Err(Errno::EPERM);
        }
        let dir = directory(parent)?;
        self.list(dir)?;
        let name: Name = Arc::from(name);
        {
            let mut entries = writable(dir)?;
            if entries.get(&name).is_some() {
                return Err(Errno::EEXIST);
            }
            node.count_link(true);
            node.count_lookup();
            entries.put(name.clone(), node.ino, Target::Node(node.clone()));
        }
        parent.touch();
        self.observe(node, parent, &name);
        Ok(())
    }

    /// Removes a file's name.
    pub(super) fn unlink(&self, parent: &Node, name: &OsStr) -> Result<(), Errno> {
        let dir = directory(parent)?;
        self.list(dir)?;
        let removed = {
            let mut entries = dir.entries.write();
            match &entries.get(name).ok_or(Errno::ENOENT)?.target {
                Target::Node(node) if matches!(node.content, Content::Directory(_)) => return Err(Errno::EISDIR),
                _ => entries.remove(name),
            }
        };
        parent.touch();
        if let Some(Entry { target: Target::Node(node), .. }) = removed {
            self.stop_observing(&node);
            node.count_link(false);
            self.release(&node);
        }
        Ok(())
    }

    /// Removes an empty directory.
    pub(super) fn remove_directory(&self, parent: &Node, name: &OsStr) -> Result<(), Errno> {
        let dir = directory(parent)?;
        let mut entries = dir.entries.write();
        let Target::Node(node) = entries.get(name).ok_or(Errno::ENOENT)?.target.clone() else { return Err(Errno::ENOTDIR) };
        let removed = directory(&node)?;
        drop(entries);
        self.list(removed)?;
        entries = dir.entries.write();
        retire(removed)?;
        entries.remove(name);
        drop(entries);
        node.meta.lock().links = 0;
        parent.touch();
        parent.count_link(false);
        self.release(&node);
        Ok(())
    }

    /// Renames, over what is there unless `keep` forbids it.
    pub(super) fn rename(&self, from: &Node, name: &OsStr, to: &Node, new_name: &OsStr, keep: bool) -> Result<(), Errno> {
        check_name(new_name)?;
        let (from_dir, to_dir) = (directory(from)?, directory(to)?);
        self.list(from_dir)?;
        self.list(to_dir)?;
        let new_name: Name = Arc::from(new_name);
        let (moved, replaced) = {
            let (mut source, mut target) = lock_two(from, from_dir, to, to_dir);
            if source.removed || target.as_ref().is_some_and(|entries| entries.removed) {
                return Err(Errno::ENOENT);
            }
            let entry = source.get(name).ok_or(Errno::ENOENT)?.clone();
            let old = target.as_deref().unwrap_or(&source).get(&new_name).cloned();
            if let Some(old) = &old {
                if keep {
                    return Err(Errno::EEXIST);
                }
                if old.ino == entry.ino {
                    return Ok(());
                }
                self.check_replaceable(&entry, old)?;
            }
            source.remove(name);
            target.as_deref_mut().unwrap_or(&mut source).put(new_name.clone(), entry.ino, entry.target.clone());
            (entry, old)
        };
        from.touch();
        to.touch();
        if let Some(Entry { target: Target::Node(node), .. }) = replaced {
            node.observed.lock().take();
            if matches!(node.content, Content::Directory(_)) {
                node.meta.lock().links = 0;
                to.count_link(false);
            } else {
                node.count_link(false);
            }
            self.release(&node);
        }
        let Target::Node(node) = moved.target else { return Ok(()) };
        if let Content::Directory(dir) = &node.content {
            *dir.place.lock() = Some(Place { parent: to.ino, name: new_name });
            from.count_link(false);
            to.count_link(true);
            self.observe_below(&node, dir);
        } else {
            self.stop_observing(&node);
            self.observe(&node, to, &new_name);
        }
        Ok(())
    }

    fn check_replaceable(&self, moved: &Entry, old: &Entry) -> Result<(), Errno> {
        let directory_of = |entry: &Entry| match &entry.target {
            Target::Node(node) if matches!(node.content, Content::Directory(_)) => Some(node.clone()),
            _ => None,
        };
        match (directory_of(moved), directory_of(old)) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err(Errno::EISDIR),
            (Some(_), None) => Err(Errno::ENOTDIR),
            (Some(_), Some(old)) => {
                let dir = directory(&old)?;
                // One that was never listed has files of the base, or may have.
                if dir.is_listed() { retire(dir) } else { Err(Errno::ENOTEMPTY) }
            }
        }
    }

    /// Forgets a node that neither a name nor the kernel refers to.
    fn release(&self, node: &Node) {
        if self.nodes.remove_unreferenced(node)
            && let Content::File(file) = &node.content
        {
            file.retire(&self.files);
            self.files.cache.delete(file.cache_file());
        }
    }

    /// The kernel gives back references to an inode.
    pub(super) fn forget(&self, ino: u64, count: u64) {
        if let Some(node) = self.nodes.forget(ino, count)
            && let Content::File(file) = &node.content
        {
            file.retire(&self.files);
            self.files.cache.delete(file.cache_file());
        }
    }

    /// The node at a path, if there is one; directories on the way are listed.
    pub(super) fn find(&self, path: &str) -> Result<Arc<Node>, Errno> {
        let mut node = self.node(ROOT)?;
        for name in path.split('/').map(OsStr::new) {
            let dir = directory(&node)?;
            if dir.needs_listing_for(name) {
                self.list(dir)?;
            }
            let found = self.see(&mut dir.entries.write(), name).ok_or(Errno::ENOENT)?;
            node = found;
        }
        Ok(node)
    }

    /// Path of `name` in a directory, relative to the root; none where the directory was removed.
    fn path(&self, parent: &Node, name: &OsStr) -> Option<String> {
        let mut path = name.to_str()?.to_owned();
        let Content::Directory(dir) = &parent.content else { return None };
        let mut place = dir.place.lock().clone();
        for _ in 0..DEPTH_MAX {
            let Some(Place { parent, name }) = place else { return Some(path) };
            path = format!("{}/{path}", name.to_str()?);
            let node = self.nodes.get(parent)?;
            let Content::Directory(dir) = &node.content else { return None };
            place = dir.place.lock().clone();
        }
        None
    }

    /// A file was given a name: if it is one that outlives the compute, the observer hears of it.
    fn observe(&self, node: &Arc<Node>, parent: &Node, name: &OsStr) {
        if let Some(observer) = &self.observer
            && matches!(node.content, Content::File(_))
            && let Some(path) = self.path(parent, name)
            && is_observed(&path)
        {
            let path: Arc<str> = path.into();
            *node.observed.lock() = Some(path.clone());
            observer.written(path, node.clone());
        }
    }

    /// A file loses the name under which it was observed.
    fn stop_observing(&self, node: &Node) {
        let observed = node.observed.lock().take();
        if let (Some(observer), Some(path)) = (&self.observer, observed) {
            observer.removed(path);
        }
    }

    /// A directory moved, and everything in it.
    fn observe_below(&self, node: &Node, dir: &Directory) {
        if self.observer.is_none() {
            return;
        }
        let children: Vec<(Name, Entry)> = dir.entries.read().iter().map(|(name, entry)| (name.clone(), entry.clone())).collect();
        for (name, entry) in children {
            let Target::Node(child) = entry.target else { continue };
            if let Content::Directory(dir) = &child.content {
                self.observe_below(&child, dir);
            } else {
                self.stop_observing(&child);
                self.observe(&child, node, &name);
            }
        }
    }

    /// A file's contents changed.
    pub(super) fn changed(&self, node: &Arc<Node>) {
        if let Some(observer) = &self.observer {
            let observed = node.observed.lock().clone();
            if let Some(path) = observed {
                observer.written(path, node.clone());
            }
        }
    }
}

pub(super) fn directory(node: &Node) -> Result<&Directory, Errno> {
    match &node.content {
        Content::Directory(dir) => Ok(dir),
        _ => Err(Errno::ENOTDIR),
    }
}

fn check_name(name: &OsStr) -> Result<(), Errno> {
    if name.len() > NAME_BYTES_MAX { Err(Errno::ENAMETOOLONG) } else { Ok(()) }
}

/// The entries of a directory that still exists.
fn writable(dir: &Directory) -> Result<RwLockWriteGuard<'_, Entries>, Errno> {
    let entries = dir.entries.write();
    if entries.removed { Err(Errno::ENOENT) } else { Ok(entries) }
}

/// Makes sure that a directory is empty and stays so.
fn retire(dir: &Directory) -> Result<(), Errno> {
    let mut entries = writable(dir)?;
    if !entries.is_empty() {
        return Err(Errno::ENOTEMPTY);
    }
    entries.removed = true;
    Ok(())
}

/// Locks two directories; for one and the same, the second guard is none.
fn lock_two<'a>(
    first: &Node,
    first_dir: &'a Directory,
    second: &Node,
    second_dir: &'a Directory,
) -> (RwLockWriteGuard<'a, Entries>, Option<RwLockWriteGuard<'a, Entries>>) {
    if first.ino == second.ino {
        (first_dir.entries.write(), None)
    } else if first.ino < second.ino {
        let entries = first_dir.entries.write();
        (entries, Some(second_dir.entries.write()))
    } else {
        let entries = second_dir.entries.write();
        (first_dir.entries.write(), Some(entries))
    }
}

/// The files of a database's relations. A relation with an init fork is unlogged: it starts with a main fork like its
/// init fork, and no other, as after a crash.
fn relation_files(spc: u32, db: u32, forks: &[(u32, Fork, u32)]) -> Vec<(String, Base)> {
    let unlogged: std::collections::HashSet<u32> = forks.iter().filter(|(_, fork, _)| *fork == Fork::Init).map(|(rel, ..)| *rel).collect();
    let mut files = Vec::with_capacity(forks.len());
    let mut add = |rel: u32, fork: Fork, contents: Fork, blocks: u32| {
        let fork_in_base = RelNode { spc, db, rel }.fork(contents);
        for segment in 0..blocks.div_ceil(BLOCKS_PER_FILE).max(1) {
            let blocks = (blocks - segment * BLOCKS_PER_FILE).min(BLOCKS_PER_FILE);
            files.push((relation_file_name(rel, fork, segment), Base::Relation { fork: fork_in_base, segment, blocks }));
        }
    };
    for &(rel, fork, blocks) in forks {
        match fork {
            Fork::Init => {
                add(rel, Fork::Init, Fork::Init, blocks);
                add(rel, Fork::Main, Fork::Init, blocks);
            }
            _ if unlogged.contains(&rel) => {}
            _ => add(rel, fork, fork, blocks),
        }
    }
    files
}

/// Whether a file of this path holds what a tenant has.
fn is_of_data(path: &str) -> bool {
    DATA.iter().any(|folder| path.starts_with(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(forks: &[(u32, Fork, u32)]) -> Vec<(String, u32, Fork)> {
        let part = |(name, base)| match base {
            Base::Relation { fork, blocks, .. } => (name, blocks, fork.fork),
            other => panic!("a relation's file expected, got {other:?}"),
        };
        relation_files(1663, 5, forks).into_iter().map(part).collect()
    }

    #[test]
    fn forks_are_cut_into_files_of_a_gigabyte() {
        assert_eq!(
            names(&[(20, Fork::Main, 2 * BLOCKS_PER_FILE + 1), (21, Fork::Main, 0), (22, Fork::FreeSpaceMap, BLOCKS_PER_FILE)]),
            [
                ("20".to_owned(), BLOCKS_PER_FILE, Fork::Main),
                ("20.1".to_owned(), BLOCKS_PER_FILE, Fork::Main),
                ("20.2".to_owned(), 1, Fork::Main),
                ("21".to_owned(), 0, Fork::Main),
                ("22_fsm".to_owned(), BLOCKS_PER_FILE, Fork::FreeSpaceMap),
            ]
        );
    }

    #[test]
    fn an_unlogged_relation_starts_as_its_init_fork() {
        assert_eq!(
            names(&[(30, Fork::Main, 700), (30, Fork::VisibilityMap, 1), (30, Fork::Init, 1), (31, Fork::Init, 0)]),
            [
                ("30_init".to_owned(), 1, Fork::Init),
                ("30".to_owned(), 1, Fork::Init),
                ("31_init".to_owned(), 0, Fork::Init),
                ("31".to_owned(), 0, Fork::Init),
            ]
        );
    }
}
