//! What ingest makes of a server's WAL is what the server itself has on disk when it stops: every block, SLRU page, map, counter and file.

mod oracle;

use anyhow::{Context, Result};
use varve_postgres::Major;
use varve_testing::postgres::Postgres;
use varve_testing::redo::sql_path;

const SETTINGS: [(&str, &str); 10] = [
    ("wal_level", "logical"),
    ("wal_keep_size", "'16GB'"),
    ("max_wal_size", "'1GB'"),
    ("checkpoint_timeout", "'1h'"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "'32MB'"),
    ("autovacuum", "off"),
    ("track_commit_timestamp", "on"),
    ("restart_after_crash", "off"),
    ("allow_in_place_tablespaces", "on"),
];

/// Runs corpus files one after the other, each in a database of its own, and compares.
fn compare_after(major: Major, files: &[&str], settings: &[(&str, &str)]) -> Result<()> {
    let mut all = SETTINGS.to_vec();
    all.extend_from_slice(settings);
    for file in files {
        let mut postgres = Postgres::init(major, &[], &all)?;
        let mut loaded = oracle::import(&postgres)?;
        postgres.start()?;
        postgres.psql_file("postgres", &sql_path(file)).with_context(|| format!("running {file}.sql"))?;
        postgres.stop("fast")?;
        oracle::ingest(&postgres, &mut loaded)?;
        let mut comparison = oracle::Comparison::new(&loaded);
        comparison.data_directory(&postgres.data_dir()).with_context(|| format!("after {file}.sql"))?;
        println!("{file}: {} blocks and pages, {} records", comparison.compared_blocks, loaded.boundaries.len());
    }
    Ok(())
}

#[test]
fn heap_and_maps() {
    let files = ["heap_basic", "heap_rows", "heap_freeze", "heap_vacuum", "heap_visibility", "heap_speculative", "heap_locks"];
    compare_after(Major::V15, &files, &[]).unwrap();
}

#[test]
fn btree_and_hash() {
    compare_after(Major::V15, &["btree_splits", "btree_posting", "btree_delete", "btree_vacuum", "hash"], &[]).unwrap();
}

#[test]
fn other_indexes_and_sequences() {
    let files = ["gin_entry_tree", "gin_pending_list", "gin_posting_tree", "gist", "spgist", "brin", "generic", "sequences"];
    compare_after(Major::V15, &files, &[]).unwrap();
}

#[test]
fn what_is_outside_relations() {
    compare_after(Major::V15, &["transactions", "storage", "storage_file_copy"], &[]).unwrap();
}

#[test]
fn without_full_page_images() {
    let settings = [("full_page_writes", "off"), ("track_commit_timestamp", "off")];
    compare_after(Major::V15, &["heap_rows", "heap_vacuum", "transactions", "storage"], &settings).unwrap();
}
