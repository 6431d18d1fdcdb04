//! The data directory as it is in the base.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    path::Path,
    sync::Arc,
};

use fuser::Errno;
use varve_postgres::{Oid, paths::database_directory, slru::SlruKind};

use super::{
    InitialContent, MountConfig, MountError,
    base::Base,
    directory::{Directory, Listing, Name, Place, Target},
    file::{FileContext, FileData},
    node::{Content, Meta, Node, ROOT},
    observer::{Observer, is_observed},
    tree::{Tree, directory},
};
use crate::tablespaces::{self, Location};

/// Where the tablespaces of the base are that have a location: `pg_tblspc/<oid>` is a symbolic link that leads to
/// `<mountpoint>/varve_tablespaces/<oid>`.
pub(crate) const TABLESPACES: &str = "varve_tablespaces";
/// What a sandbox shows as `/tablespaces`.
pub(crate) const NAMED: &str = "varve_named";
/// Mode of directories, as `initdb` makes them.
const DIRECTORY_MODE: u32 = 0o700;

/// Builds the tree that `config` describes.
pub(super) fn build(config: &MountConfig, files: Arc<FileContext>, observer: Option<Observer>) -> Result<Tree, MountError> {
    let tree = Tree::new(files, observer, Places::of(&config.tablespaces), (config.uid, config.gid), DIRECTORY_MODE);
    let builder = Builder { tree: &tree, uid: config.uid, gid: config.gid };
    let places = &tree.places;
    for kind in SlruKind::ALL {
        builder.directory(kind.directory(), Some(Listing::Slru(kind)))?;
    }
    builder.directory("global", Some(Listing::Relations { spc: varve_postgres::ids::GLOBAL_TABLESPACE, db: 0 }))?;
    for &(spc, db) in &config.databases {
        let path = database_directory(spc, db, config.major, config.catalog_version);
        builder.directory(&places.resolve(&path), Some(Listing::Relations { spc, db }))?;
    }
    builder.directory("pg_tblspc", None)?;
    builder.directory(TABLESPACES, None)?;
    builder.directory(NAMED, None)?;
    let mountpoint =
        std::path::absolute(&config.mountpoint).map_err(|source| MountError::Mountpoint { path: config.mountpoint.clone(), source })?;
    for (spc, location) in &config.tablespaces {
        let (link, version) = (format!("pg_tblspc/{spc}"), config.major.tablespace_directory(config.catalog_version));
        builder.directory(&places.resolve(&format!("{link}/{version}")), None)?;
        let data = mountpoint.join(TABLESPACES).join(spc.to_string());
        match location {
            Location::InPlace => continue,
            Location::Mount => builder.add(&link, 0o777, &InitialContent::Symlink(data))?,
            Location::Named(name) => {
                builder.add(&link, 0o777, &InitialContent::Symlink(name.into()))?;
                if let Some(below) = name.strip_prefix(tablespaces::NAMED) {
                    builder.add(&format!("{NAMED}{below}"), 0o777, &InitialContent::Symlink(data))?;
                }
            }
        }
    }
    let links: Vec<String> = config.tablespaces.iter().map(|(spc, _)| format!("pg_tblspc/{spc}")).collect();
    for file in config.initial_files.iter().filter(|file| !links.contains(&file.path)) {
        builder.add(&places.resolve(&file.path), file.mode, &file.content)?;
    }
    Ok(tree)
}

/// Where the mount has what lies in `pg_tblspc`.
pub(super) struct Places {
    in_place: BTreeSet<String>,
    /// The tablespaces of the base that are seen under a name.
    named: BTreeMap<String, Oid>,
}

impl Places {
    /// Of these tablespaces.
    pub(super) fn of(tablespaces: &[(Oid, Location)]) -> Places {
        let mut places = Places { in_place: BTreeSet::new(), named: BTreeMap::new() };
        for (spc, location) in tablespaces {
            match location {
                Location::InPlace => drop(places.in_place.insert(spc.to_string())),
                Location::Named(name) => drop(places.named.insert(name.clone(), *spc)),
                Location::Mount => {}
            }
        }
        places
    }

    /// The folder of the mount to which a link in `pg_tblspc` leads; none where it leads out of it.
    pub(super) fn behind(&self, link: &Path, mountpoint: &Path) -> Option<String> {
        if let Some(spc) = link.to_str().and_then(|name| self.named.get(name)) {
            return Some(format!("{TABLESPACES}/{spc}"));
        }
        if let Ok(below) = link.strip_prefix(mountpoint) {
            return below.to_str().map(str::to_owned);
        }
        link.strip_prefix(tablespaces::NAMED).ok()?.to_str().map(|below| format!("{NAMED}/{below}"))
    }

    /// A path of the data directory, with the link in `pg_tblspc` resolved if it is one.
    pub(super) fn resolve<'a>(&self, path: &'a str) -> Cow<'a, str> {
        match path.strip_prefix("pg_tblspc/") {
            Some(rest) if !rest.split('/').next().is_some_and(|spc| self.in_place.contains(spc)) => format!("{TABLESPACES}/{rest}").into(),
            _ => path.into(),
        }
    }
}

/// Whether a name of the root directory is not told to who lists it: a backup of the data directory would have
/// tablespaces twice.
pub(super) fn is_hidden(directory: &Node, name: &OsStr) -> bool {
    directory.ino == ROOT && (name == TABLESPACES || name == NAMED)
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
