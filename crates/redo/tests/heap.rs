//! Redo of heap records against Postgres.

use varve_postgres::Major;
use varve_testing::redo::assert_redone;

#[test]
fn heap_basic() {
    println!("{}", assert_redone(Major::V15, "heap_basic"));
}
