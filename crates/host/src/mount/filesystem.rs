//! The kernel's requests, answered.
//!
//! What makes it fast: the kernel keeps names, attributes and pages as long as it likes (nothing changes behind its
//! back), gathers writes, and neither opens nor closes nor flushes are sent at all: inodes live by their lookups alone,
//! and file handles do not exist. A request that has to wait for the base goes through [`Workers`]; all others are
//! answered by the thread that took them.
//!
//! A write that the kernel gathered and that cannot be stored is lost: Postgres was told long ago that it succeeded.
//! From then on the mount fails every request, so that nobody reads the older contents, and says so ([`Failure`]).

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::FallocateFlags;

use super::{
    build::is_hidden,
    directory::Target,
    file::FileData,
    node::{Content, Meta, Node, ROOT},
    tree::{New, Tree, directory},
    workers::Workers,
};

/// How long the kernel may keep what it was told: nothing changes but through the kernel itself.
const LIFETIME: Duration = Duration::from_secs(3600);
/// Requests in the background (read-ahead and write-back) that the kernel sends at a time.
const BACKGROUND_REQUESTS_MAX: u16 = 64;
/// Inode numbers are never used twice.
const GENERATION: Generation = Generation(0);
/// No handles: an open file is its inode.
const NO_HANDLE: FileHandle = FileHandle(0);
/// Entries that one `readdirplus` turns into nodes, at most.
const NODES_READ_MAX: usize = 512;
/// Positions of `.` and `..` come before those of the entries.
const FIRST_POSITION: u64 = 2;
const O_EXCL: i32 = rustix::fs::OFlags::EXCL.bits() as i32;
const S_IFMT: u32 = 0o170_000;
const S_IFSOCK: u32 = 0o140_000;
const S_IFIFO: u32 = 0o010_000;
const S_IFREG: u32 = 0o100_000;

/// What the kernel is asked to do for speed, where it can.
const WANTED: [InitFlags; 9] = [
    InitFlags::FUSE_WRITEBACK_CACHE,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_NO_OPEN_SUPPORT,
    // Needed on a full disk: see `room`.
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
];

/// Called once when the mount has lost data or stops working.
pub type FailureCallback = Box<dyn Fn(&str) + Send + Sync>;

/// Whether the mount failed, and why.
pub(super) struct Failure {
    reason: OnceLock<String>,
    callback: Option<FailureCallback>,
}

impl Failure {
    pub(super) fn new(callback: Option<FailureCallback>) -> Failure {
        Failure { reason: OnceLock::new(), callback }
    }

    /// The first reason, if there is one.
    pub(super) fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// The mount fails from now on.
    pub(super) fn fail(&self, reason: String) {
        if let Err(reason) = self.reason.set(reason) {
            tracing::error!("the mount failed again: {reason}");
            return;
        }
        if let Some(reason) = self.reason() {
            tracing::error!("the mount failed: {reason}");
            if let Some(callback) = &self.callback {
                callback(reason);
            }
        }
    }

    fn check(&self) -> Result<(), Errno> {
        if self.reason.get().is_some() { Err(Errno::EIO) } else { Ok(()) }
    }
}

/// See the module.
pub(super) struct DataDirectory {
    tree: Arc<Tree>,
    failure: Arc<Failure>,
    workers: Workers,
    /// Called when the kernel has ended the mount.
    ended: Box<dyn Fn() + Send + Sync>,
}

impl DataDirectory {
    pub(super) fn new(tree: Arc<Tree>, failure: Arc<Failure>, inline_max: usize, ended: Box<dyn Fn() + Send + Sync>) -> DataDirectory {
        DataDirectory { tree, failure, workers: Workers::new(inline_max), ended }
    }

    fn node(&self, ino: INodeNo) -> Result<Arc<Node>, Errno> {
        self.failure.check()?;
        self.tree.node(ino.0)
    }

