//! The template: stock `initdb`, taken in, and a server that starts on it under another tenant's identity.

use std::io::Read;
use std::sync::Arc;

use crate::oracle::{Comparison, Loaded, servers};
use anyhow::{Context, Result};
use varve_engine::base_backup::{Options, write_base_backup};
use varve_engine::template::{TemplateError, import_data_directory};
use varve_host::bin_dirs::BinDirs;
use varve_host::dirs::User;
use varve_host::initdb::template_archive;
use varve_postgres::wal::synthesis::AncestorTimeline;
use varve_postgres::{Lsn, Major};
use varve_testbed::postgres::{Postgres, bin_dir};
use varve_testing::naive_history::NaiveHistory;

/// What a host's `initdb` makes, taken apart as a pageserver does.
fn made_by_a_host(major: Major) -> Result<tempfile::TempDir> {
    let binaries = BinDirs::new(vec![(major.number(), bin_dir(major)?)]);
    let archive = template_archive(&binaries.find(major.number())?, User::for_postgres()?)?;
    let work = tempfile::tempdir()?;
    tar::Archive::new(zstd::Decoder::new(&archive[..])?).unpack(work.path())?;
    Ok(work)
}

fn a_tenant_starts_on_the_template(major: Major) -> Result<()> {
    let made = made_by_a_host(major)?;

    let history = Arc::new(NaiveHistory::new(major, Lsn(8)));
    let (mut calls, mut last) = (0, None);
    let imported = import_data_directory(made.path(), &*history, &mut |progress| {
        calls += 1;
        last = Some(progress);
    })?;
    let last = last.context("progress is told")?;
    assert!(calls > 100 && last.done_bytes == last.total_bytes, "{calls} calls, the last says {last:?}");
    assert_eq!((imported.cluster.major, imported.cluster.data_checksum_version), (major, 0));
    let loaded = Loaded { history, imported, boundaries: Vec::new(), logged_databases: Vec::new() };
    Comparison::new(&loaded).data_directory(made.path())?;

    // A tenant has its own identifier and timelines; the template's timeline is none of them.
    let end = loaded.end();
    let ancestors = vec![AncestorTimeline { tli: 1, switch: end }];
    let timeline = servers::timeline(&*loaded.history, 7_400_000_000_000_000_001, 2, ancestors, end, (end, end))?;
    let tar_of = |gzip| -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let options = Options { gzip, ..servers::whole_directory() };
        write_base_backup(&*loaded.history, &loaded.imported.cluster, &timeline, &options, &mut out)?;
        Ok(out)
    };
    let (plain, compressed) = (tar_of(false)?, tar_of(true)?);
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(&compressed[..]).read_to_end(&mut unpacked)?;
    assert!(unpacked == plain, "the compressed backup is the plain one");
    assert!(compressed.len() < plain.len() / 4, "{} bytes became {}", plain.len(), compressed.len());
    let mut server = servers::from_backup(&*loaded.history, &loaded, &timeline, &[])?;
    server.start()?;
    let role = "SELECT rolsuper, rolreplication, rolcanlogin FROM pg_roles WHERE rolname = 'varve'";
    assert_eq!(server.psql("postgres", role)?.trim(), "t|t|t");
    let facts = "SELECT system_identifier, timeline_id, pg_encoding_to_char(encoding), datcollate \
                 FROM pg_control_system(), pg_control_checkpoint(), pg_database WHERE datname = 'postgres'";
    assert_eq!(server.psql("postgres", facts)?.trim(), "7400000000000000001|2|UTF8|C.UTF-8");
    server.psql("postgres", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS i")?;
    server.psql("postgres", "CHECKPOINT")?;
    servers::check(&server)?;
    server.stop("fast")
}

macro_rules! for_each_major {
    ($($test:ident $major:ident)*) => {
        mod a_tenant_starts_on_the_template_of {
            $(#[test]
            fn $test() {
                super::a_tenant_starts_on_the_template(varve_postgres::Major::$major).unwrap();
            })*
        }
    };
}

for_each_major! { postgres_14 V14 postgres_15 V15 postgres_16 V16 postgres_17 V17 postgres_18 V18 }

#[test]
fn a_cluster_that_runs_or_is_of_another_major_is_refused() {
    let mut postgres = Postgres::init(Major::V15, &[], &[]).unwrap();
    postgres.start().unwrap();
    let history = NaiveHistory::new(Major::V15, Lsn(8));
    let running = import_data_directory(&postgres.data_dir(), &history, &mut |_| {}).unwrap_err();
    assert!(running.to_string().contains("in production") && running.to_string().contains("stop it"), "{running}");
    postgres.stop("immediate").unwrap();
    let crashed = import_data_directory(&postgres.data_dir(), &history, &mut |_| {}).unwrap_err();
    assert!(matches!(crashed, TemplateError::NotShutDown { .. }), "{crashed}");
    let other = import_data_directory(&postgres.data_dir(), &NaiveHistory::new(Major::V17, Lsn(8)), &mut |_| {}).unwrap_err();
    assert!(matches!(other, TemplateError::OtherMajor { .. }), "{other}");
}
