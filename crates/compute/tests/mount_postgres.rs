//! Stock Postgres on the mount.

mod support;

use std::sync::Arc;

use support::{Mounted, StoppedCluster};
use varve_postgres::Major;
use varve_testing::postgres::Postgres;

const CATALOG_VERSION_15: u32 = 202_209_061;

/// A stopped cluster with pgbench's tables. The cluster lives as long as the first value.
fn pgbench_cluster(scale: &str) -> (Postgres, Arc<StoppedCluster>) {
    let mut origin = Postgres::init(Major::V15, &[], &[]).expect("a cluster");
    origin.start().expect("it starts");
    let mut pgbench = origin.command("pgbench").expect("pgbench");
    let output = pgbench.args(["-i", "-q", "-s", scale, "-h"]).arg(origin.dir()).args(["-U", "postgres", "postgres"]).output();
    let output = output.expect("pgbench runs");
    assert!(output.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&output.stderr));
    origin.stop("fast").expect("it stops");
    let source = StoppedCluster::new(&origin.data_dir(), Major::V15, CATALOG_VERSION_15);
    (origin, source)
}

#[test]
fn postgres_starts_and_runs() {
    let (_origin, source) = pgbench_cluster("5");
    let mounted = Mounted::start(&source, |_| {});
    let server = mounted.postgres(&[]);
    assert_eq!(server.psql("postgres", "SELECT count(*) FROM pgbench_accounts"), "500000");
    println!("{}", server.run("pgbench", &["-S", "-T", "3", "-c", "4"]));
    println!("{}", server.run("pgbench", &["-T", "3", "-c", "4"]));
    println!("{:?}", mounted.mount().statistics());
}