    /// A regular file.
    fn file(&self, ino: INodeNo) -> Result<Arc<Node>, Errno> {
        let node = self.node(ino)?;
        match node.content {
            Content::File(_) => Ok(node),
            Content::Directory(_) => Err(Errno::EISDIR),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Does `job`, elsewhere if it may wait for the base.
    fn run(&self, waits: bool, job: impl FnOnce() + Send + 'static) {
        if waits { self.workers.run(job) } else { job() }
    }

    /// Runs a change of a directory, which may have to be listed before.
    fn change<R: Send + 'static>(
        &self,
        parent: INodeNo,
        reply: R,
        answer: impl FnOnce(R, Result<(), Errno>) + Send + 'static,
        change: impl FnOnce(&Tree, &Node) -> Result<(), Errno> + Send + 'static,
    ) {
        let parent = match self.node(parent) {
            Ok(parent) => parent,
            Err(error) => return answer(reply, Err(error)),
        };
        let tree = self.tree.clone();
        self.run(needs_listing(&parent), move || answer(reply, change(&tree, &parent)));
    }
}

fn needs_listing(node: &Node) -> bool {
    matches!(&node.content, Content::Directory(dir) if !dir.is_listed())
}

/// What the kernel is told of a node.
fn attributes(tree: &Tree, node: &Node) -> FileAttr {
    node.attributes(tree.files.room.is_low())
}

/// Whether a file must not have `end` bytes, for want of room on the disk.
fn must_not_grow(tree: &Tree, node: &Node, end: u64) -> bool {
    let size = contents(node).map_or(0, FileData::size);
    end > size && node.may_be_refused() && tree.files.has_no_room_for(end - size)
}

/// The contents of a node that is known to be a regular file.
fn contents(node: &Node) -> Result<&FileData, Errno> {
    match &node.content {
        Content::File(file) => Ok(file),
        _ => Err(Errno::EINVAL),
    }
}

fn answer_empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn answer_entry(tree: &Tree, reply: ReplyEntry, result: Result<Arc<Node>, Errno>) {
    match result {
        Ok(node) => reply.entry(&LIFETIME, &attributes(tree, &node), GENERATION),
        Err(error) => reply.error(error),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(0))
}

impl Filesystem for DataDirectory {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in WANTED {
            if config.add_capabilities(wanted).is_err() {
                tracing::info!("the kernel's FUSE has no {wanted:?}: the mount will be slower");
            }
        }
        let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
        Ok(())
    }

    fn destroy(&mut self) {
        (self.ended)();
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let parent = match self.node(parent) {
            Ok(parent) => parent,
            Err(error) => return reply.error(error),
        };
        let answer = |tree: &Tree, reply: ReplyEntry, result| match result {
            // That a name does not exist may be remembered as well.
            Err(Errno::ENOENT) => reply.entry(&LIFETIME, &no_such_entry(), GENERATION),
            other => answer_entry(tree, reply, other),
        };
        if matches!(&parent.content, Content::Directory(dir) if dir.needs_listing_for(name)) {
            let (tree, name) = (self.tree.clone(), name.to_owned());
            self.workers.run(move || answer(&tree, reply, tree.lookup(&parent, &name)));
        } else {
            answer(&self.tree, reply, self.tree.lookup(&parent, name));
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, count: u64) {
        if ino.0 != ROOT {
            self.tree.forget(ino.0, count);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino) {
            Ok(node) => reply.attr(&LIFETIME, &attributes(&self.tree, &node)),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        changed: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(error),
        };
        let waits = match (&node.content, size) {
            (Content::File(file), Some(size)) => file.truncate_waits(size),
            _ => false,
        };
        let tree = self.tree.clone();
        self.run(waits, move || {
            if let Some(size) = size {
                let truncated = contents(&node).and_then(|file| file.truncate(&tree.files, size).map_err(|error| errno(&error)));
                if let Err(error) = truncated {
                    return reply.error(error);
                }
                tree.changed(&node);
            }
            {
                let mut meta = node.meta.lock();
                let now = SystemTime::now();
                let time = |time| match time {
                    TimeOrNow::SpecificTime(time) => time,
                    TimeOrNow::Now => now,
                };
                meta.mode = mode.map_or(meta.mode, |mode| (mode & 0o7777) as u16);
                meta.uid = uid.unwrap_or(meta.uid);
                meta.gid = gid.unwrap_or(meta.gid);
                meta.accessed = accessed.map_or(meta.accessed, time);
                meta.modified = modified.map(time).or(size.map(|_| now)).unwrap_or(meta.modified);
                meta.changed = changed.unwrap_or(now);
            }
            reply.attr(&LIFETIME, &attributes(&tree, &node));
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.node(ino) {
            Ok(node) => match &node.content {
                Content::Symlink(target) => reply.data(target.as_bytes()),
                _ => reply.error(Errno::EINVAL),
            },
            Err(error) => reply.error(error),
        }
    }

    fn mknod(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, _rdev: u32, reply: ReplyEntry) {
        let special = match mode & S_IFMT {
            S_IFREG => None,
            S_IFSOCK => Some(FileType::Socket),
            S_IFIFO => Some(FileType::NamedPipe),
            _ => return reply.error(Errno::EPERM),
        };
        let (name, meta) = (name.to_owned(), Meta::new(mode, req.uid(), req.gid()));
        self.make(parent, reply, move |tree, parent| tree.create(parent, &name, meta, special.map_or(New::File, New::Special)));
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let (name, meta) = (name.to_owned(), Meta::new(mode, req.uid(), req.gid()));
        self.make(parent, reply, move |tree, parent| tree.create(parent, &name, meta, New::Directory));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (name, target, meta) = (name.to_owned(), target.as_os_str().to_owned(), Meta::new(0o777, req.uid(), req.gid()));
        self.make(parent, reply, move |tree, parent| tree.create(parent, &name, meta, New::Symlink(&target)));
    }

    fn link(&self, _req: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(error),
        };
        let name = name.to_owned();
        self.make(parent, reply, move |tree, parent| tree.link(&node, parent, &name).map(|()| node));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.change(parent, reply, answer_empty, move |tree, parent| tree.unlink(parent, &name));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.change(parent, reply, answer_empty, move |tree, parent| tree.remove_directory(parent, &name));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = match (self.node(parent), self.node(new_parent)) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(error), _) | (_, Err(error)) => return reply.error(error),
        };
        let (tree, name, new_name) = (self.tree.clone(), name.to_owned(), new_name.to_owned());
        self.run(needs_listing(&from) || needs_listing(&to), move || {
            answer_empty(reply, tree.rename(&from, &name, &to, &new_name, flags.contains(RenameFlags::RENAME_NOREPLACE)));
        });
    }

