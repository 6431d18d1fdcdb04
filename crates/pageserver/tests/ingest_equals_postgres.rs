//! What ingest makes of a server's WAL is what the server itself has on disk when it stops: every block, SLRU page, map, counter and file.

mod oracle;

use anyhow::{Context, Result};
use varve_postgres::Major;
use varve_testing::postgres::Postgres;
use varve_testing::redo::{Preamble, sql_path};

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

/// Runs corpus files one after the other, each on a server of its own, and compares.
fn compare_after(major: Major, files: &[&str], settings: &[(&str, &str)]) -> Result<()> {
    for file in files {
        let preamble = Preamble::of_file(file)?;
        if !preamble.is_for(major) {
            continue;
        }
        let own = preamble.settings.iter().map(|(name, value)| (&name[..], &value[..]));
        let all: Vec<(&str, &str)> = SETTINGS.into_iter().chain(own).chain(settings.iter().copied()).collect();
        let initdb: Vec<&str> = preamble.initdb.iter().map(String::as_str).collect();
        let mut postgres = Postgres::init(major, &initdb, &all)?;
        let mut loaded = oracle::import(&postgres)?;
        postgres.start()?;
        postgres.psql_file("postgres", &sql_path(file)).with_context(|| format!("running {file}.sql"))?;
        postgres.stop("fast")?;
        oracle::ingest(&postgres, &mut loaded).with_context(|| format!("after {file}.sql"))?;
        let mut comparison = oracle::Comparison::new(&loaded);
        comparison.data_directory(&postgres.data_dir()).with_context(|| format!("after {file}.sql"))?;
        println!("{file}: {} blocks and pages, {} records", comparison.compared_blocks, loaded.boundaries.len());
    }
    Ok(())
}

/// A test of these files for each major.
macro_rules! for_each_major {
    ($($name:ident: $files:expr, $settings:expr;)*) => {
        $(mod $name {
            for_each_major!(@major $files, $settings, postgres_14 V14 postgres_15 V15 postgres_16 V16 postgres_17 V17 postgres_18 V18);
        })*
    };
    (@major $files:expr, $settings:expr, $($test:ident $major:ident)*) => {
        $(#[test]
        fn $test() {
            super::compare_after(varve_postgres::Major::$major, &$files, &$settings).unwrap();
        })*
    };
}

for_each_major! {
    heap_and_maps:
        ["heap_basic", "heap_rows", "heap_freeze", "heap_vacuum", "heap_visibility", "heap_speculative", "heap_locks"], [];
    btree_and_hash: ["btree_splits", "btree_posting", "btree_delete", "btree_vacuum", "hash"], [];
    other_indexes_and_sequences:
        ["gin_entry_tree", "gin_pending_list", "gin_posting_tree", "gist", "spgist", "brin", "generic", "sequences"], [];
    what_is_outside_relations: ["transactions", "storage", "storage_file_copy"], [];
    without_full_page_images:
        ["heap_rows", "heap_vacuum", "transactions", "storage"], [("full_page_writes", "off"), ("track_commit_timestamp", "off")];
    with_checksums_and_compression: ["checksums", "images_pglz", "images_lz4", "images_zstd"], [];
}
