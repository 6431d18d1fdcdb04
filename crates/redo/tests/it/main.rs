//! What `varve-redo` promises, one module for each promise: pages as Postgres's own redo makes them, and no input that
//! makes it panic.

mod btree_and_hash;
mod btree_and_hash_are_total;
mod concurrency;
mod heap;
mod heap_is_total;
mod index_methods;
mod index_methods_are_total;
mod postgres_suites;
mod put_off_compaction;
