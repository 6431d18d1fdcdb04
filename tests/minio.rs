//! The main job on MinIO, which stands for S3: a disk that is lost, and another pageserver that goes on from the
//! bucket.

use std::time::Duration;

use anyhow::ensure;
use varve_testbed::acknowledged::Writers;
use varve_testbed::dev::{Dev, amcheck, program, psql};
use varve_testbed::minio::Minio;

const VARVE: &str = env!("CARGO_BIN_EXE_varve");

#[test]
fn the_bucket_is_the_database() -> anyhow::Result<()> {
    let Some(minio) = Minio::start_unless_skipped() else { return Ok(()) };
    let mut dev = Dev::start_on(VARVE, Some(minio.url("varve")), minio.variables())?;
    dev.json(&["tenant", "create", "acme"])?;
    let db = dev.compute("acme/main", &[])?;
    program("pgbench", &["-iq", "-s", "3", &db])?;
    let writers = Writers::start(&db, 2)?;
    writers.wait_for(200, Duration::from_secs(60))?;
    dev.kill()?;
    dev.wipe()?;
    dev.run()?;
    writers.wait_for(50, Duration::from_secs(60))?;
    let acknowledged = writers.stop();
    dev.json(&["branch", "create", "acme/child"])?;
    dev.json(&["compute", "stop", "acme/main"])?;
    dev.stop()?;
    dev.wipe()?;
    dev.run()?;
    for branch in ["acme/main", "acme/child"] {
        let db = dev.compute(branch, &[])?;
        acknowledged.check(&db)?;
        ensure!(psql(&db, "SELECT count(*) FROM pgbench_accounts")? == "300000", "{branch} holds what pgbench loaded");
        amcheck(&db)?;
    }
    Ok(())
}
