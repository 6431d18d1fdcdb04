//! What `varve-postgres` promises, one module for each promise, checked against what stock Postgres writes.

mod framer;
