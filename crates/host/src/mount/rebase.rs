//! The base moves on: to the redo point of a checkpoint of Postgres's that has completed.
//!
//! 1. A *mark* is set ([`Rebaser::mark`]): what is written afterwards is told apart from what was written before. What
//!    the kernel holds is asked for first, so that it counts as written before.
//! 2. The caller makes Postgres make a checkpoint, learns its redo point R, and waits until the base can be had there.
//! 3. The base moves to R, and blocks that were written before the mark are handed over to it where the rule says so
//!    ([`Rebaser::move_to`], [`super::rule`]). From then on they go like fetched ones.
//!
//! Blocks that were not written since the former base are the same at R, so nothing has to be known of them. Names and
//! sizes of files stay those of the mount. Blocks are handed over only as far as the base has the relation at R. So
//! what is dropped can be fetched again; a block that is missing then is an error, and never zeros.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use rustix::fs::{Mode, OFlags};
use varve_postgres::{
    Fork, Oid,
    paths::{BLOCKS_PER_FILE, RelationFileName},
};

use super::Mount;
use super::base::Base;
use super::directory::{Directory, Entry, Name, Target};
use super::file::{FileData, Tally};
use super::node::{Content, Node, ROOT};
use super::rule::Terms;
use super::tree::{Tree, directory};

/// How deep directories of relations lie: `varve_tablespaces/<oid>/PG_15_202209061/<database>`.
const DEPTH_MAX: usize = 4;

/// See the module. There is one for a mount, since two that mark would take each other's for theirs.
pub struct Rebaser {
    tree: Arc<Tree>,
    mountpoint: PathBuf,
}

/// The files of a database's main forks that were written: relation, number of the file, file.
type Files = Vec<(Oid, u32, Arc<FileData>)>;

impl Mount {
    /// What moves the base on.
    pub fn rebaser(&self) -> Rebaser {
        Rebaser { tree: self.tree.clone(), mountpoint: self.mountpoint.clone() }
    }
}

impl Rebaser {
    /// Waits until what is written takes so much of the cache that the base should move on.
    pub async fn crowded(&self) {
        self.tree.files.budget.crowded().await;
    }

    /// Bytes that were written so far.
    pub fn written(&self) -> u64 {
        self.tree.files.counters.bytes_written.load(Relaxed)
    }

    /// Bytes that were written and stay for now.
    pub fn stays(&self) -> u64 {
        self.tree.files.budget.held().written
    }

    /// The cache's budget in bytes; 0 where there is none.
    pub fn limit(&self) -> u64 {
        self.tree.files.budget.limit().unwrap_or(0)
    }

    /// Sets a mark: what Postgres writes from now on was not written before it. Blocks.
    ///
    /// # Errors
    /// When the mount cannot be reached.
    pub fn mark(&self) -> io::Result<()> {
        let root = rustix::fs::open(&self.mountpoint, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::syncfs(root.as_fd())?;
        self.tree.files.mark.fetch_add(1, SeqCst);
        Ok(())
    }

    /// The base moves to `terms.redo`, which was fixed after the last mark. Blocks that were written before the mark
    /// are handed over to it. Blocks.
    ///
    /// # Errors
    /// When the base cannot move, or cannot be asked, or the cache cannot be read.
    pub fn move_to(&self, terms: &Terms) -> io::Result<Tally> {
        let files = &self.tree.files;
        files.source.move_to(terms.redo)?;
        files.counters.rebases.fetch_add(1, Relaxed);
        let root = self.tree.node(ROOT).map_err(|error| io::Error::from_raw_os_error(error.code()))?;
        let mut written: BTreeMap<(Oid, Oid), Files> = BTreeMap::new();
        look(&root, ("", 0), &mut written);
        let mut tally = Tally::default();
        for ((spc, db), found) in written {
            let what = format_args!("the relations of database {db} in tablespace {spc}");
            let relations = files.source.call(what, |source| source.relations(spc, db))?;
            let unlogged: BTreeSet<Oid> = relations.iter().filter(|(_, fork, _)| *fork == Fork::Init).map(|(rel, ..)| *rel).collect();
            let logged = relations.iter().filter(|(rel, fork, _)| *fork == Fork::Main && !unlogged.contains(rel));
            let sizes: HashMap<Oid, u32> = logged.map(|(rel, _, blocks)| (*rel, *blocks)).collect();
            for (rel, segment, file) in found {
                let blocks = sizes.get(&rel).copied().unwrap_or(0).saturating_sub(segment * BLOCKS_PER_FILE);
                file.hand_over(files, terms, blocks, &mut tally)?;
                files.budget.make_room(files, true);
            }
        }
        Ok(tally)
    }
}

/// Finds files of main forks of which something was written, but for unlogged relations. One that was renamed is not
/// the one that the base has by its name.
fn look(node: &Node, (path, depth): (&str, usize), found: &mut BTreeMap<(Oid, Oid), Files>) {
    let Ok(dir) = directory(node) else { return };
    // In one that nobody listed nothing was written.
    if !dir.is_listed() {
        return;
    }
    let unlogged = unlogged(dir);
    let entry = |(name, entry): (&Name, &Entry)| match &entry.target {
        Target::Node(node) => Some((format!("{path}{}", name.to_str()?), node.clone())),
        Target::Unseen(_) => None,
    };
    let nodes: Vec<(String, Arc<Node>)> = dir.entries.read().iter().filter_map(entry).collect();
    for (path, node) in nodes {
        match &node.content {
            Content::Directory(_) if depth < DEPTH_MAX => look(&node, (&format!("{path}/"), depth + 1), found),
            Content::File(file) if file.is_changed() => {
                let Some((rel, segment)) = file.base().main_fork() else { continue };
                if !unlogged.contains(&rel.rel) && Base::of_new_file(&path).main_fork() == Some((rel, segment)) {
                    found.entry((rel.spc, rel.db)).or_default().push((rel.rel, segment, file.clone()));
                }
            }
            _ => {}
        }
    }
}

/// The relations of a directory that have an init fork.
fn unlogged(dir: &Directory) -> BTreeSet<Oid> {
    let parse = |name: &Name| name.to_str().and_then(RelationFileName::parse);
    dir.entries.read().iter().filter_map(|(name, _)| parse(name)).filter(|name| name.fork == Fork::Init).map(|name| name.rel).collect()
}