    /// Opens need not be told: the kernel takes ENOSYS for good.
    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn create(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, flags: i32, reply: ReplyCreate) {
        let parent = match self.node(parent) {
            Ok(parent) => parent,
            Err(error) => return reply.error(error),
        };
        let (tree, name, meta) = (self.tree.clone(), name.to_owned(), Meta::new(mode, req.uid(), req.gid()));
        self.run(needs_listing(&parent), move || {
            let created = match tree.create(&parent, &name, meta, New::File) {
                Err(Errno::EEXIST) if flags & O_EXCL == 0 => tree.lookup(&parent, &name),
                created => created,
            };
            match created {
                Ok(node) => reply.created(&LIFETIME, &attributes(&tree, &node), GENERATION, NO_HANDLE, FopenFlags::FOPEN_KEEP_CACHE),
                Err(error) => reply.error(error),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let node = match self.file(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(error),
        };
        let waits = contents(&node).is_ok_and(|file| file.read_waits(offset, size.into()));
        let tree = self.tree.clone();
        self.run(waits, move || match contents(&node) {
            Err(error) => reply.error(error),
            Ok(file) => file.read(&tree.files, offset, size.into(), |read| match read {
                Ok(data) => reply.data(data),
                Err(error) => reply.error(errno(&error)),
            }),
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let node = match self.file(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(error),
        };
        let gathered = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        // What is gathered has been promised: that is what the reserve is for.
        if !gathered && must_not_grow(&self.tree, &node, offset.saturating_add(data.len() as u64)) {
            return reply.error(Errno::ENOSPC);
        }
        if contents(&node).is_ok_and(|file| file.write_waits(offset, data.len() as u64)) {
            let (tree, failure, data) = (self.tree.clone(), self.failure.clone(), data.to_vec());
            self.workers.run(move || write(&tree, &failure, &node, offset, &data, gathered, reply));
        } else {
            write(&self.tree, &self.failure, &node, offset, data, gathered, reply);
        }
    }

    /// The kernel has sent all that it gathered before a file is closed; it takes ENOSYS for good.
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    /// Nothing of the cache outlives this process, so there is nothing to sync; what the kernel gathered it has sent
    /// before.
    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        answer_empty(reply, self.failure.check());
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        answer_empty(reply, self.failure.check());
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.read_directory(ino, move |tree, node| {
            let read = node.and_then(|node| {
                read_entries(tree, &node, offset, |position, ino, kind, name| reply.add(INodeNo(ino), position, kind, name))
            });
            match read {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            }
        });
    }

    fn readdirplus(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        self.read_directory(ino, move |tree, node| {
            let read = node.and_then(|node| {
                read_nodes(tree, &node, offset, |position, node, name| {
                    reply.add(INodeNo(node.ino), position, name, &LIFETIME, &attributes(tree, node), GENERATION)
                })
            });
            match read {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error),
            }
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.tree.files.cache.space() {
            Ok(space) => reply.statfs(
                space.f_blocks,
                space.f_bfree,
                // What is kept is nobody's to plan with.
                space.f_bavail.saturating_sub(self.tree.files.room.reserve() / space.f_frsize.max(1)),
                space.f_files,
                space.f_ffree,
                space.f_bsize as u32,
                space.f_namemax as u32,
                space.f_frsize as u32,
            ),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn fallocate(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        let node = match self.file(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(error),
        };
        if must_not_grow(&self.tree, &node, offset.saturating_add(length)) {
            return reply.error(Errno::ENOSPC);
        }
        let waits = contents(&node).is_ok_and(|file| file.write_waits(offset, length));
        let tree = self.tree.clone();
        self.run(waits, move || {
            let mode = FallocateFlags::from_bits_retain(mode as u32);
            let done = contents(&node).and_then(|file| file.allocate(&tree.files, mode, offset, length).map_err(|error| errno(&error)));
            tree.changed(&node);
            answer_empty(reply, done);
        });
    }

    // Extended attributes, seeking for holes and copying between files are left to the kernel, which takes ENOSYS for
    // good.
    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: fuser::ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _value: &[u8], _flags: i32, _position: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: fuser::ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: fuser::ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: fuser::IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: fuser::ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}

impl DataDirectory {
    /// Makes a new entry of a directory.
    fn make(&self, parent: INodeNo, reply: ReplyEntry, make: impl FnOnce(&Tree, &Node) -> Result<Arc<Node>, Errno> + Send + 'static) {
        let parent = match self.node(parent) {
            Ok(parent) => parent,
            Err(error) => return reply.error(error),
        };
        let tree = self.tree.clone();
        self.run(needs_listing(&parent), move || answer_entry(&tree, reply, make(&tree, &parent)));
    }

    /// Reads a directory; `read` answers.
    fn read_directory(&self, ino: INodeNo, read: impl FnOnce(&Tree, Result<Arc<Node>, Errno>) + Send + 'static) {
        let node = self.node(ino);
        let waits = node.as_ref().is_ok_and(|node| needs_listing(node));
        let tree = self.tree.clone();
        self.run(waits, move || read(&tree, node));
    }
}

/// `.` and `..` of a directory with their positions.
fn dots(node: &Node, parent: u64) -> [(u64, &'static OsStr, u64); 2] {
    [(1, OsStr::new("."), node.ino), (FIRST_POSITION, OsStr::new(".."), parent)]
}

/// Gives `add` the entries of a directory behind position `offset` (position, inode number, kind, name), until it says
/// that it is full.
fn read_entries(tree: &Tree, node: &Node, offset: u64, mut add: impl FnMut(u64, u64, FileType, &OsStr) -> bool) -> Result<(), Errno> {
    let dir = directory(node)?;
    tree.list(dir)?;
    for (position, name, ino) in dots(node, dir.parent()) {
        if offset < position && add(position, ino, FileType::Directory, name) {
            return Ok(());
        }
    }
    let entries = dir.entries.read();
    for (cookie, name, entry) in entries.after(offset.saturating_sub(FIRST_POSITION)).filter(|(_, name, _)| !is_hidden(node, name)) {
        let kind = match &entry.target {
            Target::Node(node) => node.kind(),
            Target::Unseen(_) => FileType::RegularFile,
        };
        if add(cookie + FIRST_POSITION, entry.ino, kind, name) {
            break;
        }
    }
    Ok(())
}

/// As [`read_entries`], with the nodes themselves. Each that was added counts as looked up, but for `.` and `..`.
fn read_nodes(tree: &Tree, node: &Arc<Node>, offset: u64, mut add: impl FnMut(u64, &Node, &OsStr) -> bool) -> Result<(), Errno> {
    let dir = directory(node)?;
    tree.list(dir)?;
    for (position, name, ino) in dots(node, dir.parent()) {
        if offset < position && add(position, &*tree.node(ino)?, name) {
            return Ok(());
        }
    }
    let mut entries = dir.entries.write();
    let behind = entries.after(offset.saturating_sub(FIRST_POSITION)).filter(|(_, name, _)| !is_hidden(node, name)).take(NODES_READ_MAX);
    let names: Vec<_> = behind.map(|(cookie, name, _)| (cookie, name.clone())).collect();
    for (cookie, name) in names {
        let Some(node) = tree.see(&mut entries, &name) else { continue };
        if add(cookie + FIRST_POSITION, &node, &name) {
            break;
        }
        node.count_lookup();
    }
    Ok(())
}

/// The entry that says that there is none of that name.
fn no_such_entry() -> fuser::FileAttr {
    let never = SystemTime::UNIX_EPOCH;
    fuser::FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: never,
        mtime: never,
        ctime: never,
        crtime: never,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// Stores what the kernel writes.
fn write(tree: &Tree, failure: &Failure, node: &Arc<Node>, offset: u64, data: &[u8], gathered: bool, reply: ReplyWrite) {
    match contents(node).and_then(|file| file.write(&tree.files, offset, data).map_err(|error| errno(&error))) {
        Ok(()) => {
            node.touch();
            tree.changed(node);
            reply.written(data.len() as u32);
        }
        Err(error) => {
            if gathered {
                failure.fail(format!(
                    "{} bytes at {offset} of inode {} that Postgres wrote could not be stored in the cache: {}; make room there",
                    data.len(),
                    node.ino,
                    io::Error::from_raw_os_error(error.code())
                ));
            }
            reply.error(error);
        }
    }
}
