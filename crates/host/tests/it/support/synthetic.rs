//! A base without Postgres: a directory that looks like a stopped cluster, its blocks filled so that each says where it
//! belongs.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use varve_postgres::{Fork, Major, RelFork, RelNode};

use super::StoppedCluster;

pub(crate) const BLOCK: usize = 8192;

/// Contents of block `block` of relation file `rel`.
pub(crate) fn block_contents(rel: u32, block: u32) -> Vec<u8> {
    (0..BLOCK as u32 / 8).flat_map(|word| [rel.to_le_bytes(), (block * 1024 + word).to_le_bytes()].concat()).collect()
}

/// A main fork in the database that [`synthetic_cluster`] has.
pub(crate) fn relation(rel: u32) -> RelFork {
    RelNode { spc: 1663, db: 5, rel }.fork(Fork::Main)
}

/// Makes a cluster in `dir` with database 5 and the relations (number, blocks), as files of one gigabyte at most.
pub(crate) fn synthetic_cluster(dir: &Path, relations: &[(&str, u32)]) -> Arc<StoppedCluster> {
    let data = dir.join("base-cluster");
    let write = |path: &str, contents: &[u8]| {
        let path: PathBuf = data.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(&path, contents).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its mode");
    };
    for directory in ["global", "pg_wal", "pg_tblspc", "pg_stat", "pg_replslot", "pg_logical/snapshots", "pg_multixact/members"] {
        fs::create_dir_all(data.join(directory)).expect("a directory");
    }
    for directory in ["pg_multixact/offsets", "pg_commit_ts"] {
        fs::create_dir_all(data.join(directory)).expect("a directory");
    }
    write("PG_VERSION", b"15\n");
    write("base/5/PG_VERSION", b"15\n");
    write("pg_hba.conf", b"local all all trust\n");
    write("pg_xact/0000", &[7; 3 * BLOCK]);
    for (name, blocks) in relations {
        let rel = name.split(['_', '.']).next().and_then(|rel| rel.parse().ok()).expect("a relation's name");
        let contents: Vec<u8> = (0..*blocks).flat_map(|block| block_contents(rel, block)).collect();
        write(&format!("base/5/{name}"), &contents);
    }
    set_directory_modes(&data);
    StoppedCluster::new(&data, Major::V15, 202_209_061)
}

fn set_directory_modes(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).expect("its mode");
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        if entry.path().is_dir() {
            set_directory_modes(&entry.path());
        }
    }
}
