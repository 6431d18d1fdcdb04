//! The data directory as it is in the base.

use std::{borrow::Cow, ffi::OsStr, sync::Arc};

use fuser::Errno;
use varve_postgres::{paths::database_directory, slru::SlruKind};

use super::{
    InitialContent, MountConfig, MountError,
    base::Base,
    directory::{Directory, Listing, Name, Place, Target},
    file::{FileContext, FileData},
    node::{Content, Meta, Node, ROOT},
    observer::{Observer, is_observed},
    tree::{Tree, directory},
};

/// Where the tablespaces of the base are: `pg_tblspc/<oid>` is a symbolic link to
/// `<mountpoint>/varve_tablespaces/<oid>`.
pub(super) const TABLESPACES: &str = "varve_tablespaces";
/// Mode of directories, as `initdb` makes them.
const DIRECTORY_MODE: u32 = 0o700;

/// Builds the tree that `config` describes.
pub(super) fn build(config: &MountConfig, files: Arc<FileContext>, observer: Option<Observer>) -> Result<Tree, MountError> {
    let tree = Tree::new(files, observer, config.uid, config.gid, DIRECTORY_MODE);
    let builder = Builder { tree: &tree, uid: config.uid, gid: config.gid };
    for kind in SlruKind::ALL {
        builder.directory(kind.directory(), Some(Listing::Slru(kind)))?;
    }
    builder.directory("global", Some(Listing::Relations { spc: varve_postgres::ids::GLOBAL_TABLESPACE, db: 0 }))?;
    for &(spc, db) in &config.databases {
        let path = database_directory(spc, db, config.major, config.catalog_version);
        builder.directory(&behind_link(&path), Some(Listing::Relations { spc, db }))?;
    }
    builder.directory("pg_tblspc", None)?;
    let mountpoint =
        std::path::absolute(&config.mountpoint).map_err(|source| MountError::Mountpoint { path: config.mountpoint.clone(), source })?;
    for spc in &config.tablespaces {
        builder.directory(&format!("{TABLESPACES}/{spc}/{}", config.major.tablespace_directory(config.catalog_version)), None)?;
        let target = mountpoint.join(TABLESPACES).join(spc.to_string());
        builder.add(&format!("pg_tblspc/{spc}"), 0o777, &InitialContent::Symlink(target))?;
    }
    let links: Vec<String> = config.tablespaces.iter().map(|spc| format!("pg_tblspc/{spc}")).collect();
    for file in config.initial_files.iter().filter(|file| !links.contains(&file.path)) {
        builder.add(&behind_link(&file.path), file.mode, &file.content)?;
    }
    Ok(tree)
}

/// A path of the data directory, with the link in `pg_tblspc` resolved.
pub(super) fn behind_link(path: &str) -> Cow<'_, str> {
    match path.strip_prefix("pg_tblspc/") {
        Some(rest) => format!("{TABLESPACES}/{rest}").into(),
        None => path.into(),
    }
}

struct Builder<'a> {
    tree: &'a Tree,
    uid: u32,
    gid: u32,
}

impl Builder<'_> {
    /// Makes a directory and all on the way to it; one that is there is kept.
    fn directory(&self, path: &str, listing: Option<Listing>) -> Result<Arc<Node>, MountError> {
        let mut node = self.tree.node(ROOT).map_err(|error| invalid(path, error))?;
        let mut parts = path.split('/').filter(|part| !part.is_empty() && *part != ".").peekable();
        while let Some(part) = parts.next() {
            let listing = listing.filter(|_| parts.peek().is_none());
            let existing = self.tree.see(&mut directory(&node).map_err(|error| invalid(path, error))?.entries.write(), OsStr::new(part));
            node = match existing {
                Some(existing) => existing,
                None => {
                    let name: Name = Arc::from(OsStr::new(part));
                    let place = Place { parent: node.ino, name: name.clone() };
                    let made = self.put(&node, path, name, DIRECTORY_MODE, Content::Directory(Directory::new(Some(place), listing)))?;
                    node.count_link(true);
                    made.count_link(true);
                    made
                }
            };
        }
        directory(&node).map_err(|error| invalid(path, error))?;
        Ok(node)
    }

    /// Adds a file of the base backup. One that is there already is an error, but for directories.
    fn add(&self, path: &str, mode: u32, content: &InitialContent) -> Result<(), MountError> {
        if path.split('/').any(|part| part == "..") {
            return Err(MountError::InitialFile { path: path.to_owned(), reason: "it would lie outside".to_owned() });
        }
        let path = path.trim_start_matches("./").trim_end_matches('/');
        let content = match content {
            InitialContent::Directory => {
                self.directory(path, None)?.meta.lock().mode = (mode & 0o7777) as u16;
                return Ok(());
            }
            InitialContent::File(contents) => Ok(contents.clone()),
            InitialContent::Symlink(target) => Err(target.as_os_str().to_owned()),
        };
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if name.is_empty() {
            return Err(MountError::InitialFile { path: path.to_owned(), reason: "it has no name".to_owned() });
        }
        let parent = self.directory(parent, None)?;
        let content = match content {
            Ok(contents) => Content::File(FileData::new(self.tree.nodes.issue(1), Base::Memory(contents))),
            Err(target) => Content::Symlink(target),
        };
        let node = self.put(&parent, path, Arc::from(OsStr::new(name)), mode, content)?;
        if is_observed(path) {
            *node.observed.lock() = Some(path.into());
        }
        Ok(())
    }

    fn put(&self, parent: &Node, path: &str, name: Name, mode: u32, content: Content) -> Result<Arc<Node>, MountError> {
        let ino = match &content {
            Content::File(file) => file.cache_file().ino(),
            _ => self.tree.nodes.issue(1),
        };
        let node = Node::new(ino, Meta::new(mode, self.uid, self.gid), content);
        let mut entries = directory(parent).map_err(|error| invalid(path, error))?.entries.write();
        if entries.get(&name).is_some() {
            return Err(invalid(path, Errno::EEXIST));
        }
        self.tree.nodes.insert(&node);
        entries.put(name, ino, Target::Node(node.clone()));
        Ok(node)
    }
}

fn invalid(path: &str, error: Errno) -> MountError {
    MountError::InitialFile { path: path.to_owned(), reason: std::io::Error::from_raw_os_error(error.code()).to_string() }
}
